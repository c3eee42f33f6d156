"""Load balance: the auxiliary loss, and how uneven a batch was.

The loss is E · Σ_e f_e · p_e with f_e the fraction of choices that fell on expert e and p_e its mean gate
probability (Fedus et al., arXiv:2101.03961, equation 4). It is 1 at perfect balance and has a gradient
through p alone.
"""

import torch
from torch import Tensor

from assay_platform.moe.router import Routing


def load_fraction(routing: Routing, num_experts: int) -> Tensor:
    """(E,) fraction of all choices that fell on each expert; zeros for an empty batch."""
    counts = torch.bincount(routing.expert_NK.reshape(-1), minlength=num_experts).float()
    return counts / counts.sum().clamp_min(1.0)


def balance_loss(routing: Routing, num_experts: int) -> Tensor:
    """Scalar; 1 at perfect balance, up to E when one expert takes everything."""
    mean_probability = routing.probability_NE.mean(dim=0)
    return num_experts * (load_fraction(routing, num_experts) * mean_probability).sum()


def jensen_shannon_imbalance(load_E: Tensor) -> float:
    """Jensen–Shannon divergence (nats, 0 to ln 2) between the load and the uniform distribution."""
    uniform = torch.full_like(load_E, 1.0 / load_E.numel())
    middle = (load_E + uniform) / 2

    def kl(p: Tensor) -> Tensor:
        return torch.where(p > 0, p * (p.clamp_min(1e-30) / middle).log(), 0.0).sum()

    return float((kl(load_E) + kl(uniform)) / 2)
