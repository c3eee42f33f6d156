"""All chosen experts of all rows at once: y = Σ_k gate_k · (silu(x W_gate) * (x W_up)) W_out of the k-th choice.

Nothing is dropped and nothing is padded by the caller. On a GPU the Triton form does the gather, SwiGLU, weights and
scatter inside its products (`experts_triton`); elsewhere the eager form runs one product an expert.
"""

# T rows, K chosen, D model width, H hidden width, E experts, F = 2 H: gate columns, then up columns

import torch
from torch import Tensor
from torch.nn.functional import silu


def expert_swiglu(
    x_TD: Tensor, w_in_EDF: Tensor, w_out_EHD: Tensor, expert_TK: Tensor, gate_TK: Tensor, *, backend: str | None = None
) -> Tensor:
    """(T, D) in the type of x. Differentiable in x, both weights and the gates; results repeat to the bit.

    expert_TK: integers below E, no expert twice in a row. gate_TK: float32. backend: 'eager' or 'triton'; default is
    'triton' on a GPU. Under autocast x and the weights take its type.
    """
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_TD, w_in_EDF, w_out_EHD = (tensor.to(dtype) for tensor in (x_TD, w_in_EDF, w_out_EHD))
    if (backend or ("triton" if kind == "cuda" else "eager")) == "eager" or not x_TD.shape[0]:
        return _eager(x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK)
    from assay_platform.kernels import experts_triton

    return experts_triton.expert_swiglu(x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK)


def _eager(x_TD: Tensor, w_in_EDF: Tensor, w_out_EHD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Pairs sorted by expert, so that an expert is one dense product over its rows."""
    num_experts, top_k = w_in_EDF.shape[0], expert_TK.shape[1]
    expert_of_pair = expert_TK.reshape(-1)
    order = torch.argsort(expert_of_pair, stable=True)
    row_of_pair = torch.div(order, top_k, rounding_mode="floor")
    sizes = torch.bincount(expert_of_pair, minlength=num_experts).tolist()
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
