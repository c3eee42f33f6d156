"""Batches between the process that speaks HTTP and those that hold models.

A process that scores opens a connection a kind of work, a lane, says who it is, and is sent one batch after the other:
the front's queue gives the next one when the last one is answered, and a full one before that, so that a process never
waits for a busy front. A batch whose process dies waits again, in front,
and goes to another or to the one that is started instead; one that two processes died of is refused. What is scored
twice is scored alike, so nothing is lost and nothing is done twice.

A message is its length in four bytes and MessagePack. Messages go over a Unix socket that this user alone can open.
"""

import asyncio
import itertools
import logging
import math
import os
import signal
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from assay_services import stages
from assay_services.batching import Batch, BatchLimits, BatchQueue, DeadlinePassedError, OverloadedError, Waiting
from assay_services.replies import Reply, refusal
from assay_services.tracing import Timing

_LENGTH = struct.Struct("!I")
_MOST_ATTEMPTS = 2
# Without a process that scores, requests wait so long for one to be started.
_PATIENCE_S = 10.0
# A process that does not answer a batch in this time will not.
_HUNG_S = 30.0
_RETRY_S = 0.05
_log = logging.getLogger("assay.service")


class Hello(msgspec.Struct, array_like=True):
    """What a process says first. http: the socket where it answers everything else."""

    lane: str
    pid: int
    http: str


class Call(msgspec.Struct, array_like=True):
    """Bodies of one shape: the model that they name, and what else has to be alike."""

    shape: tuple[str, bool | None]
    bodies: list[bytes]


class Answered(msgspec.Struct, array_like=True, tag="answered"):
    """A reply to each, how long the call took, and what it spent that on."""

    seconds: float
    replies: list[Reply]
    stages: list[tuple[str, float]] = []


class Aside(msgspec.Struct, array_like=True, tag="aside"):
    """The process wants no batches as long as another one takes them; or it wants some again."""

    aside: bool


_said = msgspec.msgpack.Decoder(Answered | Aside)


def _framed(message: msgspec.Struct) -> bytes:
    content = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(content)) + content


# ---------------------------------------------------------------------- the side that speaks HTTP


class _Lane:
    """A connection from a process that scores. batches: what it works on, and at most one after it. aside: it is busy
    with something else, so others come first.
    """

    def __init__(self, hello: Hello, writer: asyncio.StreamWriter) -> None:
        self.hello, self.writer = hello, writer
        self.batches: deque[Batch[bytes]] = deque()
        self.aside = False
        self.hung: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """The process has to answer something from now on, or nothing."""
        if self.hung is not None:
            self.hung.cancel()
        self.hung = asyncio.get_running_loop().call_later(_HUNG_S, _end, self.hello.pid) if self.batches else None


class Pool:
    """A queue that processes take batches from. Of one event loop; see `Queue` for what requests see of it."""

    def __init__(
        self,
        limits: BatchLimits,
        *,
        on_batch: Callable[[int, int, float], None] = lambda requests, rows, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_batch: told of every call."""
        self._queue: BatchQueue[bytes] = BatchQueue(limits)
        self._on_batch, self._clock = on_batch, clock
        self._lanes: list[_Lane] = []
        self._alone_since = -math.inf

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def processes(self) -> list[Hello]:
        """Those that answer."""
        return [lane.hello for lane in self._lanes]

    def has_room(self) -> bool:
        """Whether a request that comes now may be taken on."""
        return self._queue.has_room(self._clock())

    async def submit(
        self,
        job: bytes,
        *,
        rows: int,
        shape: Hashable,
        within_s: float,
        gone: Callable[[], bool] = lambda: False,
        told: Callable[[Timing], None] | None = None,
    ) -> Reply:
        """See `Queue`."""
        now = self._clock()
        if not self._lanes and now - self._alone_since > _PATIENCE_S:
            raise _nobody()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        left = lambda: future.cancelled() or gone()  # noqa: E731
        self._queue.add(shape, Waiting(job, rows, now, now + within_s, left, future, told=told))
        self._feed()
        return await future

    async def serve(self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Give a process batches until it goes."""
        lane = _Lane(hello, writer)
        self._lanes.append(lane)
        try:
            self._feed()
            while True:
                said = _said.decode(await _read(reader))
                if isinstance(said, Aside):
                    lane.aside = said.aside
                    self._feed()
                else:
                    self._answered(lane, said)
        finally:
            self._left(lane)

    def _feed(self) -> None:
        while any(self._gave_next(lane) for lane in self._lanes):
            pass

    def _gave_next(self, lane: _Lane) -> bool:
        """Whether there was something for a lane to do next."""
        if len(lane.batches) > 1 or (lane.aside and not all(other.aside for other in self._lanes)):
            return False
        batch = self._queue.take(self._clock(), lane, only_full=bool(lane.batches))
        if batch is None:
            return False
        late = DeadlinePassedError("the answer was not ready in the time that the request gave")
        for one in batch.expired:
            _settle(one, error=late)
        if batch.taken:
            for one in batch.taken:
                one.attempts += 1
            lane.batches.append(batch)
            if len(lane.batches) == 1:
                lane.watch()
            shape: Any = batch.shape
            lane.writer.write(_framed(Call(shape, [one.job for one in batch.taken])))
        return True

    def _answered(self, lane: _Lane, answered: Answered) -> None:
        batch = lane.batches.popleft()
        assert len(batch.taken) == len(answered.replies)
        lane.watch()
        then = lane.batches[0] if lane.batches else None
        was_answered = any(reply.status < 400 for reply in answered.replies)
        self._queue.done(batch, answered.seconds, self._clock(), lane, then=then, was_answered=was_answered)
        # The next batch first: the process that scores must not wait until answers are written.
        self._feed()
        for one, reply in zip(batch.taken, answered.replies, strict=True):
            if one.told is not None:
                waited_s = max(0.0, self._clock() - answered.seconds - one.since)
                one.told(Timing(waited_s, answered.seconds, len(batch.taken), batch.rows, lane.hello.pid,
                                answered.stages))  # fmt: skip
            _settle(one, reply=reply)
        self._on_batch(len(batch.taken), batch.rows, answered.seconds)

    def _left(self, lane: _Lane) -> None:
        self._lanes.remove(lane)
        lost = []
        for batch in lane.batches:
            for one in batch.taken:
                if one.attempts >= _MOST_ATTEMPTS:
                    _settle(one, error=OverloadedError("the processes that were to answer have ended", 1.0))
            lost.append(batch._replace(taken=[one for one in batch.taken if one.attempts < _MOST_ATTEMPTS]))
        lane.batches.clear()
        lane.watch()
        if lost:
            _log.warning("process %d has gone; %d requests that it had wait again", lane.hello.pid,
                         sum(len(batch.taken) for batch in lost))  # fmt: skip
        self._queue.lost(lost, lane)
        if not self._lanes:
            self._alone_since = self._clock()
            asyncio.get_running_loop().call_later(_PATIENCE_S, self._give_up)
        self._feed()

    def _give_up(self) -> None:
        if not self._lanes:
            for one in self._queue.all_gone():
                _settle(one, error=_nobody())


def _nobody() -> OverloadedError:
    return OverloadedError("no process that scores is there; one is being started", 1.0)


def _settle(one: Waiting[bytes], *, reply: Reply | None = None, error: Exception | None = None) -> None:
    future: asyncio.Future[Reply] = one.answer
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    elif reply is not None:
        future.set_result(reply)


def _end(pid: int) -> None:
    _log.error("process %d has not answered for %g s and is ended", pid, _HUNG_S)
    os.kill(pid, signal.SIGKILL)


async def _read(reader: asyncio.StreamReader) -> bytes:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return await reader.readexactly(length)


class Lanes:
    """Where processes that score connect to. joined: set when the first one has."""

    def __init__(self, path: Path, pools: Mapping[str, Pool]) -> None:
        """path: of the Unix socket. pools: lane → who takes from it."""
        self._path, self._pools = path, pools
        self._server: asyncio.Server | None = None
        self.joined = asyncio.Event()
        self._turns = itertools.count()

    async def start(self) -> None:
        """Listen."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._connected, str(self._path))

    async def stop(self) -> None:
        """No batches any more."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    def next_process(self) -> Path | None:
        """The socket of a process that answers everything else, in turns; None if there is none."""
        found = sorted({hello.http for pool in self._pools.values() for hello in pool.processes})
        return Path(found[next(self._turns) % len(found)]) if found else None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            hello = msgspec.msgpack.decode(await _read(reader), type=Hello)
            self.joined.set()
            await self._pools[hello.lane].serve(hello, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


# ---------------------------------------------------------------------- the side that scores


class LaneWorker:
    """A thread that takes batches of one lane and answers them, connected again whenever the front is."""

    def __init__(
        self, lane: str, path: Path, http: Path, answer: Callable[[Hashable, Sequence[bytes]], list[Reply]]
    ) -> None:
        """path: the front's socket. http: this process's own. answer: a shape and its bodies → a reply to each."""
        self._lane, self._path, self._http, self._answer = lane, path, http, answer
        self._stop = threading.Event()
        self._connection: socket.socket | None = None
        self._aside = False
        self._talking = threading.Lock()
        self._busy = threading.Lock()  # held while a batch is answered
        self._thread = threading.Thread(target=self._run, name=f"assay-{lane}", daemon=True)

    def start(self) -> None:
        """Connect and work."""
        self._thread.start()

    def step_aside(self, aside: bool) -> None:
        """Take no batches from now on as long as another process takes them; or take them again."""
        with self._talking:
            self._aside = aside
            if self._connection is not None:
                with suppress(OSError):  # the front has gone; it is told when it is back
                    self._connection.sendall(_framed(Aside(aside)))

    def stop(self) -> None:
        """Answer what is being answered, then end."""
        self._stop.set()
        with self._busy:
            if self._connection is not None:
                _shut(self._connection)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(self._path))
                    with self._talking:
                        self._connection = connection
                        connection.sendall(_framed(Hello(self._lane, os.getpid(), str(self._http))))
                        if self._aside:
                            connection.sendall(_framed(Aside(True)))
                    self._work(connection)
            except OSError:
                pass  # the front is being started, or has gone
            self._stop.wait(_RETRY_S)

    def _work(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            while not self._stop.is_set() and len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
                with self._busy:
                    (length,) = _LENGTH.unpack(head)
                    content = stream.read(length)
                    if len(content) < length:
                        return
                    call = msgspec.msgpack.decode(content, type=Call)
                    began = time.perf_counter()
                    stages.begin()
                    replies = self._replies(call)
                    answered = Answered(time.perf_counter() - began, replies, stages.taken())
                    with self._talking:
                        connection.sendall(_framed(answered))

    def _replies(self, call: Call) -> list[Reply]:
        try:
            return self._answer(call.shape, call.bodies)
        except Exception as error:  # noqa: BLE001 - whoever waits has to hear of it, and the thread goes on
            return [refusal(error)] * len(call.bodies)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
