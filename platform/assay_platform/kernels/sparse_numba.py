"""Products with sparse matrices, compiled: sums of rows for histories, of chosen pairs alone; and samples of rows."""

import numpy as np
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


@njit(nogil=True, cache=True)
def sample_rows(row_start, rows, most, seed, out_start, out_at, out_stands_for):
    """At most so many entries of some rows of a matrix as CSR, without one twice.

    A longer row is cut into `most` parts of nearly equal length, and one entry is drawn of each: what is drawn stands
    for its part, so that sums over rows stay right on average. row_start (I + 1,); rows (N,); out_start (N + 1,), where
    a row's entries go; out_at: places of entries in the matrix; out_stands_for: of how many.
    """
    for n in range(len(rows)):
        begin = row_start[rows[n]]
        length = row_start[rows[n] + 1] - begin
        num = min(length, most)
        state = np.uint64(seed) ^ (np.uint64(n + 1) * np.uint64(0x9E3779B97F4A7C15))
        for part in range(num):
            low, high = part * length // num, (part + 1) * length // num
            # A step of SplitMix64 (Steele, Lea and Flood, 2014).
            state += np.uint64(0x9E3779B97F4A7C15)
            mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(31)
            out_at[out_start[n] + part] = begin + low + np.int64(mixed % np.uint64(high - low))
            out_stands_for[out_start[n] + part] = high - low
