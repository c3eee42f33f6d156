"""Requests a second and latency of a fraud score with features and reasons over HTTP, beside four other ways to serve.

Ours: `assay serve`, one process, the champion of `assay demo`. `mlflow models serve`, BentoML with its batching and
Ray Serve with `@serve.batch` answer with the same scorer, features and reasons; 'glued' is FastAPI, Feast on Redis,
LightGBM with its TreeSHAP, as people write it by hand; the echo server is what the protocol and the generator allow.
One event a request, each payment another; every side answers the same ones, and those with our scorer have to give the
same scores. The generator (`_load`) shares the two cores. Closed loops of 1, 16 and 64 connections, then half of the
best rate in an open loop, whose latency counts from when a request should have begun.

    assay bench serving_load [--json] [--seconds 6] [--rounds 3] [--sides mlflow …] [--bento PYTHON]
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))
from _load import Told, closed_loop, evenly, open_loop, request_bytes
from _report import finish, median, row, spread

HERE = Path(__file__).parent
CONNECTIONS, ASKED, COMPARED = (1, 16, 64), 2000, 50
PEERS = {"mlflow": "mlflow models serve", "bento": "BentoML", "ray": "Ray Serve @serve.batch", "glued": "glued by hand"}
SAME_SCORER = ("mlflow", "bento", "ray")


class Side(NamedTuple):
    """A server that runs, and what to ask it."""

    port: int
    requests: list[bytes]


def free_port() -> int:
    """One that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], port: int, probe: bytes, path: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A server process until the block ends; it answers a first request before the block begins."""
    # What Feast sets where it is imported makes every count of a server that inherits it a write to a file.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMETHEUS_")}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", data=probe, headers={"Content-Type": "application/json"}
            )
            try:
                urllib.request.urlopen(request, timeout=60).read()  # noqa: S310 - our own server
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command}: {error}\n{log.read_text()[-3000:]}") from error
                time.sleep(0.5)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def payments(num: int) -> list[dict[str, Any]]:
    """The newest, without ids, so that nobody spends time on keeping decisions that others do not keep."""
    from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS, get_dataset
    from assay_platform.config import load_config
    from fraud_latency import as_records

    folder = get_dataset("ieee-cis", load_config().paths.data)
    schema: Any = CATALOGUE["ieee-cis"].schema(folder)
    wanted = [schema.timestamp, *dict.fromkeys((*schema.numeric, *schema.categorical, *schema.entities))]
    return as_records(pd.read_parquet(folder / EVENTS)[wanted].iloc[-num:])


def body_of(name: str, event: dict[str, Any]) -> bytes:
    """As a side takes one event."""
    bodies: dict[str, Any] = {"ours": {"events": [event], "explain": True}, "mlflow": {"dataframe_records": [event]}}
    return json.dumps(bodies.get(name, {"events": [event]})).encode()


PATHS = {
    "ours": "/v1/fraud/score",
    "mlflow": "/invocations",
    "bento": "/score",
    "ray": "/",
    "glued": "/score",
    "echo": "/",
}


def command_of(name: str, port: int, model: str, bento: str) -> list[str]:
    """How a side is started."""
    if name == "ours":
        return [sys.executable, "-m", "assay_services", "--port", str(port), "--fraud", model]
    python = bento if name == "bento" else sys.executable
    return [python, str(HERE / "_serving_peers.py"), name, str(port), model]


def scores_in(content: bytes) -> list[float]:
    """Of an answer of any side."""
    answer = json.loads(content)
    for key in ("scores", "predictions"):
        if isinstance(answer, dict) and key in answer:
            answer = answer[key]
    return [one["score"] for one in answer]


def measure(side: Side, seconds: float) -> dict[int, Told]:
    """Closed loops, the smallest first."""
    asyncio.run(closed_loop(side.port, side.requests, connections=8, seconds=min(3.0, seconds)))  # to warm up
    return {
        num: asyncio.run(closed_loop(side.port, side.requests, connections=num, seconds=seconds)) for num in CONNECTIONS
    }


def main() -> None:
    """A side after the other, all of them in each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fraud-demo")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="*", choices=PEERS, default=[name for name in PEERS if name != "bento"])
    parser.add_argument("--bento", default="", metavar="PYTHON", help="an interpreter that has bentoml and assay")
    parser.add_argument("--json", action="store_true")
    call = parser.parse_args()
    sides = ["ours", *call.sides, *(["bento"] if call.bento and "bento" not in call.sides else []), "echo"]
    events = payments(ASKED)
    rates: dict[tuple[str, int], list[float]] = {}
    latencies: dict[tuple[str, int], list[tuple[float, float]]] = {}
    half: dict[str, list[tuple[float, float]]] = {}
    answers: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for round_number in range(call.rounds):
            for name in sides:
                port, bodies = free_port(), [body_of(name, event) for event in events]
                log = Path(scratch) / f"{name}{round_number}.log"
                with running(command_of(name, port, call.model, call.bento), port, bodies[0], PATHS[name], log):
                    side = Side(port, [request_bytes(PATHS[name], body) for body in bodies])
                    if name != "echo" and name not in answers:
                        told = asyncio.run(closed_loop(port, side.requests[:COMPARED], connections=1, seconds=1.0,
                                                       keep=True))  # fmt: skip
                        answers[name] = [score for one in told.bodies[:COMPARED] for score in scores_in(one)]
                        if name in SAME_SCORER:
                            num = min(len(answers[name]), len(answers["ours"]))
                            np.testing.assert_allclose(answers[name][:num], answers["ours"][:num], atol=1e-6)
                    for num, told in measure(side, call.seconds).items():
                        assert set(told.status) == {200}, (name, told.status)
                        rates.setdefault((name, num), []).append(told.rate)
                        latencies.setdefault((name, num), []).append((told.median_ms, told.quantile_ms(0.99)))
                        print(f"{name}, {num}: {told.rate:.0f}/s, p50 {told.median_ms:.1f}, p99 "
                              f"{told.quantile_ms(0.99):.1f} ms", flush=True)  # fmt: skip
                    if name != "echo":
                        best = max(rates[name, num][-1] for num in CONNECTIONS)
                        told = asyncio.run(open_loop(port, side.requests, list(evenly(best / 2, call.seconds))))
                        half.setdefault(name, []).append((told.median_ms, told.quantile_ms(0.99)))
                        print(f"{name}, half of {best:.0f}/s: p50 {told.median_ms:.1f}, p99 "
                              f"{told.quantile_ms(0.99):.1f} ms", flush=True)  # fmt: skip
    rows = []
    for num in CONNECTIONS:
        for name in sides[1:-1]:
            rows.append(
                row(f"{num} at once, requests a second", median(rates["ours", num]), "/s",
                    peer=median(rates[name, num]), peer_name=PEERS[name], limit=median(rates["echo", num]),
                    limit_name="echo", higher_is_better=True, spread=spread(rates["ours", num]), runs=call.rounds)
            )  # fmt: skip
            for place, shown in enumerate(("p50", "p99")):
                mine = [one[place] for one in latencies["ours", num]]
                rows.append(
                    row(f"{num} at once, {shown}", median(mine), "ms",
                        peer=median([one[place] for one in latencies[name, num]]), peer_name=PEERS[name],
                        spread=spread(mine), runs=call.rounds)
                )  # fmt: skip
    for place, shown in enumerate(("p50", "p99")):
        mine = [one[place] for one in half["ours"]]
        rows += [
            row(f"half load, {shown}", median(mine), "ms", peer=median([one[place] for one in half[name]]),
                peer_name=PEERS[name], limit=10.0 if shown == "p99" else None, limit_name="target",
                spread=spread(mine), runs=call.rounds)
            for name in sides[1:-1]
        ]  # fmt: skip
    finish("serving_load", rows)


if __name__ == "__main__":
    main()
