"""Sources of candidates: everything that scores items for a history, and the features of a pair that it gives.

A regression scores the items taken most, the head: all there are in most catalogues. The graph scores all; of the items
beyond the head those that it ranks highest are looked up in an index, so that a million of them cost no more than a
thousand.
"""

# N users, I items, H items of the head, D width of a vector, C candidates, T of them from beyond the head, F features

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from assay_platform.models.content import ContentMap, ItemFacts, Row
from assay_platform.models.histories import (
    DAY_US,
    OWN_FEATURES,
    USER_FEATURES,
    Flags,
    Floats,
    Histories,
    Index,
    OwnPast,
)
from assay_platform.models.item_regression import ItemRegression
from assay_platform.models.retrieval import ItemIndex

# What sources and the item table say of a pair; features of the store are appended to PAIR_FEATURES.
SOURCE_FEATURES = (
    "regression", "regression_z", "liked_regression_z", "graph_log_softmax", "graph_z", "log_popularity",
    "category_match", "days_after_first_taken", "days_before_last_taken", "share_who_repeat", "days_a_taker",
)  # fmt: skip
PAIR_FEATURES = (*SOURCE_FEATURES, *OWN_FEATURES, *USER_FEATURES)
_OWN_CANDIDATES = 0.75  # the most of the candidates that may come from a user's own past

# Item features of the store, on the ranker's scale: (n,) items → (n, S).
StoreFeatures = Callable[[Index], Floats]


class ItemVectors(NamedTuple):
    """What the graph encoder learned of items."""

    item_ID: Floats
    bias_I: Floats
    scale: float

    def extended(self, more_ND: Floats) -> "ItemVectors":
        """With more items, of `stacked` rows."""
        item_ID = np.concatenate([self.item_ID, more_ND[:, :-1] / self.scale], dtype=np.float32)
        return ItemVectors(item_ID, np.concatenate([self.bias_I, more_ND[:, -1]], dtype=np.float32), self.scale)

    def where(self, chosen: Flags, stacked: Floats) -> "ItemVectors":
        """Some items with other vectors. chosen (I,); stacked (I, D + 1)."""
        item_ID = np.where(chosen[:, None], stacked[:, :-1] / np.float32(self.scale), self.item_ID)
        return ItemVectors(item_ID, np.where(chosen, stacked[:, -1], self.bias_I), self.scale)

    def stacked(self, items: Index | slice = slice(None)) -> Floats:
        """(n, D + 1) vectors whose product with a user's, and 1 behind it, is the score."""
        return np.column_stack([self.item_ID[items] * np.float32(self.scale), self.bias_I[items]])


class ItemPast(NamedTuple):
    """What is known of every item's events: who took it how often, and when first and last. All (I,)."""

    takers: Floats
    share_who_repeat: Floats
    days_a_taker: Floats
    first_us: Index
    last_us: Index

    @staticmethod
    def of(histories: Histories, num_items: int) -> "ItemPast":
        """Items that nobody took: no takers, first and last at the histories' moment."""
        past = OwnPast(histories, num_items)
        takers = np.bincount(past.item, minlength=num_items)
        some = np.maximum(takers, 1)
        now = int(histories.now_us.max(initial=0))
        first, last = np.full(num_items, now), np.full(num_items, np.iinfo(np.int64).min)
        np.minimum.at(first, histories.item, histories.time_us)
        np.maximum.at(last, histories.item, histories.time_us)
        last[takers == 0] = now
        return ItemPast(
            takers.astype(np.float32),
            (np.bincount(past.item[past.days > 1], minlength=num_items) / some).astype(np.float32),
            (np.bincount(past.item, past.days, num_items) / some).astype(np.float32),
            first.astype(np.int64),
            last.astype(np.int64),
        )

    def extended(self, num: int, now_us: int) -> "ItemPast":
        """With more items, that nobody took."""
        none, now = np.zeros(num, dtype=np.float32), np.full(num, now_us, dtype=np.int64)
        floats = (np.concatenate([held, none]) for held in (self.takers, self.share_who_repeat, self.days_a_taker))
        return ItemPast(*floats, *(np.concatenate([held, now]) for held in (self.first_us, self.last_us)))

    def head(self, num: int) -> Index:
        """(H,) the items taken by most, at most so many; ascending."""
        most = np.argsort(-self.takers, kind="stable")[:num]
        return np.sort(most).astype(np.int64)


class Candidates(NamedTuple):
    """What the ranker orders. item, score (N, C): best first by the sources alone. features (N, C, F)."""

    item: Index
    score: Floats
    features: Floats


@dataclass(frozen=True)
class Wanted:
    """Which items a list may have. excluded (N, I): of each user. allowed (I,): of everybody; None: all."""

    excluded: sp.csr_matrix | None = None
    allowed: Flags | None = None

    def part(self, first: int, end: int) -> "Wanted":
        """Of some users."""
        return self if self.excluded is None else replace(self, excluded=self.excluded[first:end])


ALL_ITEMS = Wanted()


class _Scores(NamedTuple):
    """Scores of the head (N, H), and what turns them into standard deviations from the mean."""

    value_NH: Floats
    mean_N1: Floats
    std_N1: Floats

    @staticmethod
    def of(value_NH: Floats) -> "_Scores":
        std = value_NH.std(axis=1, keepdims=True) + np.float32(1e-9)
        return _Scores(value_NH, value_NH.mean(axis=1, keepdims=True), std)

    def z(self, values: Floats) -> Floats:
        return np.asarray((values - self.mean_N1) / self.std_N1, dtype=np.float32)


@dataclass(frozen=True)
class Sources:
    """Fitted on the events of one moment; pure functions of histories.

    head (H,): items that the regressions score, ascending. liked: the regression of what was liked alone, where ratings
    tell. content: vectors of items that nobody took, from what the item table says of them.
    """

    regression: ItemRegression
    liked: ItemRegression | None
    vectors: ItemVectors
    past: ItemPast
    facts: ItemFacts
    content: ContentMap
    head: Index
    graph_weight: float = 0.5  # of the graph beside the regression where candidates are found

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.past.takers)

    @cached_property
    def log_popularity(self) -> Floats:
        """(I,) ln(1 + takers)."""
        return np.log1p(self.past.takers)

    @cached_property
    def to_user(self) -> Floats:
        """(I, D) what an item adds to the vector of a user with one item."""
        return np.asarray(self.vectors.item_ID * np.maximum(self.past.takers, 1.0)[:, None] ** -0.5, dtype=np.float32)

    @cached_property
    def place(self) -> Index:
        """(I,) of an item in the head, -1 beyond it."""
        place = np.full(self.num_items, -1, dtype=np.int64)
        place[self.head] = np.arange(len(self.head))
        return place

    @cached_property
    def _head_vectors(self) -> Floats:
        return self.vectors.stacked(self.head).T.copy()

    @cached_property
    def index(self) -> ItemIndex | None:
        """Of the items beyond the head, if there are any."""
        tail = np.flatnonzero(self.place < 0)
        return ItemIndex(tail, self.vectors.stacked(tail)) if len(tail) else None

    def extended(self, items: Sequence[str], rows: Sequence[Row], *, now_us: int) -> "Sources":
        """With items that nobody took yet. rows: what the item table says of them."""
        facts = self.facts.extended(items, rows)
        vectors = self.vectors.extended(self.content.vectors(facts.content[self.num_items :]))
        longer = replace(
            self,
            facts=facts,
            vectors=vectors,
            past=self.past.extended(len(items), now_us),
            regression=self.regression.extended(len(items)),
            liked=None if self.liked is None else self.liked.extended(len(items)),
        )
        if self.index is not None:
            # Shared: whoever still holds the shorter sources finds no item beyond their end.
            more = np.arange(self.num_items, longer.num_items)
            self.index.add(more, vectors.stacked(more))
            longer.__dict__["index"] = self.index
        return longer

    def user_vectors(self, taken: sp.csr_matrix) -> Floats:
        """(N, D): the degree-normalised sum over each history; zeros for an empty one."""
        length = np.maximum(np.diff(taken.indptr), 1.0)[:, None]
        return np.asarray(taken @ self.to_user / np.sqrt(length), dtype=np.float32)

    def candidates(
        self, histories: Histories, num: int, store: StoreFeatures, *, repeats: bool, wanted: Wanted = ALL_ITEMS
    ) -> Candidates:
        """The items that regression and graph rank highest and, where items are taken again, what was taken before.

        Items that are not wanted come last, with a score of -inf, where there are not enough others.
        """
        taken, own = histories.matrix(self.num_items), OwnPast(histories, self.num_items)
        asked_ND = np.column_stack([self.user_vectors(taken), np.ones(len(histories.now_us), dtype=np.float32)])
        regression = _Scores.of(self.regression.scores(taken))
        graph = _Scores.of(asked_ND @ self._head_vectors)
        score = regression.z(regression.value_NH) + np.float32(self.graph_weight) * graph.z(graph.value_NH)
        num_own = round(_OWN_CANDIDATES * num) if repeats else 0
        own_user, own_item, own_score = _own_first(own, num_own)
        if num_own:
            in_head = self.place[own_item] >= 0
            score[own_user[in_head], self.place[own_item[in_head]]] += own_score[in_head]
        if wanted.excluded is not None:
            user, item = wanted.excluded.nonzero()
            in_head = self.place[item] >= 0
            score[user[in_head], self.place[item[in_head]]] = -np.inf
        if wanted.allowed is not None:
            score[:, ~wanted.allowed[self.head]] = -np.inf
        graph_NP, tail_NT = graph.value_NH, None
        if self.index is not None:
            tail_NT, tail_graph = self._beyond(asked_ND, own, (own_user, own_item), num, wanted)
            tail_score = regression.z(np.zeros_like(tail_graph)) + np.float32(self.graph_weight) * graph.z(tail_graph)
            tail_score += _own_scores(tail_NT, own_user, own_item, own_score, self.num_items)
            score = np.concatenate([score, np.where(tail_NT < 0, -np.inf, tail_score)], axis=1)
            graph_NP = np.concatenate([graph_NP, tail_graph], axis=1)
        place = top_candidates(score, num)
        in_head = place < len(self.head)
        inside = np.where(in_head, place, 0)
        item = self.head[inside]
        if tail_NT is not None:
            beyond = np.take_along_axis(tail_NT, np.where(in_head, 0, place - len(self.head)), axis=1)
            item = np.where(in_head, item, np.maximum(beyond, 0))

        def of_head(value_NH: Floats) -> Floats:
            return np.where(in_head, np.take_along_axis(value_NH, inside, axis=1), np.float32(0))

        found = of_head(regression.value_NH)
        liked_z = np.zeros(item.shape, dtype=np.float32)
        if self.liked is not None:
            liked = self.liked.scores(histories.where(histories.liked).matrix(self.num_items))
            liked_z = _Scores.of(liked).z(of_head(liked))
        logits = np.take_along_axis(graph_NP, place, axis=1)
        top_logit = graph.value_NH.max(axis=1, keepdims=True)
        normal = top_logit + np.log(np.exp(graph.value_NH - top_logit).sum(axis=1, keepdims=True))
        columns = (
            found, regression.z(found), liked_z, logits - normal, graph.z(logits), self.log_popularity[item],
            self._match(taken, item),
            _signed_log((own.last_us[:, None] - self.past.first_us[item]) / DAY_US),
            _signed_log((self.past.last_us[item] - own.first_us[:, None]) / DAY_US),
            self.past.share_who_repeat[item], np.log1p(self.past.days_a_taker[item]),
        )  # fmt: skip
        parts = [
            np.stack([np.asarray(c, dtype=np.float32) for c in columns], axis=-1),
            # What was taken before cannot be taken again otherwise.
            own.features(item) if repeats else np.zeros((*item.shape, len(OWN_FEATURES)), dtype=np.float32),
            np.broadcast_to(own.user_features[:, None], (*item.shape, len(USER_FEATURES))),
            store(item.ravel()).reshape(*item.shape, -1),
        ]
        features = np.concatenate(parts, axis=-1, dtype=np.float32)
        return Candidates(item, np.take_along_axis(score, place, axis=1), features)

    def _beyond(
        self, asked_ND: Floats, own: OwnPast, own_first: tuple[Index, Index], num: int, wanted: Wanted
    ) -> tuple[Index, Floats]:
        """Items beyond the head and their graph scores, both (N, T): the graph's best, and a user's own. -1: none."""
        assert self.index is not None
        num_users, num_items = len(asked_ND), self.num_items
        excluded = np.zeros(0, dtype=np.int64)
        if wanted.excluded is not None:
            user, item = wanted.excluded.nonzero()
            beyond = self.place[item] < 0
            excluded = np.sort(user[beyond].astype(np.int64) * num_items + item[beyond])
        more = int(np.bincount(excluded // num_items, minlength=1).max())
        found, _ = self.index.search(asked_ND, min(num + more, len(self.index)), allowed=wanted.allowed)
        found[found >= num_items] = -1
        user, item = own_first
        beyond = self.place[item] < 0
        if wanted.allowed is not None:
            beyond &= wanted.allowed[item]
        user, item = user[beyond], item[beyond]
        counts = np.bincount(user, minlength=num_users)
        ours = np.full((num_users, int(counts.max(initial=0))), -1, dtype=np.int64)
        ours[user, np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)] = item
        keys = np.arange(num_users)[:, None] * num_items
        # An own item is there once, as the user's.
        found[_within(keys + found, np.sort(user * num_items + item))] = -1
        tail = np.concatenate([found, ours], axis=1)
        tail[_within(keys + tail, excluded)] = -1
        vectors = self.vectors
        known = np.maximum(tail, 0)
        products = np.einsum("nd,ntd->nt", asked_ND[:, :-1], vectors.item_ID[known], optimize=True)
        return tail, np.asarray(products * np.float32(vectors.scale) + vectors.bias_I[known], dtype=np.float32)

    def _match(self, taken: sp.csr_matrix, item_NC: Index) -> Floats:
        """(N, C) cosine of the categories of a history and those of an item."""
        from assay_platform.kernels.sparse_numba import chosen_products

        categories = self.facts.categories
        out = np.zeros(item_NC.shape, dtype=np.float32)
        if categories.shape[1]:
            profile = (taken @ categories).toarray()
            profile /= np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-6)
            chosen_products(profile, categories.indptr, categories.indices, categories.data, item_NC, out)
        return out


def _signed_log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))


def _own_first(own: OwnPast, num: int) -> tuple[Index, Index, Floats]:
    """User, item and what is added to the score of what each user took most, lately for more: the first `num` of it."""
    decayed = own.decayed(-1)
    order = np.lexsort((-decayed, own.user))
    user = own.user[order]
    starts = np.searchsorted(user, user, side="left")
    order = order[np.arange(len(order)) - starts < num]
    return own.user[order], own.item[order], np.float32(100.0) + decayed[order]


def _own_scores(item_NT: Index, user: Index, item: Index, score: Floats, num_items: int) -> Floats:
    """(N, T): the score of those pairs that are among (user, item), 0 of others."""
    out = np.zeros(item_NT.shape, dtype=np.float32)
    if not len(user):
        return out
    key = user * num_items + item
    order = np.argsort(key)
    asked = np.where(item_NT < 0, -1, np.arange(len(item_NT))[:, None] * num_items + item_NT)
    at = np.minimum(np.searchsorted(key[order], asked), len(key) - 1)
    return np.where(key[order][at] == asked, score[order][at], out)


def _within(asked: Index, keys: Index) -> Flags:
    """Which are among ascending keys."""
    if not len(keys):
        return np.zeros(asked.shape, dtype=bool)
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.asarray(keys[at] == asked)


def top_candidates(scores_NI: Floats, num: int) -> Index:
    """(N, C) item indices by descending score."""
    num = min(num, scores_NI.shape[1])
    rough = np.argpartition(-scores_NI, num - 1, axis=1)[:, :num]
    order = np.argsort(-np.take_along_axis(scores_NI, rough, axis=1), axis=1, kind="stable")
    return np.take_along_axis(rough, order, axis=1).astype(np.int64)
