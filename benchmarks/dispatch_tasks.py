"""What the dispatcher costs beside plain Ray, and whether results survive workers that are killed.

Overhead: 10,000 tasks of 10 ms of arithmetic on two cores, by plain `ray.remote` and by a `Dispatcher` on Ray, in turn.
Kills: 50 times 40 tasks of about 0.1 s, of which a worker is killed at a random moment of each run; every result is
compared, to the bit, with those of a run without kills.

    assay bench dispatch_tasks [--json] [--tasks N] [--runs N] [--kills N]
"""

import argparse
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import ray
from assay_platform.tasks.cluster import ray_cluster
from assay_platform.tasks.dispatch import Dispatcher
from assay_platform.tasks.placement import ByCost
from assay_platform.tasks.task import Kind, Place, Task
from assay_platform.tasks.workers import RayWorkers

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, median, row, spread

CORES, TASK_S = 2, 0.01


def spin(loops: int, number: int) -> int:
    """The same arithmetic whoever runs it."""
    found = number
    for _ in range(loops):
        found = (found * 1_103_515_245 + 12_345) % 2_147_483_648
    return found


def placed_spin(place: Place, loops: int, number: int) -> int:
    """As a task."""
    del place
    return spin(loops, number)


def calibrated() -> int:
    """Loops that take TASK_S."""
    loops, best = 20_000, float("inf")
    for _ in range(20):
        began = time.perf_counter()
        spin(loops, 1)
        best = min(best, time.perf_counter() - began)
    return int(loops * TASK_S / best)


def by_ray(loops: int, num: int) -> tuple[float, list[int]]:
    """Seconds and results."""
    remote = ray.remote(spin)
    began = time.perf_counter()
    results: list[int] = ray.get([remote.remote(loops, number) for number in range(num)])
    return time.perf_counter() - began, results


def by_dispatcher(loops: int, num: int) -> tuple[float, list[int]]:
    """Seconds and results."""
    with Dispatcher(RayWorkers(), ByCost()) as dispatcher:
        began = time.perf_counter()
        tasks = (Task(work=placed_spin, args=(loops, number), kind=Kind.UPDATE) for number in range(num))
        futures = [dispatcher.submit(task) for task in tasks]
        results = [future.result() for future in futures]
        return time.perf_counter() - began, results


def solve(place: Place, seed: int) -> float:
    """A task of the kills."""
    del place
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((260, 260))
    for _ in range(6):
        matrix = np.linalg.inv(matrix @ matrix.T + np.eye(260))
    return float(np.trace(matrix))


def kill_one(generator: random.Random, within_s: float, done: threading.Event, killed: list[int]) -> None:
    """A worker of this Ray that runs a task, at a random moment."""
    if done.wait(generator.uniform(0.0, within_s)):
        return
    while not done.is_set():
        running = [p for p in psutil.process_iter(["name"]) if p.info["name"].startswith("ray::solve")]
        if running:
            victim = generator.choice(running)
            victim.kill()
            killed.append(victim.pid)
            return
        time.sleep(0.005)


def kills(num: int) -> tuple[int, int, int]:
    """Runs with the same results, workers killed, tasks started again."""
    generator, same, killed, again = random.Random(0), 0, list[int](), 0  # noqa: S311 - no secret
    tasks = [Task(work=solve, args=(seed,), kind=Kind.MATRIX, name="solve") for seed in range(40)]
    within_s, expected = 0.0, list[float]()
    for number in range(-2, num):  # twice undisturbed: workers start, then what it takes
        done, began = threading.Event(), time.perf_counter()
        with Dispatcher(RayWorkers()) as dispatcher:
            futures = [dispatcher.submit(task) for task in tasks]
            if number >= 0:
                arguments = (generator, within_s, done, killed)
                threading.Thread(target=kill_one, args=arguments, daemon=True).start()
            results = [future.result(300) for future in futures]
            done.set()
            again += sum(count for one, count in dispatcher.now().done.items() if one.outcome == "retried")
        if number < 0:
            within_s, expected = time.perf_counter() - began, results
            continue
        same += results == expected
        print(f"run {number + 1}: {same} the same, {len(killed)} killed, {again} started again", file=sys.stderr)
    return same, len(killed), again


def main() -> None:
    """Both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kills", type=int, default=50)
    call, _ = parser.parse_known_args()
    rows = []
    with ray_cluster(CORES):
        same, killed, again = kills(call.kills)
        rows.append(row("a worker killed at a random moment: runs with the same result", same, f"of {call.kills}",
                        limit=call.kills, limit_name="all", higher_is_better=True, runs=call.kills))  # fmt: skip
        rows += [row("workers killed", killed, ""), row("tasks started again", again, "")]
        loops = calibrated()
        by_ray(loops, 100), by_dispatcher(loops, 100)  # workers start
        seconds: dict[str, list[float]] = {"ours": [], "ray": []}
        for _ in range(call.runs):
            peer_s, peer = by_ray(loops, call.tasks)
            ours_s, ours = by_dispatcher(loops, call.tasks)
            assert ours == peer
            seconds["ours"].append(ours_s)
            seconds["ray"].append(peer_s)
            print(f"dispatcher {ours_s:.1f} s, ray.remote {peer_s:.1f} s", file=sys.stderr)
        rows.append(row(f"{call.tasks:,} tasks of 10 ms", median(seconds["ours"]), "s", peer=median(seconds["ray"]),
                        peer_name="ray.remote", limit=call.tasks * TASK_S / CORES, limit_name="arithmetic alone",
                        spread=spread(seconds["ours"]), runs=call.runs))  # fmt: skip
    finish("dispatch_tasks", rows, device=f"CPU, {CORES} cores")


if __name__ == "__main__":
    main()
