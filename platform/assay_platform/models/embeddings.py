"""Numbers and categories become vectors.

Numeric columns: piecewise-linear encoding over quantile bins, then one small linear map a column (Gorishniy
et al., 'On Embeddings for Numerical Features in Tabular Deep Learning', arXiv:2203.05556, section 3.2).
Categorical columns: one table for all columns, each with its own range of rows.

Missing values are states of their own: a missing number lights a bin reserved for it and no other; a missing
or never seen category has row 0 of its column.

Periodic embeddings of numeric columns are the other choice (section 3.3 of the same paper), over quantile ranks here.

Not covered: learned bin edges.
"""

# N rows, F numeric columns, B bins, Q frequencies, C categorical columns, P width of one column's embedding

import math

import torch
from torch import Tensor, nn


class _Quantiles(nn.Module):
    """How far a number v fills each of its column's bins: clamp((v - edge_b) / (edge_{b+1} - edge_b), 0, 1).

    All lower bins are full, all higher ones empty, so order is kept, and the training range is where it ends.
    """

    left_FB: Tensor
    inverse_width_FB: Tensor

    def __init__(self, edges: Tensor) -> None:
        """edges: (F, B + 1), ascending in each row; equal neighbours are empty bins that never fill."""
        super().__init__()
        width_FB = edges[:, 1:] - edges[:, :-1]
        self.register_buffer("left_FB", edges[:, :-1].clone())
        self.register_buffer("inverse_width_FB", torch.where(width_FB > 0, 1.0 / width_FB.clamp_min(1e-12), 0.0))

    def fill(self, values_NF: Tensor, missing_NF: Tensor) -> Tensor:
        """(N, F, B), as if a missing number were 0."""
        filled_NF = torch.where(missing_NF, 0.0, values_NF)
        return ((filled_NF.unsqueeze(-1) - self.left_FB) * self.inverse_width_FB).clamp(0.0, 1.0)


class PiecewiseLinearEmbedding(_Quantiles):
    """(N, F) numbers, NaN where missing → (N, F, P): a linear map of how far the bins are filled."""

    def __init__(self, edges: Tensor, embedding_dim: int) -> None:
        """edges: (F, B + 1)."""
        super().__init__(edges)
        num_columns, num_bins = self.left_FB.shape
        self.weight_FBP = nn.Parameter(torch.empty(num_columns, num_bins + 1, embedding_dim))
        self.bias_FP = nn.Parameter(torch.zeros(num_columns, embedding_dim))
        nn.init.normal_(self.weight_FBP, std=1.0 / math.sqrt(num_bins + 1))

    def forward(self, values_NF: Tensor) -> Tensor:
        """Embed a batch; an empty batch gives an empty result."""
        missing_NF = torch.isnan(values_NF)
        bins_NFB = self.fill(values_NF, missing_NF)
        present_NF1 = (~missing_NF).unsqueeze(-1).to(bins_NFB.dtype)
        encoded_NFB = torch.cat([bins_NFB * present_NF1, 1.0 - present_NF1], dim=-1)
        # One batched product over columns: (F, N, B+1) @ (F, B+1, P).
        embedded_FNP = torch.bmm(encoded_NFB.transpose(0, 1), self.weight_FBP)
        return embedded_FNP.transpose(0, 1) + self.bias_FP


class PeriodicEmbedding(_Quantiles):
    """(N, F) numbers, NaN where missing → (N, F, P): sines and cosines of a number's quantile rank, a linear map, ReLU.

    The rank stands for the quantile normalisation that the paper does before. A missing number has learned sines and
    cosines of its own.
    """

    def __init__(self, edges: Tensor, embedding_dim: int, *, num_frequencies: int = 8, scale: float = 1.0) -> None:
        """edges: (F, B + 1). scale: standard deviation of the first frequencies."""
        super().__init__(edges)
        num_columns = len(edges)
        self.frequency_FQ = nn.Parameter(torch.randn(num_columns, num_frequencies) * scale)
        self.missing_FQ = nn.Parameter(torch.zeros(num_columns, 2 * num_frequencies))
        self.weight_FQP = nn.Parameter(torch.empty(num_columns, 2 * num_frequencies, embedding_dim))
        self.bias_FP = nn.Parameter(torch.zeros(num_columns, embedding_dim))
        nn.init.normal_(self.weight_FQP, std=1.0 / math.sqrt(num_frequencies))

    def forward(self, values_NF: Tensor) -> Tensor:
        """Embed a batch; an empty batch gives an empty result."""
        missing_NF = torch.isnan(values_NF)
        rank_NF1 = self.fill(values_NF, missing_NF).mean(-1, keepdim=True)
        angle_NFQ = 2 * math.pi * self.frequency_FQ * (2 * rank_NF1 - 1)
        waves_NFQ = torch.cat([angle_NFQ.sin(), angle_NFQ.cos()], dim=-1)
        waves_NFQ = torch.where(missing_NF.unsqueeze(-1), self.missing_FQ, waves_NFQ)
        embedded_FNP = torch.bmm(waves_NFQ.transpose(0, 1), self.weight_FQP)
        return torch.relu(embedded_FNP.transpose(0, 1) + self.bias_FP)


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

    def column(self, place: int, cardinality: int) -> Tensor:
        """(cardinality, P) the vectors of one column."""
        start = int(self.offset_C[place])
        return self.table.weight[start : start + cardinality]
