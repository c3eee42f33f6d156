"""Requests over HTTP/1.1 from one process, as cheaply as Python can: raw bytes on kept connections, a latency each.

The server shares the machine, so what the generator costs is taken from it; a client library costs more than a score.
Closed loop: so many connections, each sends its next request when it has its answer. Open loop: requests begin at given
times whatever the answers do, and latency counts from when they should have begun (Tene's 'coordinated omission').
"""

import asyncio
import gc
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle

# Servers close connections that are idle for five seconds; a client that meant to use one then has to ask again.
_IDLE_S = 3.0


@dataclass
class Told:
    """What came of a load. latency_s: of each answer in the order of their ends. at_s: when, from the beginning."""

    seconds: float = 0.0
    latency_s: list[float] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    status: Counter[int] = field(default_factory=Counter)
    ok_latency_s: list[float] = field(default_factory=list)
    broken: int = 0
    bodies: list[bytes] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.status[200] / self.seconds

    def quantile_ms(self, share: float) -> float:
        """Of the good answers."""
        ordered = sorted(self.ok_latency_s)
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")

    @property
    def median_ms(self) -> float:
        """Of the good answers."""
        return 1e3 * statistics.median(self.ok_latency_s) if self.ok_latency_s else float("nan")

    def add(self, began: float, start: float, status: int, body: bytes, *, keep: bool) -> None:
        """One answer."""
        now = time.perf_counter()
        self.latency_s.append(now - began)
        self.at_s.append(now - start)
        self.status[status] += 1
        if status == 200:
            self.ok_latency_s.append(now - began)
        if keep:
            self.bodies.append(body)


def request_bytes(path: str, body: bytes, host: str = "127.0.0.1", headers: str = "") -> bytes:
    """A POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> tuple[int, bytes]:
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
    if length is None:  # in chunks, as some servers answer
        body = b""
        while (size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)) > 0:
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return int(head[9:12]), body
    return int(head[9:12]), await reader.readexactly(length)


def quiet() -> None:
    """Keep what is there out of garbage collections, whose pauses would count as the server's."""
    gc.collect()
    gc.freeze()


async def closed_loop(
    port: int, requests: Sequence[bytes], *, connections: int, seconds: float, keep: bool = False
) -> Told:
    """Each connection goes on for so long."""
    told, source = Told(), cycle(requests)
    quiet()
    start = time.perf_counter()

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() - start < seconds:
            began = time.perf_counter()
            try:
                told.add(began, start, *await _ask(reader, writer, next(source)), keep=keep)
            except (OSError, asyncio.IncompleteReadError):
                told.broken += 1
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    told.seconds = time.perf_counter() - start
    return told


async def open_loop(
    port: int, requests: Sequence[bytes], times_s: Iterable[float], *, most_connections: int = 512, keep: bool = False
) -> Told:
    """Requests begin at these times; one that finds no connection free gets a new one, up to a limit."""
    told, source = Told(), cycle(requests)
    free: list[tuple[float, tuple[asyncio.StreamReader, asyncio.StreamWriter]]] = []
    room = asyncio.Semaphore(most_connections)
    quiet()
    start = time.perf_counter()

    async def one(request: bytes, due: float) -> None:
        async with room:
            while free and time.perf_counter() - free[0][0] > _IDLE_S:
                free.pop(0)[1][1].close()
            pair = free.pop()[1] if free else await asyncio.open_connection("127.0.0.1", port)
            try:
                told.add(due, start, *await _ask(*pair, request), keep=keep)
                free.append((time.perf_counter(), pair))
            except (OSError, asyncio.IncompleteReadError):
                told.broken += 1

    tasks = []
    for moment in times_s:
        wait = start + moment - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(one(next(source), start + moment)))
    await asyncio.gather(*tasks)
    told.seconds = time.perf_counter() - start
    for _, (_, writer) in free:
        writer.close()
    return told


def evenly(rate: float, seconds: float) -> Iterator[float]:
    """Times of a steady load."""
    return (i / rate for i in range(int(rate * seconds)))
