"""LayerNorm, GELU and the residual in one pass over memory: y = gelu(layer_norm(x) · weight + bias) + residual.

Each input is read once and the result is written once, forward and backward; three separate operators move each tensor
through memory up to four times. GELU is the exact one, with erf.
"""

# N rows, D width

from torch import Tensor
from torch.nn.functional import gelu, layer_norm


def layer_norm_gelu_residual(
    x_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    residual_ND: Tensor,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """(N, D) in the type of the residual, computed in float32. Differentiable in all four; repeats to the bit.

    x and the residual may differ in type, as they do under autocast. backend: 'eager' or 'triton'; default is 'triton'
    on a GPU.
    """
    if x_ND.shape != residual_ND.shape:
        raise ValueError(f"x is {tuple(x_ND.shape)} and the residual {tuple(residual_ND.shape)}; they must be alike")
    if (backend or ("triton" if x_ND.device.type == "cuda" else "eager")) == "eager" or not x_ND.numel():
        normal_ND = layer_norm(x_ND.float(), x_ND.shape[-1:], weight_D.float(), bias_D.float(), eps)
        return (gelu(normal_ND) + residual_ND.float()).to(residual_ND.dtype)
    from assay_platform.kernels import norm_triton

    return norm_triton.layer_norm_gelu_residual(x_ND, weight_D, bias_D, residual_ND, eps)
