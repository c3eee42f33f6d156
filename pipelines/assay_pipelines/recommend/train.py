"""Train the sources of a recommender and the ranker over them.

The ranker must learn from interactions that its inputs have not seen, or it learns to trust them too much. So for each
of a few holdouts all sources are fitted without part of the interactions, which are then the labels.
"""

# U users, I items, D width of a vector, C candidates, F features of a pair, T tasks

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from assay_platform.models.content import ItemFacts, fit_content_map
from assay_platform.models.graph import GraphEncoder, ItemGraph
from assay_platform.models.histories import Again, Floats, Histories, Index
from assay_platform.models.item_regression import RegressionConfig, fit_item_regression
from assay_platform.models.recommender import PairRanker, RankerConfig
from assay_platform.models.sequence import SequenceConfig, SequenceEncoder
from assay_platform.models.sources import NO_MORE, ItemPast, Sources, Wanted, Weights
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.training import ALONE, HERE, Checkpoint, Ranks, TrainConfig, UpdateOn, Workers, fastest_device, fit
from torch import Tensor

from assay_pipelines.recommend.evaluate import best_items, ndcg_at_10
from assay_pipelines.recommend.train_graph import is_large, item_vectors, train_encoder
from assay_pipelines.recommend.train_sequence import SequenceTraining, train_sequence

# Items of the regression, whose time grows with their cube: those taken most.
MAX_HEAD = 8000
_MASKED_OUT = -1e9
_LISTS_A_CHUNK = 256
# What a ranker learns from: at most so many lists, and beside them a part again that knows so few events of a user.
_MOST_LISTS, _SHORTENED, _SHORTEST = 20_000, 0.1, 5
_OTHER_TASKS = 0.3  # of the first task's weight in the loss
_HIDDEN = 0.2  # of the items, in lists of what nobody has taken yet
# What the regression's search tries; seconds from a quick succession of ratings to a day's shopping.
_PENALTIES = (250.0, 500.0, 1000.0)
_CLOSENESS_S = (0.0, 3600.0, 86_400.0)


def choose_regression(
    histories: Histories,
    wanted: sp.csr_matrix,
    *,
    again: Again,
    on_progress: Callable[[float, str], None] = lambda done, text: None,
) -> RegressionConfig:
    """The penalty, then the closeness in time, that rank the validation part best."""
    num_items = wanted.shape[1]
    seen, head = histories.matrix(num_items), ItemPast.of(histories, num_items).head(MAX_HEAD)
    excluded = again.excluded(histories, num_items)
    measured: dict[RegressionConfig, float] = {}
    grid = [RegressionConfig(penalty=penalty) for penalty in _PENALTIES]

    def best() -> RegressionConfig:
        return max(measured, key=lambda config: measured[config])

    def measure(config: RegressionConfig) -> None:
        regression = fit_item_regression(histories, num_items, config, head)

        def scores(users: Index) -> Floats:
            found = np.zeros((len(users), num_items), dtype=np.float32)
            found[:, head] = regression.scores(seen[users])
            return found

        top = best_items(scores, wanted, excluded)
        measured[config] = ndcg_at_10(top, wanted)
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
    again: Again
    sequence: SequenceTraining | None = None
    weights: Weights = NO_MORE


def item_graph(histories: Histories, facts: ItemFacts, regression: RegressionConfig) -> ItemGraph:
    """Users, baskets by the regression's closeness, and categories."""
    return ItemGraph.of(histories, facts.categories, closeness_s=regression.closeness_s)


class Encoders(NamedTuple):
    """What is trained once, on the holdout that sees least, and serves everywhere: functions of histories and of graphs
    that have seen the labels of no holdout.

    graph: of graphs too large to be trained on every time; its vectors are smoothed over the edges of each.
    """

    sequence: SequenceEncoder | None = None
    graph: GraphEncoder | None = None


_NONE = Encoders()


def fit_sources(histories: Histories, recipe: Recipe, *, seed: int, shared: Encoders = _NONE) -> Sources:
    """All sources from the same events, beside encoders that are there already."""
    num_items = recipe.facts.num_items
    past = ItemPast.of(histories, num_items)
    head = past.head(MAX_HEAD)
    graph = item_graph(histories, recipe.facts, recipe.regression)
    rated = not histories.liked.all()
    encoder = train_encoder(graph, recipe.graph, seed=seed) if shared.graph is None else shared.graph
    vectors = item_vectors(encoder, graph)
    content = fit_content_map(recipe.facts, vectors.stacked(), np.log1p(past.takers))
    return Sources(
        fit_item_regression(histories, num_items, recipe.regression, head),
        fit_item_regression(histories.where(histories.liked), num_items, recipe.regression, head) if rated else None,
        vectors.where(past.takers == 0, content.vectors(recipe.facts.content, recipe.facts.sentences)),
        past,
        recipe.facts,
        content,
        head,
        shared.sequence,
        recipe.weights,
    )


class Holdout(NamedTuple):
    """One way to divide interactions: what sources see, and what is to be predicted of the same users, by task.

    store_IF: item features of the store at the histories' moment; new_S: those of an item without events.
    """

    seen: Histories
    wanted: list[sp.csr_matrix]
    store_IF: Floats
    new_S: Floats

    def store(self, items: Index) -> Floats:
        """(n, S) of some items."""
        return self.store_IF[items]


class Lists(NamedTuple):
    """Candidates of users with something to find among them."""

    features_UCF: Tensor
    wanted_UCT: Tensor
    possible_UC: Tensor  # not excluded


@dataclass(frozen=True, kw_only=True)
class RankerTraining:
    """How the ranker is trained."""

    num_epochs: int = 4
    lists_a_step: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    update_on: UpdateOn = "device"


class Earliest(NamedTuple):
    """The sources of the holdout that sees least, its number, and the encoders that were trained on it."""

    number: int
    sources: Sources
    encoders: Encoders


def fit_earliest(
    holdouts: list[Holdout],
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    workers: Workers = HERE,
) -> Earliest:
    """With a sequence encoder if the recipe has one. checkpoint, workers: of its training."""
    number = min(range(len(holdouts)), key=lambda n: len(holdouts[n].seen.item))
    seen, encoders = holdouts[number].seen, _NONE
    # Where the order of events is of no use, what one holdout sees are labels of another.
    if recipe.sequence is not None:
        graph = item_graph(seen, recipe.facts, recipe.regression)
        if is_large(graph):
            encoders = Encoders(graph=train_encoder(graph, recipe.graph, seed=seed + 1 + number))
    sources = fit_sources(seen, recipe, seed=seed + 1 + number, shared=encoders)
    if recipe.sequence is not None:
        train = partial(train_sequence, config=SequenceConfig(), training=recipe.sequence, seed=seed)
        data = {"histories": seen, "graph_ID": sources.vectors.item_ID}
        encoder = workers.train(train, data, checkpoint=checkpoint)
        encoders = encoders._replace(sequence=encoder.requires_grad_(False))
        sources = replace(sources, sequence=encoders.sequence)
    return Earliest(number, sources, encoders)


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
            fitted.append(fit_sources(holdout.seen, recipe, seed=seed + 1 + number, shared=earliest.encoders))
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
    users = np.flatnonzero(sum(np.diff(wanted.indptr) for wanted in holdout.wanted))
    if len(users) > most:
        users = np.sort(generator.choice(users, most, replace=False))
    lists = []
    for first in range(0, len(users), _LISTS_A_CHUNK):
        chosen = users[first : first + _LISTS_A_CHUNK]
        seen, wanted = holdout.seen.of_users(chosen), [by_task[chosen] for by_task in holdout.wanted]
        new = Wanted(recipe.again.excluded(seen, sources.num_items))
        lists.append(_list_of(sources, seen, wanted, new, holdout, config, recipe))
        again = np.flatnonzero(generator.random(len(chosen)) < _SHORTENED)
        if len(again):
            few = seen.of_users(again).latest(generator.integers(1, _SHORTEST + 1, len(again)))
            excluded = Wanted(None if new.excluded is None else new.excluded[again])
            lists.append(
                _list_of(sources, few, [by_task[again] for by_task in wanted], excluded, holdout, config, recipe)
            )
    lists += _lists_of_new(sources, holdout, config, recipe, users, generator)
    return [part for part in lists if len(part.wanted_UCT)]


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
    kept = sp.diags(hidden.astype(np.float32))
    wanted = [sp.csr_matrix(by_task @ kept) for by_task in holdout.wanted]
    for by_task in wanted:
        by_task.eliminate_zeros()
    users = users[sum(np.diff(by_task.indptr) for by_task in wanted)[users] > 0]
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
        lists.append(
            _list_of(sources, seen, [w[chosen] for w in wanted], Wanted(allowed=hidden), unknown, config, recipe)
        )
    return lists


def _list_of(
    sources: Sources,
    seen: Histories,
    wanted: list[sp.csr_matrix],
    possible: Wanted,
    holdout: Holdout,
    config: RankerConfig,
    recipe: Recipe,
) -> Lists:
    found = sources.candidates(
        seen, config.num_candidates, holdout.store, own_past=recipe.again.own_past, wanted=possible
    )
    possible_UC = ~np.isneginf(found.score)
    by_task = [np.take_along_axis(some.toarray() > 0, found.item, axis=1) & possible_UC for some in wanted]
    wanted_UCT = np.stack(by_task, axis=-1)
    users = np.flatnonzero(wanted_UCT.any(axis=(1, 2)))
    return Lists(*(torch.from_numpy(array[users]) for array in (found.features, wanted_UCT, possible_UC)))


def train_ranker(
    lists: list[Lists],
    config: RankerConfig,
    *,
    seed: int,
    training: RankerTraining,
    linear: bool = False,
    on_epoch: Callable[[int, float], None] = lambda epoch, metric: None,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
) -> tuple[PairRanker, RoutingMonitor]:
    """Softmax over each list: every user counts the same, whatever the number of items that it wants. Tasks but the
    first count less; a list without anything wanted by one says nothing of it.

    linear: without the experts, for comparison. ranks: that train it together; the routing is of one's own share.
    """
    torch.manual_seed(seed)
    generator, device = torch.Generator().manual_seed(seed), fastest_device()
    ranker = PairRanker(config)
    for module in (ranker.backbone, ranker.head):
        module.requires_grad_(not linear)
    monitor = RoutingMonitor(ranker)
    if not lists:
        return ranker, monitor  # nothing to learn from: the sources' order stays
    features_UCF, wanted_UCT, possible_UC = (torch.cat(parts) for parts in zip(*lists, strict=True))
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
        mine = users[ranks.share(len(users))]
        logits, balance = ranker(features_UCF[mine].to(device))
        logits = logits.masked_fill(~possible_UC[mine, :, None].to(device), _MASKED_OUT)
        wanted = wanted_UCT[mine].float().to(device)
        likelihood_UT = (logits.log_softmax(1) * wanted).sum(1) / wanted.sum(1).clamp(min=1)
        num_T = wanted_UCT[users].any(1).sum(0).to(device)
        by_task = likelihood_UT.sum(0) / num_T.clamp(min=1)
        total: Tensor = balance * (len(mine) / len(users)) - by_task[0] - _OTHER_TASKS * by_task[1:].sum()
        return total

    def epoch_done(epoch: int, metric: float) -> None:
        monitor.metrics()
        on_epoch(epoch, metric)

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
                update_on=training.update_on,
            ),
            on_epoch=epoch_done,
            units=list(ranker.backbone.layers),
            checkpoint=checkpoint,
            generators=[generator],
            ranks=ranks,
        )
    return ranker.cpu(), monitor
