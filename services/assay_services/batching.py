"""Requests that wait together are answered together, and what would wait too long is refused at once.

A call costs milliseconds before its first row, so whatever comes in while one runs makes up the next one. Nobody waits
for company: an idle scorer takes a single request as it is.

How many rows a batch has follows from what calls of its shape were measured to take: as many as fit into `max_batch_s`,
so those who come next wait no longer than that for it to end, but never so few that most of the time goes into what a
call costs before its first row. A shape is whatever makes calls alike (with reasons or
without); the shape whose oldest request has waited longest comes next.

Load is shed before latency collapses: a request that would wait longer than `max_wait_s`, or than it says that it can,
is refused with the time after which to come back (a bounded queue, in seconds of work instead of requests: 'Handling
Overload', Beyer et al., Site Reliability Engineering, chapter 21). Whoever has gone, or whose time has passed, is left
out of the batch.

`BatchQueue` is the bookkeeping, without threads or clocks of its own; `Batcher` is the thread around it.
"""

import asyncio
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from assay_platform.errors import ConfigError

from assay_services import stages
from assay_services.tracing import Timing

Job = TypeVar("Job")
Result = TypeVar("Result")
# How much of what was measured before is left at each new batch, and how much a batch may outgrow the largest so far.
_MEMORY, _GROWTH = 0.95, 2
_MOST_SHAPES = 256  # whose cost is known
_SHORTEST_S = 1e-6


class OverloadedError(Exception):
    """A request that was not taken on. retry_after_s: when there will be room."""

    def __init__(self, detail: str, retry_after_s: float) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class DeadlinePassedError(Exception):
    """A request that waited until nobody needed its answer any more."""


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """max_batch_s: what one batch may take. max_wait_s: who would wait longer is refused. max_waiting: requests.

    max_rows: in one batch, whatever it may take.
    """

    max_batch_s: float = 0.05
    max_wait_s: float = 0.25
    max_waiting: int = 4096
    max_rows: int = 1_000_000

    def __post_init__(self) -> None:
        for name in ("max_batch_s", "max_wait_s", "max_waiting", "max_rows"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")


class CallCost:
    """seconds = fixed + a_row · rows, by least squares over calls, newer ones counting more."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        self._largest = 0
        self.fixed_s, self.a_row_s = 0.0, _SHORTEST_S

    @property
    def is_known(self) -> bool:
        """Whether a call was measured."""
        return self._largest > 0

    def observe(self, rows: int, seconds: float) -> None:
        """One more call."""
        self._weight = _MEMORY * self._weight + 1.0
        self._rows = _MEMORY * self._rows + rows
        self._seconds = _MEMORY * self._seconds + seconds
        self._rows_rows = _MEMORY * self._rows_rows + rows * rows
        self._rows_seconds = _MEMORY * self._rows_seconds + rows * seconds
        self._largest = max(self._largest, rows)
        mean_rows, mean_s = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_rows / self._weight - mean_rows**2
        steepest = mean_s / mean_rows
        # Calls of one size say nothing of the share of each; half of it is neither the best case nor the worst.
        slope = 0.5 * steepest
        if variance > 1e-3 * mean_rows**2:
            slope = (self._rows_seconds / self._weight - mean_rows * mean_s) / variance
        self.a_row_s = max(_SHORTEST_S, min(steepest, slope))
        self.fixed_s = max(0.0, mean_s - self.a_row_s * mean_rows)

    def seconds(self, rows: int) -> float:
        """What a call of so many rows takes."""
        return self.fixed_s + self.a_row_s * rows if self.is_known else 0.0

    def rows_within(self, seconds: float) -> int:
        """How many rows fit, or are worth a call, at least one, and at most a few times what was ever seen."""
        fitting = int(max(seconds - self.fixed_s, self.fixed_s) / self.a_row_s)
        return max(1, min(fitting, _GROWTH * max(1, self._largest)))


@dataclass(slots=True)
class Waiting(Generic[Job]):
    """A request in the queue. since, until: on the queue's clock. gone: asked before it is taken."""

    job: Job
    rows: int
    since: float
    until: float
    gone: Callable[[], bool] = lambda: False
    answer: Any = None  # where the answer goes; the queue does not look at it
    attempts: int = 0
    told: Any = None  # who is told of the call that answers it


class Batch(NamedTuple, Generic[Job]):
    """Requests of one shape to be answered by one call, and those whose time has passed or whose caller has gone."""

    shape: Hashable
    taken: list[Waiting[Job]]
    expired: list[Waiting[Job]]

    @property
    def rows(self) -> int:
        """Of those taken."""
        return sum(one.rows for one in self.taken)


@dataclass
class BatchQueue(Generic[Job]):
    """Who waits, for how long, and who comes next. Not thread-safe. Times are seconds of whatever clock.

    Batches are taken by whoever works on one at a time: a thread, or one of several processes.
    """

    limits: BatchLimits
    costs: dict[Hashable, CallCost] = field(default_factory=dict)
    _waiting: dict[Hashable, deque[Waiting[Job]]] = field(default_factory=dict)
    _rows: dict[Hashable, int] = field(default_factory=dict)
    _busy_until: dict[Hashable, float] = field(default_factory=dict)  # worker → when its batch should be done
    _waiting_s: float | None = 0.0  # work that waits; None when it has to be counted again

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def wait_s(self, now: float) -> float:
        """How long a request that comes now waits for its call to begin."""
        under_way_s = sum(max(0.0, until - now) for until in self._busy_until.values())
        if self._waiting_s is None:  # under a flood of refusals it stays what it is
            self._waiting_s = sum(self._work_s(shape) for shape in self._waiting)
        return (under_way_s + self._waiting_s) / max(1, len(self._busy_until))

    def has_room(self, now: float) -> bool:
        """Whether `check_room` lets a request pass."""
        return self.wait_s(now) <= self.limits.max_wait_s and len(self) < self.limits.max_waiting

    def check_room(self, now: float) -> float:
        """How long a request that comes now waits, if it may.

        Raises:
            OverloadedError: there is no room, whatever it wants.
        """
        wait_s = self.wait_s(now)
        if wait_s > self.limits.max_wait_s:
            raise OverloadedError(f"more requests than can be answered: {1e3 * wait_s:.0f} ms of work wait", wait_s)
        if len(self) >= self.limits.max_waiting:
            raise OverloadedError(f"{self.limits.max_waiting} requests wait, which is as many as may", wait_s)
        return wait_s

    def add(self, shape: Hashable, one: Waiting[Job]) -> None:
        """Take on a request.

        Raises:
            OverloadedError: it would wait too long, or too many wait.
        """
        wait_s = self.check_room(one.since)
        if one.since + wait_s + self._cost(shape).seconds(1) > one.until:
            raise OverloadedError(f"the answer would take {1e3 * wait_s:.0f} ms, longer than asked for", wait_s)
        self._waiting.setdefault(shape, deque()).append(one)
        self._rows[shape] = self._rows.get(shape, 0) + one.rows
        self._waiting_s = None

    def take(self, now: float, worker: Hashable = None, *, only_full: bool = False) -> Batch[Job] | None:
        """What a worker is to answer next; None if nobody waits. A request with more rows than a batch should have goes
        alone. only_full: unless as many wait as a batch may have, and who comes later could not be in it anyway.
        """
        oldest = min(((queue[0].since, shape) for shape, queue in self._waiting.items() if queue), default=None,
                     key=lambda pair: pair[0])  # fmt: skip
        if oldest is None:
            return None
        _, shape = oldest
        queue, room = self._waiting[shape], self._room(shape)
        if only_full and self._rows[shape] < room:
            return None
        batch: Batch[Job] = Batch(shape, [], [])
        self._waiting_s = None
        while queue and (not batch.taken or queue[0].rows <= room):
            one = queue.popleft()
            self._rows[shape] -= one.rows
            if one.until < now or one.gone():
                batch.expired.append(one)
                continue
            batch.taken.append(one)
            room -= one.rows
        if not queue:
            # Shapes have names in them that callers choose.
            del self._waiting[shape], self._rows[shape]
        free_at = max(now, self._busy_until.get(worker, now))
        self._busy_until[worker] = free_at + (self._cost(shape).seconds(batch.rows) if batch.taken else 0.0)
        return batch

    def done(
        self,
        batch: Batch[Job],
        seconds: float,
        now: float,
        worker: Hashable = None,
        *,
        then: Batch[Job] | None = None,
        was_answered: bool = True,
    ) -> None:
        """The call of a batch took so long. then: what the worker goes on with. was_answered: not refused as a whole,
        which says nothing of what an answer takes.
        """
        if batch.taken:
            if was_answered:
                self._cost(batch.shape).observe(batch.rows, seconds)
                self.costs[batch.shape] = self.costs.pop(batch.shape)
            self._waiting_s = None
        self._busy_until[worker] = now + (0.0 if then is None else self._cost(then.shape).seconds(then.rows))

    def lost(self, batches: Iterable[Batch[Job]], worker: Hashable) -> None:
        """A worker has gone, and what it had taken waits again, in front."""
        self._busy_until.pop(worker, None)
        self._waiting_s = None
        for batch in reversed(list(batches)):
            self._waiting.setdefault(batch.shape, deque()).extendleft(reversed(batch.taken))
            self._rows[batch.shape] = self._rows.get(batch.shape, 0) + batch.rows

    def all_gone(self) -> list[Waiting[Job]]:
        """Whoever waits, and waits no longer."""
        found = [one for queue in self._waiting.values() for one in queue]
        self._waiting.clear()
        self._rows.clear()
        self._waiting_s = None
        return found

    def _cost(self, shape: Hashable) -> CallCost:
        cost = self.costs.get(shape)
        if cost is None:
            if len(self.costs) >= _MOST_SHAPES:
                del self.costs[next(iter(self.costs))]  # not measured for longest
            cost = self.costs[shape] = CallCost()
        return cost

    def _work_s(self, shape: Hashable) -> float:
        rows, cost = self._rows.get(shape, 0), self._cost(shape)
        if not rows or not cost.is_known:
            return 0.0  # nobody is refused on a guess
        return math.ceil(rows / self._room(shape)) * cost.fixed_s + rows * cost.a_row_s

    def _room(self, shape: Hashable) -> int:
        """Rows of a batch."""
        return min(self.limits.max_rows, self._cost(shape).rows_within(self.limits.max_batch_s))


class Batcher(Generic[Job, Result]):
    """Threads that answer requests in batches, one by default. Requests come from event loops.

    More than one is for a model on a GPU: while it works on one's batch, another makes the next one ready, if that is
    as large as a batch may be; a smaller one would only take the place of those who come in meanwhile.
    """

    def __init__(
        self,
        work: Callable[[Hashable, Sequence[Job]], Iterable[Result | Exception]],
        limits: BatchLimits,
        *,
        name: str,
        num_threads: int = 1,
        on_batch: Callable[[int, int, float], None] = lambda requests, rows, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """work: (shape, jobs) → an answer or an error each, in order; of as many threads at once as there are.
        on_batch: told of every call.
        """
        self._work, self._on_batch, self._clock = work, on_batch, clock
        self._queue: BatchQueue[Job] = BatchQueue(limits)
        self._changed = threading.Condition()
        self._closed, self._num_busy = False, 0
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"assay-{name}", daemon=True) for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def has_room(self) -> bool:
        """Whether a request that comes now may be taken on, before anybody looks at what it wants."""
        with self._changed:
            return self._queue.has_room(self._clock())

    async def submit(
        self,
        job: Job,
        *,
        rows: int,
        shape: Hashable = None,
        within_s: float = math.inf,
        gone: Callable[[], bool] = lambda: False,
        told: Callable[[Timing], None] | None = None,
    ) -> Result:
        """The answer to a request. within_s: after which nobody needs it. gone: whether nobody needs it already. told:
        of the call that answers it, in a thread of this queue.

        Raises:
            OverloadedError: it was not taken on.
            DeadlinePassedError: its turn did not come in time.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        with self._changed:
            if self._closed:
                raise OverloadedError("the service is about to stop", 1.0)
            now = self._clock()
            left = lambda: future.cancelled() or gone()  # noqa: E731
            self._queue.add(shape, Waiting(job, rows, now, now + within_s, left, (loop, future), told=told))
            self._changed.notify()
        return await future

    def close(self) -> None:
        """Answer those who wait, then end the threads. Safe to repeat."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=30)

    def _run(self, worker: int) -> None:
        while True:
            with self._changed:
                while (batch := self._queue.take(self._clock(), worker, only_full=self._num_busy > 0)) is None:
                    if self._closed and not len(self._queue):
                        self._changed.notify_all()
                        return
                    self._changed.wait()
                self._num_busy += 1
            late = DeadlinePassedError("the answer was not ready in the time that the request gave")
            _deliver((one, late) for one in batch.expired)
            stages.begin()
            began = self._clock()
            answers = self._answers(batch) if batch.taken else []
            seconds = self._clock() - began
            laps = stages.taken()
            for one in batch.taken:
                if one.told is not None:
                    one.told(Timing(began - one.since, seconds, len(batch.taken), batch.rows, os.getpid(), laps))
            with self._changed:
                self._queue.done(batch, seconds, self._clock(), worker)
                self._num_busy -= 1
                self._changed.notify()
            _deliver(zip(batch.taken, answers, strict=True))
            if batch.taken:
                self._on_batch(len(batch.taken), batch.rows, seconds)

    def _answers(self, batch: Batch[Job]) -> list[Result | Exception]:
        try:
            answers = list(self._work(batch.shape, [one.job for one in batch.taken]))
            assert len(answers) == len(batch.taken)
        except Exception as error:  # noqa: BLE001 - whoever waits has to hear of it, and the thread goes on
            return [error] * len(batch.taken)
        return answers


def _deliver(answers: Iterable[tuple[Waiting[Any], Any]]) -> None:
    """In one message to each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for one, answer in answers:
        loop, future = one.answer
        by_loop.setdefault(loop, []).append((future, answer))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_set_all, pairs)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            continue


def _set_all(pairs: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, answer in itertools.filterfalse(lambda pair: pair[0].done(), pairs):
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)
