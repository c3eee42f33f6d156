"""Three regions in network namespaces behind `assay gateway`: how near, what a lost region costs, what others know.

A namespace holds the gateway and callers, three others a service each (`assay serve`, a home folder of its own, on
loopback alone). Between them a relay delays every byte by half of the round trip that is injected. A region is lost
when its end of the link is set down, so that packets vanish as they do when a cable is cut; when its processes are
killed; or when they are stopped and answer nothing any more.

Callers: scores of payments that no event changes, in an open loop, each of which has to be what the region says by
itself; and sessions that post an event of a card of their own and score the next payment at once, whose answer has to
be what all regions say when they know everything. Nothing is sent again by callers. Afterwards every acknowledged event
is sent to every region once more: one that is not known as a duplicate was lost.

Needs root, for the namespaces.

    assay bench serving_regions [--json] [--model fraud-demo] [--losses 4] [--rate 40] [--seconds 10] [--home FOLDER]
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, median, row
from serving_load import PATHS, body_of, payments

DELAYS_MS = {"near": 4.0, "middle": 30.0, "far": 90.0}
GATEWAY = "assay-gw"
PORT, TIMEOUT_S, SAME, COMPARED, MOST = 8000, 30.0, 1e-6, 200, 500
JSON = {"Content-Type": "application/json"}
LOSSES = ("link", "killed", "stopped")


def ip(*arguments: str, check: bool = True) -> None:
    """Of iproute2."""
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


def address(name: str, *, inside: bool) -> str:
    """Of a region's end of its link, or of the gateway's."""
    return f"10.77.{list(DELAYS_MS).index(name)}.{2 if inside else 1}"


@contextmanager
def network() -> Iterator[None]:
    """A namespace for the gateway and one for each region, with a link between them."""
    spaces = [GATEWAY, *(f"assay-{name}" for name in DELAYS_MS)]
    try:
        for space in spaces:
            ip("netns", "del", space, check=False)
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        for name in DELAYS_MS:
            space = f"assay-{name}"
            ip("-n", GATEWAY, "link", "add", name, "type", "veth", "peer", "name", "up0", "netns", space)
            ip("-n", GATEWAY, "addr", "add", f"{address(name, inside=False)}/30", "dev", name)
            ip("-n", GATEWAY, "link", "set", name, "up")
            ip("-n", space, "addr", "add", f"{address(name, inside=True)}/30", "dev", "up0")
            ip("-n", space, "link", "set", "up0", "up")
        yield
    finally:
        for space in spaces:
            ip("netns", "del", space, check=False)


def within(space: str, *command: str) -> list[str]:
    """A command, in a namespace."""
    return ["ip", "netns", "exec", space, *command]


# ---------------------------------------------------------------------- the way between


async def relay(host: str, delay_s: float) -> None:
    """Bytes both ways between an address and the service on loopback, each late by half of the delay."""

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, content = await waiting.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not content:
                    writer.close()
                    return
                writer.write(content)

        task = asyncio.create_task(deliver())
        content = b"-"
        while content:
            try:
                content = await reader.read(65536)
            except OSError:
                content = b""
            waiting.put_nowait((loop.time() + delay_s / 2, content))
        with suppress(OSError):
            await task

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection("127.0.0.1", PORT)
        except OSError:
            writer.close()
            return
        await asyncio.gather(late(reader, there[1]), late(there[0], writer))

    server = await asyncio.start_server(connected, host, PORT)
    await server.serve_forever()


# ---------------------------------------------------------------------- processes


def started(command: list[str], log: Path, home: Path, **more: str) -> "subprocess.Popen[bytes]":
    """In a group of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PROMETHEUS_")} | {"ASSAY_HOME": str(home)}
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment | more, start_new_session=True)


def ended(process: "subprocess.Popen[bytes]") -> None:
    """All of a group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Region:
    """A service and the relay in front of it."""

    def __init__(self, name: str, home: Path, model: str) -> None:
        self.name, self.home, self.model = name, home, model
        self.url = f"http://{address(name, inside=True)}:{PORT}"
        relaying = (sys.executable, __file__, "--relay", address(name, inside=True), str(DELAYS_MS[name]))
        self.relay = started(within(f"assay-{name}", *relaying), home.parent / f"{name}-relay.log", home)
        self.service: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """The service."""
        command = (sys.executable, "-m", "assay_services", "--port", str(PORT), "--fraud", self.model)
        self.service = started(within(f"assay-{self.name}", *command), self.home.parent / f"{self.name}.log", self.home)

    def signal(self, number: signal.Signals) -> None:
        """Of all processes of the service."""
        assert self.service is not None
        os.killpg(self.service.pid, number)

    def stop(self) -> None:
        """The service."""
        if self.service is not None:
            ended(self.service)


# ---------------------------------------------------------------------- callers


class Callers:
    """What they saw. good: when answers ended. Times are of one clock."""

    def __init__(
        self, client: httpx.AsyncClient, bodies: list[bytes], right: list[float], table: dict[str, Any]
    ) -> None:
        self.client, self.bodies, self.right, self.table = client, bodies, right, table
        self.good: list[tuple[float, float, str]] = []  # began, seconds, region
        self.failed: list[str] = []
        self.differences: list[float] = []
        self.acknowledged: list[dict[str, Any]] = []
        self.read: list[tuple[dict[str, Any], float, str]] = []  # the next payment of a session, its score, who said so
        self.stop = asyncio.Event()

    async def score(self, i: int) -> None:
        """One of the payments that no event changes."""
        began = time.monotonic()
        answer = await self._asked(self.bodies[i % len(self.bodies)], {})
        if answer is not None:
            self.good.append((began, time.monotonic() - began, answer.headers["x-assay-region"]))
            score = answer.json()["scores"][0]["score"]
            self.differences.append(abs(score - self.right[i % len(self.right)]))

    async def session(self, number: int) -> None:
        """Pay with a card of one's own, then ask about the next payment."""
        paid = card_of(self.table, number)
        headers = {"X-Assay-Session": f"card {number}"}
        body = json.dumps({"events": [paid], "application": "fraud"}).encode()
        answer = await self._asked(body, headers, "/v1/events")
        if answer is None:
            return
        self.acknowledged.append(paid)
        time_of = self.table["timestamp"]
        following = {**paid, self.table["id"]: None, time_of: paid[time_of] + 60}
        answer = await self._asked(body_of("ours", following), headers)
        if answer is not None and "x-assay-behind" not in answer.headers:
            self.read.append((following, answer.json()["scores"][0]["score"], answer.headers["x-assay-region"]))

    async def _asked(self, body: bytes, headers: dict[str, str], path: str = PATHS["ours"]) -> httpx.Response | None:
        try:
            answer = await self.client.post(path, content=body, headers=headers | JSON)
        except httpx.TransportError as error:
            self.failed.append(type(error).__name__)
            return None
        if answer.status_code not in (200, 202):
            self.failed.append(f"{answer.status_code} {answer.text[:200]}")
            return None
        return answer

    async def run(self, rate: float) -> None:
        """Until told to stop. One of five is a session."""
        tasks: set[asyncio.Task[None]] = set()
        began, i = time.monotonic(), 0
        while not self.stop.is_set():
            await asyncio.sleep(max(0.0, began + i / rate - time.monotonic()))
            task = asyncio.create_task(self.session(i) if i % 5 == 0 else self.score(i))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            i += 1
        await asyncio.gather(*tasks)

    def longest_gap(self, since: float, until: float) -> float:
        """Without a good answer."""
        ends = sorted([since, *(b + s for b, s, _ in self.good if since <= b + s <= until)])
        return max((b - a for a, b in pairwise(ends)), default=until - since)

    def seconds(self, since: float, region: str) -> list[float]:
        """Of answers of a region to what was asked since."""
        return [s for b, s, name in self.good if b >= since and name == region]


def card_of(table: dict[str, Any], number: int) -> dict[str, Any]:
    """A payment that shares no key with others."""
    own: dict[str, Any] = dict.fromkeys(table["keys"], f"regions {number}")
    own |= dict.fromkeys(table.get("totals", ()), 1e4 * number)  # by which accounts are known
    return {**table["events"][-1], **own, table["id"]: f"regions-{number}"}


async def states(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    """What the gateway says of its regions."""
    return {one["name"]: one for one in (await client.get("/v1/gateway")).json()["regions"]}


async def without(near: Region, kind: str, callers: Callers, client: httpx.AsyncClient, pause_s: float) -> float:
    """Lose a region and have it back; the longest time without a good answer around its loss."""
    began = time.monotonic()
    if kind == "link":
        ip("-n", f"assay-{near.name}", "link", "set", "up0", "down")
    else:
        near.signal(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
    await asyncio.sleep(2.0 + pause_s)
    gap = callers.longest_gap(began, began + 2.0 + pause_s)
    if kind == "link":
        ip("-n", f"assay-{near.name}", "link", "set", "up0", "up")
    elif kind == "killed":
        near.start()
    else:
        near.signal(signal.SIGCONT)
    await until_state(client, near.name, "up")
    await asyncio.sleep(pause_s)
    assert callers.good[-1][2] == near.name, "the nearest region answers again"
    return gap


async def until_state(client: httpx.AsyncClient, name: str, state: str, most_s: float = 240.0) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while time.monotonic() - began < most_s:
        with suppress(httpx.TransportError):  # of a gateway that is being started
            if (await states(client))[name]["state"] == state:
                return time.monotonic() - began
        await asyncio.sleep(0.05)
    raise SystemExit(f"{name} is not {state} after {most_s:g} s")


# ---------------------------------------------------------------------- the measurement, inside the namespace


async def measured(call: argparse.Namespace, regions: list[Region], gateway_url: str) -> list[dict[str, Any]]:
    """All rows."""
    table = json.loads(Path(call.events).read_text())
    bodies = [body_of("ours", event) for event in table["events"][:COMPARED]]
    limits = httpx.Limits(max_connections=512, max_keepalive_connections=64, keepalive_expiry=3.0)
    rows: list[dict[str, Any]] = []
    async with ExitStackAsync() as stack:
        client = await stack.enter(httpx.AsyncClient(base_url=gateway_url, limits=limits, timeout=TIMEOUT_S))
        direct = {
            region.name: await stack.enter(httpx.AsyncClient(base_url=region.url, timeout=TIMEOUT_S))
            for region in regions
        }
        for region in regions:
            await until_state(client, region.name, "up")
        right = [(await direct["near"].post(PATHS["ours"], content=b)).json()["scores"][0]["score"] for b in bodies]
        callers = Callers(client, bodies, right, table)
        running = asyncio.create_task(callers.run(call.rate))

        # How near: each region by draining those that are nearer, beside the same service asked without a way.
        for name, injected_ms in ((region.name, DELAYS_MS[region.name]) for region in regions):
            since = time.monotonic() + 1.0
            await asyncio.sleep(call.seconds + 1.0)
            seen = callers.seconds(since, name)
            alone = await asyncio.gather(*(timed(direct[name], bodies[i]) for i in range(1)))
            told = (await states(client))[name]["latency_ms"]
            rows.append(row(f"{name}: p50 of a score through the gateway", 1e3 * median(seen), "ms",
                            limit=injected_ms, limit_name="injected there and back", answers=len(seen),
                            measured_by_gateway_ms=told, alone_ms=round(1e3 * alone[0], 1)))  # fmt: skip
            if name != regions[-1].name:
                await client.post(f"/v1/admin/gateway/{name}/drain")
        for region in regions[:-1]:
            await client.post(f"/v1/admin/gateway/{region.name}/resume")
        await asyncio.sleep(call.pause)
        rows.append(row("failed while regions were drained and came back", len(callers.failed), "requests", limit=0,
                        limit_name="target", why=Counter(callers.failed).most_common(3)))  # fmt: skip

        lag_s, most_lag_s = await time_to_know(client, regions[-1].name)
        gaps: dict[str, list[float]] = {}
        for number in range(call.losses):
            kind = LOSSES[number % len(LOSSES)]
            gaps.setdefault(kind, []).append(await without(regions[0], kind, callers, client, call.pause))
        callers.stop.set()
        await running

        lost, different, reads = await known_by_all(regions, direct, callers, client)
    seen_by = Counter(name for *_, name in callers.good)
    rows += [
        row("longest time without a good answer when the nearest is lost", max(map(max, gaps.values())), "s", limit=1,
            limit_name="target", runs=call.losses, **{kind: round(max(of), 3) for kind, of in gaps.items()}),
        row("requests failed, none sent again by callers", len(callers.failed), f"of {len(callers.good)}", limit=0,
            limit_name="target", why=Counter(callers.failed).most_common(3), by_region=dict(seen_by)),
        row("wrong scores", sum(one > SAME for one in callers.differences), f"of {len(callers.good)}", limit=0,
            limit_name="target", largest_difference=max(callers.differences)),
        row("sessions that did not read what they wrote", sum(one > SAME for one in reads), f"of {len(reads)}", limit=0,
            limit_name="target", largest_difference=max(reads)),
        row("acknowledged events that a region does not know", lost, f"of {len(callers.acknowledged)} by each", limit=0,
            limit_name="target"),
        row("payments that regions score differently afterwards", different, f"of {len(callers.read)}", limit=0,
            limit_name="target"),
        row("until the farthest region knows a write of another, mean", 1e3 * lag_s, "ms",
            limit=DELAYS_MS[regions[-1].name], limit_name="injected there and back", p99_at_most_ms=1e3 * most_lag_s),
    ]  # fmt: skip
    return rows


async def known_by_all(
    regions: list[Region], direct: dict[str, httpx.AsyncClient], callers: Callers, client: httpx.AsyncClient
) -> tuple[int, int, list[float]]:
    """Events that a region lacks, payments that regions score differently, how far off sessions have read."""
    began = time.monotonic()
    while any(one["waiting_writes"] for one in (await states(client)).values()):
        await asyncio.sleep(0.1)
        assert time.monotonic() - began < 120
    paid, read = callers.acknowledged, callers.read
    lost, said = 0, []
    for region in regions:
        for part in (paid[i : i + MOST] for i in range(0, len(paid), MOST)):
            answer = await direct[region.name].post("/v1/events", json={"events": part, "application": "fraud"})
            lost += len(part) - len(answer.json()["duplicates"]["fraud"])
        scores: list[float] = []
        for part in ([following for following, *_ in read[i : i + MOST]] for i in range(0, len(read), MOST)):
            answer = await direct[region.name].post(PATHS["ours"], json={"events": part})
            scores += [one["score"] for one in answer.json()["scores"]]
        said.append(scores)
    different = sum(max(of) - min(of) > SAME for of in zip(*said, strict=True))
    differences = [abs(now - then) for now, (_, then, _) in zip(said[0], read, strict=True)]
    return lost, different, differences


class ExitStackAsync:
    """Clients that are closed together."""

    def __init__(self) -> None:
        self._clients: list[httpx.AsyncClient] = []

    async def enter(self, client: httpx.AsyncClient) -> httpx.AsyncClient:
        """One more."""
        self._clients.append(client)
        return client

    async def __aenter__(self) -> "ExitStackAsync":
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.aclose()


async def timed(client: httpx.AsyncClient, body: bytes) -> float:
    """Seconds of a score without the gateway."""
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        await client.post(PATHS["ours"], content=body)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


async def time_to_know(client: httpx.AsyncClient, region: str) -> tuple[float, float]:
    """Seconds until a region knew a write of another one: mean, and a bound of 99 in 100."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    family = next(one for one in families if one.name == "assay_region_told_seconds")
    of = [sample for sample in family.samples if sample.labels["region"] == region]
    total, seconds = (next(s.value for s in of if s.name.endswith(end)) for end in ("_count", "_sum"))
    bounds = [float(s.labels["le"]) for s in of if s.name.endswith("_bucket") and s.value >= 0.99 * total]
    return seconds / total, min(bounds)


def inside(call: argparse.Namespace) -> None:
    """In the namespace of the gateway."""
    scratch = Path(call.inside)
    regions = [Region(name, scratch / name, call.model) for name in DELAYS_MS if name in call.regions]
    with ExitStack() as stack:
        for region in regions:
            region.start()
            stack.callback(ended, region.relay)
            stack.callback(region.stop)
        settings = scratch / "gateway.toml"
        settings.write_text(
            "[gateway]\nport = 8080\nregions = { "
            + ", ".join(f'{region.name} = "{region.url}"' for region in regions)
            + " }\n"
        )
        command = [sys.executable, "-m", "assay_services.gateway"]
        gateway = started(command, scratch / "gateway.log", scratch / "gateway", ASSAY_CONFIG=str(settings))
        stack.callback(ended, gateway)
        rows = asyncio.run(measured(call, regions, "http://127.0.0.1:8080"))
        for region in regions:  # all at once; what was put on the stack waits for them
            region.signal(signal.SIGTERM)
    (scratch / "rows.json").write_text(json.dumps(rows))


def ieee_cis() -> dict[str, Any]:
    """The newest payments, and the names of what a session needs of its own."""
    from assay_pipelines.datasets.catalogue import CATALOGUE, get_dataset
    from assay_platform.config import load_config

    schema: Any = CATALOGUE["ieee-cis"].schema(get_dataset("ieee-cis", load_config().paths.data))
    return {"events": payments(500), "keys": schema.keys, "id": schema.id, "timestamp": schema.timestamp}


def main() -> None:
    """Make namespaces, measure in them, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fraud-demo")
    parser.add_argument("--losses", type=int, default=4)
    parser.add_argument("--rate", type=float, default=40.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--events", help="JSON of events, keys, totals, id, timestamp (default: IEEE-CIS)")
    parser.add_argument("--pause", type=float, default=3.0, help="seconds between what is done to regions")
    parser.add_argument("--regions", nargs="+", default=list(DELAYS_MS), choices=list(DELAYS_MS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--relay", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.relay:
        asyncio.run(relay(call.relay[0], float(call.relay[1]) / 1e3))
        return
    if call.inside:
        inside(call)
        return
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root")
    from assay_platform.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if call.events is None:
            call.events = str(scratch / "events.json")
            Path(call.events).write_text(json.dumps(ieee_cis()))
        for name in call.regions:
            shutil.copytree(load_config().paths.home, scratch / name, ignore=shutil.ignore_patterns("recommend-*"))
        with network():
            given = ["--model", call.model, "--losses", str(call.losses), "--rate", str(call.rate),
                     "--seconds", str(call.seconds), "--events", call.events, "--pause", str(call.pause),
                     "--regions", *call.regions]  # fmt: skip
            command = within(GATEWAY, sys.executable, __file__, "--inside", folder, *given)
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                logs = "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in scratch.glob("*.log"))
                raise SystemExit(logs) from error
            rows = json.loads((scratch / "rows.json").read_text())
    finish("serving_regions", rows)


if __name__ == "__main__":
    main()
