"""Workers that are killed under load: what is lost, and how long nobody answers.

`assay serve --workers 2` over a home folder of the benchmark's own. Scores come in an open loop, each sent once more if
its connection broke or the answer was a 503; events come one by one with an Idempotency-Key, sent again until somebody
takes them. Whenever both workers are there one of them is killed (SIGKILL), every second time the one that writes.
Afterwards all events are sent again under their ids: one that is not known as a duplicate was acknowledged and lost.

    assay bench serving_kill [--json] [--model fraud-demo] [--kills 10] [--rate 100]
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row
from serving_load import ASKED, PATHS, body_of, command_of, free_port, payments, running

PAUSE_S, MOST_S, TIMEOUT_S = 5.0, 60.0, 10.0


async def scored(port: int, bodies: list[bytes], rate: float, done: threading.Event) -> dict[str, list[float]]:
    """When good answers ended, and when a request was lost though it was sent twice."""
    found: dict[str, list[float]] = {"good": [], "lost": [], "again": []}
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=64, keepalive_expiry=3.0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=TIMEOUT_S) as client:

        async def one(body: bytes) -> None:
            for attempt in range(2):
                with suppress(httpx.TransportError):
                    answer = await client.post(PATHS["ours"], content=body)
                    if answer.status_code == 200:
                        found["good"].append(time.monotonic())
                        return
                if attempt == 0:
                    found["again"].append(time.monotonic())
            found["lost"].append(time.monotonic())

        tasks, i, start = set(), 0, time.monotonic()
        while not done.is_set():
            await asyncio.sleep(max(0.0, start + i / rate - time.monotonic()))
            task = asyncio.ensure_future(one(bodies[i % len(bodies)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            i += 1
        await asyncio.gather(*tasks)
    return found


def post_events(port: int, event: dict[str, Any], done: threading.Event, acknowledged: list[str]) -> None:
    """One after the other, each until it is taken."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
        number = 0
        while not done.is_set():
            name = f"kill-{number}"
            body = {"events": [{**event, "TransactionID": name, "id": name}], "application": "fraud"}
            with suppress(httpx.TransportError):
                answer = client.post("/v1/events", json=body, headers={"Idempotency-Key": name})
                if answer.status_code == 202:
                    acknowledged.append(name)
                    number += 1
            time.sleep(0.02)


def main() -> None:
    """Kill, count, look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fraud-demo")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--json", action="store_true")
    call = parser.parse_args()
    from assay_platform.config import load_config

    events = payments(ASKED)
    bodies = [body_of("ours", event) for event in events]
    drawn = random.Random(0)  # noqa: S311 - which worker is killed need not be unforeseeable
    killed: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        shutil.copytree(load_config().paths.home, home)
        os.environ["ASSAY_HOME"] = str(home)
        port = free_port()
        command = [*command_of("ours", port, call.model, ""), "--workers", "2"]
        with running(command, port, bodies[0], PATHS["ours"], Path(scratch) / "ours.log"):

            def workers() -> list[int]:
                text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S).text
                return sorted({int(pid) for pid in re.findall(r'assay_model_version\{.*worker="(\d+)"', text)})

            while len(workers()) < 2:
                time.sleep(0.5)
            done, acknowledged, box = threading.Event(), [], {}
            threads = [
                threading.Thread(target=post_events, args=(port, events[-1], done, acknowledged)),
                threading.Thread(target=lambda: box.update(asyncio.run(scored(port, bodies, call.rate, done)))),
            ]
            for thread in threads:
                thread.start()
            for number in range(call.kills):
                time.sleep(PAUSE_S)
                until = time.monotonic() + MOST_S
                while len(workers()) < 2 and time.monotonic() < until:
                    time.sleep(0.5)
                writer = int((home / "writer.lock").read_text())
                alive = [pid for pid in workers() if pid != writer]
                victim = writer if number % 2 == 0 or not alive else drawn.choice(alive)
                os.kill(victim, signal.SIGKILL)
                killed.append(time.monotonic())
            time.sleep(PAUSE_S)
            done.set()
            for thread in threads:
                thread.join()
            unknown = 0
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S) as client:
                for name in acknowledged:
                    body = {"events": [{**events[-1], "TransactionID": name, "id": name}], "application": "fraud"}
                    unknown += client.post("/v1/events", json=body).json()["duplicates"] != {"fraud": [0]}
    good = sorted(box["good"])
    gaps = [next((t for t in good if t > at), at + TIMEOUT_S) - at for at in killed]
    longest = [
        max((b - a for a, b in pairwise(good) if at - 0.1 < b and a < at + PAUSE_S), default=0.0) for at in killed
    ]
    print(json.dumps({"good": len(good), "again": len(box["again"]), "events": len(acknowledged)}), flush=True)
    runs = {"runs": call.kills}
    finish("serving_kill", [
        row("scores lost though sent twice", len(box["lost"]), f"of {len(good)}", limit=0, limit_name="target", **runs),
        row("acknowledged events lost", unknown, f"of {len(acknowledged)}", limit=0, limit_name="target", **runs),
        row("from a kill to the next good answer, longest", max(gaps), "s", limit=2, limit_name="target", **runs),
        row("longest time without a good answer around a kill, median", statistics.median(longest), "s", **runs),
        row("… the longest", max(longest), "s", limit=2, limit_name="target", **runs),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
