"""Boosted trees as arrays: scored and explained without the library that trained them, and saved without a pickle.

`TreeEnsemble.from_lightgbm` reads a trained LightGBM model's text. Not covered: categorical and linear splits (columns
are numbers here, categories their rank by frequency), objectives with more than one tree an iteration.
"""

# N rows, F columns, T trees, M nodes of all trees, D depth

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay_platform.errors import ArtifactError, InputError

_FEW_ROWS = 8
# LightGBM's decision type: bit 0 categorical, bit 1 missing goes left, bits 2 and 3 what is missing (2: NaN).
_CATEGORICAL, _DEFAULT_LEFT = 1, 2


@dataclass(frozen=True)
class TreeEnsemble:
    """T trees over F columns. A node with column -1 is a leaf; children are places in the arrays."""

    num_columns: int
    roots: NDArray[np.int32]  # (T,)
    column: NDArray[np.int32]  # (M,)
    threshold: NDArray[np.float64]  # (M,) a value at or below it goes left
    nan_left: NDArray[np.bool_]  # (M,)
    left: NDArray[np.int32]  # (M,)
    right: NDArray[np.int32]  # (M,)
    value: NDArray[np.float64]  # (M,) of a leaf
    _known_reference: "_Reference | None" = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.roots)

    @staticmethod
    def from_lightgbm(booster: Any, *, num_trees: int | None = None) -> "TreeEnsemble":
        """The first `num_trees` trees of a `lightgbm.Booster` (all by default).

        Raises:
            InputError: a split that is not by a number.
        """
        text = booster.model_to_string(num_iteration=num_trees or -1)
        parts = (part.strip() for part in text.split("\n\n"))
        trees = [_fields(part) for part in parts if part.startswith("Tree=")]
        return _joined([_one_tree(fields) for fields in trees], booster.num_feature())

    def followed_by(self, more: "TreeEnsemble") -> "TreeEnsemble":
        """These trees and others over the same columns; scores add up."""
        if more.num_columns != self.num_columns:
            raise InputError(f"trees over {more.num_columns} columns cannot follow trees over {self.num_columns}")
        offset = len(self.column)
        shifted = {side: np.where(more.column >= 0, getattr(more, side) + offset, -1) for side in ("left", "right")}
        parts = {name: shifted.get(name, getattr(more, name)) for name in _ARRAYS} | {"roots": more.roots + offset}
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(self, name), parts[name]]).astype(_ARRAYS[name]) for name in _ARRAYS
        }
        return TreeEnsemble(self.num_columns, **joined)

    def logits(self, rows_NF: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N,) sums of leaves; NaN is missing."""
        from assay_platform.kernels import trees_numba

        rows = np.ascontiguousarray(rows_NF)
        out = np.zeros(len(rows))
        if len(rows) <= _FEW_ROWS or not len(self):
            walk = self._walk32 if rows.dtype == np.float32 else self._walk64
            trees_numba.score_one_by_one(rows, walk.roots, walk.nodes, walk.leaf, out)
        else:
            splits = self._splits
            cuts = splits.cut32 if rows.dtype == np.float32 else splits.cut
            _on_all_cores(trees_numba.score_trees, rows, splits.split, cuts, splits.start, splits.leaf,
                          splits.first_leaf, splits.most_words, out)  # fmt: skip
        return out

    def explain(
        self, rows_NF: NDArray[np.floating], reference_F: NDArray[np.floating]
    ) -> tuple[NDArray[np.float64], float]:
        """Shapley values (N, F) against one reference row, and the reference's score.

        base + Σ_f contribution is the row's score. Exact for the game in which a column has either the row's or the
        reference's value; see `kernels.trees_numba`.
        """
        from assay_platform.kernels import trees_numba

        rows = np.ascontiguousarray(rows_NF)
        known = self._known_reference
        reference = np.ascontiguousarray(reference_F, dtype=rows.dtype)
        if (
            known is None
            or known.row.dtype != reference.dtype
            or not np.array_equal(known.row, reference, equal_nan=True)
        ):
            walk = self._walk32 if rows.dtype == np.float32 else self._walk64
            walk = walk._replace(nodes=walk.nodes.copy())
            trees_numba.note_reference(reference, walk.nodes)
            known = _Reference(reference.copy(), walk, float(self.logits(reference[None])[0]))
            object.__setattr__(self, "_known_reference", known)
        out = np.zeros((len(rows), self.num_columns))
        if len(rows) <= 1:
            trees_numba.explain_one_by_one(rows, *known.walk, _WEIGHT, out)
        else:
            # As many blocks as threads, and none so large that a tree is gone from the cache before its last row.
            size = max(1, min(trees_numba.EXPLAINED, -(-len(rows) // len(os.sched_getaffinity(0)))))
            _on_all_cores(trees_numba.explain_trees, rows, *known.walk, _WEIGHT, size, out)
        return out, known.logit

    @cached_property
    def _numbered(self) -> "_Numbered":
        """Leaves from left to right, and what lies above them."""
        from assay_platform.kernels.trees_numba import number_leaves

        tree, first, count = (np.full(len(self.column), -1, dtype=np.int64) for _ in range(3))
        number_leaves(self.roots, self.column, self.left, self.right, tree, first, count)
        leaves = np.flatnonzero((self.column < 0) & (tree >= 0))
        first_leaf = np.concatenate([[0], np.cumsum(count[self.roots])])
        leaf = np.empty(len(leaves))
        leaf[first_leaf[tree[leaves]] + first[leaves]] = self.value[leaves]
        return _Numbered(tree, first, count, first_leaf, leaf)

    @cached_property
    def _walk64(self) -> "_Walk":
        """As the loops take them that walk down: what lies below a split comes after it, its left side first."""
        from assay_platform.kernels.trees_numba import NAN_LEFT, NODE64

        tree, first, count, first_leaf, leaf = self._numbered
        inner = np.flatnonzero((self.column >= 0) & (tree >= 0))
        inner = inner[np.lexsort((-count[inner], first[inner], tree[inner]))]
        place = np.zeros(len(self.column), dtype=np.int64)
        place[inner] = np.arange(len(inner))
        place = np.where(self.column >= 0, place, ~(first_leaf[tree] + first))
        nodes = np.empty(len(inner), dtype=NODE64)
        nodes["cut"] = self.threshold[inner]
        nodes["what"] = 4 * self.column[inner] + NAN_LEFT * self.nan_left[inner]
        nodes["left"], nodes["right"] = place[self.left[inner]], place[self.right[inner]]
        return _Walk(place[self.roots].astype(np.int32), nodes, leaf)

    @cached_property
    def _walk32(self) -> "_Walk":
        """The same for rows of single precision."""
        from assay_platform.kernels.trees_numba import NODE32

        walk = self._walk64
        nodes = walk.nodes.astype(NODE32)
        nodes["cut"] = _rounded_down(walk.nodes["cut"])
        return walk._replace(nodes=nodes)

    @cached_property
    def _splits(self) -> "_Splits":
        """As the loop over many rows takes them: tree by tree, each with the leaves on its left."""
        from assay_platform.kernels.trees_numba import SPLIT, WORD

        tree, first, count, first_leaf, leaf = self._numbered
        inner = np.flatnonzero((self.column >= 0) & (tree >= 0))
        inner = inner[np.argsort(tree[inner], kind="stable")]
        begin = first[inner]
        end = begin + count[self.left[inner]]
        num_words = (end - 1) // WORD - begin // WORD + 1
        node, begin, end = (np.repeat(of, num_words) for of in (inner, begin, end))
        word = begin // WORD + np.arange(len(node)) - np.repeat(np.cumsum(num_words) - num_words, num_words)
        low, high = (np.clip(place - word * WORD, 0, WORD) for place in (begin, end))
        split = np.empty(len(node), dtype=SPLIT)
        split["keep"] = ~((1 << high) - (1 << low))
        split["column"], split["word"], split["nan_left"] = self.column[node], word, self.nan_left[node]
        cut = self.threshold[node]
        return _Splits(
            split=split,
            cut=cut,
            cut32=_rounded_down(cut),
            start=np.searchsorted(tree[node], np.arange(len(self) + 1)),
            leaf=leaf,
            first_leaf=first_leaf,
            most_words=-(-int(count[self.roots].max()) // WORD),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """For an artifact."""
        return {name: torch.from_numpy(getattr(self, name)) for name in _ARRAYS}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor], num_columns: int) -> "TreeEnsemble":
        """Read back what `to_tensors` gave.

        Raises:
            ArtifactError: an array is missing, or a node refers to what is not there.
        """
        try:
            arrays: dict[str, NDArray[Any]] = {
                name: np.ascontiguousarray(tensors[name].numpy(), dtype=kind) for name, kind in _ARRAYS.items()
            }
        except KeyError as error:
            raise ArtifactError(f"the trees have no array {error}") from error
        num_nodes = len(arrays["column"])
        inner = arrays["column"] >= 0
        at = np.arange(num_nodes)
        # Children lie after their parent, so every walk ends; no node has two parents.
        is_sound = all(len(a) == num_nodes for name, a in arrays.items() if name != "roots") and bool(
            (arrays["column"] < num_columns).all()
            and all(((arrays[s] > at) & (arrays[s] < num_nodes))[inner].all() for s in ("left", "right"))
            and ((arrays["roots"] >= 0) & (arrays["roots"] < num_nodes)).all()
            and _differ(np.concatenate([arrays["left"][inner], arrays["right"][inner], arrays["roots"]]))
        )
        if not is_sound:
            raise ArtifactError(
                f"the trees are damaged: a place is outside of {num_nodes} nodes, {num_columns} columns"
            )
        return TreeEnsemble(num_columns, **arrays)


class _Reference(NamedTuple):
    """The row that was explained against last: a model has one."""

    row: NDArray[np.floating]  # (F,)
    walk: "_Walk"  # with where it goes in each split
    logit: float


class _Numbered(NamedTuple):
    """Of M nodes, -1 for one of no tree: its tree, the first leaf below it, counted in the tree from the left, and how
    many are below. Of L leaves, tree by tree from the left: where a tree's begin (T + 1,), and what each is worth.
    """

    tree: NDArray[np.int64]
    first: NDArray[np.int64]
    below: NDArray[np.int64]
    first_leaf: NDArray[np.int64]
    leaf: NDArray[np.float64]


class _Walk(NamedTuple):
    """Splits in the order in which rows come by; see `kernels.trees_numba`."""

    roots: NDArray[np.int32]  # (T,)
    nodes: NDArray[Any]
    leaf: NDArray[np.float64]  # (L,)


class _Splits(NamedTuple):
    """S splits with the words of leaves that they clear, of T trees with L leaves; see `kernels.trees_numba`."""

    split: NDArray[Any]  # (S,)
    cut: NDArray[np.float64]  # (S,) a value at or below it goes left
    cut32: NDArray[np.float32]  # (S,) the same for values of single precision
    start: NDArray[np.int64]  # (T + 1,) of each tree's splits
    leaf: NDArray[np.float64]  # (L,)
    first_leaf: NDArray[np.int64]  # (T + 1,)
    most_words: int  # that the leaves of a tree need


_ARRAYS: dict[str, type] = {
    "roots": np.int32, "column": np.int32, "threshold": np.float64, "nan_left": np.bool_,
    "left": np.int32, "right": np.int32, "value": np.float64,
}  # fmt: skip


def _weights(depth: int) -> NDArray[np.float64]:
    out = np.zeros((depth, depth))
    for a in range(1, depth):
        for b in range(depth):
            out[a, b] = math.exp(math.lgamma(a) + math.lgamma(b + 1) - math.lgamma(a + b + 1))
    return out


_WEIGHT = _weights(128)


def _differ(numbers: NDArray[np.int32]) -> bool:
    """Of numbers from 0. `np.unique` holds the interpreter for ten times as long, while others want to score."""
    return not len(numbers) or int(np.bincount(numbers).max()) == 1


def _rounded_down(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """The largest single-precision numbers at or below: for values of that kind they cut at the same place."""
    near = numbers.astype(np.float32)
    return np.where(near > numbers, np.nextafter(near, np.float32(-np.inf)), near)


def _fields(part: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in part.splitlines() if "=" in line)


def _one_tree(fields: dict[str, str]) -> dict[str, NDArray[Any]]:
    """Arrays of one tree, inner nodes first, then leaves; LightGBM names leaf i as child ~i."""
    leaves = np.array(fields["leaf_value"].split(), dtype=np.float64)
    num_inner = len(leaves) - 1
    if num_inner == 0:
        split: dict[str, NDArray[Any]] = {name: np.empty(0) for name in ("column", "threshold", "left", "right")}
        kinds = np.empty(0, dtype=np.int64)
    else:
        kinds = np.array(fields["decision_type"].split(), dtype=np.int64)
        if (kinds & _CATEGORICAL).any():
            raise InputError("the trees have a categorical split; give categories as numbers")
        children = {side: np.array(fields[f"{side}_child"].split(), dtype=np.int64) for side in ("left", "right")}
        split = {
            "column": np.array(fields["split_feature"].split(), dtype=np.int64),
            "threshold": np.array(fields["threshold"].split(), dtype=np.float64),
            **{side: np.where(child >= 0, child, num_inner + ~child) for side, child in children.items()},
        }
    # Where training saw no missing value, LightGBM takes one as 0.
    nan_left = np.where(kinds >> 2 == 2, (kinds & _DEFAULT_LEFT) > 0, split["threshold"] >= 0)
    nothing = np.full(len(leaves), -1)
    return {
        "column": np.concatenate([split["column"], nothing]),
        "threshold": np.concatenate([split["threshold"], np.zeros(len(leaves))]),
        "nan_left": np.concatenate([nan_left, np.zeros(len(leaves), dtype=bool)]),
        "left": np.concatenate([split["left"], nothing]),
        "right": np.concatenate([split["right"], nothing]),
        "value": np.concatenate([np.zeros(num_inner), leaves]),
    }


def _joined(trees: list[dict[str, NDArray[Any]]], num_columns: int) -> TreeEnsemble:
    sizes = [len(tree["column"]) for tree in trees]
    roots = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int32) if trees else np.empty(0, dtype=np.int32)
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind in _ARRAYS.items():
        if name == "roots":
            continue
        parts = [
            np.where(tree["column"] >= 0, tree[name] + root, -1) if name in ("left", "right") else tree[name]
            for tree, root in zip(trees, roots, strict=True)
        ]
        arrays[name] = np.concatenate([*parts, np.empty(0)]).astype(kind)
    return TreeEnsemble(num_columns, roots, **arrays)


def _on_all_cores(loop: Any, *arrays: Any) -> None:
    """Numba tells OpenMP how many threads it wants, and torch on the same thread would follow: a request that asked for
    one thread waits for the others at every layer from then on. So torch's number is put back.
    """
    before = torch.get_num_threads()
    loop(*arrays)
    torch.set_num_threads(before)
