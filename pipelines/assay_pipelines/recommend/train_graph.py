"""Train the graph encoder: edges are masked at random, the graph without them is propagated, and the masked edges are
predicted by a softmax over all items, or over a sample of them.

A graph of few enough edges is propagated as a whole in every step; of a larger one, samples around some users.
"""

# U users, I items, D width of a vector

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import scipy.sparse as sp
import torch
from assay_platform.models.graph import GraphEncoder, ItemGraph, Subgraph
from assay_platform.models.graph_sampling import GraphSampler
from assay_platform.models.histories import Floats, Index
from assay_platform.models.sources import ItemVectors
from assay_platform.training import TrainConfig, fastest_device, fit
from assay_platform.tuning.space import OneOf, Real, Space
from torch import Tensor

from assay_pipelines.recommend.evaluate import Hits, best_items

_STEPS_AN_EPOCH = 10
# The softmax of a step: users, and users times items. Items are drawn where that leaves too few users.
_MOST_USERS, _FEWEST_USERS, _LOSS_CELLS = 1024, 64, 2**23
# Edges of a graph that is propagated as a whole. Of a larger one: users of a step, items that theirs are told apart
# from, neighbours of a row, and steps of an epoch.
MOST_AT_ONCE = 3_000_000
_SAMPLED_USERS, _TOLD_APART, _FANOUT, _SAMPLED_STEPS = 1024, 8192, 16, 50
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


Pairs = tuple[Tensor, Tensor]


class _Masked(Protocol):
    """A graph without some edges, and what is to be told of those."""

    @property
    def graph(self) -> Subgraph:
        """To run the encoder over."""

    def softmax(self, user_UD: Tensor, item_ID: Tensor) -> "_Softmax":
        """Of what comes out."""


class _Graph(Protocol):
    """Draws masked graphs."""

    num_steps: int

    def mask(self, fraction: float) -> _Masked:
        """Without so many of the edges."""


class _Softmax(NamedTuple):
    """Some users and the items that theirs are told apart from, and which pairs count.

    items: which. stands_for (n,) or (): logarithm of how many items one stands for. wanted, hidden: places of dropped
    and of kept edges.
    """

    user_UD: Tensor
    item_ID: Tensor
    items: Tensor | slice
    stands_for: Tensor
    wanted: Pairs
    hidden: Pairs

    def loss(self, scale: Tensor, bias_I: Tensor) -> Tensor:
        """Of the dropped edges; a user's edges weigh 1 / sqrt(how many it lost). bias_I: of all items."""
        # One product: each more pass over all pairs takes as long as a third of it.
        logits_UI = torch.addmm(bias_I[self.items] + self.stands_for, self.user_UD * scale, self.item_ID.T)
        logits_UI[self.hidden] = _MASKED_OUT
        rows, columns = self.wanted
        weight = torch.bincount(rows, minlength=len(logits_UI)).float().clamp(min=1)[rows].rsqrt()
        loss = logits_UI.logsumexp(1)[rows] - logits_UI[rows, columns]
        return (weight * loss).sum() / weight.sum().clamp_min(1e-9)


class _MaskedWhole(NamedTuple):
    """All of a graph but for what was taken out; kept, dropped: (user, item)."""

    graph: Subgraph
    kept: Pairs
    dropped: Pairs
    generator: np.random.Generator

    def softmax(self, user_UD: Tensor, item_ID: Tensor) -> _Softmax:
        """All users and items where they are few."""
        num_items, wanted, hidden = len(item_ID), self.dropped, self.kept
        most = min(_MOST_USERS, max(_FEWEST_USERS, _LOSS_CELLS // num_items))
        if len(user_UD) > most:
            drawn = np.sort(self.generator.choice(len(user_UD), most, replace=False))
            users = torch.from_numpy(drawn).to(user_UD.device)
            wanted, hidden = (_among(pairs, 0, users, len(user_UD)) for pairs in (wanted, hidden))
            user_UD = user_UD[users]
        items: Tensor | slice = slice(None)
        stands_for = torch.zeros((), device=user_UD.device)
        if len(user_UD) * num_items > 2 * _LOSS_CELLS:
            drawn = self.generator.integers(0, num_items, _LOSS_CELLS // len(user_UD))
            told_apart = np.unique(np.concatenate([wanted[1].cpu().numpy(), drawn]))
            items = chosen = torch.from_numpy(told_apart).to(user_UD.device)
            stands_for = _stands_for(torch.isin(chosen, wanted[1]), num_items)
            wanted, hidden = (_among(pairs, 1, chosen, num_items) for pairs in (wanted, hidden))
        return _Softmax(user_UD, item_ID[items], items, stands_for, wanted, hidden)


class _WholeGraph:
    num_steps = _STEPS_AN_EPOCH

    def __init__(
        self, graph: ItemGraph, encoder: GraphEncoder, generator: np.random.Generator, device: torch.device
    ) -> None:
        self._graph, self._num_layers = graph, encoder.num_layers
        self._generator, self._device = generator, device
        self._user, self._item = (torch.from_numpy(side).to(device) for side in (graph.user, graph.item))

    def mask(self, fraction: float) -> _MaskedWhole:
        kept = self._generator.random(len(self._graph.user)) > fraction
        chosen = torch.from_numpy(kept).to(self._device)
        there, gone = ((self._user[part], self._item[part]) for part in (chosen, ~chosen))
        whole = Subgraph.whole(self._graph.adjacencies(kept, self._device), self._num_layers)
        return _MaskedWhole(whole, there, gone, self._generator)


class _MaskedSample(NamedTuple):
    """Some users. items: that theirs are told apart from."""

    graph: Subgraph
    items: Tensor
    wanted: Pairs
    hidden: Pairs
    num_items: int

    def softmax(self, user_UD: Tensor, item_ID: Tensor) -> _Softmax:
        are_wanted = torch.zeros(len(self.items), dtype=torch.bool, device=item_ID.device)
        are_wanted[self.wanted[1]] = True
        told_apart, stands_for = item_ID[: len(self.items)], _stands_for(are_wanted, self.num_items)
        return _Softmax(user_UD, told_apart, self.items, stands_for, self.wanted, self.hidden)


class _SampledGraph:
    num_steps = _SAMPLED_STEPS

    def __init__(
        self, graph: ItemGraph, encoder: GraphEncoder, generator: np.random.Generator, device: torch.device
    ) -> None:
        self._sampler = GraphSampler(graph, num_layers=encoder.num_layers, fanout=_FANOUT)
        self._num_items, self._generator, self._device = graph.num_items, generator, device
        self._some = np.flatnonzero(graph.relations[0].other_degree > 1)

    def mask(self, fraction: float) -> _MaskedSample:
        users = self._generator.choice(self._some, min(len(self._some), _SAMPLED_USERS), replace=False)
        found = self._sampler.draw(np.sort(users), fraction, _TOLD_APART, self._generator, self._device)
        items = torch.from_numpy(found.items[: found.told_apart]).to(self._device)
        wanted, hidden = (
            (torch.from_numpy(user).to(self._device), torch.from_numpy(item).to(self._device))
            for user, item in (found.wanted, found.hidden)
        )
        return _MaskedSample(found.graph, items, wanted, hidden, self._num_items)


def _stands_for(are_wanted: Tensor, num_items: int) -> Tensor:
    """(n,) logarithms: of items told apart, those that are wanted stand for themselves, the others for all others."""
    num_wanted = int(are_wanted.sum())
    others = max(1, len(are_wanted) - num_wanted)
    return torch.where(are_wanted, 0.0, float(np.log(max(1, num_items - num_wanted) / others)))


def _among(pairs: tuple[Tensor, Tensor], side: int, chosen: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Of the pairs those whose one side is chosen, that side as its place among the chosen."""
    place = torch.full((num,), -1, dtype=torch.int64, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    at = place[pairs[side]]
    kept = at >= 0
    return (at[kept], pairs[1][kept]) if side == 0 else (pairs[0][kept], at[kept])


def _calibrate(encoder: GraphEncoder, graph: _Graph, log_popularity: Tensor) -> None:
    """Start temperature and popularity bias where the loss of the untrained encoder is lowest."""
    masked = graph.mask(_CALIBRATION_MASK)
    with torch.no_grad():
        user_UD, item_ID = encoder.eval()(masked.graph)
        softmax = masked.softmax(user_UD, item_ID)
        spread = float((softmax.user_UD @ softmax.item_ID.T).std()) + 1e-9
        candidates = []
        for scale in np.exp(np.linspace(np.log(0.3), np.log(6.0), 8)) / spread:
            for share in (0.0, 0.25, 0.5, 0.75):
                loss = softmax.loss(torch.tensor(scale).to(log_popularity), share * log_popularity)
                candidates.append((float(loss), float(scale), share))
        _, scale, share = min(candidates)
        encoder.log_scale.fill_(float(np.log(scale)))
        encoder.bias_I.copy_(share * log_popularity)


def is_large(graph: ItemGraph) -> bool:
    """Whether samples of it are trained on."""
    return len(graph.user) > MOST_AT_ONCE


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
    drawn_from = _SampledGraph if is_large(graph) else _WholeGraph
    source: _Graph = drawn_from(graph, encoder, generator, device)
    popularity = np.log1p(np.bincount(graph.item, minlength=graph.num_items))
    _calibrate(encoder, source, torch.from_numpy(popularity).float().to(device))

    def batches(_: int) -> Iterator[_Masked]:
        for _step in range(source.num_steps):
            yield source.mask(generator.uniform(params["mask_low"], params["mask_high"]))

    def loss(masked: _Masked) -> Tensor:
        return masked.softmax(*encoder(masked.graph)).loss(encoder.log_scale.exp(), encoder.bias_I)

    config = TrainConfig(
        num_epochs=int(params["num_epochs"]),
        learning_rate=params["learning_rate"],
        weight_decay=params["weight_decay"],
        clip_norm=10.0,
    )
    fit(
        encoder,
        batches=batches,
        num_batches=source.num_steps,
        loss=loss,
        evaluate=None if evaluate is None else lambda: evaluate(encoder),
        config=config,
        on_epoch=on_epoch,
    )
    return encoder.cpu().eval()


def item_vectors(encoder: GraphEncoder, graph: ItemGraph) -> ItemVectors:
    """Propagated item vectors over a graph."""
    return ItemVectors(
        encoder.all_items(graph), encoder.bias_I.detach().cpu().numpy().copy(), float(encoder.log_scale.detach().exp())
    )


def graph_ndcg(encoder: GraphEncoder, graph: ItemGraph, wanted: sp.csr_matrix, excluded: sp.csr_matrix | None) -> float:
    """NDCG@10 of the encoder alone."""
    vectors, taken = item_vectors(encoder, graph), graph.relations[0].matrix()

    def scores(users: Index) -> Floats:
        user_ND = taken[users] @ vectors.item_ID * np.float32(vectors.scale)
        return np.asarray(user_ND @ vectors.item_ID.T + vectors.bias_I, dtype=np.float32)

    return float(Hits.of(best_items(scores, wanted, excluded), wanted).ndcg().mean())


@dataclass(frozen=True, kw_only=True)
class EncoderData:
    """What one trial of a search needs."""

    fit: ItemGraph
    validation: sp.csr_matrix
    excluded: sp.csr_matrix | None


def objective(params: dict[str, Any], data: EncoderData, report: Callable[[int, float], None]) -> None:
    """One trial of a search: the encoder alone, by validation NDCG@10."""
    train_encoder(
        data.fit,
        params,
        seed=int(params["seed"]),
        evaluate=lambda encoder: graph_ndcg(encoder, data.fit, data.validation, data.excluded),
        on_epoch=report,
    )
