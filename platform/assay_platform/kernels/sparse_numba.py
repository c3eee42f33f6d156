"""Products with sparse matrices, compiled: sums of rows for histories, and of chosen pairs alone."""

from numba import njit


@njit(nogil=True, cache=True)
def add_rows(start, taken, row_start, column, weight, out):
    """out (N, I), zeros before: for each of N lists the sum of the rows that it names.

    start (N + 1,), taken: lists of rows, one after the other. row_start (I + 1,), column, weight: the matrix as CSR.
    """
    for n in range(len(start) - 1):
        for place in range(start[n], start[n + 1]):
            row = taken[place]
            for at in range(row_start[row], row_start[row + 1]):
                out[n, column[at]] += weight[at]


@njit(nogil=True, cache=True)
def chosen_products(dense, row_start, column, value, chosen, out):
    """out (N, C): the product of dense[n] and of row chosen[n, c] of a matrix as CSR.

    dense (N, G). row_start (I + 1,), column, value: of (I, G). chosen (N, C).
    """
    for n in range(chosen.shape[0]):
        for c in range(chosen.shape[1]):
            total = 0.0
            for at in range(row_start[chosen[n, c]], row_start[chosen[n, c] + 1]):
                total += dense[n, column[at]] * value[at]
            out[n, c] = total
