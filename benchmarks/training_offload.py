"""Where weights are updated: on the GPU, on the CPU, on the CPU a step late; torch's own offload beside it.

A backbone of about 0.9 billion weights (4 MoE layers, 8 experts of 8,192, 2 chosen, 1 shared), products in bfloat16,
weights and state in float32. A step is --micro micro-batches of --rows rows. Memory is the peak of a step; time is the
mean over steps that follow one another without a pause. What is learned: the loss of the last of them, all ways from
the same weights on the same rows.

    assay bench training_offload [--json] [--rows N] [--micro N …]
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from assay_platform.moe import Backbone, BackboneConfig
from assay_platform.training.offload import OffloadedAdamW

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, median, row, spread

WIDTH, STEPS, RUNS = 1024, 3, 3
CONFIG = BackboneConfig(width=WIDTH, hidden=8192, num_blocks=4, num_experts=8, top_k=2, dropout=0.0)
HOW = {"lr": 1e-4, "weight_decay": 0.01}
WAYS = ("on the GPU", "on the CPU", "on the CPU, late", "torch FSDP2 offload")


class Seen(NamedTuple):
    """Of one way: of each run the seconds of a step; gigabytes; the loss of each step."""

    step_s: list[float]
    gb: float
    losses: list[float]


@contextmanager
def optimizer_of(way: str, net: Backbone) -> Iterator[Any]:
    """Ready to step."""
    if way == "on the GPU":
        yield torch.optim.AdamW(net.parameters(), **HOW, fused=True)
    elif way == "torch FSDP2 offload":
        from torch import distributed
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        distributed.init_process_group("cpu:gloo,cuda:nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
        try:
            for layer in net.layers:
                fully_shard(layer, offload_policy=CPUOffloadPolicy())
            fully_shard(net, offload_policy=CPUOffloadPolicy())
            yield torch.optim.AdamW(net.parameters(), **HOW)
        finally:
            distributed.destroy_process_group()
    else:
        optimizer = OffloadedAdamW(
            [{"params": list(net.parameters())}], **HOW, late=way.endswith("late"), units=list(net.layers)
        )
        yield optimizer
        optimizer.flush()
        optimizer.close()


def train(way: str, micro: int, num_rows: int) -> Seen:
    """From the same weights."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = Backbone(WIDTH, CONFIG)
        rows = torch.randn(16, num_rows, WIDTH)
        wanted = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    if way == "torch FSDP2 offload":
        net.cpu()
    losses: list[torch.Tensor] = []
    with optimizer_of(way, net) as optimizer:

        def step(number: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            for part in range(micro):
                x_ND = rows[(number * micro + part) % len(rows)]
                with torch.autocast("cuda", torch.bfloat16):
                    y_ND, balance = net(x_ND)
                    loss = (y_ND.float() - (x_ND @ wanted).float().tanh()).square().mean() + balance
                (loss / micro).backward()
            losses.append(loss.detach())
            optimizer.step()

        for number in range(2):
            step(number)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for run in range(RUNS):
            began = time.perf_counter()
            for number in range(STEPS):
                step(2 + run * STEPS + number)
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - began) / STEPS)
        gb = torch.cuda.max_memory_allocated() / 1e9
        return Seen(seconds, gb, [float(one) for one in losses])


def main() -> None:
    """Every way, micro-batches as given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="the first one is always run")
    parser.add_argument("--rows", type=int, default=2048, help="of a micro-batch")
    parser.add_argument("--micro", type=int, nargs="+", default=[32, 64, 128])
    call, _ = parser.parse_known_args()
    rows = []
    for micro in call.micro:
        seen: dict[str, Seen] = {}
        for way in dict.fromkeys([WAYS[0], *call.ways]):
            try:
                seen[way] = train(way, micro, call.rows)
                print(f"{micro} x {way}: {seen[way].gb:.2f} GB, {seen[way].step_s}", file=sys.stderr, flush=True)
            except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
                if way != WAYS[-1]:
                    raise
                print(f"{way}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            gc.collect()
            torch.cuda.empty_cache()
        usual = seen[WAYS[0]]
        for way, one in seen.items():
            name = f"{micro} x {call.rows:,} rows a step, update {way}"
            more: dict[str, Any] = {"peer_name": WAYS[0], "runs": RUNS}
            rows.append(row(f"{name}: a step", 1e3 * median(one.step_s), "ms", peer=1e3 * median(usual.step_s),
                            spread=spread(one.step_s), **more))  # fmt: skip
            rows.append(row(f"{name}: memory", one.gb, "GB", peer=usual.gb, **more))
            rows.append(row(f"{name}: loss", one.losses[-1], "", peer=usual.losses[-1], **more))
            apart = max(abs(a - b) / b for a, b in zip(one.losses, usual.losses, strict=True))
            print(
                f"{name}: losses at most {apart:.2%} apart, the first {one.losses[0]:.3f}", file=sys.stderr, flush=True
            )
    finish("training_offload", rows, device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
