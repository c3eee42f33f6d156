"""Sums of rows of a sparse matrix into dense ones, compiled: scores of histories by weights of items."""

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
