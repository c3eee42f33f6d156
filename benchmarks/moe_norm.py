"""LayerNorm + GELU + residual on a GPU, bf16, forward and backward: ours, eager PyTorch, torch.compile.

The limit is a device copy of as many bytes in the same run: each direction reads two tensors and writes one, so a copy
of 1.5 tensors, and twice that for both. All are timed as captured graphs, ten launches a run, over inputs that take
turns, so that the cache holds nothing of the last one. Outputs and gradients are compared first.

    assay bench moe_norm [--json]
"""

import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from assay_platform.kernels import layer_norm_gelu_residual
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _gpu import RUNS, captured, timed
from _report import finish, median, row, spread

SHAPES = ((65_536, 1_024), (16_384, 4_096), (8_192, 1_024))
TURNS = 8
Op = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Three operators."""
    return torch.nn.functional.gelu(torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)) + residual


def in_turns(calls: list[Callable[[], object]]) -> Callable[[], None]:
    """A call that takes the next of some captured graphs."""
    graphs = cycle([captured(call) for call in calls])

    def call() -> None:
        next(graphs)()

    return call


def main() -> None:
    """Measure."""
    if not torch.cuda.is_available():
        sys.exit("assay bench moe_norm needs a GPU")
    rows = []
    compiled = torch.compile(eager, dynamic=False)  # a kernel for each shape, its best case
    for N, D in SHAPES:
        weight, bias = torch.randn(D, device="cuda").bfloat16(), torch.randn(D, device="cuda").bfloat16()
        data = [torch.randn((3, N, D), device="cuda").bfloat16() for _ in range(TURNS)]
        leaves = [t.clone().requires_grad_() for t in (data[0][0], weight, bias, data[0][1])]

        def gradients(op: Op, leaves: list[Tensor] = leaves, dy: Tensor = data[0][2]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(op(*leaves), leaves, dy)

        exact = [t.detach().double().requires_grad_() for t in leaves]
        reference = (eager(*exact), *torch.autograd.grad(eager(*exact), exact, data[0][2].double()))
        for op in (layer_norm_gelu_residual, eager):
            for ours, theirs in zip((op(*leaves), *gradients(op)), reference, strict=True):
                assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()

        def forwards(
            op: Op, weight: Tensor = weight, bias: Tensor = bias, data: list[Tensor] = data
        ) -> Callable[[], None]:
            with torch.no_grad():
                return in_turns([lambda d=d: op(d[0], weight, bias, d[1]) for d in data])

        def steps(
            op: Op, weight: Tensor = weight, bias: Tensor = bias, data: list[Tensor] = data
        ) -> Callable[[], None]:
            inputs = [[t.detach().requires_grad_() for t in (d[0], weight, bias, d[1])] for d in data]
            return in_turns(
                [lambda i=i, dy=d[2]: torch.autograd.grad(op(*i), i, dy) for i, d in zip(inputs, data, strict=True)]
            )

        size = 3 * N * D // 2
        copies = [(d.view(-1)[:size], torch.empty_like(d.view(-1)[:size])) for d in data]
        floor = median(timed(in_turns([lambda a=a, b=b: b.copy_(a) for a, b in copies]), 10))
        for name, make, passes in (("forward", forwards, 1), ("forward and backward", steps, 2)):
            ms = {"ours": timed(make(layer_norm_gelu_residual), 10)}
            ms |= {"eager": timed(make(eager), 10), "compiled": timed(make(compiled), 10)}
            best = median(ms["ours"])
            rows += [
                row(
                    f"{N:,} x {D:,} {name}", 1e3 * best, "µs", peer=1e3 * median(ms[peer]), peer_name=peer,
                    limit=1e3 * passes * floor, limit_name="copy", spread=spread(ms["ours"]), runs=RUNS,
                    share_of_copy=round(passes * floor / best, 3),
                )
                for peer in ("eager", "compiled")
            ]  # fmt: skip
            print(f"{N:,} x {D:,} {name}: {passes * floor / best:.1%} of the copy bandwidth")
    finish("moe_norm", rows, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
