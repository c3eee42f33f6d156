"""The recommender: sources score every item for a history, an MoE ranker orders the best of them.

`PairRanker` is the torch module, on the same backbone as the fraud model. `Recommender` is what services and
pipelines hold: sources, ranker, histories and item facts, saved and loaded as an artifact. It needs no graph
library: a user's vector is a sum over its history.
"""

# N users, I items, D width of a vector, C candidates, F features of a (user, item) pair

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay_platform.errors import ArtifactError, InputError
from assay_platform.models.artifact import load_artifact, load_weights, save_artifact
from assay_platform.models.histories import (
    DAY_US,
    OWN_FEATURES,
    USER_FEATURES,
    Floats,
    Histories,
    Index,
    OwnPast,
)
from assay_platform.models.item_regression import ItemRegression
from assay_platform.models.lists import diversified
from assay_platform.moe import Backbone, BackboneConfig

# What sources and the item table say of a pair; features of the store are appended to PAIR_FEATURES.
SOURCE_FEATURES = (
    "regression", "regression_z", "liked_regression_z", "graph_log_softmax", "graph_z", "log_popularity",
    "category_match", "days_after_first_taken", "days_before_last_taken", "share_who_repeat", "days_a_taker",
)  # fmt: skip
PAIR_FEATURES = (*SOURCE_FEATURES, *OWN_FEATURES, *USER_FEATURES)
_OWN_CANDIDATES = 0.75  # the most of the candidates that may come from a user's own past
_FAR = 5.0  # standard deviations beyond which a feature says nothing more
_TOKEN = re.compile(r"[|,;\s]+")
_MAX_TOKENS = 512
_RANKING_CHUNK = 256


_RANKER_BACKBONE = BackboneConfig(width=64, hidden=64, num_blocks=1, num_experts=4, top_k=2, dropout=0.2)


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """Shape of the ranker. features: which of PAIR_FEATURES it takes. num_store_features: item features read from the
    feature store, after these.
    """

    features: tuple[str, ...] = PAIR_FEATURES
    num_store_features: int = 0
    num_candidates: int = 200
    backbone: BackboneConfig = field(default_factory=lambda: _RANKER_BACKBONE)

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.features) + self.num_store_features

    @property
    def columns(self) -> list[int]:
        """Where its features are among those of `Candidates`.

        Raises:
            ArtifactError: this release does not have one of them.
        """
        unknown = sorted(set(self.features) - set(PAIR_FEATURES))
        if unknown:
            raise ArtifactError(f"the ranker takes the feature {unknown[0]!r}, which this release does not have")
        places = [PAIR_FEATURES.index(name) for name in self.features]
        return [*places, *range(len(PAIR_FEATURES), len(PAIR_FEATURES) + self.num_store_features)]


class PairRanker(nn.Module):
    """Scores candidates by their features: linear + MoE, both of which start at zero."""

    mean_F: Tensor
    std_F: Tensor

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(config.num_features))
        self.register_buffer("std_F", torch.ones(config.num_features))
        self.linear = nn.Linear(config.num_features, 1)
        self.backbone = Backbone(config.num_features, config.backbone)
        self.head = nn.Linear(config.backbone.width, 1)
        for layer in (self.linear, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features_NCF: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and the balance loss (scalar)."""
        scaled = ((features_NCF - self.mean_F) / self.std_F).clamp(-_FAR, _FAR)
        out = self.backbone(scaled.flatten(0, 1))
        correction_NC = self.head(out.y_ND).view(scaled.shape[:2])
        return self.linear(scaled).squeeze(-1) + correction_NC, out.balance_loss


class ItemFacts(NamedTuple):
    """What is known of items: titles for people, unit category vectors (I, G), and the 'column:word' that each of the G
    stands for.
    """

    titles: tuple[str, ...]
    categories_IG: Floats
    words: tuple[str, ...] = ()


def item_facts(
    items: Sequence[str],
    table: Mapping[str, Mapping[str, str]],
    *,
    text: Sequence[str],
    categorical: Sequence[str],
) -> ItemFacts:
    """Collect titles, and categories split into words, the most frequent 512 of them."""
    titles = tuple(" · ".join(table.get(i, {}).get(n, "") for n in text).strip(" ·") or i for i in items)
    words = [
        {f"{name}:{w}" for name in categorical for w in _TOKEN.split(table.get(i, {}).get(name, "")) if w}
        for i in items
    ]
    counts: dict[str, int] = {}
    for found in words:
        for word in found:
            counts[word] = counts.get(word, 0) + 1
    kept = {w: j for j, w in enumerate(sorted(counts, key=lambda w: (-counts[w], w))[:_MAX_TOKENS])}
    categories_IG = np.zeros((len(items), max(1, len(kept))), dtype=np.float32)
    for row, found in enumerate(words):
        for word in found & kept.keys():
            categories_IG[row, kept[word]] = 1.0
    norm = np.linalg.norm(categories_IG, axis=1, keepdims=True)
    return ItemFacts(titles, categories_IG / np.maximum(norm, 1.0), tuple(kept))


class ItemVectors(NamedTuple):
    """What the graph encoder learned of items."""

    item_ID: Floats
    bias_I: Floats
    scale: float


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


class Candidates(NamedTuple):
    """What the ranker orders. item, score (N, C): best first by the sources alone. features (N, C, F)."""

    item: Index
    score: Floats
    features: Floats


@dataclass(frozen=True)
class Sources:
    """Everything that scores items for a history. Fitted on the events of one moment; pure functions of histories.

    liked: the regression of what was liked alone, where ratings tell.
    """

    regression: ItemRegression
    liked: ItemRegression | None
    vectors: ItemVectors
    past: ItemPast
    facts: ItemFacts
    graph_weight: float = 0.5  # of the graph beside the regression where candidates are found

    @cached_property
    def log_popularity(self) -> Floats:
        """(I,) ln(1 + takers)."""
        return np.log1p(self.past.takers)

    @cached_property
    def to_user(self) -> Floats:
        """(I, D) what an item adds to the vector of a user with one item."""
        return np.asarray(self.vectors.item_ID * np.maximum(self.past.takers, 1.0)[:, None] ** -0.5, dtype=np.float32)

    def user_vectors(self, taken: sp.csr_matrix) -> Floats:
        """(N, D): the degree-normalised sum over each history; zeros for an empty one."""
        length = np.maximum(np.diff(taken.indptr), 1.0)[:, None]
        return np.asarray(taken @ self.to_user / np.sqrt(length), dtype=np.float32)

    def graph_scores(self, taken: sp.csr_matrix) -> Floats:
        """(N, I) log-softmax over all items."""
        logits = (self.user_vectors(taken) @ self.vectors.item_ID.T) * self.vectors.scale + self.vectors.bias_I
        logits -= logits.max(axis=1, keepdims=True)
        return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), dtype=np.float32)

    def candidates(
        self, histories: Histories, num: int, store_IF: Floats, *, repeats: bool, excluded: sp.csr_matrix | None
    ) -> Candidates:
        """The items that regression and graph rank highest and, where items are taken again, what was taken before.

        store_IF: item features of the store. excluded (N, I): come last, with a score of -inf.
        """
        num_items = len(self.past.takers)
        taken, own = histories.matrix(num_items), OwnPast(histories, num_items)
        regression, graph = self.regression.scores(taken), self.graph_scores(taken)
        regression_z, graph_z = _standardised(regression), _standardised(graph)
        score = regression_z + self.graph_weight * graph_z
        if repeats:
            _own_first(score, own, round(_OWN_CANDIDATES * num))
        if excluded is not None:
            score[excluded.nonzero()] = -np.inf
        item = top_candidates(score, num)

        def of(scores_NI: Floats) -> Floats:
            return np.take_along_axis(scores_NI, item, axis=1)

        liked_z = np.zeros(item.shape, dtype=np.float32)
        if self.liked is not None:
            liked_z = of(_standardised(self.liked.scores(histories.where(histories.liked).matrix(num_items))))
        profile = taken @ self.facts.categories_IG
        profile /= np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-6)
        match = np.einsum("ng,ncg->nc", profile, self.facts.categories_IG[item], optimize=True)
        columns = (
            of(regression), of(regression_z), liked_z, of(graph), of(graph_z), self.log_popularity[item], match,
            _signed_log((own.last_us[:, None] - self.past.first_us[item]) / DAY_US),
            _signed_log((self.past.last_us[item] - own.first_us[:, None]) / DAY_US),
            self.past.share_who_repeat[item], np.log1p(self.past.days_a_taker[item]),
        )  # fmt: skip
        parts = [
            np.stack([np.asarray(c, dtype=np.float32) for c in columns], axis=-1),
            # What was taken before cannot be taken again otherwise.
            own.features(item) if repeats else np.zeros((*item.shape, len(OWN_FEATURES)), dtype=np.float32),
            np.broadcast_to(own.user_features[:, None], (*item.shape, len(USER_FEATURES))),
            store_IF[item],
        ]
        return Candidates(item, of(score), np.concatenate(parts, axis=-1, dtype=np.float32))


def _standardised(scores_NI: Floats) -> Floats:
    mean, std = scores_NI.mean(axis=1, keepdims=True), scores_NI.std(axis=1, keepdims=True)
    return np.asarray((scores_NI - mean) / (std + 1e-9), dtype=np.float32)


def _signed_log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.sign(values) * np.log1p(np.abs(values)))


def _own_first(score_NI: Floats, own: OwnPast, num: int) -> None:
    """Lift what each user took most, lately for more, above all else: the first `num` of it."""
    decayed = own.decayed(-1)
    order = np.lexsort((-decayed, own.user))
    user = own.user[order]
    starts = np.searchsorted(user, user, side="left")
    order = order[np.arange(len(order)) - starts < num]
    score_NI[own.user[order], own.item[order]] += 100.0 + decayed[order]


def top_candidates(scores_NI: Floats, num: int) -> Index:
    """(N, C) item indices by descending score."""
    num = min(num, scores_NI.shape[1])
    rough = np.argpartition(-scores_NI, num - 1, axis=1)[:, :num]
    order = np.argsort(-np.take_along_axis(scores_NI, rough, axis=1), axis=1, kind="stable")
    return np.take_along_axis(rough, order, axis=1).astype(np.int64)


class Ranked(NamedTuple):
    """Items of one user, best first."""

    items: list[int]
    scores: list[float]


class Recommender:
    """A trained model ready to answer. Thread-safe: answering changes nothing."""

    def __init__(
        self,
        *,
        ranker: PairRanker,
        config: RankerConfig,
        users: Sequence[str],
        items: Sequence[str],
        histories: Histories,
        sources: Sources,
        store_features_IF: Floats,
        repeats: bool,
        use_ranker: bool = True,
        diversity: float = 0.0,
    ) -> None:
        """histories: of `users`, what the sources were fitted on. store_features_IF: item features as the feature store
        had them at the end of training, transformed. diversity: see `lists`; 0 leaves the ranker's order.
        """
        self._ranker = ranker.eval().requires_grad_(False)
        self.fences = ranker.backbone.guard()  # an expert that fails is left out, the others answer
        self._config, self._columns = config, config.columns
        self.items = tuple(items)
        self.users = tuple(users)
        self.item_index = {item: i for i, item in enumerate(items)}
        self._user_index = {user: u for u, user in enumerate(users)}
        self.histories, self._sources = histories, sources
        norms = np.linalg.norm(sources.vectors.item_ID, axis=1, keepdims=True)
        self._unit_ID = sources.vectors.item_ID / np.maximum(norms, 1e-9)
        self.store_features_IF = store_features_IF
        self.repeats = repeats
        self.use_ranker, self.diversity = use_ranker, diversity

    @property
    def num_parameters(self) -> int:
        """Trained weights: of the regression, item vectors, biases and the ranker."""
        sources = self._sources
        learned = sources.regression.weights.nnz + sources.vectors.item_ID.size + len(self.items)
        learned += 0 if sources.liked is None else sources.liked.weights.nnz
        return int(learned) + sum(p.numel() for p in self._ranker.parameters())

    def title(self, item: int) -> str:
        """For people."""
        return self._sources.facts.titles[item]

    def having(self, column: str, value: str) -> NDArray[np.bool_]:
        """(I,) the items with all words of a value in a column of the item table.

        Raises:
            InputError: no item has such a column, or such a word in it.
        """
        words = self._sources.facts.words
        columns = sorted({word.partition(":")[0] for word in words})
        if column not in columns:
            raise InputError(f"{column!r} is not known of items; known are {', '.join(columns) or 'no columns'}")
        chosen = np.ones(len(self.items), dtype=bool)
        for part in filter(None, _TOKEN.split(value)):
            if f"{column}:{part}" not in words:
                raise InputError(f"no item has {part!r} in {column!r}")
            chosen &= self._sources.facts.categories_IG[:, words.index(f"{column}:{part}")] > 0
        return chosen

    def knows_user(self, user: str) -> bool:
        """Whether training saw this user."""
        return user in self._user_index

    def history(self, user: str, recent: Sequence[tuple[int, str]] = (), *, now_us: int | None = None) -> Histories:
        """One user's events: those of training, and of `recent`, as (time_us, item), what the model knows besides.

        now_us: by default just after the newest event of all.
        """
        row, held = self._user_index.get(user), self.histories
        # What is known of a newer event is when and what, so it counts as liked.
        liked = {(time_us, self.item_index[item]): True for time_us, item in recent if item in self.item_index}
        if row is not None:
            part = held.part(row, row + 1)
            known = zip(part.time_us.tolist(), part.item.tolist(), part.liked.tolist(), strict=True)
            liked |= {(time_us, item): flag for time_us, item, flag in known}
        events = sorted(event for event in liked if now_us is None or event[0] < now_us)
        latest = int(held.now_us.max(initial=0))
        moment = max([latest, *(time_us + 1 for time_us, _ in events)]) if now_us is None else now_us
        return Histories(
            np.array([0, len(events)], dtype=np.int64),
            np.array([item for _, item in events], dtype=np.int64),
            np.array([time_us for time_us, _ in events], dtype=np.int64),
            np.array([liked[event] for event in events], dtype=bool),
            np.array([moment], dtype=np.int64),
        )

    def rank(
        self,
        histories: Histories,
        *,
        num: int,
        excluded: sp.csr_matrix | None,
        store_features_IF: Floats | None = None,
    ) -> tuple[Index, Floats]:
        """Top `num` items (N, num) and their scores for N histories, full ranking: no item is left out unseen.

        The ranker orders the sources' best, at least `num` of them. Excluded items come last, with a score of -inf.
        """
        store_IF = self.store_features_IF if store_features_IF is None else store_features_IF
        tops, values = [], []
        for start in range(0, histories.num_users, _RANKING_CHUNK):
            end = min(start + _RANKING_CHUNK, histories.num_users)
            part_excluded = None if excluded is None else excluded[start:end]
            top, score = self._rank_chunk(histories.part(start, end), num, part_excluded, store_IF)
            tops.append(top)
            values.append(score)
        return np.concatenate(tops), np.concatenate(values)

    def _rank_chunk(
        self, histories: Histories, num: int, excluded: sp.csr_matrix | None, store_IF: Floats
    ) -> tuple[Index, Floats]:
        found = self._sources.candidates(
            histories,
            max(num, self._config.num_candidates),
            store_IF[:, : self._config.num_store_features],
            repeats=self.repeats,
            excluded=excluded,
        )
        if not self.use_ranker:
            return self._listed(found.item, found.score, num)
        with torch.inference_mode():
            logits, _ = self._ranker(torch.from_numpy(found.features[..., self._columns]))
        # Where few items are left, excluded ones are among the candidates.
        final_NC = np.where(np.isneginf(found.score), -np.inf, logits.numpy())
        return self._listed(found.item, final_NC, num)

    def _listed(self, item_NC: Index, score_NC: Floats, num: int) -> tuple[Index, Floats]:
        if self.diversity > 0:
            order = diversified(score_NC, self._unit_ID[item_NC], weight=self.diversity, num=num)
        else:
            order = np.argsort(-score_NC, axis=1, kind="stable")[:, :num]
        return np.take_along_axis(item_NC, order, axis=1), np.take_along_axis(score_NC, order, axis=1)

    def recommend(
        self,
        history: Histories,
        *,
        k: int,
        exclude: Index,
        store_features_IF: Floats | None = None,
    ) -> Ranked:
        """Best k items for one history, without the excluded ones."""
        num_items = len(self.items)
        excluded = sp.csr_matrix(
            (np.ones(len(exclude)), (np.zeros(len(exclude), dtype=np.int64), exclude)), (1, num_items)
        )
        k = min(k, num_items - len(exclude))
        if k <= 0:
            return Ranked([], [])
        top, score = self.rank(history, num=k, excluded=excluded, store_features_IF=store_features_IF)
        return Ranked(top[0].tolist(), [float(v) for v in score[0]])

    def recommend_known(self, user: str, *, k: int) -> list[tuple[str, float]]:
        """Item ids and scores from the training history alone; popular items for an unknown user."""
        history = self.history(user)
        seen = np.unique(history.item)
        if not len(seen):
            return [(self.items[i], float(s)) for i, s in zip(*self.popular(k, seen), strict=True)]
        ranked = self.recommend(history, k=k, exclude=seen[:0] if self.repeats else seen)
        return [(self.items[i], s) for i, s in zip(ranked.items, ranked.scores, strict=True)]

    def popular(self, k: int, exclude: Index, popularity_I: NDArray[np.floating] | None = None) -> Ranked:
        """The answer for somebody of whom nothing is known. popularity_I: fresher counts, if there are any."""
        score_I = np.asarray(self._sources.log_popularity if popularity_I is None else popularity_I, dtype=np.float64)
        score_I = score_I.copy()
        score_I[exclude] = -np.inf
        order = np.argsort(-score_I, kind="stable")[: max(0, min(k, len(score_I) - len(exclude)))]
        return Ranked(order.tolist(), [float(v) for v in score_I[order]])

    def because(self, item: int, taken: Index) -> int | None:
        """The item of those taken that adds most to this item's score: to the regression's, or to the graph's where the
        regression knows no connection. None if nothing adds to either.

        Both scores are sums over what was taken, so this is what they say, not a guess beside them.
        """
        if not len(taken):
            return None
        sources = self._sources
        for added in (sources.regression.added(taken, item), sources.to_user[taken] @ sources.vectors.item_ID[item]):
            best = int(np.argmax(added))
            if added[best] > 0:
                return int(taken[best])
        return None

    def save(self, folder: Path, companions: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the artifact; see `artifact`."""
        sources, held = self._sources, self.histories
        vectors, regressions = sources.vectors, {"regression": sources.regression, "liked": sources.liked}
        tensors = {f"ranker.{name}": value for name, value in self._ranker.state_dict().items()}
        arrays = {
            **{
                f"{name}.{part}": array
                for name, regression in regressions.items()
                if regression is not None
                for part, array in regression.arrays().items()
            },
            "item_ID": vectors.item_ID,
            "bias_I": vectors.bias_I,
            "categories_IG": sources.facts.categories_IG,
            "store_features_IF": self.store_features_IF,
            **{f"past.{name}": array for name, array in sources.past._asdict().items()},
            **{f"history.{name}": array for name, array in held._asdict().items()},
        }
        tensors |= {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        config = {
            "ranker": asdict(self._config),
            "users": self.users,
            "items": self.items,
            "titles": sources.facts.titles,
            "words": sources.facts.words,
            "scale": vectors.scale,
            "graph_weight": sources.graph_weight,
            "repeats": self.repeats,
            "use_ranker": self.use_ranker,
            "diversity": self.diversity,
        }
        save_artifact(folder, kind="recommend", config=config, tensors=tensors, companions=companions)

    @staticmethod
    def load(folder: Path) -> "Recommender":
        """Read an artifact; nothing is unpickled.

        Raises:
            ArtifactError: the artifact is damaged or does not fit this release.
        """
        config, tensors = load_artifact(folder, kind="recommend")
        try:
            shape = config["ranker"]
            ranker_config = RankerConfig(
                features=tuple(shape["features"]),
                num_store_features=int(shape["num_store_features"]),
                num_candidates=int(shape["num_candidates"]),
                backbone=BackboneConfig(**shape["backbone"]),
            )
            users, items = [str(u) for u in config["users"]], [str(i) for i in config["items"]]
            facts = ItemFacts(tuple(config["titles"]), tensors.pop("categories_IG").numpy(), tuple(config["words"]))
            vectors = ItemVectors(tensors.pop("item_ID").numpy(), tensors.pop("bias_I").numpy(), float(config["scale"]))
            regressions = {
                name: ItemRegression.of_arrays(
                    {part: tensors.pop(f"{name}.{part}").numpy() for part in ("weight", "item", "start")}
                )
                for name in ("regression", "liked")
                if f"{name}.weight" in tensors
            }
            regression, liked = regressions["regression"], regressions.get("liked")
            past = ItemPast(*(tensors.pop(f"past.{name}").numpy() for name in ItemPast._fields))
            histories = Histories(*(tensors.pop(f"history.{name}").numpy() for name in Histories._fields))
            store_features_IF = tensors.pop("store_features_IF").numpy()
            graph_weight = float(config["graph_weight"])
            repeats, use_ranker = bool(config["repeats"]), bool(config["use_ranker"])
            diversity = float(config["diversity"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{folder}: config.json does not describe a recommender: {error}") from error
        ranker = PairRanker(ranker_config)
        load_weights(ranker, {name.removeprefix("ranker."): t for name, t in tensors.items()}, folder)
        return Recommender(
            ranker=ranker,
            config=ranker_config,
            users=users,
            items=items,
            histories=histories,
            sources=Sources(regression, liked, vectors, past, facts, graph_weight),
            store_features_IF=store_features_IF,
            repeats=repeats,
            use_ranker=use_ranker,
            diversity=diversity,
        )
