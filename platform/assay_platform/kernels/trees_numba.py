"""Scores of decision trees and exact Shapley values against one reference row, compiled.

Many rows are scored without a branch (Lucchese et al., 'QuickScorer', SIGIR 2015): leaves of a tree are bits, from left
to right; a split that sends a row to the right clears the bits of the leaves on its left; the first bit that is left
is the row's leaf. Splits are taken in any order, each for 64 rows by some vector instructions, which beats
walking down, where every step waits for a guess that is wrong half of the time.

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
EXPLAINED = 32  # rows at most that go through a tree while it is at hand
# Rows that splits are applied to at once. Fewer, and the compiler unrolls the loop instead of vectorising it.
_BLOCK = 64
WORD = 32  # leaves whose bits are in one word
_ALL = np.uint32(0xFFFFFFFF)
# The lowest bit times this has the bit's place in its five highest bits, coded (de Bruijn).
_DE_BRUIJN = np.uint32(0x077CB531)
_PLACE = np.zeros(WORD, dtype=np.uint64)
_PLACE[[(0x077CB531 << bit & 0xFFFFFFFF) >> 27 for bit in range(WORD)]] = np.arange(WORD)

# A split in one place in memory, few bytes of it: between two calls all trees have left the cache. cut: a value at or
# below it goes left. what: four times the column, and the two bits. left, right: splits, or leaves as ~place. The first
# is of single-precision rows, for which rounded cuts are exact.
NODE32, NODE64 = (np.dtype([("cut", kind), ("what", "i4"), ("left", "i4"), ("right", "i4")]) for kind in ("f4", "f8"))
REFERENCE_LEFT, NAN_LEFT = 1, 2


@njit(nogil=True, cache=True, inline="always")
def _next(node, value):
    left = node.what & NAN_LEFT != 0 if np.isnan(value) else value <= node.cut
    return node.left if left else node.right


@njit(nogil=True, cache=True, inline="always")
def _worth(row, at, nodes, leaves):
    while at >= 0:
        at = _next(nodes[at], row[nodes[at].what >> 2])
    return leaves[~at]


# Clears bits of a word; a split whose leaves are in several words comes as often.
SPLIT = np.dtype([("keep", "u4"), ("column", "u4"), ("word", "u4"), ("nan_left", "u4")])


@njit(nogil=True, cache=True)
def note_reference(row, nodes):
    """In each split, whether the reference goes left there, whether it comes there or not."""
    for at in range(len(nodes)):
        what = nodes[at].what & ~REFERENCE_LEFT
        value = row[what >> 2]
        left = what & NAN_LEFT != 0 if np.isnan(value) else value <= nodes[at].cut
        nodes[at].what = what | REFERENCE_LEFT if left else what


@njit(nogil=True, cache=True)
def number_leaves(roots, column, left, right, tree, first, count):
    """Of each node (M,): its tree (-1: of none, as it comes), the first leaf below it and how many there are, counted
    from the left. Children lie after their only parent.
    """
    for t in range(len(roots)):
        tree[roots[t]], first[roots[t]] = t, 0
    for at in range(len(column) - 1, -1, -1):
        count[at] = 1 if column[at] < 0 else count[left[at]] + count[right[at]]
    for at in range(len(column)):
        if column[at] >= 0 and tree[at] >= 0:
            tree[left[at]] = tree[right[at]] = tree[at]
            first[left[at]] = first[at]
            first[right[at]] = first[at] + count[left[at]]


@njit(nogil=True, cache=True, inline="always")
def _lowest(word):
    """Place of the lowest bit."""
    return _PLACE[np.uint32((word & (np.uint32(0) - word)) * _DE_BRUIJN) >> np.uint32(27)]


# Places are unsigned throughout: a place that could be negative would keep the compiler from vectorising.
@njit(nogil=True, cache=True, error_model="numpy")
def _score_block(values, bits, splits, cuts, starts, leaves, first_leaf, out):
    """values (F, block), bits (words, block): scratch. starts (T + 1,) of splits, first_leaf (T + 1,) of leaves."""
    for t in range(len(starts) - 1):
        num_words = (first_leaf[t + 1] - first_leaf[t] + WORD - 1) // WORD
        bits[:num_words] = _ALL
        for s in range(starts[t], starts[t + 1]):
            keep, cut = splits[s].keep, cuts[s]
            c, w = np.uint64(splits[s].column), np.uint64(splits[s].word)
            if splits[s].nan_left != 0:
                for r in range(np.uint64(_BLOCK)):
                    bits[w, r] &= keep if values[c, r] > cut else _ALL
            else:
                for r in range(np.uint64(_BLOCK)):
                    bits[w, r] &= _ALL if values[c, r] <= cut else keep
        leaf = np.uint64(first_leaf[t])
        if num_words == 1:  # without the search for a word, this loop is vectorised too
            for r in range(np.uint64(_BLOCK)):
                out[r] += leaves[leaf + _lowest(bits[np.uint64(0), r])]
        else:
            for r in range(np.uint64(_BLOCK)):
                w = np.uint64(0)
                while bits[w, r] == 0:
                    w += np.uint64(1)
                out[r] += leaves[leaf + w * np.uint64(WORD) + _lowest(bits[w, r])]


@njit(nogil=True, cache=True, parallel=True, error_model="numpy")
def score_trees(rows, splits, cuts, starts, leaves, first_leaf, most_words, out):
    """out (N,): the sum of the leaves of each row. cuts: of splits, a row at or below one goes left."""
    for block in prange((len(rows) + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        num_rows = min(_BLOCK, len(rows) - first)
        values = np.zeros((rows.shape[1], _BLOCK), dtype=rows.dtype)
        for n in range(num_rows):
            for c in range(rows.shape[1]):
                values[c, n] = rows[first + n, c]
        bits = np.empty((most_words, _BLOCK), dtype=np.uint32)
        sums = np.zeros(_BLOCK)
        _score_block(values, bits, splits, cuts, starts, leaves, first_leaf, sums)
        out[first : first + num_rows] = sums[:num_rows]


@njit(nogil=True, cache=True)
def score_one_by_one(rows, roots, nodes, leaves, out):
    """out (N,), zeros before: the same on the calling thread, for a few rows."""
    for root in roots:
        for n in range(len(rows)):
            out[n] += _worth(rows[n], root, nodes, leaves)


@njit(nogil=True, cache=True)
def _explain_tree(row, root, nodes, leaves, weight, path, taken, out):
    """weight (D, D): weight[a, b] = (a - 1)! b! / (a + b)!. path (3, D): scratch. taken (F,): zeros, restored."""
    columns, others, from_row = path[0], path[1], path[2]
    at, length, a, b = root, 0, 0, 0
    while True:
        while at >= 0:
            node = nodes[at]
            c = node.what >> 2
            of_reference = node.left if node.what & REFERENCE_LEFT else node.right
            if taken[c] == 2:
                at = of_reference
                continue
            at = _next(node, row[c])
            if taken[c] == 0 and at != of_reference:
                columns[length], others[length], from_row[length] = c, of_reference, 1
                taken[c] = 1
                a += 1
                length += 1
        gain, loss = leaves[~at] * weight[a, b], leaves[~at] * weight[b, a]
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
def explain_trees(rows, roots, nodes, leaves, weight, size, out):
    """out (N, F), zeros before: Shapley values that add up to f(row) - f(reference). nodes: with the reference noted.
    size: rows that go through a tree while it is at hand.
    """
    for block in prange((len(rows) + size - 1) // size):
        first = block * size
        path, taken = np.empty((3, _DEPTH), dtype=np.int32), np.zeros(rows.shape[1], dtype=np.int8)
        for root in roots:
            for n in range(first, min(first + size, len(rows))):
                _explain_tree(rows[n], root, nodes, leaves, weight, path, taken, out[n])


@njit(nogil=True, cache=True)
def explain_one_by_one(rows, roots, nodes, leaves, weight, out):
    """The same on the calling thread."""
    path, taken = np.empty((3, _DEPTH), dtype=np.int32), np.zeros(rows.shape[1], dtype=np.int8)
    for root in roots:
        for n in range(len(rows)):
            _explain_tree(rows[n], root, nodes, leaves, weight, path, taken, out[n])
