"""Sparse SwiGLU experts on a GPU: ours, grouped products of PyTorch, a loop over experts; outputs compared first.

65,536 rows, width 1,024, hidden 512, 64 experts, 8 chosen, bf16; and 1 to 512 rows. The limit is the rate of a dense
8,192³ product in the same run. Small batches are timed as a captured CUDA graph, as serving runs them, and as a call.
Routing is given, the same for all. Where the transformers library is installed, its own two forms are peers too.

    assay bench moe_kernels [--json]
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from assay_platform.kernels import expert_swiglu
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

sys.path.insert(0, str(Path(__file__).parent))
from _gpu import RUNS, captured, peak_gb, timed
from _report import finish, median, row, spread

D, H, E, K = 1024, 512, 64, 8
LARGE, SMALL = 65_536, (1, 8, 64, 512)
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def grouped(x_TD: Tensor, w_in: Tensor, w_out: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Permute, two grouped products, weigh, add back."""
    pairs = expert_TK.reshape(-1)
    order = torch.argsort(pairs, stable=True)
    ends = torch.bincount(pairs, minlength=E).cumsum(0).int()
    rows = order // K
    gate, up = grouped_mm(x_TD[rows], w_in, offs=ends).chunk(2, -1)
    y = grouped_mm(silu(gate) * up, w_out, offs=ends) * gate_TK.reshape(-1)[order, None].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, rows, y)


def batched(x_TD: Tensor, w_in: Tensor, w_out: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Gather the weights of every pair, two batched products: what small batches usually get."""
    pairs = expert_TK.reshape(-1)
    x = x_TD.repeat_interleave(K, 0).unsqueeze(1)
    gate, up = torch.bmm(x, w_in[pairs]).chunk(2, -1)
    y = torch.bmm(silu(gate) * up, w_out[pairs]).squeeze(1) * gate_TK.reshape(-1, 1).to(x.dtype)
    return y.view(-1, K, D).sum(1)


def loop(*args: Tensor) -> Tensor:
    """One expert after the other."""
    return expert_swiglu(*args, backend="eager")


def of_transformers(name: str) -> Layer | None:
    """One of that library's expert functions, which read their weights from a module."""
    try:
        from transformers.integrations import moe
    except ImportError:
        return None
    function = getattr(moe, name)

    def layer(x_TD: Tensor, w_in: Tensor, w_out: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        module = SimpleNamespace(
            num_experts=E, has_gate=True, has_bias=False, is_transposed=True, gate_up_proj=w_in, down_proj=w_out,
            _apply_gate=lambda both: silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
        )  # fmt: skip
        return function(module, x_TD, expert_TK, gate_TK)

    return layer


def installed(**layers: Layer | None) -> dict[str, Layer]:
    """Those that are there."""
    return {name.replace("_mm", "").replace("_", " "): layer for name, layer in layers.items() if layer is not None}


def inputs(num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random rows and weights, softmax routing of random logits."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    gate, expert = torch.softmax(normal(num_rows, E), -1).topk(K, -1)
    w_in, w_out = (normal(E, D, 2 * H) / D**0.5).bfloat16(), (normal(E, H, D) / H**0.5).bfloat16()
    return normal(num_rows, D).bfloat16(), w_in, w_out, expert, gate / gate.sum(-1, keepdim=True)


def equal(ours: Tensor, peer: Tensor) -> None:
    """bf16 rounds differently in a different order."""
    error = float((ours - peer).float().norm() / peer.float().norm())
    assert error < 0.02, f"outputs differ by {error:.3f}"


def large(dense: float) -> list[dict[str, Any]]:
    """Forward and a training step, as shares of the dense rate."""
    args = inputs(LARGE)
    leaves = [t.detach().requires_grad_() for t in (*args[:3], args[4])]
    dy = torch.randn_like(args[0])
    flops = 6 * LARGE * K * D * H

    def forward(layer: Layer) -> Tensor:
        with torch.no_grad():
            return layer(*args)

    def step(layer: Layer) -> tuple[Tensor, ...]:
        y = layer(leaves[0], leaves[1], leaves[2], args[3], leaves[3])
        return torch.autograd.grad(y, leaves, dy)

    peers = installed(
        transformers_grouped_mm=of_transformers("grouped_mm_experts_forward"),
        plain_grouped_mm=grouped,
        expert_loop=loop,
    )
    rows = []
    for name, work, share in (("forward", forward, 1), ("forward and backward", step, 3)):
        ours_out, ours = work(expert_swiglu), timed(lambda work=work: work(expert_swiglu))
        graph = timed(captured(lambda work=work: work(expert_swiglu)))
        rows.append(
            row(f"{LARGE:,} rows, {name}, one graph, of the dense rate", share * flops / median(graph) / dense, "",
                limit=1.0, limit_name="dense product", higher_is_better=True, spread=spread(graph), runs=RUNS)
        )  # fmt: skip
        for peer, layer in peers.items():
            for a, b in zip(ours_out, work(layer), strict=True):
                equal(a, b)
            theirs = timed(lambda work=work, layer=layer: work(layer))
            common: dict[str, Any] = {"peer_name": peer, "runs": RUNS}
            rows += [
                row(f"{LARGE:,} rows, {name}", median(ours), "ms", peer=median(theirs), spread=spread(ours), **common),
                row(f"{LARGE:,} rows, {name}, of the dense rate", share * flops / median(ours) / dense, "",
                    peer=share * flops / median(theirs) / dense, limit=1.0, limit_name="dense product",
                    higher_is_better=True, **common),
                row(f"{LARGE:,} rows, {name}, peak memory", peak_gb(lambda work=work: work(expert_swiglu)), "GB",
                    peer=peak_gb(lambda work=work, layer=layer: work(layer)), **common),
            ]  # fmt: skip
    return rows


def small(num_rows: int) -> list[dict[str, Any]]:
    """A batch as serving sees it."""
    args = inputs(num_rows)
    with torch.no_grad():
        ours_out = expert_swiglu(*args)
        ours, call = timed(captured(lambda: expert_swiglu(*args))), timed(lambda: expert_swiglu(*args))
        rows = []
        peers = installed(
            transformers_batched_mm=of_transformers("batched_mm_experts_forward"), plain_batched_mm=batched,
            transformers_grouped_mm=of_transformers("grouped_mm_experts_forward"), plain_grouped_mm=grouped,
        )  # fmt: skip
        for peer, layer in peers.items():
            gathers_weights = "batched" in peer
            if gathers_weights and num_rows > 64:
                continue  # gigabytes of them
            equal(ours_out, layer(*args))
            theirs = timed(captured(lambda layer=layer: layer(*args))) if gathers_weights else None
            theirs_call = timed(lambda layer=layer: layer(*args))
            rows.append(
                row(f"{num_rows} rows, one graph launch", median(ours), "ms", peer=theirs and median(theirs),
                    peer_name=peer, spread=spread(ours), runs=RUNS)
            )  # fmt: skip
            rows.append(
                row(f"{num_rows} rows, one call", median(call), "ms", peer=median(theirs_call), peer_name=peer,
                    spread=spread(call), runs=RUNS)
            )  # fmt: skip
    return rows


def main() -> None:
    """Everything."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    dense = 2 * 8192**3 / median(timed(lambda: a @ a))  # operations a millisecond
    rows = large(dense)
    for num_rows in SMALL:
        rows += small(num_rows)
    rows.append(row("dense 8,192³ product", dense / 1e9, "TFLOP/s", higher_is_better=True, runs=RUNS))
    finish("moe_kernels", rows, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
