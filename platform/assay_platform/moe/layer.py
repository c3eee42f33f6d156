"""One sparse layer: shared expert + routed experts.

y = shared(x) + Σ_{e in top-k} gate_e(x) · expert_e(x). The shared expert learns what all inputs have in
common, so that routed ones can differ (Dai et al., 'DeepSeekMoE', arXiv:2401.06066, section 3.2).
"""

from typing import NamedTuple

from torch import Tensor, nn

from assay_platform.moe.balance import balance_loss, load_fraction
from assay_platform.moe.experts import SwiGLUExperts
from assay_platform.moe.router import Routing, TopKRouter

__all__ = ["LayerOutput", "MoELayer", "Routing"]


class LayerOutput(NamedTuple):
    """What one layer says besides its result."""

    y_ND: Tensor
    balance_loss: Tensor  # scalar
    load_E: Tensor  # fraction of choices an expert got in this batch


class MoELayer(nn.Module):
    """(N, D) → (N, D); no row is ever dropped."""

    def __init__(self, width: int, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.router = TopKRouter(width, num_experts, top_k)
        self.shared = SwiGLUExperts(1, width, hidden)
        self.routed = SwiGLUExperts(num_experts, width, hidden)

    def forward(self, x_ND: Tensor) -> LayerOutput:
        """Run a batch."""
        routing = self.router(x_ND)
        y_ND = self.shared.run_one(0, x_ND) + self.routed(x_ND, routing)
        return LayerOutput(y_ND, balance_loss(routing, self.num_experts), load_fraction(routing, self.num_experts))
