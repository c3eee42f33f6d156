"""Which experts see an input: softmax top-k routing.

Gate in float32 whatever the rest computes in: a rounding of the logits flips choices (Fedus et al., 'Switch
Transformers', arXiv:2101.03961, section 2.4). The chosen gates are renormalised to sum to one.

Not covered yet: sigmoid gates with selection bias, load feedback, centroids, two-stage routing.
"""

# N rows, D model width, E experts, K chosen

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """The choice for one batch."""

    expert_NK: Tensor  # int64, which experts
    gate_NK: Tensor  # float32, their weights; each row sums to 1
    probability_NE: Tensor  # float32, the whole softmax, for balance and instruments


class TopKRouter(nn.Module):
    """Chooses the K most probable of E experts for every row."""

    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(width, num_experts, bias=False)
        nn.init.normal_(self.gate.weight, std=0.02)

    def forward(self, x_ND: Tensor) -> Routing:
        """Route a batch."""
        logits_NE = nn.functional.linear(x_ND.float(), self.gate.weight.float())
        probability_NE = torch.softmax(logits_NE, dim=-1)
        top_NK, expert_NK = probability_NE.topk(self.top_k, dim=-1)
        return Routing(expert_NK, top_NK / top_NK.sum(dim=-1, keepdim=True), probability_NE)
