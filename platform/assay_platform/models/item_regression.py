"""Each item predicted from the others of a history, in closed form.

EASE (Steck, 'Embarrassingly Shallow Autoencoders for Sparse Data', arXiv:1905.03375) with three changes. A user weighs
1 / sqrt(how many items it took), so that few long histories do not decide. Items that users took close in time count as
taken together once more (what a shop calls a basket). And of each item only the strongest weights are kept, so
that a score is a sum over short lists.
"""

# N users, I items, H items that are scored, K weights kept an item

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from assay_platform.models.histories import Floats, Histories, Index

# Pairs further apart in a user's history are not looked at.
_MAX_STEPS = 60
_MAX_KEPT = 512


@dataclass(frozen=True, kw_only=True)
class RegressionConfig:
    """penalty: λ of EASE. closeness_s: seconds in which being close counts a third; 0 leaves time out."""

    penalty: float = 500.0
    closeness_s: float = 150.0


@dataclass(frozen=True)
class ItemRegression:
    """weights (I, H): of a history item (row) for an item to score (column)."""

    weights: sp.csr_matrix

    def scores(self, taken: sp.csr_matrix) -> Floats:
        """(N, H) of histories, given as a 0/1 matrix (N, I)."""
        from assay_platform.kernels.sparse_numba import add_rows

        weights = self.weights
        out = np.zeros((taken.shape[0], weights.shape[1]), dtype=np.float32)
        add_rows(taken.indptr, taken.indices, weights.indptr, weights.indices, weights.data, out)
        return out

    def added(self, taken: Index, item: int) -> Floats:
        """(len(taken),) what each item of a history adds to the score of one of the H."""
        by_item = self._by_item
        part = slice(by_item.indptr[item], by_item.indptr[item + 1])
        rows, weights = by_item.indices[part], by_item.data[part]
        found = np.zeros(len(taken), dtype=np.float32)
        at = np.searchsorted(rows, taken)
        inside = np.flatnonzero(at < len(rows))
        inside = inside[rows[at[inside]] == taken[inside]]
        found[inside] = weights[at[inside]]
        return found

    @cached_property
    def _by_item(self) -> sp.csc_matrix:
        by_item = self.weights.tocsc()
        by_item.sort_indices()
        return by_item

    def extended(self, num: int) -> "ItemRegression":
        """With more items, from which nothing follows."""
        weights = self.weights
        start = np.concatenate([weights.indptr, np.full(num, weights.indptr[-1])])
        shape = (weights.shape[0] + num, weights.shape[1])
        return ItemRegression(sp.csr_matrix((weights.data, weights.indices, start), shape))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What is saved of it."""
        weights = self.weights
        return {
            "weight": weights.data.astype(np.float32),
            "item": weights.indices.astype(np.int32),
            "start": weights.indptr.astype(np.int64),
        }

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]], num_scored: int) -> "ItemRegression":
        """From what was saved. num_scored: H."""
        parts = (arrays["weight"], arrays["item"], arrays["start"])
        return ItemRegression(sp.csr_matrix(parts, (len(arrays["start"]) - 1, num_scored)))


def together(histories: Histories, num_items: int, closeness_s: float) -> sp.csr_matrix:
    """(I, I) symmetric: how often two items were taken close in time, exp(-gap / closeness) each time.

    histories: each item of a user once.
    """
    user, item, time_s = histories.users(), histories.item, histories.time_us / 1e6
    total = sp.csr_matrix((num_items, num_items))
    for steps in range(1, _MAX_STEPS + 1):
        gap = time_s[steps:] - time_s[:-steps]
        near = np.flatnonzero((user[steps:] == user[:-steps]) & (gap < 5 * closeness_s))
        if not len(near):
            break
        pairs = (item[near], item[near + steps])
        total = total + sp.csr_matrix((np.exp(-gap[near] / closeness_s), pairs), total.shape)
    return sp.csr_matrix(total + total.T)


def fit_item_regression(
    histories: Histories, num_items: int, config: RegressionConfig, head: Index | None = None
) -> ItemRegression:
    """The closed form of the items in `head` (H,), ascending; by default of all.

    Memory and time grow with H² and H³: 8,000 items take 1.5 GB and half a minute.
    """
    head = np.arange(num_items) if head is None else head
    once = histories.once()
    if len(head) < num_items:
        place = np.full(num_items, -1, dtype=np.int64)
        place[head] = np.arange(len(head))
        once = once.where(place[once.item] >= 0)
        once = once._replace(item=place[once.item])
    taken = once.matrix(len(head))
    length = np.diff(once.start)
    # Weights of users that took the mean number of items are 1, so that the penalty means the same in every table.
    weight = np.sqrt(max(1.0, float(length[length > 0].mean())) / np.maximum(length, 1))

    def gram(more: NDArray[np.float32] | float) -> NDArray[np.float32]:
        found = (taken.T @ taken.multiply(weight[:, None])).toarray().astype(np.float32)
        if config.closeness_s > 0:
            found += together(once, len(head), config.closeness_s)
        found[np.diag_indices_from(found)] += np.float32(config.penalty) + more
        return np.asarray(found)

    try:
        inverse = _inverse(gram(0.0))
    except np.linalg.LinAlgError:
        # Closeness without that of an item to itself is not positive definite; where it outweighs the rest, with it.
        inverse = _inverse(gram(np.asarray(taken.sum(0), dtype=np.float32).ravel()))
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    kept = _strongest(weights)
    start = np.zeros(num_items + 1, dtype=np.int64)
    start[head + 1] = np.diff(kept.indptr)
    return ItemRegression(sp.csr_matrix((kept.data, kept.indices, np.cumsum(start)), (num_items, len(head))))


def _inverse(gram: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of a symmetric positive definite matrix, in its place."""
    from scipy.linalg import lapack

    factor, failed = lapack.spotrf(gram, lower=1, overwrite_a=1)
    inverse, failed_too = lapack.spotri(factor, lower=1, overwrite_c=1)
    if failed or failed_too:
        raise np.linalg.LinAlgError("the item matrix is not positive definite")
    lower = np.tril(inverse)
    return np.asarray(lower + np.tril(lower, -1).T)


def _strongest(weights: NDArray[np.float32]) -> sp.csr_matrix:
    """The largest weights of every column, by size."""
    num_items = len(weights)
    if num_items <= _MAX_KEPT:
        return sp.csr_matrix(weights)
    rows = np.argpartition(-np.abs(weights), _MAX_KEPT, axis=0)[:_MAX_KEPT]
    columns = np.broadcast_to(np.arange(num_items), rows.shape)
    kept = (weights[rows, columns].ravel(), (rows.ravel(), columns.ravel()))
    return sp.csr_matrix(kept, weights.shape)
