"""Training that touches selected experts only, against all experts at every step: time, memory, quality.

The fraud net on raw columns of IEEE-CIS with a pool of 128 experts, 2 chosen, batches of 64 rows as an online update
would have them. Three ways, the same seeds, batches and number of steps:

    all        every expert takes every step, with a gradient of zero if no row chose it
    lazy       for the first four fifths of the steps an expert that no row chose is left alone
    isolated   for the first four fifths only half of the experts are open, and of those the chosen ones are touched;
               then all are opened, new ones first as bystanders, and touched when chosen

Memory is weights, gradients and optimizer state at the end of the first stage, when each is largest.

    assay bench moe_isolation [--json]
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from assay_pipelines.fraud.train import net_logits
from assay_platform.models.fraud import FraudNet, FraudNetConfig
from assay_platform.moe import BackboneConfig, MoELayer
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row
from moe_routers import MAX_CATEGORIES, Fraud

SEEDS, NUM_EXPERTS, BATCH, STEPS, PRE = (0, 1, 2), 128, 64, 900, 0.8


class Outcome(NamedTuple):
    """One training."""

    ap: float
    step_ms: float  # median of the first stage
    later_ms: float  # of the second
    size_mb: float


def size_mb(net: FraudNet, optimizer: torch.optim.Optimizer, largest: int) -> float:
    """Bytes of weights, of the largest set of gradients seen, and of optimizer state."""
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    state = sum(
        v.numel() * v.element_size()
        for s in optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    )
    return (weights + state + largest) / 1e6


def train(task: Fraud, way: str, seed: int) -> Outcome:
    """From scratch."""
    torch.manual_seed(seed)
    config = FraudNetConfig(
        max_embedded=MAX_CATEGORIES + 1, backbone=BackboneConfig(num_experts=NUM_EXPERTS, num_blocks=2)
    )
    net = FraudNet(task.edges, task.encoder.cardinalities, config)
    layers = [m for m in net.modules() if isinstance(m, MoELayer)]
    if way == "isolated":
        for layer in layers:
            layer.isolate(range(NUM_EXPERTS // 2))

    def optimizer_of() -> torch.optim.Optimizer:
        trained = [p for p in net.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.03, fused=True)

    optimizer, size, largest = optimizer_of(), 0.0, 0
    generator = torch.Generator().manual_seed(seed)
    net.train()
    seconds: list[float] = []
    for step in range(STEPS):
        batch = task.train.take(torch.randint(len(task.train), (BATCH,), generator=generator))
        if step == int(PRE * STEPS):
            size = size_mb(net, optimizer, largest)
            if way == "isolated":
                for layer in layers:
                    layer.open_all()
                optimizer = optimizer_of()
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        task.loss(net, batch).backward()
        if way == "all" or (way == "lazy" and step >= PRE * STEPS):
            for p in net.parameters():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        for layer in layers:
            layer.router.after_step()
        seconds.append(time.perf_counter() - began)
        if step < PRE * STEPS and step % 20 == 0:
            largest = max(largest, sum(p.grad.numel() * 4 for p in net.parameters() if p.grad is not None))
    cut = int(PRE * STEPS)
    ap = average_precision_score(task.test.labels.numpy() > 0.5, net_logits(net.eval(), task.test.rows))
    return Outcome(float(ap), 1e3 * statistics.median(seconds[:cut]), 1e3 * statistics.median(seconds[cut:]), size)


def main() -> None:
    """Measure."""
    task = Fraud()
    task.test = task.test.take(torch.arange(0, len(task.test), 3))
    found: dict[str, list[Outcome]] = {"all": [], "lazy": [], "isolated": []}
    for seed in SEEDS:
        for way, outcomes in found.items():
            outcomes.append(train(task, way, seed))
            print(f"seed {seed} {way}: {outcomes[-1]}", flush=True)

    def middle(way: str, field: str) -> float:
        return statistics.mean(getattr(o, field) for o in found[way])

    rows: list[dict[str, Any]] = []
    for way in ("lazy", "isolated"):
        for field, unit, better in (
            ("step_ms", "ms", False),
            ("later_ms", "ms", False),
            ("size_mb", "MB", False),
            ("ap", "AP", True),
        ):
            values = [getattr(o, field) for o in found[way]]
            rows.append(
                row(
                    f"{way}, {field}", middle(way, field), unit, peer=middle("all", field), peer_name="all updated",
                    higher_is_better=better, spread=(max(values) - min(values)) / middle(way, field), runs=len(values),
                )
            )  # fmt: skip
    finish("moe_isolation", rows)


if __name__ == "__main__":
    main()
