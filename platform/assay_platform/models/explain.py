"""Why a score is what it is: contributions of features that add up to the logit exactly.

Integrated gradients (Sundararajan et al., arXiv:1703.01365) along the straight line from a reference input to the
actual one. The first layer of a net is a linear map, so the line is one behind it too: it is walked there, where a
point costs a fraction, and the mean gradient goes back through the map once.

Top-k routing makes the function piecewise smooth: where the path crosses a routing boundary the logit jumps, and no
quadrature of gradients sees that. What the gradients do not account for is shared among the features in proportion to
what they do account for, so the sum is f(x) - f(reference), to float precision, for any function. Four segments are
within 0.4 % of 256 on the fraud model of IEEE-CIS (mean L1 distance of all contributions, trees included).
"""

# N rows, G features, P width of one feature's embedding, S segments

from collections.abc import Callable

import torch
from torch import Tensor


def integrated_gradients(
    linear: Callable[[Tensor], Tensor],
    rest: Callable[[Tensor], Tensor],
    x_NGP: Tensor,
    reference_GP: Tensor,
    *,
    num_segments: int = 4,
) -> tuple[Tensor, Tensor]:
    """Contributions (N, G) and the base value (scalar) with base + Σ_g contribution = rest(linear(x)).

    linear: (N, G, P) → (N, …), affine. rest: (M, …) → (M,), differentiable almost everywhere, independent between rows.
    """
    num_rows = len(x_NGP)
    x_NGP = x_NGP.detach().requires_grad_(True)
    with torch.enable_grad():
        end = linear(x_NGP)
        start = linear(reference_GP.unsqueeze(0)).detach()
        delta = end.detach() - start
        steps = [start + (s / num_segments) * delta for s in range(1, num_segments + 1)]
        path = torch.cat([start, *steps]).requires_grad_(True)
        values = rest(path)
        (gradient,) = torch.autograd.grad(values.sum(), path)
        at_start, along = gradient[:1], gradient[1:].view(num_segments, num_rows, *gradient.shape[1:])
        # The trapezoid rule.
        mean = (along.sum(0) + 0.5 * (at_start - along[-1])) / num_segments
        (slope_NGP,) = torch.autograd.grad((end * mean).sum(), x_NGP)
    share_NG = (slope_NGP * (x_NGP.detach() - reference_GP)).sum(-1).double()
    values = values.detach().double()
    base = values[0]
    residual_N1 = (values[len(values) - num_rows :] - base - share_NG.sum(-1)).unsqueeze(-1)
    weight_NG = share_NG.abs() + 1e-12
    return share_NG + residual_N1 * weight_NG / weight_NG.sum(-1, keepdim=True), base
