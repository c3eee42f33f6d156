"""The recommender: sources score every item for a history, an MoE ranker orders the best of them.

`PairRanker` is the torch module, on the same backbone as the fraud model. `Recommender` is what services and
pipelines hold: sources, ranker, histories and item facts, saved and loaded as an artifact. It needs no graph
library: a user's vector is a sum over its history.
"""

# N users, I items, D width of a vector, C candidates, F features of a (user, item) pair, T tasks

import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from assay_platform.errors import ArtifactError
from assay_platform.models.artifact import load_artifact, load_weights, save_artifact
from assay_platform.models.content import ContentMap, ItemFacts, Row
from assay_platform.models.histories import DAY_US, Again, Flags, Floats, Histories, Index
from assay_platform.models.item_regression import ItemRegression
from assay_platform.models.list_rules import NO_RULES, ListRules
from assay_platform.models.lists import Limits, banned, explored, varied
from assay_platform.models.sequence import SequenceConfig, SequenceEncoder
from assay_platform.models.sources import (
    ALL_ITEMS,
    PAIR_FEATURES,
    ItemPast,
    ItemVectors,
    Sources,
    StoreFeatures,
    Wanted,
    Weights,
    top_candidates,
)
from assay_platform.moe import Backbone, BackboneConfig

_FAR = 5.0  # standard deviations beyond which a feature says nothing more
_RANKING_CHUNK, _RANKING_THREADS = 256, 16
_EXPLORED = 50  # candidates that chance may give a place
_RANKER_BACKBONE = BackboneConfig(width=64, hidden=64, num_blocks=1, num_experts=4, top_k=2, dropout=0.2)


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """Shape of the ranker. features: which of PAIR_FEATURES it takes. num_store_features: item features read from the
    feature store, after these. tasks: what users may do with an item, each with logits of its own; lists are for the
    first of them.
    """

    features: tuple[str, ...] = PAIR_FEATURES
    num_store_features: int = 0
    num_candidates: int = 200
    tasks: tuple[str, ...] = ("taken",)
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
    """Scores candidates by their features, for every task: linear + MoE, both of which start at zero.

    mix_T: how much the logits of each task count in a list.
    """

    mean_F: Tensor
    std_F: Tensor
    mix_T: Tensor

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.register_buffer("mean_F", torch.zeros(config.num_features))
        self.register_buffer("std_F", torch.ones(config.num_features))
        num_tasks = len(config.tasks)
        self.register_buffer("mix_T", torch.eye(1, num_tasks)[0])
        self.linear = nn.Linear(config.num_features, num_tasks)
        self.backbone = Backbone(config.num_features, config.backbone)
        self.head = nn.Linear(config.backbone.width, num_tasks)
        for layer in (self.linear, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features_NCF: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C, T) and the balance loss (scalar). What is not known of a pair, a NaN, counts as the mean."""
        scaled = ((features_NCF - self.mean_F) / self.std_F).nan_to_num(0.0).clamp(-_FAR, _FAR)
        out = self.backbone(scaled.flatten(0, 1))
        correction_NCT = self.head(out.y_ND).unflatten(0, scaled.shape[:2])
        return self.linear(scaled) + correction_NCT, out.balance_loss

    def score(self, features_NCF: Tensor) -> Tensor:
        """(N, C) what lists are ordered by."""
        logits_NCT, _ = self(features_NCF)
        score_NC: Tensor = logits_NCT @ self.mix_T
        return score_NC

    def mixed(self, share: float) -> "PairRanker":
        """The same with so much of every task but the first."""
        other = deepcopy(self)
        other.mix_T[1:] = share
        return other


class Ranked(NamedTuple):
    """Items of one user, best first. propensity: how likely each had its place."""

    items: list[int]
    scores: list[float]
    propensity: list[float]

    @staticmethod
    def of(items: Index, scores: Floats, last: float = 1.0) -> "Ranked":
        """last: how likely the last one had its place; the others were certain."""
        propensity = [1.0] * max(0, len(items) - 1) + [last] * min(1, len(items))
        return Ranked(items.tolist(), [float(score) for score in scores], propensity)


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
        again: Again,
        use_ranker: bool = True,
        diversity: float = 0.0,
        num_ranked: int | None = None,
    ) -> None:
        """histories: of `users`, what the sources were fitted on. store_features_IF: item features as the feature store
        had them at the end of training, transformed. diversity: see `lists`; 0 leaves the ranker's order. num_ranked:
        how many candidates the ranker orders; by default as many as it learned from.
        """
        self._ranker = ranker.eval().requires_grad_(False)
        self.fences = ranker.backbone.guard()  # an expert that fails is left out, the others answer
        self._config, self._columns = config, config.columns
        self.items = tuple(items)
        self.users = tuple(users)
        self.item_index = {item: i for i, item in enumerate(items)}
        self._user_index = {user: u for u, user in enumerate(users)}
        self.histories, self.sources = histories, sources
        self.store_features_IF = store_features_IF
        self.again = again
        self.use_ranker, self.diversity = use_ranker, diversity
        self.num_ranked = config.num_candidates if num_ranked is None else num_ranked

    def extended(
        self, items: Sequence[str], rows: Sequence[Row], *, now_us: int, store_features_NF: Floats
    ) -> "Recommender":
        """With items that nobody took yet; this one stays as it is. rows: what the item table says of them."""
        longer = copy(self)
        longer.items = (*self.items, *items)
        longer.item_index = {item: i for i, item in enumerate(longer.items)}
        longer.sources = self.sources.extended(items, rows, now_us=now_us)
        longer.store_features_IF = np.concatenate([self.store_features_IF, store_features_NF], dtype=np.float32)
        return longer

    @property
    def num_parameters(self) -> int:
        """Trained weights: of the regression, item vectors, biases and the ranker."""
        sources = self.sources
        learned = sources.regression.weights.nnz + sources.vectors.item_ID.size + len(self.items)
        learned += 0 if sources.liked is None else sources.liked.weights.nnz
        nets = [self._ranker, *([] if sources.sequence is None else [sources.sequence])]
        return int(learned) + sum(p.numel() for net in nets for p in net.parameters())

    def title(self, item: int) -> str:
        """For people."""
        return self.sources.facts.titles[item]

    def having(self, column: str, value: str) -> Flags:
        """(I,) the items with all words of a value in a category; see `ItemFacts.having`."""
        return self.sources.facts.having(column, value)

    def knows_user(self, user: str) -> bool:
        """Whether training saw this user."""
        return user in self._user_index

    def had(self, history: Histories) -> Index:
        """Items that a list for this one history leaves out unless somebody wants it otherwise."""
        excluded = self.again.excluded(history, len(self.items))
        return history.item[:0] if excluded is None else excluded.indices.astype(np.int64)

    def history(
        self, user: str, recent: Sequence[tuple[int, str, float]] = (), *, now_us: int | None = None
    ) -> Histories:
        """One user's events: those of training, and of `recent`, as (time_us, item, strength), what the model knows
        besides.

        now_us: by default just after the newest event of all.
        """
        row, held = self._user_index.get(user), self.histories
        # Of several things that a user did with an item at one instant, the strongest counts.
        found = sorted(
            (time_us, self.item_index[i], strength) for time_us, i, strength in recent if i in self.item_index
        )
        if row is not None:
            part = held.part(row, row + 1)
            known = zip(part.time_us.tolist(), part.item.tolist(), part.strength.tolist(), strict=True)
            found = sorted([*found, *known])
        strengths = {(time_us, item): strength for time_us, item, strength in found}
        events = [event for event in strengths if now_us is None or event[0] < now_us]
        latest = int(held.now_us.max(initial=0))
        moment = max([latest, *(time_us + 1 for time_us, _ in events)]) if now_us is None else now_us
        return Histories(
            np.array([0, len(events)], dtype=np.int64),
            np.array([item for _, item in events], dtype=np.int64),
            np.array([time_us for time_us, _ in events], dtype=np.int64),
            np.array([strengths[event] for event in events], dtype=np.float32),
            np.array([moment], dtype=np.int64),
        )

    def rank(
        self, histories: Histories, *, num: int, wanted: Wanted = ALL_ITEMS, store: StoreFeatures | None = None
    ) -> tuple[Index, Floats]:
        """Top `num` items (N, num) and their scores for N histories, full ranking: no item is left out unseen.

        The ranker orders the sources' best, at least `num` of them. Items that are not wanted come last, with a score
        of -inf. store: fresher features of items than those of the end of training.
        """

        def ranked(start: int) -> tuple[Index, Floats]:
            end = min(start + _RANKING_CHUNK, histories.num_users)
            return self._rank_chunk(histories.part(start, end), num, wanted.part(start, end), store or self._stored)

        starts = range(0, histories.num_users, _RANKING_CHUNK)
        if not starts:
            return np.zeros((0, num), dtype=np.int64), np.zeros((0, num), dtype=np.float32)
        if len(starts) == 1:
            return ranked(0)
        with ThreadPoolExecutor(min(_RANKING_THREADS, os.cpu_count() or 1)) as pool:
            parts = list(pool.map(ranked, starts))
        tops, values = zip(*parts, strict=True)
        return np.concatenate(tops), np.concatenate(values)

    def _stored(self, items: Index) -> Floats:
        return self.store_features_IF[items]

    def _rank_chunk(self, histories: Histories, num: int, wanted: Wanted, store: StoreFeatures) -> tuple[Index, Floats]:
        found = self.sources.candidates(
            histories, max(num, self.num_ranked), store, own_past=self.again.own_past, wanted=wanted
        )
        if not self.use_ranker:
            return self._listed(found.item, found.score, num)
        with torch.inference_mode():
            score_NC = self._ranker.score(torch.from_numpy(found.features[..., self._columns]))
        # Where few items are left, unwanted ones are among the candidates.
        final_NC = np.where(np.isneginf(found.score), -np.inf, score_NC.numpy())
        return self._listed(found.item, final_NC, num)

    def _listed(self, item_NC: Index, score_NC: Floats, num: int) -> tuple[Index, Floats]:
        if self.diversity > 0:
            alike = self.sources.likeness(item_NC)
            order = varied(score_NC, alike, weight=self.diversity, num=num)
        else:
            order = np.argsort(-score_NC, axis=1, kind="stable")[:, :num]
        return np.take_along_axis(item_NC, order, axis=1), np.take_along_axis(score_NC, order, axis=1)

    def recommend(
        self,
        history: Histories,
        *,
        k: int,
        exclude: Index,
        allowed: Flags | None = None,
        store: StoreFeatures | None = None,
        rules: ListRules = NO_RULES,
        chance: Callable[[], float] = random.random,
    ) -> Ranked:
        """Best k items for one history, without the excluded ones. allowed (I,): by default all.

        chance: where rules leave something to it.
        """

        def best(num: int, allowed: Flags | None) -> tuple[Index, Floats]:
            at = (np.zeros(len(exclude), dtype=np.int64), exclude)
            excluded = sp.csr_matrix((np.ones(len(exclude), dtype=np.float32), at), (1, len(self.items)))
            found = self.rank(history, num=min(num, len(self.items)), wanted=Wanted(excluded, allowed), store=store)
            return found[0][0], found[1][0]

        return self._listed_by(rules, best, k, allowed, now_us=int(history.now_us[0]), chance=chance)

    def popular(
        self,
        k: int,
        exclude: Index,
        *,
        allowed: Flags | None = None,
        popularity_I: Floats | None = None,
        rules: ListRules = NO_RULES,
        chance: Callable[[], float] = random.random,
    ) -> Ranked:
        """The answer for somebody of whom nothing is known. popularity_I: fresher counts, if there are any."""
        score_I = (self.sources.log_popularity if popularity_I is None else popularity_I).copy()
        score_I[exclude] = -np.inf

        def best(num: int, allowed: Flags | None) -> tuple[Index, Floats]:
            there_I = score_I if allowed is None else np.where(allowed, score_I, np.float32(-np.inf))
            items = top_candidates(there_I[None], num)[0]
            return items, there_I[items]

        now_us = int(self.histories.now_us.max(initial=0))
        return self._listed_by(rules, best, k, allowed, now_us=now_us, chance=chance)

    def _listed_by(
        self,
        rules: ListRules,
        ranked: Callable[[int, Flags | None], tuple[Index, Floats]],
        k: int,
        allowed: Flags | None,
        *,
        now_us: int,
        chance: Callable[[], float],
    ) -> Ranked:
        """A list that keeps to the rules. ranked: the best so many of what is allowed, -inf for what is not there."""
        if k <= 0 or not self.items:
            return Ranked([], [], [])
        if rules.never:
            held = ~banned(self.sources.facts, rules.never)
            allowed = held if allowed is None else allowed & held

        def best(num: int, allowed: Flags | None) -> tuple[Index, Floats]:
            items, scores = ranked(num, allowed)
            there = ~np.isneginf(scores)
            return items[there], scores[there]

        if not rules:
            return Ranked.of(*best(k, allowed))
        items, scores = best(max(k + _EXPLORED, self._config.num_candidates), allowed)
        limits = Limits(self.sources.facts, rules.at_most)
        places, last = limits.take(items, k), 1.0
        is_new = self.sources.past.first_us > now_us - rules.new_days * DAY_US
        need = rules.num_new(k)
        if int(is_new[items[places]].sum()) < need:
            # The best new ones there are, then the best of all others.
            new, new_scores = best(need + _EXPLORED, is_new if allowed is None else is_new & allowed)
            limits = Limits(self.sources.facts, rules.at_most)
            kept = limits.take(new, need)
            others = np.flatnonzero(~np.isin(items, new[kept]))
            others = others[limits.take(items[others], k - len(kept))]
            items, scores = np.r_[items[others], new[kept]], np.r_[scores[others], new_scores[kept]]
            places = np.argsort(-scores, kind="stable").tolist()
        elif rules.explore and len(places) == k:
            limits = Limits(self.sources.facts, rules.at_most)
            places = limits.take(items, k - 1)
            pool = [p for p in range(len(items)) if p not in places and limits.fits(int(items[p]))][:_EXPLORED]
            drawn, last = explored(len(pool), rules.explore, chance)
            places.append(pool[drawn])
        return Ranked.of(items[places], scores[places], last)

    def recommend_known(self, user: str, *, k: int) -> list[tuple[str, float]]:
        """Item ids and scores from the training history alone; popular items for an unknown user."""
        history = self.history(user)
        if not len(history.item):
            ranked = self.popular(k, history.item)
            return [(self.items[i], s) for i, s in zip(ranked.items, ranked.scores, strict=True)]
        ranked = self.recommend(history, k=k, exclude=self.had(history))
        return [(self.items[i], s) for i, s in zip(ranked.items, ranked.scores, strict=True)]

    def because(self, item: int, taken: Index) -> int | None:
        """The item of those taken that adds most to this item's score: to the regression's, or to the graph's where the
        regression knows no connection. None if nothing adds to either.

        Both scores are sums over what was taken, so this is what they say, not a guess beside them.
        """
        if not len(taken):
            return None
        sources = self.sources
        place = int(sources.place[item])
        by_regression = [sources.regression.added(taken, place)] if place >= 0 else []
        for added in (*by_regression, sources.to_user[taken] @ sources.vectors.item_ID[item]):
            best = int(np.argmax(added))
            if added[best] > 0:
                return int(taken[best])
        return None

    def save(self, folder: Path, companions: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the artifact; see `artifact`."""
        sources, held = self.sources, self.histories
        facts = sources.facts
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
            "head": sources.head,
            "facts.start": facts.has.indptr.astype(np.int64),
            "facts.word": facts.has.indices.astype(np.int32),
            "content.weights_VD": sources.content.weights_VD,
            "content.start_D": sources.content.start_D,
            "content.sentence_SD": sources.content.sentence_SD,
            "store_features_IF": self.store_features_IF,
            **{f"past.{name}": array for name, array in sources.past._asdict().items()},
            **{f"history.{name}": array for name, array in held._asdict().items()},
        }
        tensors |= {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        if sources.sequence is not None:
            tensors |= {f"sequence.{name}": value for name, value in sources.sequence.state_dict().items()}
        config = {
            "ranker": asdict(self._config),
            "users": self.users,
            "items": self.items,
            "titles": facts.titles,
            "words": facts.words,
            "text": facts.text,
            "categorical": facts.categorical,
            "scale": vectors.scale,
            "weights": asdict(sources.weights),
            "sequence": None if sources.sequence is None else asdict(sources.sequence.config),
            "again": self.again,
            "use_ranker": self.use_ranker,
            "diversity": self.diversity,
            "num_ranked": self.num_ranked,
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
                tasks=tuple(shape["tasks"]),
                backbone=BackboneConfig(**shape["backbone"]),
            )
            users, items = [str(u) for u in config["users"]], [str(i) for i in config["items"]]
            start, word = (tensors.pop(f"facts.{part}").numpy() for part in ("start", "word"))
            words = tuple(config["words"])
            has = sp.csr_matrix((np.ones(len(word), dtype=np.float32), word, start), (len(items), len(words)))
            facts = ItemFacts(tuple(config["titles"]), has, words, tuple(config["text"]), tuple(config["categorical"]))
            content = ContentMap(
                *(tensors.pop(f"content.{part}").numpy() for part in ("weights_VD", "start_D", "sentence_SD"))
            )
            head = tensors.pop("head").numpy()
            vectors = ItemVectors(tensors.pop("item_ID").numpy(), tensors.pop("bias_I").numpy(), float(config["scale"]))
            regressions = {
                name: ItemRegression.of_arrays(
                    {part: tensors.pop(f"{name}.{part}").numpy() for part in ("weight", "item", "start")}, len(head)
                )
                for name in ("regression", "liked")
                if f"{name}.weight" in tensors
            }
            regression, liked = regressions["regression"], regressions.get("liked")
            past = ItemPast(*(tensors.pop(f"past.{name}").numpy() for name in ItemPast._fields))
            histories = Histories(*(tensors.pop(f"history.{name}").numpy() for name in Histories._fields))
            store_features_IF = tensors.pop("store_features_IF").numpy()
            weights = Weights(**{name: float(weight) for name, weight in config["weights"].items()})
            of_sequence = None if config["sequence"] is None else SequenceConfig(**config["sequence"])
            again, use_ranker = Again(config["again"]), bool(config["use_ranker"])
            diversity, num_ranked = float(config["diversity"]), int(config["num_ranked"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{folder}: config.json does not describe a recommender: {error}") from error
        sequence = None
        if of_sequence is not None:
            sequence = SequenceEncoder(np.zeros_like(vectors.item_ID), of_sequence)
            load_weights(sequence, _taken_out(tensors, "sequence."), folder)
        ranker = PairRanker(ranker_config)
        load_weights(ranker, _taken_out(tensors, "ranker."), folder)
        return Recommender(
            ranker=ranker,
            config=ranker_config,
            users=users,
            items=items,
            histories=histories,
            sources=Sources(regression, liked, vectors, past, facts, content, head, sequence, weights),
            store_features_IF=store_features_IF,
            again=again,
            use_ranker=use_ranker,
            diversity=diversity,
            num_ranked=num_ranked,
        )


def _taken_out(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}
