"""Train the two parts of a recommender.

Graph encoder: edges are masked at random, the graph without them is propagated, and the masked edges are
predicted by a softmax over all items.

Ranker: it must learn from edges that its inputs have not seen, or it learns to trust them too much. So for
each of a few snapshots an encoder is trained without part of the edges, turned by orthogonal Procrustes into
the coordinates of the main encoder, and the left-out edges are the labels. The same turn lets a ranker keep
working when the encoder is refitted.
"""

# U users, I items, D width of a vector, C candidates, S side features

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from assay_platform.models.graph import Adjacency, GraphEncoder, adjacency
from assay_platform.models.recommender import (
    GraphScorer,
    ItemFacts,
    ItemVectors,
    PairRanker,
    RankerConfig,
    top_candidates,
)
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.training import TrainConfig, fit
from assay_platform.tuning.space import OneOf, Real, Space
from numpy.typing import NDArray
from torch import Tensor

from assay_pipelines.recommend.evaluate import DEPTH, ranking_metrics

_STEPS_AN_EPOCH = 10
_MAX_LOSS_USERS = 1024
_CALIBRATION_MASK = 0.6
_MASKED_OUT = -1e9

SPACE: Space = {
    "learning_rate": Real(low=1e-3, high=6e-3, log=True),
    "weight_decay": Real(low=0.3, high=3.0, log=True),
    "dropout": Real(low=0.2, high=0.6),
    "num_layers": OneOf((1, 2, 3)),
    "mask_high": Real(low=0.6, high=0.85),
}
DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "weight_decay": 1.0,
    "dropout": 0.5,
    "num_layers": 2,
    "mask_low": 0.4,
    "mask_high": 0.8,
    "width": 64,
    "num_epochs": 12,
}


class _Masked(NamedTuple):
    """A graph without some edges, and what was kept and taken out, as (user, item) index pairs."""

    graph: Adjacency
    kept: tuple[Tensor, Tensor]
    dropped: tuple[Tensor, Tensor]


def _mask(edges: sp.coo_matrix, fraction: float, generator: np.random.Generator) -> _Masked:
    keep = generator.random(edges.nnz) > fraction

    def pairs(rows: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(edges.row[rows].astype(np.int64)), torch.from_numpy(edges.col[rows].astype(np.int64))

    remaining = sp.csr_matrix(
        (np.ones(int(keep.sum()), dtype=np.float32), (edges.row[keep], edges.col[keep])), edges.shape
    )
    return _Masked(adjacency(remaining), pairs(keep), pairs(~keep))


def _masked_edge_loss(logits_UI: Tensor, masked: _Masked, users: Tensor | None, num_users: int) -> Tensor:
    """Softmax loss of the dropped edges; a user's edges weigh 1 / sqrt(how many it lost)."""
    rows, columns = masked.dropped
    kept_rows, kept_columns = masked.kept
    if users is not None:
        place = torch.full((num_users,), -1, dtype=torch.int64)
        place[users] = torch.arange(len(users))
        rows, kept_rows = place[rows], place[kept_rows]
        chosen, kept_chosen = rows >= 0, kept_rows >= 0
        rows, columns = rows[chosen], columns[chosen]
        kept_rows, kept_columns = kept_rows[kept_chosen], kept_columns[kept_chosen]
    logits_UI = logits_UI.index_put((kept_rows, kept_columns), torch.tensor(_MASKED_OUT))
    weight = torch.bincount(rows, minlength=len(logits_UI)).float().clamp(min=1)[rows].rsqrt()
    loss = logits_UI.logsumexp(1)[rows] - logits_UI[rows, columns]
    return (weight * loss).sum() / weight.sum().clamp_min(1e-9)


def _calibrate(encoder: GraphEncoder, edges: sp.coo_matrix, generator: np.random.Generator) -> None:
    """Start temperature and popularity bias where the loss of the untrained encoder is lowest."""
    masked = _mask(edges, _CALIBRATION_MASK, generator)
    log_popularity = torch.from_numpy(np.log1p(np.asarray(edges.sum(0)).ravel())).float()
    with torch.no_grad():
        user_UD, item_ID = encoder.eval()(masked.graph)
        user_UD, users = _some_users(user_UD, generator)
        logits_UI = user_UD @ item_ID.T
        spread = float(logits_UI.std()) + 1e-9
        candidates = []
        for scale in np.exp(np.linspace(np.log(0.3), np.log(6.0), 8)) / spread:
            for share in (0.0, 0.25, 0.5, 0.75):
                trial_UI = logits_UI * float(scale) + share * log_popularity
                loss = _masked_edge_loss(trial_UI, masked, users, edges.shape[0])
                candidates.append((float(loss), float(scale), share))
        _, scale, share = min(candidates)
        encoder.log_scale.fill_(float(np.log(scale)))
        encoder.bias_I.copy_(share * log_popularity)


def _some_users(user_UD: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor | None]:
    if len(user_UD) <= _MAX_LOSS_USERS:
        return user_UD, None
    users = torch.from_numpy(np.sort(generator.choice(len(user_UD), _MAX_LOSS_USERS, replace=False)))
    return user_UD[users], users


def train_encoder(
    interactions: sp.csr_matrix,
    params: Mapping[str, Any],
    *,
    seed: int,
    evaluate: Callable[[GraphEncoder], float] | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, metric: None,
) -> GraphEncoder:
    """Fit a graph encoder to all interactions given."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    edges = sp.coo_matrix(interactions)
    encoder = GraphEncoder(
        interactions, width=params["width"], num_layers=params["num_layers"], dropout=params["dropout"]
    )
    _calibrate(encoder, edges, generator)

    def batches(_: int) -> Iterator[_Masked]:
        for _step in range(_STEPS_AN_EPOCH):
            yield _mask(edges, generator.uniform(params["mask_low"], params["mask_high"]), generator)

    def loss(masked: _Masked) -> Tensor:
        user_UD, item_ID = encoder(masked.graph)
        user_UD, users = _some_users(user_UD, generator)
        return _masked_edge_loss(encoder.score(user_UD, item_ID), masked, users, edges.shape[0])

    config = TrainConfig(
        num_epochs=int(params["num_epochs"]),
        learning_rate=params["learning_rate"],
        weight_decay=params["weight_decay"],
        clip_norm=10.0,
    )
    fit(
        encoder,
        batches=batches,
        num_batches=_STEPS_AN_EPOCH,
        loss=loss,
        evaluate=None if evaluate is None else lambda: evaluate(encoder),
        config=config,
        on_epoch=on_epoch,
    )
    return encoder.eval()


def item_vectors(
    encoder: GraphEncoder, interactions: sp.csr_matrix, turn_DD: NDArray[np.float32] | None = None
) -> ItemVectors:
    """Propagated item vectors over a graph, optionally turned into other coordinates."""
    with torch.no_grad():
        _, item_ID = encoder(adjacency(interactions))
    vectors = item_ID.numpy() if turn_DD is None else item_ID.numpy() @ turn_DD
    return ItemVectors(
        np.ascontiguousarray(vectors, dtype=np.float32),
        encoder.bias_I.detach().numpy().copy(),
        float(encoder.log_scale.detach().exp()),
    )


def procrustes(source_ID: NDArray[np.float32], target_ID: NDArray[np.float32]) -> NDArray[np.float32]:
    """(D, D) orthogonal turn that brings source closest to target; scores are unchanged by it."""
    left, _, right = np.linalg.svd(source_ID.T @ target_ID)
    return np.asarray(left @ right, dtype=np.float32)


def graph_ndcg(encoder: GraphEncoder, train: sp.csr_matrix, wanted: sp.csr_matrix, *, repeats: bool) -> float:
    """NDCG@10 of the encoder alone."""
    with torch.no_grad():
        scores = encoder.score(*encoder(adjacency(train))).numpy()
    return ranking_metrics(top_candidates(scores, None if repeats else train, DEPTH), wanted, train)["ndcg_at_10"]


@dataclass(frozen=True, kw_only=True)
class EncoderData:
    """What one trial of a search needs."""

    fit: sp.csr_matrix
    validation: sp.csr_matrix
    repeats: bool


def objective(params: dict[str, Any], data: EncoderData, report: Callable[[int, float], None]) -> None:
    """One trial of a search: the encoder alone, by validation NDCG@10."""
    train_encoder(
        data.fit,
        params,
        seed=int(params["seed"]),
        evaluate=lambda encoder: graph_ndcg(encoder, data.fit, data.validation, repeats=data.repeats),
        on_epoch=report,
    )


class Holdout(NamedTuple):
    """One way to divide training interactions: what the inputs see, what is to be predicted.

    moment_U: for each user the index of the moment at which its store features are read.
    """

    seen: sp.csr_matrix
    labels: sp.csr_matrix
    moment_U: NDArray[np.int64]


class Snapshot(NamedTuple):
    """Inputs and labels of all users under one holdout."""

    user_UD: Tensor
    item_ID: Tensor
    candidates_UC: Tensor
    side_UCS: Tensor
    positive_UC: Tensor
    users: Tensor  # with at least one positive among the candidates


@dataclass(frozen=True, kw_only=True)
class RankerTraining:
    """How the ranker is trained: lists of `list_size` = all positives + the graph's best + a random tail."""

    num_steps: int = 200
    users_a_step: int = 64
    list_size: int = 100
    num_hard: int = 50
    learning_rate: float = 2e-3
    weight_decay: float = 0.05


def make_snapshots(
    main: ItemVectors,
    holdouts: list[Holdout],
    params: Mapping[str, Any],
    config: RankerConfig,
    facts: ItemFacts,
    store_features_MIF: NDArray[np.float32],
    *,
    repeats: bool,
    seed: int,
    on_progress: Callable[[float], None] = lambda done: None,
) -> list[Snapshot]:
    """Train an encoder without each holdout's labels and collect what a ranker would see.

    store_features_MIF: item features at each moment that holdouts refer to.
    """
    snapshots = []
    for number, holdout in enumerate(holdouts):
        encoder = train_encoder(holdout.seen, params, seed=seed + 1 + number)
        turn = procrustes(item_vectors(encoder, holdout.seen).item_ID, main.item_ID)
        vectors = item_vectors(encoder, holdout.seen, turn)
        snapshots.append(_snapshot(holdout, vectors, config, facts, store_features_MIF, repeats=repeats))
        on_progress((number + 1) / len(holdouts))
    return snapshots


def train_ranker(
    snapshots: list[Snapshot],
    config: RankerConfig,
    *,
    seed: int,
    training: RankerTraining,
    on_progress: Callable[[float], None] = lambda done: None,
) -> tuple[PairRanker, RoutingMonitor]:
    """Train on held-out edges. Store features beyond what `config` has are left out. Routing has a report an epoch."""
    snapshots = [s._replace(side_UCS=s.side_UCS[..., : config.num_side]) for s in snapshots]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    ranker = PairRanker(config)
    side = torch.cat([s.side_UCS.flatten(0, 1) for s in snapshots])
    ranker.side_mean_S.copy_(side.mean(0))
    ranker.side_std_S.copy_(side.std(0) + 1e-6)
    ranker.vector_scale.copy_(torch.stack([snapshots[0].user_UD.std(), snapshots[0].item_ID.std()]) + 1e-9)
    usable = [s for s in snapshots if len(s.users)]
    monitor = RoutingMonitor(ranker)
    if not usable:
        return ranker, monitor  # nothing to learn from: the graph's order stays

    def batches(_: int) -> Iterator[tuple[Snapshot, Tensor]]:
        for _step in range(_STEPS_AN_EPOCH):
            snapshot = usable[int(torch.randint(len(usable), (), generator=generator))]
            pick = torch.randint(len(snapshot.users), (training.users_a_step,), generator=generator)
            yield snapshot, snapshot.users[pick]

    num_epochs = max(1, training.num_steps // _STEPS_AN_EPOCH)

    def epoch_done(epoch: int, _: float) -> None:
        monitor.metrics()
        on_progress(epoch / num_epochs)

    with monitor:
        fit(
            ranker,
            batches=batches,
            num_batches=_STEPS_AN_EPOCH,
            loss=lambda batch: _list_loss(ranker, *batch, training, generator),
            evaluate=None,
            config=TrainConfig(
                num_epochs=num_epochs, learning_rate=training.learning_rate, weight_decay=training.weight_decay
            ),
            on_epoch=epoch_done,
        )
    return ranker, monitor


def _snapshot(
    holdout: Holdout,
    vectors: ItemVectors,
    config: RankerConfig,
    facts: ItemFacts,
    store_features_MIF: NDArray[np.float32],
    *,
    repeats: bool,
) -> Snapshot:
    scorer = GraphScorer(holdout.seen, vectors, facts)
    user_UD = scorer.user_vectors(holdout.seen)
    scores_UI = scorer.graph_scores(user_UD)
    candidates = top_candidates(scores_UI, None if repeats else holdout.seen, config.num_candidates)
    side = scorer.side_features(holdout.seen, scores_UI, candidates)
    store = store_features_MIF[holdout.moment_U[:, None], candidates]
    positive = np.take_along_axis(holdout.labels.toarray() > 0, candidates, axis=1)
    return Snapshot(
        torch.from_numpy(user_UD),
        torch.from_numpy(vectors.item_ID),
        torch.from_numpy(candidates),
        torch.from_numpy(np.concatenate([side, store], axis=-1)),
        torch.from_numpy(positive),
        torch.from_numpy(np.flatnonzero(positive.any(axis=1))),
    )


def _list_loss(
    ranker: PairRanker,
    snapshot: Snapshot,
    users: Tensor,
    training: RankerTraining,
    generator: torch.Generator,
) -> Tensor:
    """Softmax over a list of each user; sampled tail items count for all the tail (log-Q correction)."""
    positive = snapshot.positive_UC[users]
    priority = torch.rand(positive.shape, generator=generator) + 9.0 * positive.float()
    priority[:, : training.num_hard] += 2.0
    chosen = priority.topk(min(training.list_size, positive.shape[1]), dim=1).indices
    in_tail = ~positive
    in_tail[:, : training.num_hard] = False
    tail = in_tail.gather(1, chosen)
    share = in_tail.sum(1, keepdim=True) / tail.sum(1, keepdim=True).clamp(min=1)
    correction = torch.where(tail, share.clamp(min=1.0).log(), 0.0)
    side = snapshot.side_UCS[users].gather(1, chosen.unsqueeze(-1).expand(-1, -1, snapshot.side_UCS.shape[-1]))
    items = snapshot.item_ID[snapshot.candidates_UC[users].gather(1, chosen)]
    logits, balance = ranker(snapshot.user_UD[users], items, side)
    labels = positive.gather(1, chosen)
    log_probability = (logits + correction).log_softmax(1)
    count = labels.sum(1).clamp(min=1)
    per_user = -(log_probability * labels).sum(1) / count.sqrt()
    loss: Tensor = per_user.sum() / count.sqrt().sum() + balance
    return loss
