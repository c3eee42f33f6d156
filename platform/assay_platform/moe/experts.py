"""The experts: SwiGLU networks of one shape, stored as stacked weights.

SwiGLU: (silu(x W_gate) * x W_up) W_down (Shazeer, 'GLU Variants Improve Transformer', arXiv:2002.05202).
Not covered yet: experts of different sizes, add / remove / freeze.
"""

# N rows, D model width, E experts, H hidden width of one expert, K chosen

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from assay_platform.kernels import expert_swiglu
from assay_platform.moe.router import Routing


class SwiGLUExperts(nn.Module):
    """E experts; every chosen (row, expert) pair is computed, none is dropped."""

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight_in_EDH = nn.Parameter(torch.empty(num_experts, width, 2 * hidden))
        self.weight_out_EHD = nn.Parameter(torch.empty(num_experts, hidden, width))
        nn.init.normal_(self.weight_in_EDH, std=1.0 / math.sqrt(width))
        nn.init.normal_(self.weight_out_EHD, std=1.0 / math.sqrt(hidden))

    def run_one(self, expert: int, x_MD: Tensor) -> Tensor:
        """Expert number `expert` on all M rows."""
        gate, up = (x_MD @ self.weight_in_EDH[expert]).chunk(2, dim=-1)
        return (silu(gate) * up) @ self.weight_out_EHD[expert]

    def forward(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Σ_k gate_k · expert_k(x), each row's own K experts."""
        return expert_swiglu(x_ND, self.weight_in_EDH, self.weight_out_EHD, routing.expert_NK, routing.gate_NK)
