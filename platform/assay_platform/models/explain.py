"""Why a score is what it is: contributions of features that add up to the logit exactly.

Integrated gradients (Sundararajan et al., arXiv:1703.01365) along the straight line from a reference input to
the actual one, in the space of feature embeddings. Top-k routing makes the function piecewise smooth: where a
path crosses a routing boundary the logit jumps, and a plain quadrature misses the jump. So the path is walked
in S segments whose true change Δf is known from the forward passes, and what the gradients do not account for
is shared within the segment in proportion to the gradient's own attribution. The sum over features is then
f(x) - f(reference) by construction, to float precision, for any function.
"""

# N rows, G features, P width of one feature's embedding, S segments

from collections.abc import Callable

import torch
from torch import Tensor


def integrated_gradients(
    function: Callable[[Tensor], Tensor], x_NGP: Tensor, reference_GP: Tensor, *, num_segments: int = 24
) -> tuple[Tensor, Tensor]:
    """Contributions (N, G) and the base value (scalar) with base + Σ_g contribution = function(x).

    function: (M, G, P) → (M,), differentiable almost everywhere and independent between rows.
    """
    num_rows, num_features, _ = x_NGP.shape
    delta_NGP = x_NGP - reference_GP
    steps_S1 = torch.linspace(0.0, 1.0, num_segments + 1)
    path = reference_GP + steps_S1.view(-1, 1, 1, 1) * delta_NGP.unsqueeze(0)
    path = path.detach().flatten(0, 1).requires_grad_(True)
    with torch.enable_grad():
        values = function(path)
        (gradient,) = torch.autograd.grad(values.sum(), path)
    values_SN = values.detach().double().view(num_segments + 1, num_rows)
    # Trapezoid within each segment.
    slope_SNG = (gradient.view(num_segments + 1, num_rows, num_features, -1) * delta_NGP).sum(-1).double()
    share_SNG = (slope_SNG[1:] + slope_SNG[:-1]) / (2 * num_segments)
    residual_SN1 = ((values_SN[1:] - values_SN[:-1]) - share_SNG.sum(-1)).unsqueeze(-1)
    weight_SNG = share_SNG.abs() + 1e-12
    share_SNG = share_SNG + residual_SN1 * weight_SNG / weight_SNG.sum(-1, keepdim=True)
    base = values_SN[0, 0] if num_rows else torch.zeros((), dtype=torch.float64)
    return share_SNG.sum(0), base
