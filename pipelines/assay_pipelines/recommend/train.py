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
from assay_platform.models.content import ItemFacts, fit_content_map
from assay_platform.models.graph import Adjacency, GraphEncoder, ItemGraph, adjacencies
from assay_platform.models.histories import Floats, Histories, Index
from assay_platform.models.item_regression import RegressionConfig, fit_item_regression
from assay_platform.models.recommender import PairRanker, RankerConfig
from assay_platform.models.sequence import SequenceConfig, SequenceEncoder
from assay_platform.models.sources import NO_MORE, ItemPast, ItemVectors, Sources, Wanted, Weights
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.training import TrainConfig, fastest_device, fit
from assay_platform.tuning.space import OneOf, Real, Space
from numpy.typing import NDArray
from torch import Tensor

from assay_pipelines.recommend.evaluate import best_items, ranking_metrics
from assay_pipelines.recommend.train_sequence import SequenceTraining, train_sequence

_STEPS_AN_EPOCH = 10
# The softmax of a step: users, and users times items. Items are drawn where that leaves too few users.
_MOST_USERS, _FEWEST_USERS, _LOSS_CELLS = 1024, 64, 2**23
# Items of the regression, whose time grows with their cube: those taken most.
MAX_HEAD = 8000
_CALIBRATION_MASK = 0.6
_MASKED_OUT = -1e9
_LISTS_A_CHUNK = 256
# What a ranker learns from: at most so many lists, and beside them a part again that knows so few events of a user.
_MOST_LISTS, _SHORTENED, _SHORTEST = 20_000, 0.1, 5
_HIDDEN = 0.2  # of the items, in lists of what nobody has taken yet
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


def _mask(graph: ItemGraph, fraction: float, generator: np.random.Generator, device: torch.device) -> _Masked:
    keep = generator.random(len(graph.user)) > fraction

    def pairs(rows: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(graph.user[rows]).to(device), torch.from_numpy(graph.item[rows]).to(device)

    return _Masked(adjacencies(graph.matrices(keep), device), pairs(keep), pairs(~keep))


class _Softmax(NamedTuple):
    """Products of some users with the items that they are told from, and which of them count.

    items: which. stands_for (n,) or (): logarithm of how many items one stands for. wanted, hidden: places of dropped
    and of kept edges.
    """

    products_UI: Tensor
    items: Tensor | slice
    stands_for: Tensor
    wanted: tuple[Tensor, Tensor]
    hidden: tuple[Tensor, Tensor]

    @staticmethod
    def of(user_UD: Tensor, item_ID: Tensor, masked: _Masked, generator: np.random.Generator) -> "_Softmax":
        """All users and items where they are few."""
        num_items, wanted, hidden = len(item_ID), masked.dropped, masked.kept
        most = min(_MOST_USERS, max(_FEWEST_USERS, _LOSS_CELLS // num_items))
        if len(user_UD) > most:
            users = torch.from_numpy(np.sort(generator.choice(len(user_UD), most, replace=False))).to(user_UD.device)
            wanted, hidden = (_among(pairs, 0, users, len(user_UD)) for pairs in (wanted, hidden))
            user_UD = user_UD[users]
        items: Tensor | slice = slice(None)
        stands_for = torch.zeros((), device=user_UD.device)
        if len(user_UD) * num_items > 2 * _LOSS_CELLS:
            drawn = generator.integers(0, num_items, _LOSS_CELLS // len(user_UD))
            told_from = np.unique(np.concatenate([wanted[1].cpu().numpy(), drawn]))
            items = chosen = torch.from_numpy(told_from).to(user_UD.device)
            are_wanted = torch.isin(chosen, wanted[1])
            left = num_items - int(are_wanted.sum())
            stands_for = torch.where(are_wanted, 0.0, float(np.log(left / max(1, int((~are_wanted).sum())))))
            wanted, hidden = (_among(pairs, 1, chosen, num_items) for pairs in (wanted, hidden))
        return _Softmax(user_UD @ item_ID[items].T, items, stands_for, wanted, hidden)

    def loss(self, logits_UI: Tensor) -> Tensor:
        """Of the dropped edges; a user's edges weigh 1 / sqrt(how many it lost)."""
        logits_UI = (logits_UI + self.stands_for).index_put(
            self.hidden, torch.tensor(_MASKED_OUT, device=logits_UI.device)
        )
        rows, columns = self.wanted
        weight = torch.bincount(rows, minlength=len(logits_UI)).float().clamp(min=1)[rows].rsqrt()
        loss = logits_UI.logsumexp(1)[rows] - logits_UI[rows, columns]
        return (weight * loss).sum() / weight.sum().clamp_min(1e-9)


def _among(pairs: tuple[Tensor, Tensor], side: int, chosen: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Of the pairs those whose one side is chosen, that side as its place among the chosen."""
    place = torch.full((num,), -1, dtype=torch.int64, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    at = place[pairs[side]]
    kept = at >= 0
    return (at[kept], pairs[1][kept]) if side == 0 else (pairs[0][kept], at[kept])


def _calibrate(encoder: GraphEncoder, graph: ItemGraph, generator: np.random.Generator) -> None:
    """Start temperature and popularity bias where the loss of the untrained encoder is lowest."""
    device = encoder.base_ID.device
    masked = _mask(graph, _CALIBRATION_MASK, generator, device)
    log_popularity = torch.from_numpy(np.log1p(np.bincount(graph.item, minlength=graph.num_items))).float().to(device)
    with torch.no_grad():
        user_UD, item_ID = encoder.eval()(masked.graph)
        softmax = _Softmax.of(user_UD, item_ID, masked, generator)
        spread = float(softmax.products_UI.std()) + 1e-9
        candidates = []
        for scale in np.exp(np.linspace(np.log(0.3), np.log(6.0), 8)) / spread:
            for share in (0.0, 0.25, 0.5, 0.75):
                trial_UI = softmax.products_UI * float(scale) + share * log_popularity[softmax.items]
                candidates.append((float(softmax.loss(trial_UI)), float(scale), share))
        _, scale, share = min(candidates)
        encoder.log_scale.fill_(float(np.log(scale)))
        encoder.bias_I.copy_(share * log_popularity)


def train_encoder(
    graph: ItemGraph,
    params: Mapping[str, Any],
    *,
    seed: int,
    evaluate: Callable[[GraphEncoder], float] | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, metric: None,
) -> GraphEncoder:
    """Fit a graph encoder to all edges given: on a GPU where there is one. It comes back on the CPU."""
    torch.manual_seed(seed)
    generator, device = np.random.default_rng(seed), fastest_device()
    encoder = GraphEncoder(graph, width=params["width"], num_layers=params["num_layers"], dropout=params["dropout"])
    encoder.to(device)
    _calibrate(encoder, graph, generator)

    def batches(_: int) -> Iterator[_Masked]:
        for _step in range(_STEPS_AN_EPOCH):
            yield _mask(graph, generator.uniform(params["mask_low"], params["mask_high"]), generator, device)

    def loss(masked: _Masked) -> Tensor:
        user_UD, item_ID = encoder(masked.graph)
        softmax = _Softmax.of(user_UD, item_ID, masked, generator)
        return softmax.loss(softmax.products_UI * encoder.log_scale.exp() + encoder.bias_I[softmax.items])

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
    return encoder.cpu().eval()


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
        user_UD, item_ID = encoder(adjacencies(graph.matrices(), encoder.base_ID.device))
        seen = sp.csr_matrix((np.ones(len(graph.user), dtype=np.float32), (graph.user, graph.item)), wanted.shape)
        top = best_items(lambda a, b: encoder.score(user_UD[a:b], item_ID).cpu().numpy(), seen, repeats=repeats)
    return ranking_metrics(top, wanted, seen)["ndcg_at_10"]


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
    seen, head = histories.matrix(num_items), ItemPast.of(histories, num_items).head(MAX_HEAD)
    measured: dict[RegressionConfig, float] = {}
    grid = [RegressionConfig(penalty=penalty) for penalty in _PENALTIES]

    def best() -> RegressionConfig:
        return max(measured, key=lambda config: measured[config])

    def measure(config: RegressionConfig) -> None:
        regression = fit_item_regression(histories, num_items, config, head)

        def scores(first: int, end: int) -> Floats:
            found = np.zeros((end - first, num_items), dtype=np.float32)
            found[:, head] = regression.scores(seen[first:end])
            return found

        top = best_items(scores, seen, repeats=repeats)
        measured[config] = ranking_metrics(top, wanted, seen)["ndcg_at_10"]
        on_progress(len(measured) / (len(_PENALTIES) + len(_CLOSENESS_S)), f"NDCG@10 {measured[best()]:.3f}")

    for config in grid:
        measure(config)
    penalised = best()
    for closeness_s in _CLOSENESS_S:
        measure(replace(penalised, closeness_s=closeness_s))
    return best()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What validation chose of the sources. sequence: None where the order of events is of no use."""

    graph: Mapping[str, Any]
    regression: RegressionConfig
    facts: ItemFacts
    repeats: bool
    sequence: SequenceTraining | None = None
    weights: Weights = NO_MORE


def item_graph(histories: Histories, facts: ItemFacts, regression: RegressionConfig) -> ItemGraph:
    """Users, baskets by the regression's closeness, and categories."""
    return ItemGraph.of(histories, facts.categories, closeness_s=regression.closeness_s)


def fit_sources(histories: Histories, recipe: Recipe, *, seed: int, sequence: SequenceEncoder | None = None) -> Sources:
    """All sources from the same events, beside a sequence encoder that is there already."""
    num_items = recipe.facts.num_items
    past = ItemPast.of(histories, num_items)
    head = past.head(MAX_HEAD)
    graph = item_graph(histories, recipe.facts, recipe.regression)
    rated = not histories.liked.all()
    vectors = item_vectors(train_encoder(graph, recipe.graph, seed=seed), graph)
    content = fit_content_map(recipe.facts, vectors.stacked(), np.log1p(past.takers))
    return Sources(
        fit_item_regression(histories, num_items, recipe.regression, head),
        fit_item_regression(histories.where(histories.liked), num_items, recipe.regression, head) if rated else None,
        vectors.where(past.takers == 0, content.vectors(recipe.facts.content)),
        past,
        recipe.facts,
        content,
        head,
        sequence,
        recipe.weights,
    )


class Holdout(NamedTuple):
    """One way to divide interactions: what sources see, and what is to be predicted of the same users.

    store_IF: item features of the store at the histories' moment; new_S: those of an item without events.
    """

    seen: Histories
    wanted: sp.csr_matrix
    store_IF: Floats
    new_S: Floats

    def store(self, items: Index) -> Floats:
        """(n, S) of some items."""
        return self.store_IF[items]


class Lists(NamedTuple):
    """Candidates of users with something to find among them."""

    features_UCF: Tensor
    wanted_UC: Tensor
    possible_UC: Tensor  # not excluded


@dataclass(frozen=True, kw_only=True)
class RankerTraining:
    """How the ranker is trained."""

    num_epochs: int = 4
    lists_a_step: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05


class Earliest(NamedTuple):
    """The sources of the holdout that sees least, and its number. Their sequence encoder serves everywhere: it is a
    function of histories, and it has seen the labels of no holdout.
    """

    number: int
    sources: Sources


def fit_earliest(holdouts: list[Holdout], recipe: Recipe, *, seed: int) -> Earliest:
    """With a sequence encoder if the recipe has one."""
    number = min(range(len(holdouts)), key=lambda n: len(holdouts[n].seen.item))
    seen = holdouts[number].seen
    sources = fit_sources(seen, recipe, seed=seed + 1 + number)
    if recipe.sequence is not None:
        encoder = train_sequence(seen, sources.vectors.item_ID, SequenceConfig(), recipe.sequence, seed=seed)
        sources = replace(sources, sequence=encoder.requires_grad_(False))
    return Earliest(number, sources)


def fit_holdouts(
    holdouts: list[Holdout],
    recipe: Recipe,
    earliest: Earliest,
    *,
    seed: int,
    on_progress: Callable[[float], None] = lambda done: None,
) -> list[Sources]:
    """The sources of each holdout, without its labels."""
    fitted = []
    for number, holdout in enumerate(holdouts):
        if number == earliest.number:
            fitted.append(earliest.sources)
        else:
            shared = earliest.sources.sequence
            fitted.append(fit_sources(holdout.seen, recipe, seed=seed + 1 + number, sequence=shared))
        on_progress((number + 1) / len(holdouts))
    return fitted


def make_lists(
    holdouts: list[Holdout], fitted: list[Sources], recipe: Recipe, config: RankerConfig, *, seed: int
) -> list[Lists]:
    """What a ranker would see of the holdouts. fitted: their sources, weighed here as the recipe says."""
    lists, generator = [], np.random.default_rng(seed)
    for holdout, sources in zip(holdouts, fitted, strict=True):
        weighed = replace(sources, weights=recipe.weights)
        lists += _lists(weighed, holdout, config, recipe, _MOST_LISTS // len(holdouts), generator)
    return lists


def _lists(
    sources: Sources, holdout: Holdout, config: RankerConfig, recipe: Recipe, most: int, generator: np.random.Generator
) -> list[Lists]:
    """Of at most so many users who want something; some of them once more as if little were known of them, so that the
    ranker learns what to make of the few events of somebody new.
    """
    users = np.flatnonzero(np.diff(holdout.wanted.indptr))
    if len(users) > most:
        users = np.sort(generator.choice(users, most, replace=False))
    lists = []
    for first in range(0, len(users), _LISTS_A_CHUNK):
        chosen = users[first : first + _LISTS_A_CHUNK]
        seen, wanted = holdout.seen.of_users(chosen), holdout.wanted[chosen]
        new = Wanted(None if recipe.repeats else seen.matrix(wanted.shape[1]))
        lists.append(_list_of(sources, seen, wanted, new, holdout, config, recipe))
        again = np.flatnonzero(generator.random(len(chosen)) < _SHORTENED)
        if len(again):
            few = seen.of_users(again).latest(generator.integers(1, _SHORTEST + 1, len(again)))
            excluded = Wanted(None if new.excluded is None else new.excluded[again])
            lists.append(_list_of(sources, few, wanted[again], excluded, holdout, config, recipe))
    lists += _lists_of_new(sources, holdout, config, recipe, users, generator)
    return [part for part in lists if len(part.wanted_UC)]


def _lists_of_new(
    sources: Sources,
    holdout: Holdout,
    config: RankerConfig,
    recipe: Recipe,
    users: Index,
    generator: np.random.Generator,
) -> list[Lists]:
    """Lists of some items alone, as if nobody had taken them: what orders new ones is learned from these."""
    hidden = generator.random(sources.num_items) < _HIDDEN
    wanted = sp.csr_matrix(holdout.wanted @ sp.diags(hidden.astype(np.float32)))
    wanted.eliminate_zeros()
    users = users[np.diff(wanted.indptr)[users] > 0]
    users = users[generator.random(len(users)) < _SHORTENED]
    if not len(users) or hidden.all():
        return []
    sources = sources.as_if_new(hidden)
    unknown = holdout._replace(store_IF=np.where(hidden[:, None], holdout.new_S, holdout.store_IF))
    lists = []
    for first in range(0, len(users), _LISTS_A_CHUNK):
        chosen = users[first : first + _LISTS_A_CHUNK]
        seen = holdout.seen.of_users(chosen)
        seen = seen.where(~hidden[seen.item])
        lists.append(_list_of(sources, seen, wanted[chosen], Wanted(allowed=hidden), unknown, config, recipe))
    return lists


def _list_of(
    sources: Sources,
    seen: Histories,
    wanted: sp.csr_matrix,
    possible: Wanted,
    holdout: Holdout,
    config: RankerConfig,
    recipe: Recipe,
) -> Lists:
    found = sources.candidates(seen, config.num_candidates, holdout.store, repeats=recipe.repeats, wanted=possible)
    possible_UC = ~np.isneginf(found.score)
    wanted_UC = np.take_along_axis(wanted.toarray() > 0, found.item, axis=1) & possible_UC
    users = np.flatnonzero(wanted_UC.any(axis=1))
    return Lists(*(torch.from_numpy(array[users]) for array in (found.features, wanted_UC, possible_UC)))


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
    generator, device = torch.Generator().manual_seed(seed), fastest_device()
    ranker = PairRanker(config)
    for module in (ranker.backbone, ranker.head):
        module.requires_grad_(not linear)
    monitor = RoutingMonitor(ranker)
    if not lists:
        return ranker, monitor  # nothing to learn from: the sources' order stays
    features_UCF, wanted_UC, possible_UC = (torch.cat(parts) for parts in zip(*lists, strict=True))
    features_UCF = features_UCF[..., config.columns]
    flat = features_UCF[possible_UC]
    known = ~flat.isnan()
    mean = flat.nanmean(0).nan_to_num(0.0)
    ranker.mean_F.copy_(mean)
    squares = torch.where(known, flat - mean, 0.0).square().sum(0) / known.sum(0).clamp(min=1)
    ranker.std_F.copy_(squares.sqrt() + 1e-6)
    ranker.to(device)
    num_lists = len(features_UCF)
    steps = max(1, num_lists // training.lists_a_step)

    def batches(_: int) -> Iterator[Tensor]:
        yield from torch.randperm(num_lists, generator=generator).tensor_split(steps)

    def loss(users: Tensor) -> Tensor:
        logits, balance = ranker(features_UCF[users].to(device))
        logits = logits.masked_fill(~possible_UC[users].to(device), _MASKED_OUT)
        wanted = wanted_UC[users].float().to(device)
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
    return ranker.cpu(), monitor
