"""A mixed workload on two cores and a GPU: features, training and scoring at once, placed in four ways.

Every task is real work that runs on either device: decayed sums over events, an MoE net's training and scoring, the
normal equations of an item regression and their solution, trees' histograms. The same tasks in the same order: matrices
to the GPU and all else to the CPU; everything on the GPU; everything on the CPU; by measured cost, which has seen
every task once before. GPU-seconds are those in which a task holds the GPU. Every result is compared with that of the
CPU.

    taskset -c 0,1 assay bench dispatch_placement [--json] [--rounds N]
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from assay_platform.moe import Backbone, BackboneConfig
from assay_platform.tasks.dispatch import Dispatcher
from assay_platform.tasks.placement import ByCost, Placement, StaticRule
from assay_platform.tasks.task import Device, Kind, Needs, Place, Task
from assay_platform.tasks.workers import ThreadWorkers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, median, row, spread

CORES, RUNS = 2, 5
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


class Events(NamedTuple):
    """Of some entities, in the order of time."""

    entity: Tensor
    value: Tensor
    num_entities: int


def decayed_sums(place: Place, events: Events) -> Tensor:
    """Of each entity the sums of values at three half-lives, then their crosses."""
    entity, value = events.entity.to(place.device), events.value.to(place.device)
    age = torch.arange(len(entity), 0, -1, device=place.device, dtype=torch.float32) / len(entity)
    sums = []
    for half_life in (0.05, 0.2, 0.8):
        weight = torch.exp2(-age / half_life)
        sums.append(torch.zeros(events.num_entities, device=place.device).index_add_(0, entity, weight * value))
    stacked = torch.stack(sums, 1)
    crossed = torch.cat([stacked, stacked[:, :1] * stacked[:, 1:]], 1)
    return crossed.log1p().mean(0).cpu()


def histograms(place: Place, codes_NF: Tensor, gradient_N: Tensor) -> Tensor:
    """What a tree looks at to split a node: sums of gradients by column and bin; a few nodes, small ones last."""
    codes, gradient = codes_NF.to(place.device), gradient_N.to(place.device)
    best = []
    for node in range(24):
        part = slice(0, len(gradient) // (1 + node))
        flat = codes[part] + 64 * torch.arange(codes.shape[1], device=place.device)
        weight = gradient[part, None].expand(-1, codes.shape[1]).reshape(-1)
        sums = torch.zeros(64 * codes.shape[1], device=place.device).index_add_(0, flat.reshape(-1), weight)
        best.append(float(sums.view(-1, 64).cumsum(1).abs().max()))  # a tree goes on when it knows this one
    return torch.tensor(best)


def regression(place: Place, matrix_UI: Tensor) -> Tensor:
    """EASE: the inverse of the items' co-occurrences."""
    x = matrix_UI.to(place.device)
    inverse = torch.linalg.inv(x.T @ x + 300.0 * torch.eye(x.shape[1], device=place.device))
    return (inverse / inverse.diagonal()).diagonal(1).cpu()


def training(place: Place, rows: Tensor, steps: int) -> Tensor:
    """An MoE net learns a function of the rows."""
    generator = torch.Generator().manual_seed(0)
    net = small_net(generator).to(place.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    x = rows.to(place.device)
    loss = torch.zeros(())
    for step in range(steps):
        part = x[step * 1024 % (len(x) - 1023) :][:1024]
        y, balance = net(part)
        loss = (y.mean(1) - part.mean(1).tanh()).square().mean() + balance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach().cpu()


def small_net(generator: torch.Generator) -> nn.Module:
    """The same weights every time; threads share torch's own generator."""
    net = Backbone(128, BackboneConfig(width=128, hidden=256, num_blocks=2, dropout=0.0))
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return net.train()


def scoring(place: Place, rows: Tensor, nets: dict[str, nn.Module]) -> Tensor:
    """What a net, which every device has, says of a batch."""
    net = nets[torch.device(place.device).type]
    with torch.inference_mode():
        return torch.stack([net(part.to(place.device))[0].mean() for part in rows.split(8192)]).mean().cpu()


def workload(driver_cores: float, features: int, seed: int = 0) -> list[Task[Tensor]]:
    """A few large ones and many small ones, as a night's training beside a day's requests has them."""
    torch.manual_seed(seed)
    tasks, on_gpu = list[Task[Tensor]](), Needs(cores=driver_cores, gpus=1)

    def add(name: str, work: Any, kind: Kind, size: float, *args: Any) -> None:
        tasks.append(Task(work=work, args=args, kind=kind, name=name, size=size, gpu=on_gpu))

    for number in (50_000, 100_000, 200_000, 1_000_000, 4_000_000) * 4 * features:
        entity = torch.randint(0, 50_000, (number,))
        add("decayed sums", decayed_sums, Kind.FEATURE, number, Events(entity, torch.rand(number), 50_000))
    for number in (2_000, 20_000, 200_000) * 4 * features:
        codes, gradient = torch.randint(0, 64, (number, 16)), torch.randn(number)
        add("histograms", histograms, Kind.UPDATE, number, codes, gradient)
    for number in (200, 500, 1500) * 4:
        matrix = (torch.rand(2 * number, number) < 0.02).float()
        add("regression", regression, Kind.MATRIX, number**3, matrix)
    for steps in (5, 10, 20) * 2:
        add("training", training, Kind.MATRIX, steps, torch.randn(16_384, 128), steps)
    nets = {name: small_net(torch.Generator().manual_seed(0)).eval().to(name) for name in DEVICES}
    for number in (64,) * 120 + (256,) * 60 + (4096,) * 12 + (65_536,) * 4:
        add("scoring", scoring, Kind.MATRIX, number, torch.randn(number, 128), nets)
    order = torch.randperm(len(tasks)).tolist()
    return [tasks[number] for number in order]


class Ran(NamedTuple):
    """Once through all tasks."""

    seconds: float
    gpu_seconds: float
    on_gpu: int
    results: list[Tensor]


def run(placement: Placement, tasks: list[Task[Tensor]], *, num_gpus: int) -> Ran:
    """All at once."""
    began = time.perf_counter()
    with Dispatcher(ThreadWorkers(num_cores=CORES, num_gpus=num_gpus), placement) as dispatcher:
        futures = [dispatcher.submit(task) for task in tasks]
        results = [future.result() for future in futures]
        seconds = time.perf_counter() - began
        beat = dispatcher.now()
    held = sum(spent for (_, device), spent in beat.seconds.items() if device is Device.GPU)
    on_gpu = sum(count for done, count in beat.done.items() if done.device is Device.GPU)
    return Ran(seconds, held, on_gpu, results)


def main() -> None:
    """In turn, after a round of each that is not counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=RUNS)
    parser.add_argument("--driver-cores", type=float, default=0.0, help="cores that a task on the GPU takes")
    parser.add_argument("--features", type=int, default=1, help="so many times as many feature and tree tasks")
    call, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    tasks, num_gpus = workload(call.driver_cores, call.features), torch.cuda.device_count()
    by_cost = ByCost()
    ways: dict[str, tuple[Placement, int]] = {"by measured cost": (by_cost, num_gpus)}
    if num_gpus:
        ways |= {
            "static rule": (StaticRule(), num_gpus),
            "all on the GPU": (StaticRule(only=Device.GPU), num_gpus),
        }
    for device in [Device.CPU] + [Device.GPU] * bool(num_gpus):  # every task once on each device: what is to be known
        for _ in range(2):
            with Dispatcher(ThreadWorkers(num_cores=1, num_gpus=num_gpus), StaticRule(only=device)) as dispatcher:
                for task in tasks:
                    began = time.perf_counter()
                    dispatcher.submit(task).result()
                    by_cost.costs.add(task.name, device, task.size, time.perf_counter() - began)
    for name, size in sorted({(task.name, task.size) for task in tasks}):
        expected_ms = [1e3 * (by_cost.costs.seconds(name, device, size) or 0.0) for device in Device]
        print(f"{name} {size:g}: CPU {expected_ms[0]:.1f} ms, GPU {expected_ms[1]:.1f} ms", file=sys.stderr)
    ran: dict[str, list[Ran]] = {name: [] for name in ways}
    for number in range(call.rounds + 1):
        for name, (placement, gpus) in ways.items():
            one = run(placement, tasks, num_gpus=gpus)
            if number:
                ran[name].append(one)
    on_cpu = run(StaticRule(only=Device.CPU), tasks, num_gpus=0)
    print(f"all on the CPU: {on_cpu.seconds:.2f} s", file=sys.stderr)
    for name, several in ran.items():
        for one in several:
            for got, wanted in zip(one.results, on_cpu.results, strict=True):
                torch.testing.assert_close(got, wanted, rtol=0.02, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}")
    ours = ran["by measured cost"]
    rows = []
    for name, several in ran.items():
        peer = {"peer_name": name, "runs": call.rounds, "spread": spread([one.seconds for one in ours])}
        rows.append(row("everything done", median([one.seconds for one in ours]), "s",
                        peer=median([one.seconds for one in several]), **peer))  # fmt: skip
        rows.append(row("GPU held", median([one.gpu_seconds for one in ours]), "s",
                        peer=median([one.gpu_seconds for one in several]), **peer))  # fmt: skip
        print(f"{name}: {several[0].on_gpu} of {len(tasks)} on the GPU", file=sys.stderr)
    device = torch.cuda.get_device_name() if num_gpus else "CPU"
    finish("dispatch_placement", rows, device=f"{CORES} cores, {device}")


if __name__ == "__main__":
    main()
