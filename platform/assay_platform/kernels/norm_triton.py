"""LayerNorm + GELU + residual in Triton.

Forward: a program holds some whole rows, so x is read once; mean and 1 / deviation of every row are kept. Backward: as
many programs as fit on the GPU walk over the rows; each sums the gradients of weight and bias of its rows in registers
and writes one line of partial sums, and a second small kernel adds the lines up in a fixed order, so results repeat to
the bit. What limits the backward pass is arithmetic: erf and the density of GELU's derivative share one exponential
(Abramowitz and Stegun, formula 7.1.26, absolute error below 1.5e-7).
"""

# N rows, D width, P programs of the backward pass

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_LOG2_E = tl.constexpr(1.4426950408889634)
_WIDEST = 16_384


@triton.jit
def _gelu_parts(z):
    """Φ(z) and φ(z) of the standard normal distribution."""
    power = tl.exp2(z * z * (-0.5 * _LOG2_E))
    t = 1.0 / (1.0 + 0.2316418900 * tl.abs(z))  # 0.3275911 / √2
    tail = t * (0.127414796 + t * (-0.142248368 + t * (0.710706871 + t * (-0.726576013 + t * 0.530702715))))
    tail = tail * power
    return tl.where(z >= 0, 1.0 - tail, tail), power * _INV_SQRT_2PI


@triton.jit
def _forward_kernel(
    x, weight, bias, residual, y, mean_out, inverse_out, N, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < N)[:, None] & (col < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + col[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    shift = tl.load(bias + col, mask=col < D, other=0.0).to(tl.float32)
    mean = tl.sum(values, 1) / D
    values = values - mean[:, None]
    if D != BLOCK:
        values = tl.where((col < D)[None, :], values, 0.0)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / D + eps)
    z = values * inverse[:, None] * scale[None, :] + shift[None, :]
    below, _ = _gelu_parts(z)
    tl.store(y + at, (z * below + added).to(y.dtype.element_ty), mask=inside)
    tl.store(mean_out + row, mean, mask=row < N)
    tl.store(inverse_out + row, inverse, mask=row < N)


@triton.jit
def _backward_kernel(
    dy, x, weight, bias, mean_in, inverse_in, dx, partial, N,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)
    scale = tl.load(weight + col, mask=col < D, other=0.0).to(tl.float32)
    shift = tl.load(bias + col, mask=col < D, other=0.0).to(tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, N, P * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (col < D)[None, :]
        at = row.to(tl.int64)[:, None] * D + col[None, :]
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_in + row, mask=row < N, other=0.0)
        inverse = tl.load(inverse_in + row, mask=row < N, other=0.0)
        normal = (values - mean[:, None]) * inverse[:, None]
        z = normal * scale[None, :] + shift[None, :]
        below, density = _gelu_parts(z)
        grad = grad * (below + z * density)
        dscale += tl.sum(grad * normal, 0)
        dshift += tl.sum(grad, 0)
        grad = grad * scale[None, :]
        first = tl.sum(grad, 1) / D
        second = tl.sum(grad * normal, 1) / D
        out = (grad - first[:, None] - normal * second[:, None]) * inverse[:, None]
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    line = partial + tl.program_id(0) * (2 * D) + col
    tl.store(line, dscale, mask=col < D)
    tl.store(line + D, dshift, mask=col < D)


@triton.jit
def _add_kernel(partial, dweight, dbias, D: tl.constexpr, P: tl.constexpr, P2: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the P lines of partial sums, for some columns."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line = tl.arange(0, P2)
    inside = (line < P)[:, None] & (col < 2 * D)[None, :]
    total = tl.sum(tl.load(partial + line[:, None] * (2 * D) + col[None, :], mask=inside, other=0.0), 0)
    tl.store(dweight + col, total.to(dweight.dtype.element_ty), mask=col < D)
    tl.store(dbias + col - D, total.to(dbias.dtype.element_ty), mask=(col >= D) & (col < 2 * D))


def _block(D: int) -> int:
    return max(16, int(triton.next_power_of_2(D)))


def _checked(x_ND: Tensor) -> tuple[int, int]:
    N, D = x_ND.shape
    if D > _WIDEST:
        raise ValueError(f"rows are {D} wide; the fused form takes up to {_WIDEST}; use backend='eager'")
    return N, D


def run_forward(
    x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, residual_ND: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, D); mean and 1 / deviation of every row (N,)."""
    N, D = _checked(x_ND)
    block = _block(D)
    rows = max(1, _HELD_FORWARD // block)
    y = torch.empty_like(residual_ND)
    mean, inverse = (torch.empty(N, device=x_ND.device, dtype=torch.float32) for _ in range(2))
    _forward_kernel[(triton.cdiv(N, rows),)](
        x_ND, weight_D, bias_D, residual_ND, y, mean, inverse, N, eps,
        D=D, BLOCK=block, ROWS=rows, num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return y, mean, inverse


def run_backward(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, mean_N: Tensor, inverse_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; that of the residual is dy."""
    N, D = _checked(x_ND)
    block = _block(D)
    rows = max(1, _HELD_BACKWARD // block)
    num_sms = torch.cuda.get_device_properties(x_ND.device).multi_processor_count
    P = min(triton.cdiv(N, rows), num_sms * _PROGRAMS_A_SM)
    size_bytes = rows * block * (x_ND.element_size() + dy_ND.element_size())
    stages = max(1, min(3, _SHARED_BYTES // _PROGRAMS_A_SM // size_bytes))
    dx = torch.empty_like(x_ND)
    partial = torch.empty((P, 2 * D), device=x_ND.device, dtype=torch.float32)
    _backward_kernel[(P,)](
        dy_ND, x_ND, weight_D, bias_D, mean_N, inverse_N, dx, partial, N,
        D=D, BLOCK=block, ROWS=rows, P=P, STAGES=stages, num_warps=min(16, max(4, block // 1024)),
    )  # fmt: skip
    dweight, dbias = torch.empty_like(weight_D), torch.empty_like(bias_D)
    _add_kernel[(triton.cdiv(2 * D, _ADDED),)](
        partial, dweight, dbias, D=D, P=P, P2=triton.next_power_of_2(P), BLOCK=_ADDED, num_warps=4
    )
    return dx, dweight, dbias


# Measured on an H100: elements that a program holds at once, programs beside each other, and what they may share.
_HELD_FORWARD, _HELD_BACKWARD, _PROGRAMS_A_SM, _ADDED = 2048, 4096, 2, 16
_SHARED_BYTES = 220_000

_FORWARD, _BACKWARD = "assay::layer_norm_gelu_residual", "assay::layer_norm_gelu_residual_backward"


@library.custom_op(_FORWARD, mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return run_forward(x, weight, bias, residual, eps)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    each_row = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(residual), each_row, torch.empty_like(each_row)


@library.custom_op(_BACKWARD, mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return run_backward(dy, x, weight, bias, mean, inverse)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    assert dy is not None
    dx, dweight, dbias = _backward(dy.contiguous(), *ctx.saved_tensors)
    return dx, dweight, dbias, dy, None


_forward.register_autograd(_gradients, setup_context=_keep)


def layer_norm_gelu_residual(x_ND: Tensor, weight_D: Tensor, bias_D: Tensor, residual_ND: Tensor, eps: float) -> Tensor:
    """See `norm.layer_norm_gelu_residual`."""
    x_ND, weight_D, bias_D, residual_ND = (t.contiguous() for t in (x_ND, weight_D, bias_D, residual_ND))
    y: Tensor = _forward(x_ND, weight_D, bias_D, residual_ND, eps)[0]
    return y
