"""The graph encoder: LightGCN without user embeddings, so that a new user needs no training, over several relations.

Items have base vectors; propagation over degree-normalised bipartite graphs smooths them, and a user is the
normalised sum of the items in its history (LightGCN, He et al., arXiv:2002.02126, with tied user side). Items are
joined by users, by baskets (what one user took close in time) and by what is known of them (categories); how much each
relation counts is learned. Base vectors start at the truncated SVD of the relations, the ideal low-pass graph filter
(Shen et al., 'How Powerful is Graph Convolution for Recommendation?', arXiv:2108.07567), and are trained to predict
edges that were masked out of the graph.
"""

# U users, I items, D width of a vector, R relations, J the other side of a relation: users, baskets or categories

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from assay_platform.models.histories import Flags, Floats, Histories, Index

# Pairs that the truncated SVD is taken of, entries up to which it is exact, and others that are propagated to at once.
_MOST_OF_SVD, _MOST_EXACT, _OTHERS_A_CHUNK = 5_000_000, 2_000_000, 200_000


class Adjacency(NamedTuple):
    """A normalised bipartite graph of others and items as CSR, both ways round: the backward pass needs the other."""

    others_by_items: Tensor
    items_by_others: Tensor


class Hop(NamedTuple):
    """From items to others and from there to items again: one graph there and back, or two samples of it."""

    there: Adjacency
    back: Adjacency


class Subgraph(NamedTuple):
    """What one pass of the encoder runs over.

    items: whose base vectors go in. rounds: hops of every relation, the widest round first; the items that come out of
    a round are the first of those that went in. users: of the items that come out at the end.
    """

    items: Tensor | slice
    rounds: list[list[Hop]]
    users: Adjacency

    @staticmethod
    def whole(relations: list[Adjacency], num_layers: int) -> "Subgraph":
        """All of a graph. relations: users first."""
        return Subgraph(slice(None), [[Hop(both, both) for both in relations]] * (num_layers - 1), relations[0])


@dataclass(frozen=True)
class Relation:
    """Who is joined with which items. other, item (E,): pairs, each once, ascending by the other."""

    other: Index
    item: Index
    num_others: int
    num_items: int

    @cached_property
    def by_item(self) -> Index:
        """(E,) the pairs in order of items."""
        return np.argsort(self.item, kind="stable")

    @cached_property
    def other_start(self) -> Index:
        """(J + 1,) where an other's pairs begin."""
        return _starts(self.other_degree)

    @cached_property
    def item_start(self) -> Index:
        """(I + 1,) where an item's pairs begin in `by_item`."""
        return _starts(self.item_degree)

    @cached_property
    def other_degree(self) -> Index:
        """(J,)."""
        return np.bincount(self.other, minlength=self.num_others)

    @cached_property
    def item_degree(self) -> Index:
        """(I,)."""
        return np.bincount(self.item, minlength=self.num_items)

    @cached_property
    def _item_scale(self) -> Floats:
        return scale(self.item_degree)

    def matrix(self, first: int = 0, end: int | None = None) -> sp.csr_matrix:
        """(n, I) of some others: entries 1 / sqrt(degree of other · degree of item)."""
        end = self.num_others if end is None else end
        begin, stop = self.other_start[first], self.other_start[end]
        item = self.item[begin:stop]
        value = scale(np.repeat(self.other_degree[first:end], self.other_degree[first:end])) * self._item_scale[item]
        start = self.other_start[first : end + 1] - begin
        return sp.csr_matrix((value, item, start), (end - first, self.num_items))

    def adjacency(self, kept: Flags | None = None, device: torch.device | None = None) -> Adjacency:
        """Normalised by what is kept. kept (E,): by default all. device: by default the CPU."""
        other, item, by_item = self.other, self.item, self.by_item
        if kept is not None:
            by_item = (np.cumsum(kept) - 1)[by_item[kept[by_item]]]
            other, item = other[kept], item[kept]
        other_degree = np.bincount(other, minlength=self.num_others)
        item_degree = np.bincount(item, minlength=self.num_items)
        value = scale(other_degree)[other] * scale(item_degree)[item]
        return Adjacency(
            torch_csr(_starts(other_degree), item, value, self.num_items).to(device),
            torch_csr(_starts(item_degree), other[by_item], value[by_item], self.num_others).to(device),
        )


@dataclass(frozen=True, kw_only=True)
class ItemGraph:
    """What joins items. user, item, basket (E,): each item of a user once. facts (G, I): what is known of them."""

    user: Index
    item: Index
    basket: Index
    num_users: int
    facts: sp.csr_matrix

    @staticmethod
    def of(histories: Histories, facts: sp.csr_matrix, *, closeness_s: float) -> "ItemGraph":
        """facts (I, G). Items taken within `closeness_s` of the one before are of its basket; 0: at that instant."""
        once = histories.once()
        user = once.users()
        another = np.ones(len(user), dtype=bool)
        another[1:] = (np.diff(user) != 0) | (np.diff(once.time_us) > closeness_s * 1e6)
        return ItemGraph(
            user=user, item=once.item, basket=np.cumsum(another) - 1, num_users=once.num_users, facts=facts.T.tocsr()
        )

    @property
    def num_items(self) -> int:
        """I."""
        return int(self.facts.shape[1])

    @cached_property
    def relations(self) -> list[Relation]:
        """Of users, of baskets and, where anything is known of items, of facts."""
        baskets = int(self.basket[-1]) + 1 if len(self.basket) else 1
        found = [
            Relation(self.user, self.item, self.num_users, self.num_items),
            Relation(self.basket, self.item, baskets, self.num_items),
        ]
        facts = self.facts.tocoo()
        fact, item = (side.astype(np.int64) for side in (facts.row, facts.col))
        return [*found, Relation(fact, item, self.facts.shape[0], self.num_items)] if len(fact) else found

    def adjacencies(self, kept: Flags | None = None, device: torch.device | None = None) -> list[Adjacency]:
        """Of all relations. kept (E,): of the edges, by default all."""
        users, baskets, *facts = self.relations
        joined = [relation.adjacency(kept, device) for relation in (users, baskets)]
        return joined + [relation.adjacency(device=device) for relation in facts]

    def of_some(self, most: int, generator: np.random.Generator) -> "ItemGraph":
        """As many users, drawn at random, as have at most so many edges; itself if it has no more."""
        if len(self.user) <= most:
            return self
        order = generator.permutation(self.num_users)
        count = np.cumsum(np.bincount(self.user, minlength=self.num_users)[order])
        chosen = np.zeros(self.num_users, dtype=bool)
        chosen[order[: max(1, int(np.searchsorted(count, most, side="right")))]] = True
        kept = chosen[self.user]
        user, basket = (np.unique(side[kept], return_inverse=True)[1] for side in (self.user, self.basket))
        num_users = int(chosen.sum())
        return ItemGraph(user=user, item=self.item[kept], basket=basket, num_users=num_users, facts=self.facts)


def _leading(matrix: sp.csr_matrix, rank: int) -> tuple[Floats, Floats]:
    """The largest singular values and their right vectors (rank, I). Of many entries about: it is where training begins
    from, and exactly takes ten times as long.
    """
    if matrix.nnz > _MOST_EXACT:
        from sklearn.utils.extmath import randomized_svd

        _, singular, vectors = randomized_svd(matrix, rank, n_oversamples=16, n_iter=4, random_state=0)
    else:
        start = np.random.default_rng(0).standard_normal(min(matrix.shape))
        _, singular, vectors = svds(matrix, k=rank, v0=start)
    return singular, vectors


def scale(degree: NDArray[Any]) -> Floats:
    """1 / sqrt of degrees, as if none were below 1."""
    return np.asarray(np.maximum(degree, 1) ** -0.5, dtype=np.float32)


def _starts(degree: Index) -> Index:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(degree)])


def torch_csr(start: Index, column: Index, value: Floats, num_columns: int) -> Tensor:
    """(len(start) - 1, num_columns). 32 bits are what the CPU's sparse library takes without a copy."""
    width = np.int32 if start[-1] < 2**31 else np.int64
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(start.astype(width)),
            torch.from_numpy(column.astype(width)),
            torch.from_numpy(value),
            (len(start) - 1, num_columns),
            check_invariants=False,
        )


class _SparseProduct(torch.autograd.Function):
    """matrix @ x, with a backward that uses the stored transpose instead of building one every step."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transpose: Tensor, x: Tensor) -> Tensor:
        ctx.transpose = transpose
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.transpose @ gradients[0].contiguous()


class LightGraphConv(MessagePassing):  # type: ignore[misc]
    """One propagation over a pre-normalised graph, as one sparse product (PyG's fused path)."""

    def forward(self, x: Tensor, matrix: Tensor, transpose: Tensor) -> Tensor:
        """x: (columns of matrix, D) → (rows of matrix, D)."""
        out: Tensor = self.propagate(matrix, x=x, transpose=transpose)
        return out

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor, transpose: Tensor) -> Tensor:
        """Called by PyG in place of message + aggregate."""
        out: Tensor = _SparseProduct.apply(adj_t, transpose, x)  # type: ignore[no-untyped-call]
        return out


class GraphEncoder(nn.Module):
    """Item base vectors, an item bias, a temperature and the relations' weights; users come from the graph alone."""

    def __init__(self, graph: ItemGraph, *, width: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.num_layers = num_layers
        matrices = [r.matrix() for r in graph.of_some(_MOST_OF_SVD, np.random.default_rng(0)).relations]
        stacked = sp.vstack(matrices).tocsr() * len(matrices) ** -0.5
        rank = min(width, min(stacked.shape) - 1)
        singular, vectors = _leading(stacked, rank)
        base = np.zeros((graph.num_items, width), dtype=np.float32)
        base[:, :rank] = vectors.T * np.sqrt(np.maximum(singular, 0.0))
        self.base_ID = nn.Parameter(torch.from_numpy(base))
        self.bias_I = nn.Parameter(torch.zeros(graph.num_items))
        self.log_scale = nn.Parameter(torch.zeros(()))
        # What is known of items counts a third of the others to begin with.
        self.relation_R = nn.Parameter(torch.tensor([0.0, 0.0, -1.0][: len(matrices)]))
        self.conv = LightGraphConv()
        self.dropout = nn.Dropout(dropout)

    def forward(self, graph: Subgraph) -> tuple[Tensor, Tensor]:
        """User vectors (U, D) and item vectors (I, D) over a graph, which may lack masked edges, or a sample of it."""
        x_ID: Tensor = self.base_ID[graph.items]
        layers = [x_ID]
        weights = self.relation_R.softmax(0)
        for hops in graph.rounds:
            smoothed = []
            for weight, (there, back) in zip(weights, hops, strict=True):
                x_JD = self.conv(x_ID, there.others_by_items, there.items_by_others)
                smoothed.append(weight * self.conv(x_JD, back.items_by_others, back.others_by_items))
            x_ID = torch.stack(smoothed).sum(0)
            layers.append(x_ID)
        item_ID = torch.stack([layer[: len(x_ID)] for layer in layers]).mean(0)
        user_UD = self.conv(item_ID, graph.users.others_by_items, graph.users.items_by_others)
        return self.dropout(user_UD), item_ID

    @torch.no_grad()
    def all_items(self, graph: ItemGraph) -> Floats:
        """(I, D) over a whole graph, some others at a time: it need not fit where the encoder is."""
        weights = self.relation_R.softmax(0).tolist()
        layers = [self.base_ID.cpu().numpy()]
        for _ in range(self.num_layers - 1):
            smoothed = np.zeros_like(layers[0])
            for weight, relation in zip(weights, graph.relations, strict=True):
                for first in range(0, relation.num_others, _OTHERS_A_CHUNK):
                    part = relation.matrix(first, min(first + _OTHERS_A_CHUNK, relation.num_others))
                    smoothed += np.float32(weight) * (part.T @ (part @ layers[-1]))
            layers.append(smoothed)
        return np.asarray(np.mean(layers, axis=0), dtype=np.float32)

    def score(self, user_UD: Tensor, item_ID: Tensor) -> Tensor:
        """(U, I) logits."""
        return (user_UD @ item_ID.T) * self.log_scale.exp() + self.bias_I
