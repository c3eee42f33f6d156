"""Dispatch of tasks to CPUs and GPUs, in this process or on Ray.

    with Dispatcher(ThreadWorkers(num_cores=2, num_gpus=1), ByCost()) as dispatcher:
        net = dispatcher.submit(Task(work=train_net, args=(rows,), kind=Kind.MATRIX, gpu=Needs(gpus=0.5)))
        trees = dispatcher.submit(Task(work=train_trees, args=(rows,), kind=Kind.UPDATE))
        blend(net.result(), trees.result())

What waits is ordered by priority; a placement chooses what a free device takes. At most `max_waiting` tasks wait:
whoever submits more waits too. A task whose worker died is started again, and so is one that failed with an error that
it names; its function may thus run more than once, but two tasks of one key are one. Who leaves the block waits for all
results, unless an error made them leave: then everything is ended.

Not covered: preemption, tasks that wait for other tasks (submit those when the results are there), results that
outlive the process.
"""

import heapq
import math
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from assay_platform.errors import ConfigError, TaskError, TaskLateError, TaskLostError
from assay_platform.tasks.beat import Beat, Doing, Done
from assay_platform.tasks.placement import Load, Placement, Queue, StaticRule, Work
from assay_platform.tasks.rooms import Rooms, Taken
from assay_platform.tasks.task import Device, Needs, Shared, Task, TaskFuture
from assay_platform.tasks.workers import Outcome, Start, Workers

T = TypeVar("T")

_REMEMBERED_KEYS = 10_000
# Tasks that are over so soon may be handed over before there is room.
_SHORT_S = 0.1
_BEAT_S = 1.0
_CAPACITY_S = 5.0


@dataclass(eq=False)
class _Unit:
    """A task, or several that start together, from submission to result."""

    work: Work
    tasks: tuple[Task[Any], ...]
    future: TaskFuture[Any]
    retries: int
    retry_on: tuple[type[Exception], ...]
    due_s: float
    key: str
    attempt: int = 0
    device: Device = Device.CPU
    taken: Taken | None = None
    began_s: float = 0.0
    expected_s: float | None = None
    end: Callable[[], None] = field(default=lambda: None)
    alike: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        work = self.work
        # Sizes within a factor of two.
        self.alike = (work.name, work.kind, work.priority, math.frexp(work.size)[1], tuple(sorted(work.needs.items())))


class _Waiting:
    """Units that were submitted and not started, in queues of those that are alike."""

    def __init__(self) -> None:
        self._units: dict[int, _Unit] = {}
        self._queues: dict[tuple[object, ...], deque[_Unit]] = {}

    def __len__(self) -> int:
        return len(self._units)

    def __iter__(self) -> Iterator[_Unit]:
        return iter(self._units.values())

    def get(self, number: int) -> _Unit | None:
        return self._units.get(number)

    def queues(self) -> list[Queue]:
        return [Queue(queue[0].work, len(queue)) for queue in self._queues.values()]

    def add(self, unit: _Unit, *, first: bool = False) -> None:
        """first: it was there before, so it is older than what waits."""
        self._units[unit.work.number] = unit
        queue = self._queues.setdefault(unit.alike, deque())
        (queue.appendleft if first else queue.append)(unit)

    def remove(self, unit: _Unit) -> None:
        """Safe to repeat."""
        if self._units.pop(unit.work.number, None) is None:
            return
        queue = self._queues[unit.alike]
        queue.remove(unit)  # mostly the first
        if not queue:
            del self._queues[unit.alike]


class Dispatcher:
    """Takes tasks from any thread; one thread of its own places them."""

    def __init__(
        self,
        workers: Workers,
        placement: Placement | None = None,
        *,
        max_waiting: int = 512,
        beat: Callable[[Beat], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_waiting: tasks that were submitted and not started. beat: is told what runs where, once a second.

        Raises:
            ConfigError: max_waiting is below 1.
        """
        if max_waiting < 1:
            raise ConfigError(f"max_waiting is {max_waiting}; allowed is 1 and more")
        self._workers, self._placement, self._clock = workers, placement or StaticRule(), clock
        self._max_waiting, self._beat = max_waiting, beat
        self._rooms = Rooms(workers.capacity())
        self._lock = threading.RLock()
        self._work, self._changed = threading.Condition(self._lock), threading.Condition(self._lock)
        self._waiting = _Waiting()
        self._running: dict[int, _Unit] = {}
        self._ended: deque[tuple[_Unit, list[Outcome], float]] = deque()
        self._due: list[tuple[float, int]] = []
        self._fitting: dict[object, Mapping[Device, tuple[Needs, ...]]] = {}  # by needs, until machines come or go
        self._by_key: OrderedDict[str, TaskFuture[Any]] = OrderedDict()
        self._done: Counter[Done] = Counter()
        self._seconds: defaultdict[tuple[str, Device], float] = defaultdict(float)
        self._number, self._closed, self._settling, self._shrunk = 0, False, 0, False
        self._next_beat_s = self._next_capacity_s = clock() + _BEAT_S
        self._thread = threading.Thread(target=self._place, name="dispatcher", daemon=True)
        self._thread.start()

    def share(self, value: Any) -> Shared:
        """Send a value that many tasks take to the workers once; goes into `Task.args`."""
        return self._workers.share(value)

    def submit(self, task: Task[T], *, timeout_s: float | None = None) -> TaskFuture[T]:
        """The result to come. timeout_s: waits so long while too many tasks wait; None: for ever.

        Raises:
            ConfigError: no machine has what it needs.
            TaskError: too many tasks waited for too long, or the dispatcher is closed.
        """
        return self._submit((task,), timeout_s)

    def submit_together(self, tasks: Sequence[Task[T]], *, timeout_s: float | None = None) -> TaskFuture[list[T]]:
        """Tasks that start when there is room for all of them, on one kind of device. If one fails or is lost, all end.

        Priority, deadline, key and retries are those of the first.

        Raises:
            ConfigError: there are none, or the machines have not what they need.
            TaskError: as in `submit`.
        """
        if not tasks:
            raise ConfigError("no tasks were given that could start together")
        return self._submit(tuple(tasks), timeout_s)

    def _submit(self, tasks: tuple[Task[Any], ...], timeout_s: float | None) -> TaskFuture[Any]:
        first = tasks[0]
        name = first.name or str(first.kind)
        with self._changed:
            needs = self._possible(tasks)
            if not needs:
                raise ConfigError(f"task {name} needs {_wanted(tasks)}; there are {_there(self._rooms)}")
            if (known := self._known(first.key)) is not None:
                return known
            # What the dispatcher's own thread submits, in a callback of a future, would wait for itself.
            own = threading.current_thread() is self._thread
            room = self._changed.wait_for(
                lambda: self._closed or own or len(self._waiting) < self._max_waiting, timeout_s
            )
            if self._closed:
                raise TaskError(f"task {name} came after the dispatcher was closed")
            if not room:
                raise TaskError(f"task {name} was not taken within {timeout_s:g} s: {self._max_waiting} others wait")
            if (known := self._known(first.key)) is not None:
                return known
            number = self._number = self._number + 1
            now = self._clock()
            work = Work(number, name, first.kind, sum(task.size for task in tasks), first.priority, now, needs)
            due = float("inf") if first.deadline_s is None else now + first.deadline_s
            future: TaskFuture[Any] = TaskFuture(lambda: self._cancelled(unit))
            unit = _Unit(work, tasks, future, first.retries, first.retry_on, due, first.key)
            self._waiting.add(unit)
            if first.key:
                self._by_key[first.key] = future
            if due < threading.TIMEOUT_MAX:
                heapq.heappush(self._due, (due, number))
            self._work.notify()
        return future

    def _known(self, key: str) -> TaskFuture[Any] | None:
        known = self._by_key.get(key) if key else None
        return None if known is None or known.cancelled() else known

    def _possible(self, tasks: Sequence[Task[Any]]) -> Mapping[Device, tuple[Needs, ...]]:
        asked = tuple((task.cpu, task.gpu) for task in tasks)
        if asked not in self._fitting:
            found = {}
            for device in Device:
                needs = [need for task in tasks if (need := task.needs(device)) is not None]
                if len(needs) == len(tasks) and self._rooms.fits_at_all(needs):
                    found[device] = tuple(needs)
            self._fitting[asked] = found
        return self._fitting[asked]

    def _cancelled(self, unit: _Unit) -> None:
        with self._changed:
            self._forget(unit, "cancelled")
            unit.end()
            self._tell_all()

    def _forget(self, unit: _Unit, outcome: str) -> None:
        """It has its result. What still runs of it keeps its room."""
        self._waiting.remove(unit)
        self._done[Done(unit.work.name, unit.work.kind, unit.device, outcome)] += 1
        if not unit.key:
            return
        if outcome != "done":
            if self._by_key.get(unit.key) is unit.future:  # or it is somebody else's by now
                del self._by_key[unit.key]
        elif len(self._by_key) > _REMEMBERED_KEYS:
            for key in [key for key, future in self._by_key.items() if future.done()][: _REMEMBERED_KEYS // 10]:
                del self._by_key[key]

    def now(self) -> Beat:
        """What runs where, what waits, what was done."""
        with self._changed:
            return self._now()

    def _now(self) -> Beat:
        at = self._clock()
        running = [
            Doing(unit.work.name, unit.work.kind, unit.device, at - unit.began_s, unit.attempt)
            for unit in self._running.values()
        ]
        waiting = Counter(unit.work.kind for unit in self._waiting)
        capacity = self._rooms.capacity
        total = {Device.CPU: capacity.cores, Device.GPU: float(capacity.gpus)}
        used = {Device.CPU: self._rooms.used_cores, Device.GPU: self._rooms.used_gpus}
        return Beat(total, used, running, dict(waiting), dict(self._done), dict(self._seconds))

    def __enter__(self) -> "Dispatcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._changed:
                    self._changed.wait_for(lambda: not (self._waiting or self._running or self._settling))
        finally:
            self.close()

    def close(self) -> None:
        """End everything. Safe to repeat."""
        with self._changed:
            self._closed = True
            units = [*self._waiting, *self._running.values()]
            self._tell_all()
        for unit in units:
            unit.future.cancel()
        self._thread.join()

    def _tell_all(self) -> None:
        self._work.notify()
        self._changed.notify_all()

    # What follows runs in the dispatcher's own thread.

    def _place(self) -> None:
        try:
            self._place_until_closed()
        except BaseException as error:
            # A bug of ours or of a placement. Nobody may wait for what will never come.
            with self._changed:
                self._closed = True
                units = [*self._waiting, *self._running.values()]
                self._changed.notify_all()
            for unit in units:
                unit.end()
                unit.future.settle(None, TaskError(f"the dispatcher failed: {type(error).__name__}: {error}"))
            raise

    def _place_until_closed(self) -> None:
        while True:
            with self._changed:
                while not self._ended and not self._closed and not self._timed():
                    self._start_what_fits()
                    if not self._ended and not self._closed:
                        self._work.wait(self._until_next())
                ended = list(self._ended)
                self._ended.clear()
                finished = [(unit, *self._over(unit, outcomes, at)) for unit, outcomes, at in ended]
                late = self._late()
                self._settling = len(finished) + len(late)
                beat = self._now() if self._beat is not None and self._clock() >= self._next_beat_s else None
                if beat is not None:
                    self._next_beat_s = self._clock() + _BEAT_S
                closed = self._closed
            # Outside of the lock: what others have added to futures may submit more.
            for unit, value, error, again in finished:
                if not again:
                    unit.future.settle(value, error)
            for unit in late:
                given = unit.tasks[0].deadline_s
                unit.future.settle(None, TaskLateError(f"task {unit.work.name} was not done within {given:g} s"))
            with self._changed:
                self._settling = 0
                self._changed.notify_all()
            if beat is not None and self._beat is not None:
                self._beat(beat)
            if closed:
                return

    def _timed(self) -> bool:
        now = self._clock()
        beats = self._beat is not None and now >= self._next_beat_s
        return beats or bool(self._due and self._due[0][0] <= now)

    def _until_next(self) -> float | None:
        times = [self._due[0][0]] if self._due else []
        if self._beat is not None:
            times.append(self._next_beat_s)
        if self._waiting:
            times.append(self._clock() + _CAPACITY_S)
        return min(max(0.0, min(times) - self._clock()), threading.TIMEOUT_MAX) if times else None

    def _start_what_fits(self) -> None:
        now = self._clock()
        if self._waiting and now >= self._next_capacity_s:
            self._next_capacity_s = now + _CAPACITY_S
            with suppress(Exception):  # a cluster that does not answer for a moment is as large as it was
                before, now_there = self._rooms.capacity, self._workers.capacity()
                self._shrunk |= any(a < b for a, b in zip(now_there, before, strict=True))
                if now_there != before:
                    self._rooms.resize(now_there)
                    self._fitting.clear()
        reserved_cores = 0.0
        open_devices = [device for device in (Device.GPU, Device.CPU) if self._width(device) > 0]
        while self._waiting and open_devices:
            loads = {device: self._load(device, now) for device in Device if self._width(device) > 0}
            device = open_devices[0]
            work = self._placement.pick(device, self._queues(), now, loads)
            unit = None if work is None else self._waiting.get(work.number)
            if unit is not None and self._start(unit, device, now, reserved_cores):
                continue
            open_devices.pop(0)
            if unit is not None and device is Device.GPU and self._rooms.has_gpus(unit.work.needs[device]):
                # It waits for cores alone: those are not given to what comes after it.
                reserved_cores = sum(need.cores for need in unit.work.needs[device])

    def _width(self, device: Device) -> float:
        capacity = self._rooms.capacity
        return capacity.gpus if device is Device.GPU else capacity.cores

    def _load(self, device: Device, now: float) -> Load:
        width, seconds = self._width(device), 0.0
        for unit in self._running.values():
            if unit.device is device:
                left = max(0.0, (unit.expected_s or 0.0) - (now - unit.began_s))
                seconds += left * unit.work.share(device, width)
        return Load(width, seconds)

    def _queues(self) -> list[Queue]:
        queues = self._waiting.queues()
        if not self._shrunk:
            return queues
        # What no machine has any longer waits for one that has, and is not in the way of others.
        able = []
        for head, length in queues:
            needs = {device: need for device, need in head.needs.items() if self._rooms.fits_at_all(need)}
            if needs:
                able.append(Queue(head._replace(needs=needs), length))
        return able

    def _start(self, unit: _Unit, device: Device, now: float, reserved_cores: float) -> bool:
        expected = self._placement.seconds(unit.work, device)
        ahead = self._workers.ahead_cores if expected is not None and expected < _SHORT_S else 0.0
        taken = self._rooms.take(unit.work.needs[device], ahead_cores=ahead - reserved_cores)
        if taken is None:
            return False
        self._waiting.remove(unit)
        self._running[unit.work.number] = unit
        unit.device, unit.taken, unit.began_s, unit.expected_s = device, taken, now, expected
        unit.attempt += 1
        unit.future.started()
        start = Start(unit.tasks, device, taken, unit.attempt)
        unit.end = self._workers.start(start, lambda outcomes: self._came(unit, outcomes))
        self._changed.notify_all()
        return True

    def _came(self, unit: _Unit, outcomes: list[Outcome]) -> None:
        """From a thread of the workers, which may be this one where it ended at once."""
        with self._changed:
            self._ended.append((unit, outcomes, self._clock()))
            self._work.notify()

    def _over(self, unit: _Unit, outcomes: list[Outcome], at: float) -> tuple[Any, BaseException | None, bool]:
        """Value, error, and whether it waits again."""
        assert unit.taken is not None
        self._rooms.give(unit.taken)
        del self._running[unit.work.number]
        seconds = max(outcome.seconds for outcome in outcomes)
        self._seconds[unit.work.name, unit.device] += seconds
        lost = next((outcome.lost for outcome in outcomes if outcome.lost), "")
        error = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
        if unit.future.decided:  # cancelled or late: nobody asks
            return None, None, False
        retry = lost if error is None else isinstance(error, unit.retry_on)
        if retry and unit.attempt <= unit.retries and not self._closed:
            self._done[Done(unit.work.name, unit.work.kind, unit.device, "retried")] += 1
            self._waiting.add(unit, first=True)
            self._next_capacity_s = 0.0
            return None, None, True
        if error is None and lost:
            error = TaskLostError(f"task {unit.work.name} was lost {unit.attempt} times with its worker: {lost}")
        if error is None:
            self._placement.ended(unit.work, unit.device, seconds)
        self._forget(unit, "done" if error is None else "failed")
        values = [outcome.value for outcome in outcomes]
        return values[0] if len(unit.tasks) == 1 else values, error, False

    def _late(self) -> list[_Unit]:
        late = []
        while self._due and self._due[0][0] <= self._clock():
            _, number = heapq.heappop(self._due)
            unit = self._running.get(number) or self._waiting.get(number)
            if unit is not None and not unit.future.decided:
                self._forget(unit, "late")
                unit.end()
                late.append(unit)
        return late


def _wanted(tasks: Sequence[Task[Any]]) -> str:
    options = []
    for device in Device:
        needs = [need for task in tasks if (need := task.needs(device)) is not None]
        if len(needs) == len(tasks):
            options.append(f"{sum(n.cores for n in needs):g} cores and {sum(n.gpus for n in needs):g} GPUs")
    return " or ".join(options) or "one kind of device for all of them"


def _there(rooms: Rooms) -> str:
    capacity = rooms.capacity
    return f"{capacity.cores:g} cores and {capacity.gpus} GPUs, at most {capacity.cores_of_one:g} cores on one machine"
