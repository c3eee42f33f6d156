"""Versions that take turns under load: requests that fail, and what a swap adds to the 99th percentile.

Ours: `assay serve` follows the alias of three versions of one model, promoted one after the other, so the one that
comes next is never in memory: it is read from the registry, warmed, rehearsed on recent requests and swapped in.
Requests come in an open loop. 'During a swap' are those that began between the promotion and the moment when every
process that holds models answers with the new version. Peer: the same scorer on Ray Serve, which is deployed again with
another `user_config` and reads its model in `reconfigure`, under a load that it bears; its swap counts as six seconds.

    assay bench serving_swap [--json] [--swaps 200] [--rate 150] [--scorers 2] [--peer-swaps 5] [--peer-rate 40]
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _load import Told, open_loop, request_bytes
from _report import finish, row
from serving_load import ASKED, PATHS, body_of, command_of, free_port, payments, running

NUM_VERSIONS, SETTLE_S, POLL_S, WAIT_S, PEER_SWAP_S = 3, 2.0, 0.1, 60.0, 6.0
Interval = tuple[float, float]


def versions_of(model: str, home: Path) -> Any:
    """A home folder of the benchmark's own, in which the champion is registered so many times; its registry."""
    from assay_pipelines.tracking import open_registry
    from assay_platform.config import Paths, load_config
    from assay_platform.tracking.client import open_client

    source = load_config()
    shutil.copytree(source.paths.home, home)
    config = replace(source, paths=Paths(home=home, cache=source.paths.cache))
    registry = open_registry(config)
    client = open_client(config.tracking_uri)
    first = client.get_model_version(model, str(registry.version_of(model)))
    numbers = [int(first.version)]
    for _ in range(NUM_VERSIONS - 1):
        made = client.create_model_version(model, first.source, first.run_id, tags=first.tags, model_id=first.model_id)
        numbers.append(int(made.version))
    return registry, numbers


def answering(port: int, application: str = "fraud") -> int:
    """Which version answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as answer:
        models = json.loads(answer.read())["models"]
    return next(int(one["version"]) for one in models if one["application"] == application)


def under_load(port: int, requests: list[bytes], rate: float, work: Any) -> tuple[Told, Any]:
    """What came of requests that came as long as `work(start)` ran, and what that returned."""
    done, box = threading.Event(), {}
    start = time.perf_counter()

    def run() -> None:
        box["found"] = work(start)
        done.set()

    def times() -> Any:
        i = 0
        while not done.is_set():
            yield i / rate
            i += 1

    thread = threading.Thread(target=run)
    thread.start()
    told = asyncio.run(open_loop(port, requests, times()))
    thread.join()
    return told, box["found"]


def split(told: Told, swaps: list[Interval]) -> tuple[list[float], list[float]]:
    """Milliseconds of the requests that began during a swap, and of the others."""
    during, outside = [], []
    for latency, ended in zip(told.latency_s, told.at_s, strict=True):
        began = ended - latency
        inside = any(first <= began <= last for first, last in swaps)
        (during if inside else outside).append(1e3 * latency)
    return during, outside


def p99(values: list[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


def operator(model: str, numbers: list[int], port: int, swaps: int, scorers: int, told: Any) -> None:
    """Promotes, and waits each time until all scorers have the version. Tells the times of each swap.

    It asks which version answers all the time, so that being asked costs the same during a swap and outside.
    """
    from assay_pipelines.tracking import open_registry
    from assay_platform.config import load_config

    registry = open_registry(load_config())
    registry.version_of(model)
    told.send(None)
    for i in range(swaps):
        settled = time.monotonic() + SETTLE_S
        while time.monotonic() < settled:
            answering(port)
            time.sleep(POLL_S)
        version = numbers[(i + 1) % NUM_VERSIONS]
        began = time.perf_counter()
        registry.promote(model, version, reason="benchmark")
        until = time.monotonic() + WAIT_S
        in_turn = 0  # scorers are asked one after the other
        while in_turn < scorers:
            in_turn = in_turn + 1 if answering(port) == version else 0
            if time.monotonic() > until:
                raise SystemExit(f"version {version} never answered")
            time.sleep(POLL_S)
        told.send((began, time.perf_counter()))
    time.sleep(SETTLE_S)


def ours(call: argparse.Namespace, scratch: Path, requests: list[bytes], probe: bytes) -> tuple[Told, list[Interval]]:
    """Swaps of ours."""
    _, numbers = versions_of(call.model, scratch / "home")
    os.environ["ASSAY_HOME"] = str(scratch / "home")
    port = free_port()
    # A generator that also asks the registry would be late with its requests.
    context = multiprocessing.get_context("spawn")
    hears, tells = context.Pipe(duplex=False)
    process = context.Process(target=operator, args=(call.model, numbers, port, call.swaps, call.scorers, tells))
    command = [*command_of("ours", port, call.model, ""), "--workers", str(call.scorers)]
    with running(command, port, probe, PATHS["ours"], scratch / "ours.log"):
        process.start()
        tells.close()
        hears.recv()

        def swap_all(start: float) -> list[Interval]:
            found = []
            for _ in range(call.swaps):
                began, ended = hears.recv()
                found.append((began - start, ended - start))
            process.join()
            return found

        told, swaps = under_load(port, requests, call.rate, swap_all)
    return told, swaps


def theirs(call: argparse.Namespace, scratch: Path, bodies: list[bytes]) -> tuple[Told, list[Interval]]:
    """Swaps of Ray Serve."""
    port = free_port()
    requests = [request_bytes(PATHS["ray"], body) for body in bodies]
    command = command_of("ray", port, call.model, "")
    with running(command, port, bodies[0], PATHS["ray"], scratch / "ray.log") as process:

        def swap_all(start: float) -> list[Interval]:
            found = []
            time.sleep(2 * SETTLE_S)
            for _ in range(call.peer_swaps):
                began = time.perf_counter() - start
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(PEER_SWAP_S)
                found.append((began, time.perf_counter() - start))
                time.sleep(SETTLE_S)
            return found

        return under_load(port, requests, call.peer_rate, swap_all)


def main() -> None:
    """Ours, then the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fraud-demo")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=150.0, help="requests a second")
    parser.add_argument("--scorers", type=int, default=2, help="processes of ours that hold models")
    parser.add_argument("--peer-swaps", type=int, default=5)
    parser.add_argument("--peer-rate", type=float, default=40.0)
    parser.add_argument("--json", action="store_true")
    call = parser.parse_args()
    bodies = [body_of("ours", event) for event in payments(ASKED)]
    requests = [request_bytes(PATHS["ours"], body) for body in bodies]
    peer: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if call.peer_swaps:
            told, swaps = theirs(call, Path(name), [body_of("ray", event) for event in payments(ASKED)])
            during, outside = split(told, swaps)
            print(f"Ray Serve: {dict(told.status)}, broken {told.broken}, p99 {p99(during):.0f} ms during a swap, "
                  f"{p99(outside):.0f} outside, longest {max(during):.0f}", flush=True)  # fmt: skip
            peer = {"failed": sum(told.status.values()) + told.broken - told.status[200], "during": p99(during),
                    "outside": p99(outside), "longest": max(during)}  # fmt: skip
        told, swaps = ours(call, Path(name), requests, bodies[0])
    during, outside = split(told, swaps)
    total = sum(told.status.values()) + told.broken
    failed = total - told.status[200]
    print(f"answers by status {dict(told.status)}, connections broken {told.broken}", flush=True)
    took = [last - first for first, last in swaps]

    def beside(what: str) -> dict[str, Any]:
        return {"peer": peer.get(what), "peer_name": f"Ray Serve, {call.peer_swaps} swaps, {call.peer_rate:g}/s"}

    rows = [
        row("requests that failed", failed, f"of {total}", limit=0, limit_name="target", runs=len(swaps),
            **beside("failed")),
        row("p99 during a swap", p99(during), "ms", limit=p99(outside) + 10, limit_name="outside + 10 ms",
            runs=len(during), **beside("during")),
        row("p99 outside", p99(outside), "ms", runs=len(outside), **beside("outside")),
        row("longest answer during a swap", max(during), "ms", runs=len(during), **beside("longest")),
        row("from the promotion until all answer with it, median", statistics.median(took), "s", runs=len(took)),
    ]  # fmt: skip
    finish("serving_swap", rows)


if __name__ == "__main__":
    main()
