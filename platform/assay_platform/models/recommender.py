"""The recommender: graph vectors find candidates, an MoE ranker orders them.

`PairRanker` is the torch module, on the same backbone as the fraud model. `Recommender` is what services and
pipelines hold: vectors, ranker, histories and item facts, saved and loaded as an artifact. It needs no graph
library: a user's vector is a sum over its history.
"""

# U users, I items, D width of a vector, C candidates, S side features of a (user, item) pair, H history length

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay_platform.errors import ArtifactError
from assay_platform.models.artifact import load_artifact, load_weights, save_artifact
from assay_platform.moe import Backbone, BackboneConfig

Floats = NDArray[np.float32]
Index = NDArray[np.int64]

# Side features that come from the graph and the item table; features from the store are appended to these.
GRAPH_FEATURES = ("graph_score", "log_popularity", "co_occurrence", "category_match", "log_history")
_TOKEN = re.compile(r"[|,;\s]+")
_MAX_TOKENS = 512
_RANKING_CHUNK = 256


_RANKER_BACKBONE = BackboneConfig(width=64, hidden=64, num_blocks=1, num_experts=4, top_k=2, dropout=0.3)


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """Shape of the ranker. num_store_features: item features read from the feature store."""

    vector_width: int = 64
    num_store_features: int = 0
    num_candidates: int = 300
    backbone: BackboneConfig = field(default_factory=lambda: _RANKER_BACKBONE)

    @property
    def num_side(self) -> int:
        """S."""
        return len(GRAPH_FEATURES) + self.num_store_features


class PairRanker(nn.Module):
    """Re-scores candidates: a · graph score + MoE([user, item, user ∘ item, side features]).

    The MoE part starts at zero, so an untrained ranker keeps the graph's order.
    """

    side_mean_S: Tensor
    side_std_S: Tensor
    vector_scale: Tensor

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        num_side = config.num_side
        self.register_buffer("side_mean_S", torch.zeros(num_side))
        self.register_buffer("side_std_S", torch.ones(num_side))
        self.register_buffer("vector_scale", torch.ones(2))
        self.input_dropout = nn.Dropout(config.backbone.dropout)
        self.backbone = Backbone(3 * config.vector_width + num_side, config.backbone)
        self.head = nn.Linear(config.backbone.width, 1)
        self.graph_weight = nn.Parameter(torch.ones(()))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, user_ND: Tensor, item_NCD: Tensor, side_NCS: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, C) and the balance loss (scalar). side_NCS[..., 0] is the graph score."""
        user_N1D = (user_ND / self.vector_scale[0]).unsqueeze(1).expand_as(item_NCD)
        item_NCD = item_NCD / self.vector_scale[1]
        side = (side_NCS - self.side_mean_S) / self.side_std_S
        pair = torch.cat([user_N1D, item_NCD, user_N1D * item_NCD, side], dim=-1)
        out = self.backbone(self.input_dropout(pair).flatten(0, 1))
        correction_NC = self.head(out.y_ND).view(pair.shape[:2])
        return self.graph_weight * side_NCS[..., 0] + correction_NC, out.balance_loss


class ItemFacts(NamedTuple):
    """What is known of items: titles for people, unit category vectors (I, G) for the ranker."""

    titles: tuple[str, ...]
    categories_IG: Floats


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
    return ItemFacts(titles, categories_IG / np.maximum(norm, 1.0))


class ItemVectors(NamedTuple):
    """What the graph encoder learned of items."""

    item_ID: Floats
    bias_I: Floats
    scale: float


class GraphScorer:
    """Scores of users, given as rows of a history matrix, over one graph. Pure functions of the arguments.

    graph: (U, I) 0/1 interactions that vectors, popularity and co-occurrence come from.
    """

    def __init__(self, graph: sp.csr_matrix, vectors: ItemVectors, facts: ItemFacts) -> None:
        self.graph = graph
        self.vectors = vectors
        self._facts = facts
        degree = np.asarray(graph.sum(0)).ravel()
        self.log_popularity_I = np.log1p(degree).astype(np.float32)
        scale = np.maximum(degree, 1.0) ** -0.5
        self._to_user = (vectors.item_ID * scale[:, None]).astype(np.float32)
        self._scaled = sp.csr_matrix(graph @ sp.diags(scale)).astype(np.float32)
        self._scaled_t = sp.csr_matrix(self._scaled.T)

    def user_vectors(self, history: sp.csr_matrix) -> Floats:
        """(N, D): the degree-normalised sum over each history; zeros for an empty one."""
        length = np.maximum(np.asarray(history.sum(1)), 1.0)
        return np.asarray(history @ self._to_user / np.sqrt(length), dtype=np.float32)

    def graph_scores(self, user_ND: Floats) -> Floats:
        """(N, I) log-softmax over all items, minus each user's highest."""
        logits = (user_ND @ self.vectors.item_ID.T) * self.vectors.scale + self.vectors.bias_I
        # The log-normaliser is the same for all items of a user, so subtracting the highest removes it too.
        return np.asarray(logits - logits.max(axis=1, keepdims=True), dtype=np.float32)

    def side_features(self, history: sp.csr_matrix, scores_NI: Floats, candidates_NC: Index) -> Floats:
        """(N, C, len(GRAPH_FEATURES)) of candidates."""
        length_N1 = np.maximum(np.asarray(history.sum(1)), 1.0).astype(np.float32)
        # One hop over users who share items, each item's own contribution taken out.
        together = ((history @ self._scaled_t) @ self._scaled).toarray() - history.toarray()
        profile = np.asarray(history @ self._facts.categories_IG)
        profile /= np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-6)
        match = profile @ self._facts.categories_IG.T
        rows = np.arange(len(scores_NI))[:, None]
        columns = (
            scores_NI[rows, candidates_NC],
            self.log_popularity_I[candidates_NC],
            np.log(np.maximum(together[rows, candidates_NC], 0.0) / length_N1 + 1e-3),
            match[rows, candidates_NC],
            np.broadcast_to(np.log(length_N1), candidates_NC.shape),
        )
        return np.stack([np.asarray(c, dtype=np.float32) for c in columns], axis=-1)


def top_candidates(scores_NI: Floats, excluded: sp.csr_matrix | None, num: int) -> Index:
    """(N, C) item indices by descending score, without the excluded items of each row."""
    scores = scores_NI.copy()
    if excluded is not None:
        scores[excluded.nonzero()] = -np.inf
    num = min(num, scores.shape[1])
    rough = np.argpartition(-scores, num - 1, axis=1)[:, :num]
    order = np.argsort(-np.take_along_axis(scores, rough, axis=1), axis=1, kind="stable")
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
        scorer: GraphScorer,
        facts: ItemFacts,
        store_features_IF: Floats,
        repeats: bool,
        use_ranker: bool = True,
    ) -> None:
        """store_features_IF: item features as the feature store had them at the end of training, transformed.

        The ranker takes the first `config.num_store_features` of them.
        """
        self._ranker = ranker.eval().requires_grad_(False)
        self.fences = ranker.backbone.guard()  # an expert that fails is left out, the others answer
        self._config = config
        self.items = tuple(items)
        self._users = tuple(users)
        self.item_index = {item: i for i, item in enumerate(items)}
        self._user_index = {user: u for u, user in enumerate(users)}
        self._scorer = scorer
        self._facts = facts
        self.store_features_IF = store_features_IF
        self.repeats = repeats
        self.use_ranker = use_ranker
        norms = np.linalg.norm(scorer.vectors.item_ID, axis=1, keepdims=True)
        self._unit_ID = scorer.vectors.item_ID / np.maximum(norms, 1e-9)

    @property
    def num_parameters(self) -> int:
        """Trained weights: item vectors, biases and the ranker."""
        return self._scorer.vectors.item_ID.size + len(self.items) + sum(p.numel() for p in self._ranker.parameters())

    def title(self, item: int) -> str:
        """For people."""
        return self._facts.titles[item]

    def knows_user(self, user: str) -> bool:
        """Whether training saw this user."""
        return user in self._user_index

    def history(self, user: str, recent: Sequence[str] = ()) -> Index:
        """Distinct item indices of a user: training history, then newer items that the model knows."""
        row = self._user_index.get(user)
        graph = self._scorer.graph
        seen = [] if row is None else graph.indices[graph.indptr[row] : graph.indptr[row + 1]].tolist()
        newer = [self.item_index[item] for item in recent if item in self.item_index]
        return np.asarray(list(dict.fromkeys([*seen, *newer])), dtype=np.int64)

    def rank(
        self,
        history: sp.csr_matrix,
        *,
        num: int,
        excluded: sp.csr_matrix | None,
        store_features_IF: Floats | None = None,
    ) -> tuple[Index, Floats]:
        """Top `num` items (N, num) and their scores for N histories, full ranking: no item is left out unseen.

        The ranker orders the graph's best, at least `num` of them. Excluded items come last, with a score of -inf.
        """
        store_IF = self.store_features_IF if store_features_IF is None else store_features_IF
        tops, values = [], []
        for start in range(0, history.shape[0], _RANKING_CHUNK):
            rows = slice(start, start + _RANKING_CHUNK)
            part_excluded = None if excluded is None else excluded[rows]
            top, score = self._rank_chunk(history[rows], num, part_excluded, store_IF)
            tops.append(top)
            values.append(score)
        return np.concatenate(tops), np.concatenate(values)

    def _rank_chunk(
        self, history: sp.csr_matrix, num: int, excluded: sp.csr_matrix | None, store_IF: Floats
    ) -> tuple[Index, Floats]:
        user_ND = self._scorer.user_vectors(history)
        scores_NI = self._scorer.graph_scores(user_ND)
        num_candidates = max(num, self._config.num_candidates)
        candidates_NC = top_candidates(scores_NI, excluded, num_candidates)
        graph_NC = np.take_along_axis(scores_NI, candidates_NC, axis=1)
        if not self.use_ranker:
            return candidates_NC[:, :num], graph_NC[:, :num]
        side = self._scorer.side_features(history, scores_NI, candidates_NC)
        store = store_IF[candidates_NC, : self._config.num_store_features]
        side = np.concatenate([side, store], axis=-1)
        with torch.inference_mode():
            logits, _ = self._ranker(
                torch.from_numpy(user_ND),
                torch.from_numpy(self._scorer.vectors.item_ID[candidates_NC]),
                torch.from_numpy(side),
            )
        final_NC = logits.numpy()
        if excluded is not None:  # where few items are left, excluded ones are among the candidates
            rows = np.arange(len(candidates_NC))[:, None]
            final_NC = np.where(excluded[rows, candidates_NC].toarray() != 0, -np.inf, final_NC)
        order = np.argsort(-final_NC, axis=1, kind="stable")[:, :num]
        return np.take_along_axis(candidates_NC, order, axis=1), np.take_along_axis(final_NC, order, axis=1)

    def recommend(
        self,
        history: Index,
        *,
        k: int,
        exclude: Index,
        store_features_IF: Floats | None = None,
    ) -> Ranked:
        """Best k items for one history, without the excluded ones."""
        num_items = len(self.items)
        row = sp.csr_matrix(
            (np.ones(len(history), dtype=np.float32), (np.zeros(len(history), dtype=np.int64), history)),
            (1, num_items),
        )
        excluded = sp.csr_matrix(
            (np.ones(len(exclude)), (np.zeros(len(exclude), dtype=np.int64), exclude)), (1, num_items)
        )
        k = min(k, num_items - len(exclude))
        if k <= 0:
            return Ranked([], [])
        top, score = self.rank(row, num=k, excluded=excluded, store_features_IF=store_features_IF)
        return Ranked(top[0].tolist(), [float(v) for v in score[0]])

    def recommend_known(self, user: str, *, k: int) -> list[tuple[str, float]]:
        """Item ids and scores from the training history alone; popular items for an unknown user."""
        history = self.history(user)
        if not len(history):
            return [(self.items[i], float(s)) for i, s in zip(*self.popular(k, np.zeros(0, np.int64)), strict=True)]
        ranked = self.recommend(history, k=k, exclude=np.zeros(0, np.int64) if self.repeats else history)
        return [(self.items[i], s) for i, s in zip(ranked.items, ranked.scores, strict=True)]

    def popular(self, k: int, exclude: Index, popularity_I: NDArray[np.floating] | None = None) -> Ranked:
        """The answer for somebody of whom nothing is known. popularity_I: fresher counts, if there are any."""
        score_I = np.asarray(self._scorer.log_popularity_I if popularity_I is None else popularity_I, dtype=np.float64)
        score_I = score_I.copy()
        score_I[exclude] = -np.inf
        order = np.argsort(-score_I, kind="stable")[: max(0, min(k, len(score_I) - len(exclude)))]
        return Ranked(order.tolist(), [float(v) for v in score_I[order]])

    def nearest_in_history(self, item: int, history: Index) -> int | None:
        """The item of a history whose vector is closest: what a recommendation is explained by."""
        if not len(history):
            return None
        similarity = self._unit_ID[history] @ self._unit_ID[item]
        return int(history[int(np.argmax(similarity))])

    def save(self, folder: Path, companions: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the artifact; see `artifact`."""
        graph, vectors = self._scorer.graph, self._scorer.vectors
        tensors = {f"ranker.{name}": value for name, value in self._ranker.state_dict().items()}
        tensors |= {
            "item_ID": torch.from_numpy(vectors.item_ID),
            "bias_I": torch.from_numpy(vectors.bias_I),
            "categories_IG": torch.from_numpy(self._facts.categories_IG),
            "store_features_IF": torch.from_numpy(self.store_features_IF),
            "history_start": torch.from_numpy(graph.indptr.astype(np.int64)),
            "history_item": torch.from_numpy(graph.indices.astype(np.int64)),
        }
        config = {
            "ranker": asdict(self._config),
            "users": self._users,
            "items": self.items,
            "titles": self._facts.titles,
            "scale": vectors.scale,
            "repeats": self.repeats,
            "use_ranker": self.use_ranker,
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
            ranker_config = RankerConfig(
                **{**config["ranker"], "backbone": BackboneConfig(**config["ranker"]["backbone"])}
            )
            users, items = [str(u) for u in config["users"]], [str(i) for i in config["items"]]
            facts = ItemFacts(tuple(config["titles"]), tensors.pop("categories_IG").numpy())
            vectors = ItemVectors(tensors.pop("item_ID").numpy(), tensors.pop("bias_I").numpy(), float(config["scale"]))
            store_features_IF = tensors.pop("store_features_IF").numpy()
            start, item = tensors.pop("history_start").numpy(), tensors.pop("history_item").numpy()
            repeats, use_ranker = bool(config["repeats"]), bool(config["use_ranker"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{folder}: config.json does not describe a recommender: {error}") from error
        graph = sp.csr_matrix((np.ones(len(item), dtype=np.float32), item, start), (len(users), len(items)))
        ranker = PairRanker(ranker_config)
        load_weights(ranker, {name.removeprefix("ranker."): t for name, t in tensors.items()}, folder)
        return Recommender(
            ranker=ranker,
            config=ranker_config,
            users=users,
            items=items,
            scorer=GraphScorer(graph, vectors, facts),
            facts=facts,
            store_features_IF=store_features_IF,
            repeats=repeats,
            use_ranker=use_ranker,
        )
