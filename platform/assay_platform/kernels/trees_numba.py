"""Scores of decision trees and exact Shapley values against one reference row, compiled.

Shapley values of the game v(S) = f(x in the columns of S, the reference elsewhere), tree by tree: a leaf that some
hybrid of the two rows reaches splits the columns decided on its path into those taken from the row (a of them) and
those taken from the reference (b of them); it is worth value · (a - 1)! b! / (a + b)! to each of the former and
-value · a! (b - 1)! / (a + b)! to each of the latter (Lundberg et al., 'From local explanations to global
understanding with explainable AI for trees', Nature Machine Intelligence 2020, independent TreeSHAP). Only nodes that
a hybrid reaches are visited, so a row costs about as many leaves as it differs from the reference in.
"""

# N rows, F columns, T trees, M nodes of all trees, D depth

import numpy as np
from numba import njit, prange

_DEPTH = 128


@njit(nogil=True, cache=True, inline="always")
def _goes_left(value, threshold, nan_left):
    return nan_left if np.isnan(value) else value <= threshold


@njit(nogil=True, cache=True, inline="always")
def _leaf_of(row, node, column, threshold, nan_left, left, right):
    while column[node] >= 0:
        goes_left = _goes_left(row[column[node]], threshold[node], nan_left[node])
        node = left[node] if goes_left else right[node]
    return node


@njit(nogil=True, cache=True, inline="always")
def _score_row(row, roots, column, threshold, nan_left, left, right, value):
    total = 0.0
    for root in roots:
        total += value[_leaf_of(row, root, column, threshold, nan_left, left, right)]
    return total


@njit(nogil=True, cache=True, parallel=True)
def score_trees(rows, roots, column, threshold, nan_left, left, right, value, out):
    """out (N,): the sum of the leaves of each row."""
    for n in prange(len(rows)):
        out[n] = _score_row(rows[n], roots, column, threshold, nan_left, left, right, value)


@njit(nogil=True, cache=True)
def score_one_by_one(rows, roots, column, threshold, nan_left, left, right, value, out):
    """The same on the calling thread: a few rows are over before others have been woken."""
    for n in range(len(rows)):
        out[n] = _score_row(rows[n], roots, column, threshold, nan_left, left, right, value)


@njit(nogil=True, cache=True)
def _explain_row(row, reference, roots, column, threshold, nan_left, left, right, value, weight, taken, out):
    """weight (D, D): weight[a, b] = (a - 1)! b! / (a + b)!. taken (F,): zeros, and zeros again afterwards."""
    path_column = np.empty(_DEPTH, dtype=np.int32)
    path_other = np.empty(_DEPTH, dtype=np.int32)
    path_from_row = np.empty(_DEPTH, dtype=np.bool_)
    for root in roots:
        node, length, a, b = root, 0, 0, 0
        while True:
            while column[node] >= 0:
                c = column[node]
                of_row = left[node] if _goes_left(row[c], threshold[node], nan_left[node]) else right[node]
                of_reference = left[node] if _goes_left(reference[c], threshold[node], nan_left[node]) else right[node]
                if of_row == of_reference or taken[c] == 1:
                    node = of_row
                elif taken[c] == 2:
                    node = of_reference
                else:
                    path_column[length], path_other[length], path_from_row[length] = c, of_reference, True
                    taken[c] = 1
                    a += 1
                    length += 1
                    node = of_row
            gain = value[node] * weight[a, b]
            loss = value[node] * weight[b, a]
            for i in range(length):
                if path_from_row[i]:
                    out[path_column[i]] += gain
                else:
                    out[path_column[i]] -= loss
            while length > 0 and not path_from_row[length - 1]:
                length -= 1
                b -= 1
                taken[path_column[length]] = 0
            if length == 0:
                break
            path_from_row[length - 1] = False
            taken[path_column[length - 1]] = 2
            a -= 1
            b += 1
            node = path_other[length - 1]


@njit(nogil=True, cache=True, parallel=True)
def explain_trees(rows, reference, roots, column, threshold, nan_left, left, right, value, weight, out):
    """out (N, F), zeros before: Shapley values that add up to f(row) - f(reference)."""
    for n in prange(len(rows)):
        taken = np.zeros(rows.shape[1], dtype=np.int8)
        _explain_row(rows[n], reference, roots, column, threshold, nan_left, left, right, value, weight, taken, out[n])


@njit(nogil=True, cache=True)
def explain_one_by_one(rows, reference, roots, column, threshold, nan_left, left, right, value, weight, out):
    """The same on the calling thread."""
    taken = np.zeros(rows.shape[1], dtype=np.int8)
    for n in range(len(rows)):
        _explain_row(rows[n], reference, roots, column, threshold, nan_left, left, right, value, weight, taken, out[n])
