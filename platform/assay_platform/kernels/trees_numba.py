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
_BLOCK = 32  # rows that go through a tree while it is at hand

# A node in one place in memory. cut: a value at or below it goes left; of a leaf (column -1) what it is worth.
NODE = np.dtype([("cut", "f8"), ("column", "i4"), ("left", "i4"), ("right", "i4"), ("nan_left", "i4")])


@njit(nogil=True, cache=True, inline="always")
def _next(node, value):
    left = node.nan_left != 0 if np.isnan(value) else value <= node.cut
    return node.left if left else node.right


@njit(nogil=True, cache=True, inline="always")
def _worth(row, at, nodes):
    while nodes[at].column >= 0:
        at = _next(nodes[at], row[nodes[at].column])
    return nodes[at].cut


@njit(nogil=True, cache=True, parallel=True)
def score_trees(rows, roots, nodes, out):
    """out (N,), zeros before: the sum of the leaves of each row."""
    for block in prange((len(rows) + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        for root in roots:
            for n in range(first, min(first + _BLOCK, len(rows))):
                out[n] += _worth(rows[n], root, nodes)


@njit(nogil=True, cache=True)
def score_one_by_one(rows, roots, nodes, out):
    """The same on the calling thread: a few rows are over before others have been woken."""
    for root in roots:
        for n in range(len(rows)):
            out[n] += _worth(rows[n], root, nodes)


@njit(nogil=True, cache=True)
def _explain_tree(row, reference, root, nodes, weight, path, taken, out):
    """weight (D, D): weight[a, b] = (a - 1)! b! / (a + b)!. path (3, D): scratch. taken (F,): zeros, restored."""
    columns, others, from_row = path[0], path[1], path[2]
    at, length, a, b = root, 0, 0, 0
    while True:
        while nodes[at].column >= 0:
            c = nodes[at].column
            if taken[c] == 1:
                at = _next(nodes[at], row[c])
            elif taken[c] == 2:
                at = _next(nodes[at], reference[c])
            else:
                of_row, of_reference = _next(nodes[at], row[c]), _next(nodes[at], reference[c])
                at = of_row
                if of_row != of_reference:
                    columns[length], others[length], from_row[length] = c, of_reference, 1
                    taken[c] = 1
                    a += 1
                    length += 1
        gain, loss = nodes[at].cut * weight[a, b], nodes[at].cut * weight[b, a]
        for i in range(length):
            out[columns[i]] += gain if from_row[i] else -loss
        while length > 0 and not from_row[length - 1]:
            length -= 1
            b -= 1
            taken[columns[length]] = 0
        if length == 0:
            break
        from_row[length - 1] = 0
        taken[columns[length - 1]] = 2
        a -= 1
        b += 1
        at = others[length - 1]


@njit(nogil=True, cache=True, parallel=True)
def explain_trees(rows, reference, roots, nodes, weight, out):
    """out (N, F), zeros before: Shapley values that add up to f(row) - f(reference)."""
    for block in prange((len(rows) + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        path, taken = np.empty((3, _DEPTH), dtype=np.int32), np.zeros(rows.shape[1], dtype=np.int8)
        for root in roots:
            for n in range(first, min(first + _BLOCK, len(rows))):
                _explain_tree(rows[n], reference, root, nodes, weight, path, taken, out[n])


@njit(nogil=True, cache=True)
def explain_one_by_one(rows, reference, roots, nodes, weight, out):
    """The same on the calling thread."""
    path, taken = np.empty((3, _DEPTH), dtype=np.int32), np.zeros(rows.shape[1], dtype=np.int8)
    for root in roots:
        for n in range(len(rows)):
            _explain_tree(rows[n], reference, root, nodes, weight, path, taken, out[n])
