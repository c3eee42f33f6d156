"""Sources of candidates: everything that scores items for a history, and the features of a pair that it gives.

A regression scores the items taken most, the head: all there are in most catalogues. The graph scores all; of the items
beyond the head those that it ranks highest are looked up in an index, so that a million of them cost no more than a
thousand.
"""

# N users, I items, H items of the head, D width of a vector, C candidates, T of them from beyond the head, F features

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from assay_platform.models.content import ContentMap, ItemFacts, Row, fit_content_map, sentence
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
from assay_platform.models.sentences import encode
from assay_platform.models.sequence import SequenceEncoder

# What sources and the item table say of a pair; features of the store are appended to PAIR_FEATURES.
SOURCE_FEATURES = (
    "regression", "regression_z", "liked_regression_z", "graph_log_softmax", "graph_z", "sequence_log_softmax",
    "sequence_z", "log_popularity", "category_match", "content_match", "days_after_first_taken",
    "days_before_last_taken", "share_who_repeat", "days_a_taker",
)  # fmt: skip
PAIR_FEATURES = (*SOURCE_FEATURES, *OWN_FEATURES, *USER_FEATURES)
_TASTE = 2  # of HALF_LIVES_D: how fast words of what was taken count less
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

    def without(self, items: Flags, now_us: int) -> "ItemPast":
        """As if nobody had taken some items (I,)."""
        floats = (np.where(items, np.float32(0), h) for h in (self.takers, self.share_who_repeat, self.days_a_taker))
        return ItemPast(*floats, *(np.where(items, now_us, held) for held in (self.first_us, self.last_us)))

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


class _Scores:
    """One source's scores: of the head (N, H), and by a product of vectors of any pair; without vectors 0 beyond it."""

    def __init__(self, value_NH: Floats, user_ND: Floats | None = None, item_ID: Floats | None = None) -> None:
        self.value_NH, self._user_ND, self._item_ID = value_NH, user_ND, item_ID
        self._mean = value_NH.mean(axis=1, keepdims=True)
        self._std = value_NH.std(axis=1, keepdims=True) + np.float32(1e-9)

    def z(self, values: Floats) -> Floats:
        """In standard deviations from the head's mean."""
        return np.asarray((values - self._mean) / self._std, dtype=np.float32)

    def of(self, item_NT: Index) -> Floats:
        """(N, T) of pairs beyond the head."""
        if self._user_ND is None or self._item_ID is None:
            return np.zeros(item_NT.shape, dtype=np.float32)
        products = np.einsum("nd,ntd->nt", self._user_ND, self._item_ID[item_NT], optimize=True)
        return np.asarray(products, dtype=np.float32)

    def query(self, weight: float) -> Floats:
        """(N, D) vectors whose products with items' are their weighed scores, but for a constant of each user."""
        assert self._user_ND is not None
        return np.asarray(self._user_ND * np.float32(weight) / self._std, dtype=np.float32)

    def log_softmax(self, values: Floats) -> Floats:
        """Over the head."""
        top = self.value_NH.max(axis=1, keepdims=True)
        return np.asarray(values - top - np.log(np.exp(self.value_NH - top).sum(axis=1, keepdims=True)))


class _Pool(NamedTuple):
    """Where candidates come from: the head, and the items beyond it that were looked up, (N, T), -1 for none."""

    head: Index
    tail_NT: Index

    def items(self, place_NC: Index) -> Index:
        """Of places: first those of the head, then of the tail."""
        if not self.tail_NT.shape[1]:
            return self.head[place_NC]
        beyond = np.take_along_axis(self.tail_NT, np.maximum(place_NC - len(self.head), 0), axis=1)
        inside = self.head[np.minimum(place_NC, len(self.head) - 1)]
        return np.where(place_NC < len(self.head), inside, np.maximum(beyond, 0))

    def values(self, scores: _Scores, place_NC: Index) -> Floats:
        """One source's scores at places."""
        found = np.take_along_axis(scores.value_NH, np.minimum(place_NC, len(self.head) - 1), axis=1)
        if not self.tail_NT.shape[1]:
            return found
        return np.where(place_NC < len(self.head), found, scores.of(self.items(place_NC)))


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Of sources beside the regression, where candidates are found."""

    graph: float = 0.0
    sequence: float = 0.0


NO_MORE = Weights()


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
    sequence: SequenceEncoder | None = None
    weights: Weights = NO_MORE

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
    def _graph_vectors(self) -> Floats:
        return self.vectors.stacked()

    @cached_property
    def _sequence_vectors(self) -> Floats:
        assert self.sequence is not None
        return self.sequence.stacked()

    @cached_property
    def _of_head(self) -> dict[str, Floats]:
        """(D + 1, H) of either, as products want them."""
        found = {"graph": self._graph_vectors[self.head].T.copy()}
        return found if self.sequence is None else {**found, "sequence": self._sequence_vectors[self.head].T.copy()}

    @cached_property
    def index(self) -> ItemIndex | None:
        """Of the items beyond the head, if there are any."""
        tail = np.flatnonzero(self.place < 0)
        return ItemIndex(tail, self._looked_up(tail)) if len(tail) else None

    def _looked_up(self, items: Index) -> Floats:
        """(n, 2 D + 2) the vectors of graph and sequence side by side: a query weighs them."""
        graph = self._graph_vectors[items]
        return graph if self.sequence is None else np.concatenate([graph, self._sequence_vectors[items]], axis=1)

    def extended(self, items: Sequence[str], rows: Sequence[Row], *, now_us: int) -> "Sources":
        """With items that nobody took yet. rows: what the item table says of them.

        Raises:
            InputError: sentences count, and their encoder is not installed.
        """
        facts = self.facts.extended(items, rows)
        said = [sentence(row, facts.text, facts.categorical) for row in rows]
        sentences = encode(said) if self.content.takes_sentences else None
        vectors = self.vectors.extended(self.content.vectors(facts.content[self.num_items :], sentences))
        longer = replace(
            self,
            facts=facts,
            vectors=vectors,
            past=self.past.extended(len(items), now_us),
            regression=self.regression.extended(len(items)),
            liked=None if self.liked is None else self.liked.extended(len(items)),
            sequence=None if self.sequence is None else self.sequence.extended(len(items)),
        )
        if self.index is not None:
            # Shared: whoever still holds the shorter sources finds no item beyond their end.
            more = np.arange(self.num_items, longer.num_items)
            self.index.add(more, longer._looked_up(more))
            longer.__dict__["index"] = self.index
        return longer

    def as_if_new(self, items: Flags) -> "Sources":
        """What would be known if nobody had taken some items (I,): a ranker learns from it how to order new ones."""
        past, weight = self.past, np.where(items, 0.0, np.log1p(self.past.takers)).astype(np.float32)
        content = fit_content_map(self.facts, self._graph_vectors, weight)
        now = max(int(past.last_us.max(initial=0)), int(past.first_us.max(initial=0)))
        kept = sp.diags((~items[self.head]).astype(np.float32))
        return replace(
            self,
            vectors=self.vectors.where(items, content.vectors(self.facts.content, self.facts.sentences)),
            past=past.without(items, now),
            regression=ItemRegression(sp.csr_matrix(self.regression.weights @ kept)),
            liked=None if self.liked is None else ItemRegression(sp.csr_matrix(self.liked.weights @ kept)),
            content=content,
            sequence=None if self.sequence is None else self.sequence.without(items),
        )

    def user_vectors(self, taken: sp.csr_matrix) -> Floats:
        """(N, D): the degree-normalised sum over each history; zeros for an empty one."""
        length = np.maximum(np.diff(taken.indptr), 1.0)[:, None]
        return np.asarray(taken @ self.to_user / np.sqrt(length), dtype=np.float32)

    def likeness(self, item_NC: Index) -> Callable[[Index], Floats]:
        """(N,) places among candidates (N, C) → (N, C) how much each is like it: the cosine of their categories, or of
        the graph's vectors where items have none.
        """
        rows, words = np.arange(len(item_NC)), self.facts.categories
        if words.nnz:
            return lambda place: _products(words[item_NC[rows, place]], words, item_NC)
        vectors = self.vectors.item_ID[item_NC]
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
        return lambda place: np.asarray(np.einsum("ncd,nd->nc", unit, unit[rows, place], optimize=True))

    def candidates(
        self, histories: Histories, num: int, store: StoreFeatures, *, own_past: bool, wanted: Wanted = ALL_ITEMS
    ) -> Candidates:
        """The items that regression and graph rank highest and, where a user's own past counts, what was taken before.

        Items that are not wanted come last, with a score of -inf, where there are not enough others.
        """
        taken, own = histories.matrix(self.num_items), OwnPast(histories, self.num_items)
        by = self._scores(histories, taken)
        weights = {"regression": 1.0, "graph": self.weights.graph, "sequence": self.weights.sequence}

        def blended(values: Callable[[_Scores], Floats]) -> Floats:
            parts = [np.float32(weights[name]) * s.z(values(s)) for name, s in by.items() if weights.get(name)]
            return np.asarray(np.sum(parts, axis=0), dtype=np.float32) if len(parts) > 1 else parts[0]

        score = blended(lambda scores: scores.value_NH)
        num_own = round(_OWN_CANDIDATES * num) if own_past else 0
        own_user, own_item, own_score = _own_first(own, num_own, wanted.excluded)
        in_head = self.place[own_item] >= 0
        score[own_user[in_head], self.place[own_item[in_head]]] += own_score[in_head]
        if wanted.excluded is not None:
            user, item = wanted.excluded.nonzero()
            in_head = self.place[item] >= 0
            score[user[in_head], self.place[item[in_head]]] = -np.inf
        if wanted.allowed is not None:
            score[:, ~wanted.allowed[self.head]] = -np.inf
        pool = _Pool(self.head, np.zeros((len(score), 0), dtype=np.int64))
        if self.index is not None:
            pool = _Pool(self.head, self._beyond(by, (own_user, own_item), num, wanted))
            known = np.maximum(pool.tail_NT, 0)
            tail = blended(lambda scores: scores.of(known))
            tail += _own_scores(pool.tail_NT, own_user, own_item, own_score, self.num_items)
            score = np.concatenate([score, np.where(pool.tail_NT < 0, -np.inf, tail)], axis=1)
        place = top_candidates(score, num)
        item = pool.items(place)
        features = self._features(by, pool, place, taken, own)
        parts = [
            features,
            # What was taken before cannot be taken again otherwise.
            own.features(item) if own_past else np.zeros((*item.shape, len(OWN_FEATURES)), dtype=np.float32),
            np.broadcast_to(own.user_features[:, None], (*item.shape, len(USER_FEATURES))),
            store(item.ravel()).reshape(*item.shape, -1),
        ]
        joined = np.concatenate(parts, axis=-1, dtype=np.float32)
        return Candidates(item, np.take_along_axis(score, place, axis=1), joined)

    def _scores(self, histories: Histories, taken: sp.csr_matrix) -> dict[str, _Scores]:
        ones = np.ones((histories.num_users, 1), dtype=np.float32)
        graph_ND = np.concatenate([self.user_vectors(taken), ones], axis=1)
        by = {
            "regression": _Scores(self.regression.scores(taken)),
            "graph": _Scores(graph_ND @ self._of_head["graph"], graph_ND, self._graph_vectors),
        }
        if self.sequence is not None:
            asked = self.sequence.users(histories)
            by["sequence"] = _Scores(asked @ self._of_head["sequence"], asked, self._sequence_vectors)
        if self.liked is not None:
            by["liked"] = _Scores(self.liked.scores(histories.where(histories.liked).matrix(self.num_items)))
        return by

    def _features(
        self, by: Mapping[str, _Scores], pool: _Pool, place: Index, taken: sp.csr_matrix, own: OwnPast
    ) -> Floats:
        """(N, C, F) of SOURCE_FEATURES."""
        item = pool.items(place)
        none = np.zeros(item.shape, dtype=np.float32)
        columns: dict[str, Floats] = {
            "log_popularity": self.log_popularity[item],
            "category_match": _match(taken, self.facts.categories, item),
            "content_match": _match(own.decayed_matrix(_TASTE), self.facts.content, item),
            "days_after_first_taken": _signed_log((own.last_us[:, None] - self.past.first_us[item]) / DAY_US),
            "days_before_last_taken": _signed_log((self.past.last_us[item] - own.first_us[:, None]) / DAY_US),
            "share_who_repeat": self.past.share_who_repeat[item],
            "days_a_taker": np.log1p(self.past.days_a_taker[item]),
        }
        for name, scores in by.items():
            found = pool.values(scores, place)
            if name == "regression":
                columns["regression"] = found
            if name in ("graph", "sequence"):
                columns[f"{name}_log_softmax"] = scores.log_softmax(found)
            columns["liked_regression_z" if name == "liked" else f"{name}_z"] = scores.z(found)
        return np.stack([columns.get(name, none) for name in SOURCE_FEATURES], axis=-1, dtype=np.float32)

    def _beyond(self, by: Mapping[str, _Scores], own_first: tuple[Index, Index], num: int, wanted: Wanted) -> Index:
        """(N, T) items beyond the head: the best by graph and sequence, and a user's own. -1: none."""
        assert self.index is not None
        # Beyond the head the regression says nothing, so something else has to.
        weights = self.weights if self.weights != NO_MORE else Weights(graph=1.0)
        query = np.concatenate([by[name].query(w) for name, w in asdict(weights).items() if name in by], axis=1)
        num_users, num_items = len(query), self.num_items
        excluded = np.zeros(0, dtype=np.int64)
        if wanted.excluded is not None:
            user, item = wanted.excluded.nonzero()
            beyond = self.place[item] < 0
            excluded = np.sort(user[beyond].astype(np.int64) * num_items + item[beyond])
        more = int(np.bincount(excluded // num_items, minlength=1).max())
        found, _ = self.index.search(query, min(num + more, len(self.index)), allowed=wanted.allowed)
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
        return tail


def _match(taken: sp.csr_matrix, words: sp.csr_matrix, item_NC: Index) -> Floats:
    """(N, C) cosine of the words of a history, weighed as its items (N, I) are, and those of an item (I, G)."""
    profile = sp.csr_matrix(taken @ words)
    length = np.sqrt(np.asarray(profile.multiply(profile).sum(1)).ravel())
    return _products(sp.csr_matrix(sp.diags(1.0 / np.maximum(length, 1e-6)) @ profile), words, item_NC)


def _products(profile: sp.csr_matrix, words: sp.csr_matrix, item_NC: Index) -> Floats:
    """(N, C) of rows (N, G) and those of items (I, G)."""
    from assay_platform.kernels.sparse_numba import chosen_products

    out = np.zeros(item_NC.shape, dtype=np.float32)
    if words.shape[1]:
        chosen_products(profile.toarray().astype(np.float32), words.indptr, words.indices, words.data, item_NC, out)
    return out


def _signed_log(values: NDArray[np.float64]) -> Floats:
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)), dtype=np.float32)


def _own_first(own: OwnPast, num: int, excluded: sp.csr_matrix | None) -> tuple[Index, Index, Floats]:
    """User, item and what is added to the score of what each user took most, lately for more: the first `num` of it
    that are not excluded (N, I).
    """
    decayed = own.decayed(-1)
    order = np.lexsort((-decayed, own.user))
    if excluded is not None and num:
        user, item = excluded.nonzero()
        keys = np.sort(user.astype(np.int64) * excluded.shape[1] + item)
        order = order[~_within(own.pair[order], keys)]
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
