"""Bounded experts under a bursty stream: fixed room, elastic room with spares, and no bound, same layer, same inputs.

16 experts of width 256, 2 chosen, batches of 2,048 rows. Four batches in five are calm; in the rest, in runs of ten,
half of the rows come from one of four narrow crowds, as a campaign or an attack sends them, so that few experts get
most of them. 'Fixed' is timed twice: with the room that elastic has without spares, to show what it loses, and with the
least room that serves 98 % of the stream. What is served equals the dropless result, which is checked.

    assay bench moe_capacity [--json]
"""

import sys
import time
from pathlib import Path

import torch
from assay_platform.moe import CapacityConfig, MoELayer
from assay_platform.moe.capacity import ElasticCapacity
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, median, row, spread

WIDTH, NUM_EXPERTS, TOP_K, NUM_ROWS, NUM_BATCHES, RUNS = 256, 16, 2, 2_048, 100, 5
FACTOR, SPARES, TARGET = 1.25, 12, 0.98


def stream(device: str) -> list[Tensor]:
    """The batches."""
    generator = torch.Generator().manual_seed(0)
    crowds = torch.randn(4, WIDTH, generator=generator) * 1.5
    batches = []
    for number in range(NUM_BATCHES):
        x_ND = torch.randn(NUM_ROWS, WIDTH, generator=generator)
        if number % 50 >= 40:
            crowd = crowds[number // 50 % 4]
            x_ND[: NUM_ROWS // 2] = crowd + 0.5 * x_ND[: NUM_ROWS // 2]
        batches.append(x_ND[torch.randperm(NUM_ROWS, generator=generator)].to(device))
    return batches


def run(layer: MoELayer, batches: list[Tensor], capacity: ElasticCapacity | None) -> tuple[float, float]:
    """Seconds, and the fraction of choices that were served."""
    layer.capacity = capacity
    served = 0.0
    began = time.perf_counter()
    for x_ND in batches:
        served += 1.0 - layer(x_ND).overflow
    if batches[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began, served / len(batches)


def main() -> None:
    """Measure."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer = MoELayer(WIDTH, WIDTH, NUM_EXPERTS, TOP_K, num_shared=0).eval().to(device)
    torch.nn.init.normal_(layer.router.scores.weight_ED, std=0.1)
    batches = stream(device)
    with torch.inference_mode():
        layer.capacity = ElasticCapacity(CapacityConfig(factor=4.0, spares=SPARES))
        bounded = layer(batches[40])
        assert bounded.overflow == 0.0
        layer.capacity = None
        torch.testing.assert_close(bounded.y_ND, layer(batches[40]).y_ND, rtol=1e-3, atol=1e-3)
        enough = next(
            factor / 8
            for factor in range(8, 8 * NUM_EXPERTS)
            if run(layer, batches, ElasticCapacity(CapacityConfig(factor=factor / 8)))[1] >= TARGET
        )
        forms = {
            f"fixed, {FACTOR} times the even share": CapacityConfig(factor=FACTOR),
            f"fixed, {enough} times, the least for 98 %": CapacityConfig(factor=enough),
            f"elastic, {FACTOR} times and up to {SPARES} spares": CapacityConfig(factor=FACTOR, spares=SPARES),
            "no bound": None,
        }
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        served: dict[str, float] = {}
        for _ in range(RUNS):
            for name, config in forms.items():
                taken, served[name] = run(layer, batches, None if config is None else ElasticCapacity(config))
                seconds[name].append(taken)
    total = NUM_ROWS * NUM_BATCHES
    peer = list(forms)[1]
    rows = [
        row(
            name, total / median(taken), "rows/s", peer=total / median(seconds[peer]), peer_name=peer,
            higher_is_better=True, spread=spread(taken), runs=RUNS, served=round(served[name], 4),
        )
        for name, taken in seconds.items()
    ]  # fmt: skip
    finish("moe_capacity", rows, device=torch.cuda.get_device_name() if device == "cuda" else "CPU")
    for name, share in served.items():
        print(f"{name}: served {share:.2%}")


if __name__ == "__main__":
    main()
