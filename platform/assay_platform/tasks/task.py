"""A task: what to run, on what it can run, and what it is allowed to take.

A task is a function `work(place, *args)`. The same function runs on the CPU and on a GPU; `place.device` says where it
is. Tasks of one name are expected to take a time that grows with `size` in the same way; that is how the time of the
next one is foretold.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, NamedTuple, TypeVar

from assay_platform.errors import ConfigError

T = TypeVar("T")


class Device(StrEnum):
    """What can run tasks."""

    CPU = "cpu"
    GPU = "gpu"


class Kind(StrEnum):
    """What a task does, for the static rule and for people."""

    UPDATE = "update"  # optimizer steps, boosting, counting: many small steps over memory
    MATRIX = "matrix"  # nets, factorisations, solves
    FEATURE = "feature"  # windows, crosses, joins
    IO = "io"  # files, stores, networks


class Place(NamedTuple):
    """Where a task runs.

    device: as torch names it: cpu, cuda, cuda:1. attempt: from 1. key: the task's; what it writes under this name can
    be written twice. ending: whether nobody waits for the result any longer; long work looks at it now and then.
    """

    device: str
    cores: float
    attempt: int
    key: str
    ending: Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a task takes while it runs. gpus: below one, a share of one GPU; above, whole ones."""

    cores: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.cores < 0 or self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ConfigError(f"a task cannot need {self.cores:g} cores and {self.gpus:g} GPUs; a share or whole GPUs")


@dataclass(frozen=True, kw_only=True)
class Task(Generic[T]):
    """One piece of work.

    size: in whatever unit its time grows with: rows, edges, floating-point operations. cpu, gpu: what it needs there;
    None: it cannot run there. name: of the tasks that are like it; by default its kind. key: two tasks of one key are
    one task. priority: higher is started first. deadline_s: from submission to result. retries: after the loss of a
    worker or an error of `retry_on`.
    """

    work: Callable[..., T]
    args: tuple[Any, ...] = ()
    kind: Kind
    size: float = 1.0
    cpu: Needs | None = field(default_factory=Needs)
    gpu: Needs | None = None
    name: str = ""
    key: str = ""
    priority: int = 0
    deadline_s: float | None = None
    retries: int = 2
    retry_on: tuple[type[Exception], ...] = ()

    def __post_init__(self) -> None:
        if self.cpu is None and self.gpu is None:
            raise ConfigError(f"task {self.name or self.kind} says neither what it needs on a CPU nor on a GPU")
        if self.cpu is not None and self.cpu.gpus:
            raise ConfigError(f"task {self.name or self.kind} needs GPUs on the CPU; that belongs to `gpu`")
        if self.gpu is not None and not self.gpu.gpus:
            raise ConfigError(f"task {self.name or self.kind} needs no share of a GPU on the GPU; allowed is above 0")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ConfigError(f"deadline_s of task {self.name or self.kind} is {self.deadline_s:g}; allowed is above 0")
        if self.retries < 0 or not self.size >= 0:
            raise ConfigError(f"task {self.name or self.kind} has {self.retries} retries and size {self.size:g}")

    def needs(self, device: Device) -> Needs | None:
        """What it needs there."""
        return self.gpu if device is Device.GPU else self.cpu


class TaskFuture(Future[T]):
    """The result to come. Its errors are those of the task's own code, `TaskError`, or `CancelledError`."""

    def __init__(self, stop: Callable[[], None]) -> None:
        super().__init__()
        self._stop, self._deciding = stop, threading.Lock()
        self._started = False
        self.decided = False

    def _first(self) -> bool:
        """Whoever asks first decides how it ends. No lock is held while callbacks run: they may cancel others."""
        with self._deciding:
            first, self.decided = not self.decided, True
        return first

    def cancel(self) -> bool:
        """Nobody wants the result any longer. What waits is not started, what runs is ended; False: it was done."""
        if not self._first():
            return self.cancelled()
        self._stop()
        super().cancel()
        super().set_running_or_notify_cancel()
        return True

    def running(self) -> bool:
        """Whether it was started and is not done."""
        return self._started and not self.done()

    def started(self) -> None:
        """Said by the dispatcher. It can still be cancelled."""
        self._started = True

    def settle(self, value: T | None, error: BaseException | None) -> None:
        """Said by the dispatcher. Whoever cancelled before was first."""
        if not self._first():
            return
        super().set_running_or_notify_cancel()
        if error is None:
            self.set_result(value)  # type: ignore[arg-type]
        else:
            self.set_exception(error)


class Shared(NamedTuple):
    """A value that many tasks take as an argument and that is sent to each worker's machine once."""

    held: Any
