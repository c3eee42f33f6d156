"""Why a score is what it is: contributions of features that add up to the logit exactly.

Integrated gradients (Sundararajan et al., arXiv:1703.01365) along the straight line from a reference input to the
actual one. The first layer of a net is a linear map, so the line is one behind it too: it is walked there, where a
point costs a fraction, and the mean gradient goes back through the map once.

Top-k routing makes the function piecewise smooth: where the path crosses a routing boundary the logit jumps, and no
quadrature of gradients sees that. What the gradients do not account for is shared among the features in proportion to
what they do account for, so the sum is f(x) - f(reference), to float precision, for any function.
"""

# N rows, G features, P width of one feature's embedding, S segments

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# (N, G, P) → (N, …), affine.
Linear = Callable[[Tensor], Tensor]
# (M, …) → (M,), differentiable almost everywhere, independent between rows.
Rest = Callable[[Tensor], Tensor]
# Segments → how far contributions are from those of 256, mean L1 distance over their size, on the net of IEEE-CIS.
_DISTANCE = {1: 0.20, 2: 0.047, 3: 0.019, 4: 0.011, 8: 0.0044}
_ALLOWED = 0.02


def segments_for(share: float) -> int:
    """How finely a net is walked that is this part of what is explained, so that the whole is within 2 %."""
    return next((n for n, distance in _DISTANCE.items() if share * distance <= _ALLOWED), max(_DISTANCE))


class Origin(NamedTuple):
    """Where all paths of a model begin: the same for every row, so it is worth keeping."""

    reference_GP: Tensor
    hidden: Tensor  # (1, …) linear(reference)
    gradient: Tensor  # (1, …) of `rest` there
    value: Tensor  # scalar, rest(hidden)

    @staticmethod
    def of(linear: Linear, rest: Rest, reference_GP: Tensor) -> "Origin":
        """Of one reference input."""
        with torch.enable_grad():
            hidden = linear(reference_GP.unsqueeze(0)).detach().requires_grad_(True)
            value = rest(hidden)
            (gradient,) = torch.autograd.grad(value.sum(), hidden)
        return Origin(reference_GP.detach(), hidden.detach(), gradient, value.detach()[0].double())


def integrated_gradients(
    linear: Linear, rest: Rest, x_NGP: Tensor, origin: Origin, *, num_segments: int = 3
) -> tuple[Tensor, Tensor]:
    """Contributions (N, G) and the base value (scalar) with base + Σ_g contribution = rest(linear(x))."""
    num_rows = len(x_NGP)
    x_NGP = x_NGP.detach().requires_grad_(True)
    with torch.enable_grad():
        end = linear(x_NGP)
        delta = end.detach() - origin.hidden
        steps = [origin.hidden + (s / num_segments) * delta for s in range(1, num_segments + 1)]
        path = torch.cat(steps).requires_grad_(True)
        values = rest(path)
        (gradient,) = torch.autograd.grad(values.sum(), path)
        along = gradient.view(num_segments, num_rows, *gradient.shape[1:])
        # The trapezoid rule.
        mean = (along.sum(0) + 0.5 * (origin.gradient - along[-1])) / num_segments
        (slope_NGP,) = torch.autograd.grad((end * mean).sum(), x_NGP)
    share_NG = (slope_NGP * (x_NGP.detach() - origin.reference_GP)).sum(-1).double()
    reached_N = values.detach()[len(values) - num_rows :].double()
    residual_N1 = (reached_N - origin.value - share_NG.sum(-1)).unsqueeze(-1)
    weight_NG = share_NG.abs() + 1e-12
    return share_NG + residual_N1 * weight_NG / weight_NG.sum(-1, keepdim=True), origin.value
