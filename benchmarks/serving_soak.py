"""A million requests: whether memory and open files of a service stay what they are.

`assay serve` over a home folder of the benchmark's own. 32 connections in a closed loop send scores with reasons; nine
of ten have ids, so that decisions are kept; every hundredth request is a batch of events, every hundredth one asks for
labels of events that were scored, and connections are given up and opened anew now and then. Memory is what processes
hold for themselves (RssAnon: files that are mapped belong to the system's cache), summed over the processes of the
service; the median of the last tenth is compared with that of the tenth after the first fifth, by when every cache has
its size.

    assay bench serving_soak [--json] [--model fraud-demo] [--requests 1000000]
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _load import _ask, quiet, request_bytes
from _report import finish, row
from serving_load import ASKED, PATHS, command_of, free_port, payments, running

CONNECTIONS, SAMPLE_S, RECONNECT = 32, 2.0, 500


def processes_of(parent: int) -> list[int]:
    """It and all that it started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [parent]
    while todo:
        one = todo.pop()
        found.append(one)
        todo += children.get(one, [])
    return found


def held(pids: list[int]) -> tuple[float, int]:
    """MB of memory and number of open files of all."""
    kilobytes, files = 0, 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        kilobytes += int(status.split("RssAnon:")[1].split()[0])
        files += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return kilobytes / 1024, files


def requests_of(events: list[dict[str, Any]]) -> Iterator[bytes]:
    """Endlessly, all different where they have ids."""
    drawn = random.Random(0)  # noqa: S311 - a mix that is the same each time
    for number, event in enumerate(cycle(events)):
        named = {**event, "TransactionID": f"soak {number}", "id": f"soak {number}"}
        if number % 100 == 50:
            body: dict[str, Any] = {"events": [named], "application": "fraud"}
            yield request_bytes("/v1/events", json.dumps(body).encode())
        elif number % 100 == 99:
            body = {"labels": [{"id": f"soak {number - drawn.randrange(1, 5000)}", "fraud": drawn.random() < 0.03}]}
            yield request_bytes("/v1/labels", json.dumps(body).encode())
        else:
            body = {"events": [event if number % 10 == 0 else named], "explain": True}
            yield request_bytes(PATHS["ours"], json.dumps(body).encode())


async def soak(port: int, requests: Iterator[bytes], total: int, sample: Any) -> tuple[Counter[int], int]:
    """Statuses, and connections that broke. sample: called with the number of answers every two seconds."""
    status: Counter[int] = Counter()
    broken = 0

    async def one() -> None:
        nonlocal broken
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for turn in range(total):
            if status.total() >= total:
                break
            if turn % RECONNECT == RECONNECT - 1:
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                code, _ = await _ask(reader, writer, next(requests))
                status[code] += 1
            except (OSError, asyncio.IncompleteReadError):
                broken += 1
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()

    async def sampling() -> None:
        while status.total() < total:
            await asyncio.sleep(SAMPLE_S)
            sample(status.total())

    await asyncio.gather(sampling(), *(one() for _ in range(CONNECTIONS)))
    return status, broken


def main() -> None:
    """Load, look, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fraud-demo")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true")
    call = parser.parse_args()
    from assay_platform.config import load_config

    events = payments(ASKED)
    seen: list[tuple[int, float, int]] = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        shutil.copytree(load_config().paths.home, home)
        os.environ["ASSAY_HOME"] = str(home)
        port, probe = free_port(), json.dumps({"events": [events[0]]}).encode()
        with running(
            command_of("ours", port, call.model, ""), port, probe, PATHS["ours"], Path(scratch) / "log"
        ) as ours:
            quiet()
            began = time.monotonic()

            def sample(answered: int) -> None:
                seen.append((answered, *held(processes_of(ours.pid))))
                if len(seen) % 15 == 0:
                    print(f"{answered} answers, {seen[-1][1]:.0f} MB, {seen[-1][2]} files", flush=True)

            status, broken = asyncio.run(soak(port, requests_of(events), call.requests, sample))
            seconds = time.monotonic() - began

    def between(first: float, last: float) -> tuple[float, float]:
        part = [one for one in seen if first * call.requests <= one[0] <= last * call.requests]
        return statistics.median(one[1] for one in part), statistics.median(one[2] for one in part)

    (memory, files), (last_memory, last_files) = between(0.2, 0.3), between(0.9, 1.0)
    print(f"{dict(status)}, {broken} connections broken, {seconds:.0f} s", flush=True)
    runs = {"runs": 1}
    finish("serving_soak", [
        row("requests", status.total(), "", higher_is_better=True, **runs),
        row("requests that failed", status.total() - status[200] - status[202] + broken, "", limit=0,
            limit_name="target", **runs),
        row("memory, after a fifth", memory, "MB", **runs),
        row("memory, growth until the end", 100 * (last_memory / memory - 1), "%", limit=3, limit_name="target",
            **runs),
        row("open files, growth", last_files - files, "", limit=0, limit_name="target", **runs),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
