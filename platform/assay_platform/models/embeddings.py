"""Numbers and categories become vectors.

Numeric columns: piecewise-linear encoding over quantile bins, then one small linear map a column (Gorishniy
et al., 'On Embeddings for Numerical Features in Tabular Deep Learning', arXiv:2203.05556, section 3.2).
Categorical columns: one table for all columns, each with its own range of rows.

Missing values are states of their own: a missing number lights a bin reserved for it and no other; a missing
or never seen category has row 0 of its column.

Not covered: periodic embeddings, learned bin edges.
"""

# N rows, F numeric columns, B bins, C categorical columns, P width of one column's embedding

import math

import torch
from torch import Tensor, nn


class PiecewiseLinearEmbedding(nn.Module):
    """(N, F) numbers, NaN where missing → (N, F, P).

    Column f's value v fills bin b by clamp((v - edge_b) / (edge_{b+1} - edge_b), 0, 1): all lower bins are
    full, all higher ones empty, so the encoding keeps order and saturates outside of the training range.
    """

    left_FB: Tensor
    inverse_width_FB: Tensor

    def __init__(self, edges: Tensor, embedding_dim: int) -> None:
        """edges: (F, B + 1), ascending in each row; equal neighbours are empty bins that never fill."""
        super().__init__()
        num_columns, num_bins = edges.shape[0], edges.shape[1] - 1
        width_FB = edges[:, 1:] - edges[:, :-1]
        self.register_buffer("left_FB", edges[:, :-1].clone())
        self.register_buffer("inverse_width_FB", torch.where(width_FB > 0, 1.0 / width_FB.clamp_min(1e-12), 0.0))
        self.weight_FBP = nn.Parameter(torch.empty(num_columns, num_bins + 1, embedding_dim))
        self.bias_FP = nn.Parameter(torch.zeros(num_columns, embedding_dim))
        nn.init.normal_(self.weight_FBP, std=1.0 / math.sqrt(num_bins + 1))

    def forward(self, values_NF: Tensor) -> Tensor:
        """Embed a batch; an empty batch gives an empty result."""
        missing_NF = torch.isnan(values_NF)
        filled_NF = torch.where(missing_NF, 0.0, values_NF)
        bins_NFB = ((filled_NF.unsqueeze(-1) - self.left_FB) * self.inverse_width_FB).clamp(0.0, 1.0)
        present_NF1 = (~missing_NF).unsqueeze(-1).to(bins_NFB.dtype)
        encoded_NFB = torch.cat([bins_NFB * present_NF1, 1.0 - present_NF1], dim=-1)
        # One batched product over columns: (F, N, B+1) @ (F, B+1, P).
        embedded_FNP = torch.bmm(encoded_NFB.transpose(0, 1), self.weight_FBP)
        return embedded_FNP.transpose(0, 1) + self.bias_FP


class CategoricalEmbedding(nn.Module):
    """(N, C) integer codes → (N, C, P). Code 0 is 'missing or never seen in training'."""

    offset_C: Tensor

    def __init__(self, cardinalities: tuple[int, ...], embedding_dim: int) -> None:
        """cardinalities: number of codes of each column, code 0 included."""
        super().__init__()
        starts = [0]
        for cardinality in cardinalities:
            starts.append(starts[-1] + cardinality)
        self.register_buffer("offset_C", torch.tensor(starts[:-1], dtype=torch.int64))
        self.table = nn.Embedding(max(1, starts[-1]), embedding_dim)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, codes_NC: Tensor) -> Tensor:
        """Embed a batch of codes."""
        embedded: Tensor = self.table(codes_NC + self.offset_C)
        return embedded
