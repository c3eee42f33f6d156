"""Three times as many requests as can be answered: what still gets through, and how late it is.

The peak is what a closed loop of 64 connections gets. Then requests come three times as fast in an open loop, with load
shedding as `assay serve` has it (who would wait longer than 250 ms is refused) and, as the peer, without (the same
service with a limit that is never reached). Goodput: answers of status 200 within a second of when they were due.

    assay bench serving_overload [--json] [--model fraud-demo] [--seconds 15] [--times 3] [--rounds 3]
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _load import Told, closed_loop, evenly, open_loop, request_bytes
from _report import finish, median, row, spread
from serving_load import ASKED, PATHS, body_of, command_of, free_port, payments, running

CONNECTIONS, USEFUL_S, MOST_CONNECTIONS = 64, 1.0, 4096
SETTINGS = {"with shedding": "", "without": "[service]\nmax_wait_ms = 1e9\n"}


def goodput(told: Told, seconds: float) -> float:
    """Useful answers a second."""
    return sum(latency <= USEFUL_S for latency in told.ok_latency_s) / seconds


def main() -> None:
    """Both in each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fraud-demo")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--times", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    call = parser.parse_args()
    bodies = [body_of("ours", event) for event in payments(ASKED)]
    requests = [request_bytes(PATHS["ours"], body) for body in bodies]
    peaks: list[float] = []
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in SETTINGS}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(call.rounds):
            for name, settings in SETTINGS.items():
                file = Path(scratch) / "assay.toml"
                file.write_text(f"{settings or '[service]'}\nmax_requests_per_s = 1e9\n")
                port = free_port()
                command = ["env", f"ASSAY_CONFIG={file}", *command_of("ours", port, call.model, "")]
                with running(command, port, bodies[0], PATHS["ours"], Path(scratch) / f"{name}.log"):
                    asyncio.run(closed_loop(port, requests, connections=CONNECTIONS, seconds=3))
                    peak = asyncio.run(closed_loop(port, requests, connections=CONNECTIONS, seconds=5)).rate
                    peaks.append(peak)
                    told = asyncio.run(
                        open_loop(port, requests, evenly(call.times * peak, call.seconds),
                                  most_connections=MOST_CONNECTIONS)
                    )  # fmt: skip
                good = goodput(told, call.seconds)
                found[name].append((good / peak, told.quantile_ms(0.99), told.status[503] / sum(told.status.values())))
                p99 = told.quantile_ms(0.99)
                print(f"{name}: peak {peak:.0f}/s, goodput {good:.0f}/s, p99 of the accepted {p99:.0f} ms", flush=True)
                print(f"    {dict(told.status)}, {told.broken} broken", flush=True)
    ours, peer = (list(zip(*found[name], strict=True)) for name in SETTINGS)
    more: dict[str, Any] = {"peer_name": "without shedding", "runs": call.rounds}
    rows = [
        row(f"goodput at {call.times:g} times the peak, of the peak", median(list(ours[0])), "",
            peer=median(list(peer[0])), limit=0.9, limit_name="target", higher_is_better=True,
            spread=spread(list(ours[0])), **more),
        row("p99 of the accepted", median(list(ours[1])), "ms", peer=median(list(peer[1])),
            limit=1e3 * USEFUL_S, limit_name="useful", spread=spread(list(ours[1])), **more),
        row("share refused with 503", median(list(ours[2])), "", peer=median(list(peer[2])), **more),
        row("peak", median(peaks), "/s", higher_is_better=True, spread=spread(peaks), runs=len(peaks)),
    ]  # fmt: skip
    finish("serving_overload", rows)


if __name__ == "__main__":
    main()
