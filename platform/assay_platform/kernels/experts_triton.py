"""Sparse expert products on a GPU, in Triton: gather, SwiGLU, weights and scatter live inside the products.

Pairs (row, expert) are sorted by expert and cut into tiles of one expert each. Forward:

    hidden[p] = silu(x[row p] W_gate) * (x[row p] W_up)      gather and SwiGLU in the first product
    slot[k-th choice of row] = gate_p · (hidden[p] W_out)    weight and scatter in the second
    y[row] = Σ_k slot[row, k]                                float32 sum in a fixed order, so results repeat to the bit

A pair of no expert (-1) is sorted past all others, where no tile reaches, and its slot is left out of the sum.

Backward has the same shape: a product that gathers, the SwiGLU derivative, two products that sum over the rows of an
expert, one that scatters into slots again. What is kept from forward to backward is the product before SwiGLU. (Its
derivative inside the product before it needs more registers than there are: 3.3 ms against 1.0 + 1.1 apart.)
"""

# T rows, K chosen, P = T K pairs sorted by expert, D model width, H hidden width, E experts, E2 the next power of two

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library


class Sorted(NamedTuple):
    """Pairs in order of their experts."""

    order_P: Tensor  # int32, pair of every sorted place
    bounds_E1: Tensor  # int32, sorted place where an expert begins


@triton.jit
def _count_kernel(pairs, counts, P, E: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr):
    """counts[block, e]: pairs of an expert in a block; those of none count as of an expert E."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(pairs + place, mask=place < P, other=0).to(tl.int32)
    expert = tl.where(expert < 0, E, expert)
    count = tl.histogram(expert, E2, mask=place < P)
    tl.store(counts + tl.program_id(0) * E2 + tl.arange(0, E2), count)


@triton.jit
def _bounds_kernel(counts, before, bounds, B, E: tl.constexpr, E2: tl.constexpr, ROWS: tl.constexpr):
    """One program: running sums of the counts over blocks, and where every expert begins."""
    e = tl.arange(0, E2)
    total = tl.zeros((E2,), tl.int32)
    for start in range(0, B, ROWS):
        row = start + tl.arange(0, ROWS)
        count = tl.load(counts + row[:, None] * E2 + e[None, :], mask=(row < B)[:, None], other=0)
        running = tl.cumsum(count, 0)
        tl.store(before + row[:, None] * E2 + e[None, :], total[None, :] + running - count, mask=(row < B)[:, None])
        total += tl.sum(count, 0)
    tl.store(bounds + 1 + e, tl.cumsum(total, 0), mask=e < E)
    tl.store(bounds, 0)


@triton.jit
def _place_kernel(pairs, before, bounds, order, P, E: tl.constexpr, E2: tl.constexpr, BLOCK: tl.constexpr):
    """Every pair to its place; pairs of an expert stay in their own order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = place < P
    expert = tl.load(pairs + place, mask=here, other=E2).to(tl.int32)
    expert = tl.where(expert < 0, E, expert)
    mine = (expert[:, None] == tl.arange(0, E2)[None, :]).to(tl.int32)
    rank = tl.sum(mine * (tl.cumsum(mine, 0) - 1), 1)
    to = tl.load(bounds + expert, mask=here, other=0)
    to += tl.load(before + tl.program_id(0) * E2 + expert, mask=here, other=0)
    tl.store(order + to + rank, place, mask=here)


@triton.jit
def _tile(bounds, tile, E: tl.constexpr, E2: tl.constexpr, BM: tl.constexpr):
    """Expert of a tile (E if there is none), its first sorted place, and where the expert ends."""
    e = tl.arange(0, E2)
    begin = tl.load(bounds + e, mask=e < E, other=0)
    end = tl.load(bounds + e + 1, mask=e < E, other=0)
    last = tl.cumsum((end - begin + BM - 1) // BM, 0)
    expert = tl.sum(((last <= tile) & (e < E)).to(tl.int32), 0)
    mine = e == expert
    before = tl.sum(tl.where(mine, last - (end - begin + BM - 1) // BM, 0), 0)
    first = tl.sum(tl.where(mine, begin, 0), 0) + (tile - before) * BM
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _in_kernel(
    x, w, hidden, saved, order, bounds,
    D: tl.constexpr, H: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, TOP_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_n: tl.constexpr = (H + BN - 1) // BN
    tile, n = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    e, first, end = _tile(bounds, tile, E, E2, BM)
    if e >= E:
        return
    place = first + tl.arange(0, BM)
    here = place < end
    row = tl.load(order + place, mask=here, other=0) // TOP_K
    col = n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x + row.to(tl.int64)[:, None] * D + k[None, :]
    w_at = w + e.to(tl.int64) * (D * 2 * H) + k[:, None] * (2 * H) + col[None, :]
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if D % BK == 0 and H % BN == 0:
            a = tl.load(x_at)
            g, u = tl.load(w_at), tl.load(w_at + H)
        else:
            inside = start + k < D
            a = tl.load(x_at, mask=inside[None, :], other=0.0)
            whole = inside[:, None] & (col < H)[None, :]
            g, u = tl.load(w_at, mask=whole, other=0.0), tl.load(w_at + H, mask=whole, other=0.0)
        gate = tl.dot(a, g, gate, input_precision=PRECISION)
        up = tl.dot(a, u, up, input_precision=PRECISION)
        x_at += BK
        w_at += BK * 2 * H
    out = here[:, None] & (col < H)[None, :]
    at = place.to(tl.int64)[:, None]
    kind = hidden.dtype.element_ty
    if SAVE:
        tl.store(saved + at * (2 * H) + col[None, :], gate.to(kind), mask=out)
        tl.store(saved + at * (2 * H) + H + col[None, :], up.to(kind), mask=out)
    tl.store(hidden + at * H + col[None, :], (gate * tl.sigmoid(gate) * up).to(kind), mask=out)


@triton.jit
def _product_kernel(
    a, b, out, weight, order, bounds,
    N: tl.constexpr, K: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, TOP_K: tl.constexpr,
    STRIDE_BK: tl.constexpr, STRIDE_BN: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a[p] @ b[expert] of every pair. GATHER: a by row, out in sorted order; else a sorted, out by pair."""
    num_n: tl.constexpr = (N + BN - 1) // BN
    tile, n = tl.program_id(0) // num_n, tl.program_id(0) % num_n
    e, first, end = _tile(bounds, tile, E, E2, BM)
    if e >= E:
        return
    place = first + tl.arange(0, BM)
    here = place < end
    pair = tl.load(order + place, mask=here, other=0)
    col = n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    source = pair // TOP_K if GATHER else tl.where(here, place, 0)
    a_at = a + source.to(tl.int64)[:, None] * K + k[None, :]
    b_at = b + e.to(tl.int64) * (N * K) + k[:, None] * STRIDE_BK + col[None, :] * STRIDE_BN
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        if K % BK == 0 and N % BN == 0:
            left, right = tl.load(a_at), tl.load(b_at)
        else:
            inside = start + k < K
            left = tl.load(a_at, mask=inside[None, :], other=0.0)
            right = tl.load(b_at, mask=inside[:, None] & (col < N)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_at += BK
        b_at += BK * STRIDE_BK
    if WEIGHTED:
        total *= tl.load(weight + pair, mask=here, other=0.0)[:, None]
    target = place if GATHER else pair
    at = out + target.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[:, None] & (col < N)[None, :])


@triton.jit
def _sum_kernel(slots, pairs, out, D: tl.constexpr, TOP_K: tl.constexpr, PARTIAL: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = Σ_k slots[t, k], in float32; PARTIAL: without those of no expert, which nothing was written to."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        inside = col < D
        if PARTIAL:
            inside = inside & (tl.load(pairs + row * TOP_K + k) >= 0)
        total += tl.load(slots + (row * TOP_K + k) * D + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + col, total.to(out.dtype.element_ty), mask=col < D)


@triton.jit
def _weight_grad_kernel(
    a, b, out, order, bounds,
    M: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr, GATHER_A: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[e] = Σ over pairs of e of a[p]ᵀ b[p]; one of them is in sorted order, the other is looked up by row."""
    num_n: tl.constexpr = (N + BN - 1) // BN
    num_m: tl.constexpr = (M + BM - 1) // BM
    pid = tl.program_id(0)
    e, m, n = pid // (num_m * num_n), pid // num_n % num_m, pid % num_n
    first, end = tl.load(bounds + e), tl.load(bounds + e + 1)
    rows, cols = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(first, end, BK):
        place = start + k
        here = place < end
        row = tl.load(order + place, mask=here, other=0) // TOP_K
        place_a = row if GATHER_A else place
        place_b = place if GATHER_A else row
        whole_a, whole_b = here[:, None], here[:, None]
        if M % BM != 0:
            whole_a = whole_a & (rows < M)[None, :]
        if N % BN != 0:
            whole_b = whole_b & (cols < N)[None, :]
        left = tl.load(a + place_a.to(tl.int64)[:, None] * M + rows[None, :], mask=whole_a, other=0.0)
        right = tl.load(b + place_b.to(tl.int64)[:, None] * N + cols[None, :], mask=whole_b, other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    at = out + e.to(tl.int64) * (M * N) + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def _swiglu_grad_kernel(
    saved, weight, dhidden, dsaved, dweight, order, bounds, P,
    H: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient before SwiGLU, and the gates' own. dhidden turns from a gradient into gate · hidden, in place, which
    the gradient of W_out is a product of.
    """
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    here = place < P
    pair = tl.load(order + place, mask=here, other=0)
    scale = tl.load(weight + pair, mask=here, other=0.0)[:, None]
    total = tl.zeros((BM,), tl.float32)
    at = place.to(tl.int64)[:, None]
    kind = dsaved.dtype.element_ty
    for start in range(0, H, BN):
        col = start + tl.arange(0, BN)
        inside = here[:, None] & (col < H)[None, :]
        gate = tl.load(saved + at * (2 * H) + col[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(saved + at * (2 * H) + H + col[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dhidden + at * H + col[None, :], mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += tl.sum(silu * up * grad, 1)
        tl.store(dhidden + at * H + col[None, :], (silu * up * scale).to(kind), mask=inside)
        grad *= scale
        dgate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(dsaved + at * (2 * H) + col[None, :], dgate.to(kind), mask=inside)
        tl.store(dsaved + at * (2 * H) + H + col[None, :], (grad * silu).to(kind), mask=inside)
    chosen = place < tl.load(bounds + E)  # what lies past it was never computed
    tl.store(dweight + pair, tl.where(chosen, total, 0.0), mask=here)


# Block sizes, warps and stages, measured on an H100. BM is the same for all products, since tiles are shared.
Blocks = dict[str, int]


def _blocks(bm: int, bn: int, bk: int, num_warps: int, num_stages: int) -> Blocks:
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": num_warps, "num_stages": num_stages}


class Plan(NamedTuple):
    """Shapes of the work of every kernel."""

    first: Blocks
    second: Blocks
    dhidden: Blocks
    dx: Blocks
    dweight: Blocks


LARGE = Plan(
    first=_blocks(128, 128, 64, 8, 4), second=_blocks(128, 128, 64, 8, 3), dhidden=_blocks(128, 256, 64, 8, 4),
    dx=_blocks(128, 256, 64, 8, 4), dweight=_blocks(128, 128, 64, 8, 3),
)  # fmt: skip
MEDIUM = Plan(
    first=_blocks(64, 128, 64, 4, 4), second=_blocks(64, 128, 64, 4, 4), dhidden=_blocks(64, 128, 64, 4, 3),
    dx=_blocks(64, 128, 64, 4, 3), dweight=_blocks(128, 128, 64, 8, 3),
)  # fmt: skip
SMALL = Plan(
    first=_blocks(16, 64, 128, 4, 4), second=_blocks(16, 64, 128, 4, 4), dhidden=_blocks(16, 64, 64, 4, 3),
    dx=_blocks(16, 64, 64, 4, 3), dweight=_blocks(64, 64, 32, 4, 3),
)  # fmt: skip
# float32 takes twice the room, and no tensor core.
_FLOAT32 = _blocks(32, 64, 32, 4, 2)
FLOAT32 = Plan(_FLOAT32, _FLOAT32, _FLOAT32, _FLOAT32, _FLOAT32)
# From so many pairs an expert on, a tile of the kind is mostly full.
_LARGE_FROM, _MEDIUM_FROM = 256, 48
# Pairs times experts that one program of the sort takes; more pairs, larger blocks, fewer rows of counts.
_SORTED_SMALL, _SORTED_LARGE = 16_384, 32_768


def plan_of(num_pairs: int, num_experts: int, dtype: torch.dtype) -> Plan:
    """By size and type."""
    if dtype == torch.float32:
        return FLOAT32
    if num_pairs >= _LARGE_FROM * num_experts:
        return LARGE
    return MEDIUM if num_pairs >= _MEDIUM_FROM * num_experts else SMALL


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _padded(num_experts: int) -> int:
    return max(2, int(triton.next_power_of_2(num_experts)))


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def sort_pairs(expert_TK: Tensor, num_experts: int, *, partial: bool = False) -> Sorted:
    """A stable counting sort; no value comes back to the host. partial: there may be -1."""
    pairs = expert_TK.reshape(-1)
    P, E2 = pairs.numel(), _padded(num_experts + partial)
    elements, num_warps = (_SORTED_LARGE, 16) if P > _SORTED_LARGE else (_SORTED_SMALL, 8)
    block = max(16, elements // E2)
    B = _ceil(P, block)
    counts = torch.empty((2, B, E2), device=pairs.device, dtype=torch.int32)
    order = torch.empty(P, device=pairs.device, dtype=torch.int32)
    bounds = torch.empty(num_experts + 1, device=pairs.device, dtype=torch.int32)
    _count_kernel[(B,)](pairs, counts[0], P, E=num_experts, E2=E2, BLOCK=block, num_warps=4)
    rows = max(1, _SORTED_SMALL // E2)
    _bounds_kernel[(1,)](counts[0], counts[1], bounds, B, E=num_experts, E2=E2, ROWS=rows, num_warps=8)
    _place_kernel[(B,)](pairs, counts[1], bounds, order, P, E=num_experts, E2=E2, BLOCK=block, num_warps=num_warps)
    return Sorted(order, bounds)


def _summed(slots_PD: Tensor, expert_TK: Tensor, *, partial: bool) -> Tensor:
    (T, top_k), D = expert_TK.shape, slots_PD.shape[1]
    out = slots_PD.new_empty(T, D)
    block = min(1024, triton.next_power_of_2(D))
    _sum_kernel[(T, _ceil(D, block))](
        slots_PD, expert_TK, out, D=D, TOP_K=top_k, PARTIAL=partial, BLOCK=block, num_warps=4
    )
    return out


def run_forward(
    x_TD: Tensor,
    w_in_EDF: Tensor,
    w_out_EHD: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    *,
    save: bool,
    partial: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Sorted]:
    """y (T, D); the product before SwiGLU (P, 2H), empty unless `save`; the order of pairs."""
    (T, D), (E, H, _), K = x_TD.shape, w_out_EHD.shape, expert_TK.shape[1]
    P = T * K
    first, second, *_ = plan or plan_of(P, E, x_TD.dtype)
    pairs = sort_pairs(expert_TK, E, partial=partial)
    num_tiles = min(P, P // first["BM"] + E)
    hidden = x_TD.new_empty(P, H)
    saved = x_TD.new_empty((P, 2 * H) if save else (0, 2 * H))
    common = {"E": E, "E2": _padded(E), "TOP_K": K, "PRECISION": _precision()}
    _in_kernel[(num_tiles * _ceil(H, first["BN"]),)](
        x_TD, w_in_EDF, hidden, saved, *pairs, D=D, H=H, SAVE=save, **common, **first
    )
    slots = x_TD.new_empty(P, D)
    _product_kernel[(num_tiles * _ceil(D, second["BN"]),)](
        hidden, w_out_EHD, slots, gate_TK, *pairs, N=D, K=H, STRIDE_BK=D, STRIDE_BN=1, GATHER=False, WEIGHTED=True,
        **common, **second,
    )  # fmt: skip
    return _summed(slots, expert_TK, partial=partial), saved, pairs


def run_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    w_in_EDF: Tensor,
    w_out_EHD: Tensor,
    expert_TK: Tensor,
    gate_TK: Tensor,
    saved: Tensor,
    pairs: Sorted,
    *,
    partial: bool = False,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, both weights and the gates."""
    (T, D), (E, H, _), K = x_TD.shape, w_out_EHD.shape, gate_TK.shape[1]
    P = T * K
    chosen = plan or plan_of(P, E, x_TD.dtype)
    num_tiles = min(P, P // chosen.first["BM"] + E)
    precision = _precision()
    common = {"E": E, "E2": _padded(E), "TOP_K": K, "PRECISION": precision}
    dhidden, dsaved = saved.new_empty(P, H), torch.empty_like(saved)
    dgate_TK = torch.empty_like(gate_TK)
    _product_kernel[(num_tiles * _ceil(H, chosen.dhidden["BN"]),)](
        dy_TD, w_out_EHD, dhidden, gate_TK, *pairs, N=H, K=D, STRIDE_BK=1, STRIDE_BN=D, GATHER=True, WEIGHTED=False,
        **common, **chosen.dhidden,
    )  # fmt: skip
    _swiglu_grad_kernel[(_ceil(P, 2),)](
        saved, gate_TK, dhidden, dsaved, dgate_TK, *pairs, P,
        H=H, E=E, BM=2, BN=min(512, triton.next_power_of_2(H)), num_warps=4,
    )  # fmt: skip

    def weight_gradient(a: Tensor, b: Tensor, like: Tensor, *, gather_a: bool) -> Tensor:
        out, blocks, (_, M, N) = torch.empty_like(like), chosen.dweight, like.shape
        _weight_grad_kernel[(E * _ceil(M, blocks["BM"]) * _ceil(N, blocks["BN"]),)](
            a, b, out, *pairs, M=M, N=N, TOP_K=K, GATHER_A=gather_a, PRECISION=precision, **blocks
        )
        return out

    dw_out = weight_gradient(dhidden, dy_TD, w_out_EHD, gather_a=False)
    del dhidden
    dw_in = weight_gradient(x_TD, dsaved, w_in_EDF, gather_a=True)
    slots = x_TD.new_empty(P, D)
    _product_kernel[(num_tiles * _ceil(D, chosen.dx["BN"]),)](
        dsaved, w_in_EDF, slots, gate_TK, *pairs, N=D, K=2 * H, STRIDE_BK=1, STRIDE_BN=2 * H, GATHER=False,
        WEIGHTED=False, **common, **chosen.dx,
    )  # fmt: skip
    return _summed(slots, expert_TK, partial=partial), dw_in, dw_out, dgate_TK


# ---------------------------------------------------------------------- operators, so that torch.compile sees one node


_FORWARD, _BACKWARD = "assay::expert_swiglu", "assay::expert_swiglu_backward"


@library.custom_op(_FORWARD, mutates_args=())
def _forward(
    x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor, save: bool, partial: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, saved, pairs = run_forward(x, w_in, w_out, expert, gate, save=save, partial=partial)
    return y, saved, pairs.order_P, pairs.bounds_E1


@_forward.register_fake
def _(
    x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor, save: bool, partial: bool
) -> tuple[Tensor, ...]:
    saved = x.new_empty((expert.numel() if save else 0, w_in.shape[2]))
    return (
        torch.empty_like(x),
        saved,
        expert.new_empty(expert.numel(), dtype=torch.int32),
        expert.new_empty(w_in.shape[0] + 1, dtype=torch.int32),
    )


@library.custom_op(_BACKWARD, mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor, saved: Tensor, order: Tensor,
    bounds: Tensor, partial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return run_backward(dy, x, w_in, w_out, expert, gate, saved, Sorted(order, bounds), partial=partial)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, expert: Tensor, gate: Tensor, saved: Tensor, order: Tensor,
    bounds: Tensor, partial: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return torch.empty_like(x), torch.empty_like(w_in), torch.empty_like(w_out), torch.empty_like(gate)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, partial = inputs
    ctx.partial = partial
    ctx.set_materialize_grads(False)  # or the other outputs, as large as all hidden layers, get gradients of zeros
    ctx.save_for_backward(*tensors, *output[1:])


def _gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    assert dy is not None
    dx, dw_in, dw_out, dgate = _backward(dy.contiguous(), *ctx.saved_tensors, ctx.partial)
    return dx, dw_in, dw_out, None, dgate, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


def expert_swiglu(
    x_TD: Tensor, w_in_EDF: Tensor, w_out_EHD: Tensor, expert_TK: Tensor, gate_TK: Tensor, *, partial: bool
) -> Tensor:
    """See `experts.expert_swiglu`."""
    inputs = (x_TD, w_in_EDF, w_out_EHD, gate_TK)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    tensors = (x_TD, w_in_EDF, w_out_EHD, expert_TK, gate_TK.float())
    contiguous = [tensor.contiguous() for tensor in tensors]
    if not save and not torch.compiler.is_compiling():  # an operator's dispatch takes as long as a small batch
        return run_forward(*contiguous, save=False, partial=partial)[0]
    y: Tensor = _forward(*contiguous, save, partial)[0]
    return y
