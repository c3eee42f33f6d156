"""How good ranked lists are: full ranking, never sampled."""

# N users with something to find, D places of a list

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from assay_platform.models.histories import Index
from assay_platform.models.sources import top_candidates
from numpy.typing import NDArray

DEPTH = 20
_CELLS = 2**24  # scores of users for items at a time
_ITEMS_A_BLOCK = 256
_SHOWN = 10
_DRAWS = 1000
Lists = NDArray[np.int64]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]


def best_items(
    scores: Callable[[Index], NDArray[np.float32]], wanted: sp.csr_matrix, excluded: sp.csr_matrix | None
) -> Lists:
    """(U, DEPTH) items by descending score, of users who want something; zeros for others. scores: rows of users (n,) →
    (n, I). excluded (U, I): left out.
    """
    num_users, num_items = wanted.shape
    users, step = np.flatnonzero(np.diff(wanted.indptr)), max(1, _CELLS // num_items)
    lists = np.zeros((num_users, min(DEPTH, num_items)), dtype=np.int64)
    for first in range(0, len(users), step):
        chosen = users[first : first + step]
        found = scores(chosen)
        if excluded is not None:
            found[excluded[chosen].nonzero()] = -np.inf
        lists[chosen] = top_candidates(found, DEPTH)
    return lists


def of_some_users(wanted: sp.csr_matrix, most: int, *, seed: int) -> sp.csr_matrix:
    """Without what all users want but so many, drawn at random (U, I): metrics are means over users."""
    users = np.flatnonzero(np.diff(wanted.indptr))
    if len(users) <= most:
        return wanted
    kept = np.zeros(wanted.shape[0], dtype=np.float32)
    kept[np.random.default_rng(seed).choice(users, most, replace=False)] = 1.0
    some = sp.csr_matrix(sp.diags(kept) @ wanted)
    some.eliminate_zeros()
    return some


class Hits(NamedTuple):
    """Which places of whose lists are right. user (N,): rows of the lists. hit (N, D). wanted (N,): how many items."""

    user: NDArray[np.intp]
    hit: Flags
    wanted: NDArray[np.int64]

    @staticmethod
    def of(top: Lists, test: sp.csr_matrix) -> "Hits":
        """top: item indices, best first; the row of a user. test (U, I) 0/1. Users without a test item are left out."""
        wanted = np.diff(test.indptr)
        user = np.flatnonzero(wanted)
        rows = test[user]
        lists = top[user, :DEPTH]
        hit = [np.asarray(rows[np.arange(len(user)), lists[:, d]]).ravel() > 0 for d in range(lists.shape[1])]
        return Hits(user, np.stack(hit, axis=1), wanted[user])

    def of_users(self, chosen: Flags) -> "Hits":
        """Those of some users. chosen (U,)."""
        kept = chosen[self.user]
        return Hits(self.user[kept], self.hit[kept], self.wanted[kept])

    def ndcg(self) -> Floats:
        """(N,) NDCG@10."""
        hit = self.hit[:, :_SHOWN]
        discount = 1.0 / np.log2(np.arange(2, 2 + _SHOWN))
        ideal = np.cumsum(discount)[np.minimum(self.wanted, _SHOWN) - 1]
        return np.asarray((hit * discount[: hit.shape[1]]).sum(1) / ideal)

    def recall(self, depth: int) -> Floats:
        """(N,) part of what was wanted."""
        return np.asarray(self.hit[:, :depth].sum(1) / self.wanted)

    def reciprocal_rank(self) -> Floats:
        """(N,) 1 / place of the first hit among ten; 0 without one."""
        hit = self.hit[:, :_SHOWN]
        return np.where(hit.any(1), 1.0 / (hit.argmax(1) + 1.0), 0.0)


def ndcg_at_10(top: Lists, test: sp.csr_matrix) -> float:
    """The metric that choices go by, alone; see `ranking_metrics`."""
    return float(Hits.of(top, test).ndcg().mean())


def ranking_metrics(top: Lists, test: sp.csr_matrix, train: sp.csr_matrix) -> dict[str, float]:
    """Metrics of the contract, MRR@10 and the Gini index of exposure besides.

    top (U, at least 20): item indices, best first. test (U, I) 0/1: what was taken in the test part. train (U, I) 0/1.
    Users without a test item do not count.

    coverage: fraction of items in anybody's first 10. gini: of how often items are there, from 0, all alike, to 1.
    novelty: mean -log2 of the fraction of users who had an item. diversity: 1 - mean cosine, between the items of a
    list, of who took them in training.
    """
    hits = Hits.of(top, test)
    popularity = np.maximum(np.asarray(train.sum(0)).ravel(), 1.0) / train.shape[0]
    shown = top[hits.user, :_SHOWN]
    return {
        "ndcg_at_10": float(hits.ndcg().mean()),
        "recall_at_10": float(hits.recall(10).mean()),
        "recall_at_20": float(hits.recall(20).mean()),
        "mrr_at_10": float(hits.reciprocal_rank().mean()),
        "coverage": float(len(np.unique(shown)) / train.shape[1]),
        "gini": _gini(np.bincount(shown.ravel(), minlength=train.shape[1])),
        "novelty": float(-np.log2(popularity[shown]).mean()),
        "diversity": _diversity(shown, train),
    }


def interval(values: Floats, seed: int = 0) -> tuple[float, float]:
    """95 % of the mean over users, by 1,000 Poisson bootstraps; of differences of two models for the same users too."""
    weights = np.random.default_rng(seed).poisson(1.0, (_DRAWS, len(values)))
    low, high = np.quantile(weights @ values / np.maximum(weights.sum(1), 1), [0.025, 0.975])
    return float(low), float(high)


def _gini(counts: NDArray[np.int64]) -> float:
    ordered = np.sort(counts)
    places = np.arange(1, len(ordered) + 1)
    return float((2 * places - len(ordered) - 1) @ ordered / max(1, len(ordered) * ordered.sum()))


def _diversity(top10: Lists, train: sp.csr_matrix) -> float:
    """Cosines of a pair of items are computed once, however many lists have it."""
    depth = top10.shape[1]
    if depth < 2:
        return 0.0
    scale = np.maximum(np.asarray(train.sum(0)).ravel(), 1.0) ** -0.5
    unit = sp.csr_matrix((train @ sp.diags(scale)).T)
    first, second = (np.sort(top10, axis=1)[:, places].ravel() for places in np.triu_indices(depth, 1))
    pairs, times = np.unique(first * len(scale) + second, return_counts=True)
    first, second = pairs // len(scale), pairs % len(scale)
    total = 0.0
    # Items of the first places by blocks, which begin where a block's worth of different ones has gone by.
    place = np.cumsum(np.r_[0, np.diff(first) > 0]) // _ITEMS_A_BLOCK
    for rows in np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(place)) + 1):
        (left, at), (right, to) = (np.unique(items[rows], return_inverse=True) for items in (first, second))
        cosine = unit[left] @ unit[right].T
        total += float(np.asarray(cosine[at, to]).ravel() @ times[rows])
    return 1.0 - total / max(1, int(times.sum()))
