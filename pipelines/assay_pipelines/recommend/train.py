"""Train the sources of a recommender and the ranker over them.

Graph encoder: edges are masked at random, the graph without them is propagated, and the masked edges are
predicted by a softmax over all items.

Ranker: it must learn from interactions that its inputs have not seen, or it learns to trust them too much. So for each
of a few holdouts all sources are fitted without part of the interactions, which are then the labels.
"""

# U users, I items, D width of a vector, C candidates, F features of a pair

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from assay_platform.models.graph import Adjacency, GraphEncoder, ItemGraph, adjacencies
from assay_platform.models.histories import Floats, Histories
from assay_platform.models.item_regression import RegressionConfig, fit_item_regression
from assay_platform.models.recommender import (
    ItemFacts,
    ItemPast,
    ItemVectors,
    PairRanker,
    RankerConfig,
    Sources,
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
_LISTS_A_CHUNK = 256
# What the regression's search tries; seconds from a quick succession of ratings to a day's shopping.
_PENALTIES = (250.0, 500.0, 1000.0)
_CLOSENESS_S = (0.0, 3600.0, 86_400.0)

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

    graph: list[Adjacency]
    kept: tuple[Tensor, Tensor]
    dropped: tuple[Tensor, Tensor]


def _mask(graph: ItemGraph, fraction: float, generator: np.random.Generator) -> _Masked:
    keep = generator.random(len(graph.user)) > fraction

    def pairs(rows: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(graph.user[rows]), torch.from_numpy(graph.item[rows])

    return _Masked(adjacencies(graph.matrices(keep)), pairs(keep), pairs(~keep))


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


def _calibrate(encoder: GraphEncoder, graph: ItemGraph, generator: np.random.Generator) -> None:
    """Start temperature and popularity bias where the loss of the untrained encoder is lowest."""
    masked = _mask(graph, _CALIBRATION_MASK, generator)
    log_popularity = torch.from_numpy(np.log1p(np.bincount(graph.item, minlength=graph.num_items))).float()
    with torch.no_grad():
        user_UD, item_ID = encoder.eval()(masked.graph)
        user_UD, users = _some_users(user_UD, generator)
        logits_UI = user_UD @ item_ID.T
        spread = float(logits_UI.std()) + 1e-9
        candidates = []
        for scale in np.exp(np.linspace(np.log(0.3), np.log(6.0), 8)) / spread:
            for share in (0.0, 0.25, 0.5, 0.75):
                trial_UI = logits_UI * float(scale) + share * log_popularity
                loss = _masked_edge_loss(trial_UI, masked, users, graph.num_users)
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
    graph: ItemGraph,
    params: Mapping[str, Any],
    *,
    seed: int,
    evaluate: Callable[[GraphEncoder], float] | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, metric: None,
) -> GraphEncoder:
    """Fit a graph encoder to all edges given."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    encoder = GraphEncoder(graph, width=params["width"], num_layers=params["num_layers"], dropout=params["dropout"])
    _calibrate(encoder, graph, generator)

    def batches(_: int) -> Iterator[_Masked]:
        for _step in range(_STEPS_AN_EPOCH):
            yield _mask(graph, generator.uniform(params["mask_low"], params["mask_high"]), generator)

    def loss(masked: _Masked) -> Tensor:
        user_UD, item_ID = encoder(masked.graph)
        user_UD, users = _some_users(user_UD, generator)
        return _masked_edge_loss(encoder.score(user_UD, item_ID), masked, users, graph.num_users)

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


def item_vectors(encoder: GraphEncoder, graph: ItemGraph) -> ItemVectors:
    """Propagated item vectors over a graph."""
    with torch.no_grad():
        _, item_ID = encoder(adjacencies(graph.matrices()))
    return ItemVectors(
        np.ascontiguousarray(item_ID.numpy(), dtype=np.float32),
        encoder.bias_I.detach().numpy().copy(),
        float(encoder.log_scale.detach().exp()),
    )


def graph_ndcg(encoder: GraphEncoder, graph: ItemGraph, wanted: sp.csr_matrix, *, repeats: bool) -> float:
    """NDCG@10 of the encoder alone."""
    with torch.no_grad():
        scores = encoder.score(*encoder(adjacencies(graph.matrices()))).numpy()
    seen = sp.csr_matrix((np.ones(len(graph.user), dtype=np.float32), (graph.user, graph.item)), wanted.shape)
    return _ndcg(scores, seen, wanted, repeats=repeats)


def _ndcg(scores_UI: Floats, seen: sp.csr_matrix, wanted: sp.csr_matrix, *, repeats: bool) -> float:
    if not repeats:
        scores_UI[seen.nonzero()] = -np.inf
    return ranking_metrics(top_candidates(scores_UI, DEPTH), wanted, seen)["ndcg_at_10"]


@dataclass(frozen=True, kw_only=True)
class EncoderData:
    """What one trial of a search needs."""

    fit: ItemGraph
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


def choose_regression(
    histories: Histories,
    wanted: sp.csr_matrix,
    *,
    repeats: bool,
    on_progress: Callable[[float, str], None] = lambda done, text: None,
) -> RegressionConfig:
    """The penalty, then the closeness in time, that rank the validation part best."""
    num_items = wanted.shape[1]
    seen = histories.matrix(num_items)
    measured: dict[RegressionConfig, float] = {}
    grid = [RegressionConfig(penalty=penalty) for penalty in _PENALTIES]

    def best() -> RegressionConfig:
        return max(measured, key=lambda config: measured[config])

    def measure(config: RegressionConfig) -> None:
        scores = fit_item_regression(histories, num_items, config).scores(seen)
        measured[config] = _ndcg(scores, seen, wanted, repeats=repeats)
        on_progress(len(measured) / (len(_PENALTIES) + len(_CLOSENESS_S)), f"NDCG@10 {measured[best()]:.3f}")

    for config in grid:
        measure(config)
    penalised = best()
    for closeness_s in _CLOSENESS_S:
        measure(replace(penalised, closeness_s=closeness_s))
    return best()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What validation chose of the sources. graph_weight: None until it is chosen."""

    graph: Mapping[str, Any]
    regression: RegressionConfig
    facts: ItemFacts
    repeats: bool
    graph_weight: float | None = None


def item_graph(histories: Histories, facts: ItemFacts, regression: RegressionConfig) -> ItemGraph:
    """Users, baskets by the regression's closeness, and categories."""
    return ItemGraph.of(histories, facts.categories_IG, closeness_s=regression.closeness_s)


def fit_sources(histories: Histories, recipe: Recipe, *, seed: int) -> Sources:
    """All sources from the same events."""
    num_items = len(recipe.facts.titles)
    graph = item_graph(histories, recipe.facts, recipe.regression)
    rated = not histories.liked.all()
    return Sources(
        fit_item_regression(histories, num_items, recipe.regression),
        fit_item_regression(histories.where(histories.liked), num_items, recipe.regression) if rated else None,
        item_vectors(train_encoder(graph, recipe.graph, seed=seed), graph),
        ItemPast.of(histories, num_items),
        recipe.facts,
        recipe.graph_weight or 0.0,
    )


class Holdout(NamedTuple):
    """One way to divide interactions: what sources see, and what is to be predicted of the same users.

    store_IF: item features of the store at the histories' moment.
    """

    seen: Histories
    wanted: sp.csr_matrix
    store_IF: Floats


class Lists(NamedTuple):
    """Candidates of users with something to find among them."""

    features_UCF: Tensor
    wanted_UC: Tensor
    possible_UC: Tensor  # not excluded


@dataclass(frozen=True, kw_only=True)
class RankerTraining:
    """How the ranker is trained."""

    num_epochs: int = 6
    lists_a_step: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05


def make_lists(
    holdouts: list[Holdout],
    recipe: Recipe,
    config: RankerConfig,
    *,
    seed: int,
    on_progress: Callable[[float], None] = lambda done: None,
) -> list[Lists]:
    """Fit the sources without each holdout's labels and collect what a ranker would see."""
    lists = []
    for number, holdout in enumerate(holdouts):
        sources = fit_sources(holdout.seen, recipe, seed=seed + 1 + number)
        lists += _lists(sources, holdout, config, recipe)
        on_progress((number + 1) / len(holdouts))
    return lists


def _lists(sources: Sources, holdout: Holdout, config: RankerConfig, recipe: Recipe) -> list[Lists]:
    lists = []
    for start in range(0, holdout.seen.num_users, _LISTS_A_CHUNK):
        end = min(start + _LISTS_A_CHUNK, holdout.seen.num_users)
        part = holdout.seen.part(start, end)
        excluded = None if recipe.repeats else part.matrix(holdout.wanted.shape[1])
        found = sources.candidates(
            part, config.num_candidates, holdout.store_IF, repeats=recipe.repeats, excluded=excluded
        )
        wanted = np.take_along_axis(holdout.wanted[start:end].toarray() > 0, found.item, axis=1)
        possible = ~np.isneginf(found.score)
        users = np.flatnonzero((wanted & possible).any(axis=1))
        lists.append(
            Lists(*(torch.from_numpy(array[users]) for array in (found.features, wanted & possible, possible)))
        )
    return [part for part in lists if len(part.wanted_UC)]


def train_ranker(
    lists: list[Lists],
    config: RankerConfig,
    *,
    seed: int,
    training: RankerTraining,
    linear: bool = False,
    on_progress: Callable[[float], None] = lambda done: None,
) -> tuple[PairRanker, RoutingMonitor]:
    """Softmax over each list: every user counts the same, whatever the number of items that it wants.

    linear: without the experts, for comparison.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    ranker = PairRanker(config)
    for module in (ranker.backbone, ranker.head):
        module.requires_grad_(not linear)
    monitor = RoutingMonitor(ranker)
    if not lists:
        return ranker, monitor  # nothing to learn from: the sources' order stays
    features_UCF, wanted_UC, possible_UC = (torch.cat(parts) for parts in zip(*lists, strict=True))
    features_UCF = features_UCF[..., config.columns]
    flat = features_UCF[possible_UC]
    ranker.mean_F.copy_(flat.mean(0))
    ranker.std_F.copy_(flat.std(0) + 1e-6)
    num_lists = len(features_UCF)
    steps = max(1, num_lists // training.lists_a_step)

    def batches(_: int) -> Iterator[Tensor]:
        yield from torch.randperm(num_lists, generator=generator).tensor_split(steps)

    def loss(users: Tensor) -> Tensor:
        logits, balance = ranker(features_UCF[users])
        logits = logits.masked_fill(~possible_UC[users], _MASKED_OUT)
        wanted = wanted_UC[users].float()
        likelihood = (logits.log_softmax(1) * wanted).sum(1) / wanted.sum(1)
        total: Tensor = balance - likelihood.mean()
        return total

    def epoch_done(epoch: int, _: float) -> None:
        monitor.metrics()
        on_progress(epoch / training.num_epochs)

    with monitor:
        fit(
            ranker,
            batches=batches,
            num_batches=steps,
            loss=loss,
            evaluate=None,
            config=TrainConfig(
                num_epochs=training.num_epochs,
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
            ),
            on_epoch=epoch_done,
        )
    return ranker, monitor
