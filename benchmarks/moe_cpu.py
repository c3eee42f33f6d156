"""One MoE layer of the fraud model on a CPU, batches of 1, 32 and 1,000 rows, no gradients.

Ours is the whole layer, router included. Peers: a loop over experts, as most public code has it, with the same router
and weights, its output compared first; and a dense SwiGLU network of as many parameters. Layers take turns over four
sets of weights, as the layers of a model do, so that no set stays in the nearest cache.

    assay bench moe_cpu [--json]
"""

import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from assay_platform.moe import MoELayer
from torch import Tensor, nn
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, in_turn, median, row, spread

WIDTH, NUM_EXPERTS, TOP_K, SETS = 128, 16, 2, 4
RUNS = {1: 400, 32: 300, 1_000: 40}


class Dense(nn.Module):
    """As many parameters as a layer, its router left out."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(WIDTH, 2 * hidden) / WIDTH**0.5)
        self.w_out = nn.Parameter(torch.randn(hidden, WIDTH) / hidden**0.5)

    def forward(self, x_ND: Tensor) -> Tensor:
        """SwiGLU."""
        gate, up = (x_ND @ self.w_in).chunk(2, -1)
        return (silu(gate) * up) @ self.w_out


def loop(layer: MoELayer, x_ND: Tensor) -> Tensor:
    """One expert after the other looks for its rows."""
    routing, _ = layer.router(x_ND)
    y_ND = layer.pool.always(x_ND)
    for e in range(layer.num_experts):
        row, slot = torch.where(routing.expert_NK == e)
        if len(row):
            y_ND.index_add_(0, row, layer.pool[e](x_ND[row]) * routing.gate_NK[row, slot, None])
    return y_ND


def main() -> None:
    """Measure."""
    torch.manual_seed(0)
    layers = [MoELayer(WIDTH, WIDTH, NUM_EXPERTS, TOP_K).eval() for _ in range(SETS)]
    for layer in layers:
        nn.init.normal_(layer.router.scores.weight_ED, std=0.3)  # rows differ in what they choose
    denses = [Dense((NUM_EXPERTS + 1) * WIDTH).eval() for _ in range(SETS)]
    rows = []
    with torch.inference_mode():
        for num_rows, runs in RUNS.items():
            x_ND = torch.randn(num_rows, WIDTH)
            for layer in layers:
                torch.testing.assert_close(layer(x_ND).y_ND, loop(layer, x_ND), rtol=1e-3, atol=1e-4)

            def turns(calls: list[Callable[[Tensor], object]], x_ND: Tensor = x_ND) -> Callable[[], object]:
                order = cycle(calls)
                return lambda: next(order)(x_ND)

            calls = {
                "ours": turns(list(layers)),
                "dense of equal parameters": turns(list(denses)),
                "expert loop": turns([lambda x, layer=layer: loop(layer, x) for layer in layers]),
            }
            in_turn(calls, 2 * SETS)
            seconds = in_turn(calls, runs)
            for peer in list(calls)[1:]:
                rows.append(  # noqa: PERF401 - two lines that one reads
                    row(
                        f"{num_rows} rows", 1e3 * median(seconds["ours"]), "ms", peer=1e3 * median(seconds[peer]),
                        peer_name=peer, spread=spread(sorted(seconds["ours"])[runs // 10 : -runs // 10]), runs=runs,
                        times=round(median(seconds[peer]) / median(seconds["ours"]), 2),
                    )
                )  # fmt: skip
    finish("moe_cpu", rows)


if __name__ == "__main__":
    main()
