"""The user-item graph encoder: LightGCN without user embeddings, so that a new user needs no training.

Items have base vectors; propagation over the degree-normalised bipartite graph smooths them, and a user is the
normalised sum of the items in its history (LightGCN, He et al., arXiv:2002.02126, with tied user side). Base
vectors start at the truncated SVD of the normalised adjacency, the ideal low-pass graph filter (Shen et al.,
'How Powerful is Graph Convolution for Recommendation?', arXiv:2108.07567), and are trained to predict edges
that were masked out of the graph.
"""

# U users, I items, D width of a vector

import warnings
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing


class Adjacency(NamedTuple):
    """A normalised bipartite graph as CSR, both ways round: the backward pass needs the transpose."""

    users_by_items: Tensor
    items_by_users: Tensor


def normalised(interactions: sp.csr_matrix) -> sp.csr_matrix:
    """(U, I) 0/1 matrix → entries 1 / sqrt(degree of user · degree of item)."""
    user_scale = np.maximum(np.asarray(interactions.sum(1)).ravel(), 1.0) ** -0.5
    item_scale = np.maximum(np.asarray(interactions.sum(0)).ravel(), 1.0) ** -0.5
    return sp.csr_matrix(sp.diags(user_scale) @ interactions @ sp.diags(item_scale)).astype(np.float32)


def adjacency(interactions: sp.csr_matrix) -> Adjacency:
    """Normalise a graph once for many products."""
    matrix = normalised(interactions)
    return Adjacency(_torch_csr(matrix), _torch_csr(sp.csr_matrix(matrix.T)))


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
    """Item base vectors, an item bias and a temperature; users come from the graph alone."""

    def __init__(self, interactions: sp.csr_matrix, *, width: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.num_layers = num_layers
        num_items = interactions.shape[1]
        rank = min(width, min(interactions.shape) - 1)
        start = np.random.default_rng(0).standard_normal(min(interactions.shape))
        _, singular, vectors = svds(normalised(interactions), k=rank, v0=start)
        base = np.zeros((num_items, width), dtype=np.float32)
        base[:, :rank] = vectors.T * np.sqrt(np.maximum(singular, 0.0))
        self.base_ID = nn.Parameter(torch.from_numpy(base))
        self.bias_I = nn.Parameter(torch.zeros(num_items))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.conv = LightGraphConv()
        self.dropout = nn.Dropout(dropout)

    def forward(self, graph: Adjacency) -> tuple[Tensor, Tensor]:
        """User vectors (U, D) and item vectors (I, D) over a graph, which may lack masked edges."""
        x_ID: Tensor = self.base_ID
        layers = [x_ID]
        for _ in range(self.num_layers - 1):
            x_UD = self.conv(x_ID, graph.users_by_items, graph.items_by_users)
            x_ID = self.conv(x_UD, graph.items_by_users, graph.users_by_items)
            layers.append(x_ID)
        item_ID = torch.stack(layers).mean(0)
        user_UD = self.conv(item_ID, graph.users_by_items, graph.items_by_users)
        return self.dropout(user_UD), item_ID

    def score(self, user_UD: Tensor, item_ID: Tensor) -> Tensor:
        """(U, I) logits."""
        return (user_UD @ item_ID.T) * self.log_scale.exp() + self.bias_I
