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
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from assay_platform.models.histories import Histories, Index


class Adjacency(NamedTuple):
    """A normalised bipartite graph of others and items as CSR, both ways round: the backward pass needs the other."""

    others_by_items: Tensor
    items_by_others: Tensor


@dataclass(frozen=True, kw_only=True)
class ItemGraph:
    """What joins items. user, item, basket (E,): each item of a user once. facts (G, I): 0/1, what is known of them."""

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
        joined = facts.T.tocsr()
        joined.data[:] = 1.0
        return ItemGraph(
            user=user, item=once.item, basket=np.cumsum(another) - 1, num_users=once.num_users, facts=joined
        )

    @property
    def num_items(self) -> int:
        """I."""
        return int(self.facts.shape[1])

    def matrices(self, kept: NDArray[np.bool_] | None = None) -> list[sp.csr_matrix]:
        """Normalised (J, I) of users, of baskets and, where anything is known of items, of facts. kept (E,): of the
        edges, by default all.
        """
        chosen = slice(None) if kept is None else kept
        item = self.item[chosen]
        num_baskets = int(self.basket[-1]) + 1 if len(self.basket) else 1
        ones = np.ones(len(item), dtype=np.float32)
        found = [
            normalised(sp.csr_matrix((ones, (other[chosen], item)), (num, self.num_items)))
            for other, num in ((self.user, self.num_users), (self.basket, num_baskets))
        ]
        return [*found, normalised(self.facts)] if self.facts.nnz else found


def normalised(interactions: sp.csr_matrix) -> sp.csr_matrix:
    """(U, I) 0/1 matrix → entries 1 / sqrt(degree of user · degree of item)."""
    user_scale = np.maximum(np.asarray(interactions.sum(1)).ravel(), 1.0) ** -0.5
    item_scale = np.maximum(np.asarray(interactions.sum(0)).ravel(), 1.0) ** -0.5
    return sp.csr_matrix(sp.diags(user_scale) @ interactions @ sp.diags(item_scale)).astype(np.float32)


def adjacencies(matrices: list[sp.csr_matrix], device: torch.device | None = None) -> list[Adjacency]:
    """Ready for many products. device: by default the CPU."""
    both = ((_torch_csr(matrix), _torch_csr(sp.csr_matrix(matrix.T))) for matrix in matrices)
    return [Adjacency(matrix.to(device), transpose.to(device)) for matrix, transpose in both]


def _torch_csr(matrix: sp.csr_matrix) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int64)),
            torch.from_numpy(matrix.indices.astype(np.int64)),
            torch.from_numpy(matrix.data.astype(np.float32)),
            matrix.shape,
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
        matrices = graph.matrices()
        stacked = sp.vstack(matrices).tocsr() * len(matrices) ** -0.5
        rank = min(width, min(stacked.shape) - 1)
        start = np.random.default_rng(0).standard_normal(min(stacked.shape))
        _, singular, vectors = svds(stacked, k=rank, v0=start)
        base = np.zeros((graph.num_items, width), dtype=np.float32)
        base[:, :rank] = vectors.T * np.sqrt(np.maximum(singular, 0.0))
        self.base_ID = nn.Parameter(torch.from_numpy(base))
        self.bias_I = nn.Parameter(torch.zeros(graph.num_items))
        self.log_scale = nn.Parameter(torch.zeros(()))
        # What is known of items counts a third of the others to begin with.
        self.relation_R = nn.Parameter(torch.tensor([0.0, 0.0, -1.0][: len(matrices)]))
        self.conv = LightGraphConv()
        self.dropout = nn.Dropout(dropout)

    def forward(self, graph: list[Adjacency]) -> tuple[Tensor, Tensor]:
        """User vectors (U, D) and item vectors (I, D) over a graph, which may lack masked edges."""
        x_ID: Tensor = self.base_ID
        layers = [x_ID]
        weights = self.relation_R.softmax(0)
        for _ in range(self.num_layers - 1):
            smoothed = []
            for weight, relation in zip(weights, graph, strict=True):
                x_JD = self.conv(x_ID, relation.others_by_items, relation.items_by_others)
                smoothed.append(weight * self.conv(x_JD, relation.items_by_others, relation.others_by_items))
            x_ID = torch.stack(smoothed).sum(0)
            layers.append(x_ID)
        item_ID = torch.stack(layers).mean(0)
        user_UD = self.conv(item_ID, graph[0].others_by_items, graph[0].items_by_others)
        return self.dropout(user_UD), item_ID

    def score(self, user_UD: Tensor, item_ID: Tensor) -> Tensor:
        """(U, I) logits."""
        return (user_UD @ item_ID.T) * self.log_scale.exp() + self.bias_I
