"""All chosen experts of all rows at once: y = Σ_k gate_k · (silu(x W_gate) * (x W_up)) W_out of the k-th choice.

Nothing is dropped and nothing is padded by the caller. Three forms of one signature:

    triton    on a GPU: gather, SwiGLU, weights and scatter inside the products (`experts_triton`)
    numba     on a CPU, for up to 128 rows without gradients in float32: one compiled call (`experts_numba`)
    eager     anywhere: one product an expert
"""

# T rows, K chosen, D model width, H hidden width, E experts, F = 2 H: gate columns, then up columns

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

_COMPILED_ROWS = 128  # from here on BLAS is faster (measured on two cores of a Zen 3: 1.4 ms both)


def expert_swiglu(
    x_TD: Tensor,
    w_in_EDF: Tensor,
    w_out_EHD: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    *,
    num_always: int = 0,
    partial: bool = False,
    backend: str | None = None,
) -> Tensor:
    """(T, D) in the type of x. Differentiable in x, both weights and the gates; results repeat to the bit.

    expert_TK: integers below E - num_always, no expert twice in a row. gate_TK: float32. num_always: so many experts,
    the last ones, run for every row with a gate of 1 besides. partial: -1 may stand for 'no expert' in expert_TK, with
    a gate of 0. backend: one of those above; by default the fastest that applies. Under autocast x and the weights take
    its type.
    """
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_TD, w_in_EDF, w_out_EHD = (tensor.to(dtype) for tensor in (x_TD, w_in_EDF, w_out_EHD))
    if backend is None:
        backend = "triton" if kind == "cuda" else "eager"
        if kind == "cpu" and fits_compiled(x_TD) and compilable(w_out_EHD[0]):
            backend = "numba"
    if backend == "numba":
        from assay_platform.kernels import experts_numba

        return experts_numba.expert_swiglu(x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK, num_always=num_always)
    if num_always:
        last = torch.arange(len(w_in_EDF) - num_always, len(w_in_EDF), device=x_TD.device).expand(len(x_TD), -1)
        expert_TK = torch.cat([expert_TK, last], dim=1)
        gate_TK = torch.cat([gate_TK, gate_TK.new_ones(len(x_TD), num_always)], dim=1)
    if backend == "eager" or not x_TD.shape[0]:
        return _eager(x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK)
    from assay_platform.kernels import experts_triton

    return experts_triton.expert_swiglu(x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK, partial=partial)


def fits_compiled(x_TD: Tensor) -> bool:
    """Whether the compiled CPU form is the fastest for this batch, the weights being of the kind that it takes."""
    return _is_small(x_TD) and not torch.is_grad_enabled()


def fits_compiled_layer(x_TD: Tensor, weights: Sequence[Tensor]) -> bool:
    """The same for router and experts in one call, which has gradients for the rows, though not for its weights."""
    return _is_small(x_TD) and not (torch.is_grad_enabled() and any(w.requires_grad for w in weights))


def _is_small(x_TD: Tensor) -> bool:
    return (
        len(x_TD) <= _COMPILED_ROWS
        and x_TD.dtype == torch.float32
        and x_TD.is_cpu
        and not torch.is_autocast_enabled("cpu")
    )


def compilable(w_out_HD: Tensor) -> bool:
    """Whether the compiled CPU form takes experts of this shape."""
    H, D = w_out_HD.shape
    return w_out_HD.dtype == torch.float32 and w_out_HD.is_cpu and D % 4 == 0 and H % 4 == 0


def _eager(x_TD: Tensor, w_in_EDF: Tensor, w_out_EHD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Pairs sorted by expert, so that an expert is one dense product over its rows."""
    num_experts, top_k = w_in_EDF.shape[0], expert_TK.shape[1]
    expert_of_pair = expert_TK.reshape(-1)
    order = torch.argsort(expert_of_pair, stable=True)
    none, *sizes = torch.bincount(expert_of_pair + 1, minlength=num_experts + 1).tolist()
    order = order[none:]
    row_of_pair = torch.div(order, top_k, rounding_mode="floor")
    chunks = torch.split(x_TD.index_select(0, row_of_pair), sizes)
    # Expert 0 always takes part, so that there is something to join even where no row is.
    outputs = torch.cat(
        [_one(chunk, w_in_EDF[e], w_out_EHD[e]) for e, chunk in enumerate(chunks) if sizes[e] or e == 0]
    )
    weighted = outputs * gate_TK.reshape(-1, 1).index_select(0, order).to(outputs.dtype)
    return torch.zeros_like(x_TD).index_add(0, row_of_pair, weighted)


def _one(x_MD: Tensor, w_in_DF: Tensor, w_out_HD: Tensor) -> Tensor:
    gate, up = (x_MD @ w_in_DF).chunk(2, dim=-1)
    return (silu(gate) * up) @ w_out_HD
