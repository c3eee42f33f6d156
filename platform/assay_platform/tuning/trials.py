"""What a search knows of its trials, and where they run: in this process, one at a time, or on Ray, many at once.

A `Desk` takes the reports of all trials and answers each at once: stop, or go on with so many cores.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from assay_platform.errors import WorkError
from assay_platform.tasks.cluster import quiet_ray_environment
from assay_platform.tasks.shares import Share
from assay_platform.tuning.stopping import Curve, Stopping, share_cores

# report(epoch, metric): once an epoch; higher is better. Does not come back where the trial is to end.
Report = Callable[[int, float], None]
# objective(params, data, report) trains; what it returns is measured besides the metric, by name.
Objective = Callable[[dict[str, Any], Any, Report], Mapping[str, float] | None]

_MAX_RESTARTS = 2


class Verdict(NamedTuple):
    """What a trial does after a report. cores: that it may use from now on."""

    stop: bool
    cores: int


class StopTrial(BaseException):
    """Ends a trial from inside of its report. No `Exception`: an objective that catches those must not catch it."""


@dataclass
class Desk:
    """Takes reports. One at a time: an actor on Ray."""

    stopping: Stopping
    num_cores: int
    elastic: bool
    _running: set[int] = field(default_factory=set, init=False)

    def begin(self, trial: int) -> None:
        """A trial starts, or starts again: what it reported before does not count."""
        self._running.add(trial)
        self.stopping.of.pop(trial, None)

    def report(self, trial: int, epoch: int, metric: float) -> Verdict:
        """One report."""
        stop = self.stopping.add(trial, epoch, metric)
        cores = {trial: 1}
        if self.elastic:
            cores = share_cores(self.num_cores, {one: self.stopping.promise(one) for one in self._running | {trial}})
        return Verdict(stop, cores[trial])

    def end(self, trial: int) -> Curve:
        """Its reports."""
        self._running.discard(trial)
        return list(self.stopping.of.get(trial, []))

    def resize(self, num_cores: int) -> None:
        """So many cores to share from now on."""
        self.num_cores = num_cores

    def curves(self) -> dict[int, Curve]:
        """Of the trials that run."""
        return {trial: list(self.stopping.of.get(trial, [])) for trial in self._running}


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A trial that ran to an end. error: one line, where it failed; curve: its reports."""

    trial: int
    curve: Curve
    stopped: bool = False
    values: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


class Workers(Protocol):
    """Run trials. Every method is called from one thread."""

    @property
    def num_slots(self) -> int:
        """How many may run at once; it can change."""

    def start(self, trial: int, params: dict[str, Any]) -> None:
        """Begin one; fewer than `num_slots` run."""

    def wait(self, timeout_s: float) -> list[Ended]:
        """Trials that ended since; waits so long for one.

        Raises:
            WorkError: what they reported is lost.
        """

    def curves(self) -> dict[int, Curve]:
        """What the trials that run have reported.

        Raises:
            WorkError: it is lost.
        """

    def close(self) -> None:
        """End all that runs. Safe to repeat."""


def _run(objective: Objective, params: dict[str, Any], data: Any, report: Report) -> tuple[bool, dict[str, float], str]:
    """Whether it was stopped, what it measured besides, and what went wrong."""
    try:
        values = objective(params, data, report)
    except StopTrial:
        return True, {}, ""
    except Exception as error:  # noqa: BLE001 - of code that is not ours; the search says what it was
        return False, {}, f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return False, {name: float(value) for name, value in (values or {}).items()}, ""


class HereWorkers:
    """This process; a trial that is over time ends at its next report."""

    @property
    def num_slots(self) -> int:
        """One."""
        return 1

    def __init__(
        self, objective: Objective, data: Any, desk: Desk, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._objective, self._data, self._desk, self._clock = objective, data, desk, clock
        self._next: tuple[int, dict[str, Any]] | None = None

    def start(self, trial: int, params: dict[str, Any]) -> None:
        """See `Workers`."""
        self._next = (trial, params)
        self._desk.begin(trial)

    def wait(self, timeout_s: float) -> list[Ended]:
        """See `Workers`."""
        if self._next is None:
            return []
        (trial, params), until = self._next, self._clock() + timeout_s
        over = False

        def report(epoch: int, metric: float) -> None:
            nonlocal over
            stop = self._desk.report(trial, epoch, float(metric)).stop
            over = self._clock() >= until
            if stop or over:
                raise StopTrial

        stopped, values, error = _run(self._objective, params, self._data, report)
        if over:
            return []  # it still runs, as far as anybody knows
        self._next = None
        return [Ended(trial=trial, curve=self._desk.end(trial), stopped=stopped, values=values, error=error)]

    def curves(self) -> dict[int, Curve]:
        """See `Workers`."""
        return self._desk.curves()

    def close(self) -> None:
        """See `Workers`."""
        self._next = None


class RayWorkers:
    """Actors of a running Ray cluster, a core each, which trials use one after the other.

    A trial whose worker dies is started again in a new one, twice at most. Data are put into the object store once.
    Where other programs search on the cluster too, it uses a fair share of it, see `shares`.
    """

    def __init__(self, objective: Objective, data: Any, desk: Desk, *, num_slots: int) -> None:
        quiet_ray_environment()
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._num_slots, self._num_cores = num_slots, desk.num_cores
        self._share = Share(max(num_slots, desk.num_cores) if desk.elastic else num_slots)
        self._ray: Any = ray
        self._objective, self._data = ray.put(objective), ray.put(data)
        # Beside the driver: what they share is lost together, and other nodes may come and go.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "scheduling_strategy": here}
        self._desk: Any = ray.remote(Desk).options(**options).remote(desk.stopping, desk.num_cores, desk.elastic)
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[int, dict[str, Any], Any, int]] = {}  # ref → trial, params, actor, restarts

    @property
    def num_slots(self) -> int:
        """See `Workers`."""
        cores = self._share.cores()
        if cores != self._num_cores:
            self._num_cores = cores
            self._desk.resize.remote(cores)
        return min(self._num_slots, cores)

    def start(self, trial: int, params: dict[str, Any]) -> None:
        """See `Workers`."""
        self._start(trial, params, 0)

    def _start(self, trial: int, params: dict[str, Any], restarts: int) -> None:
        actor = self._idle.pop() if self._idle else self._ray.remote(_Worker).options(num_cpus=1).remote()
        ref = actor.run.remote(trial, params, self._objective, self._data, self._desk)
        self._running[ref] = (trial, params, actor, restarts)

    def wait(self, timeout_s: float) -> list[Ended]:
        """See `Workers`."""
        from ray.exceptions import RayActorError, RayError

        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), timeout=max(0.0, timeout_s))
        ended = []
        for ref in done:
            trial, params, actor, restarts = self._running.pop(ref)
            try:
                stopped, values, error = self._ray.get(ref)
                self._idle.append(actor)
            except RayActorError as problem:
                if restarts < _MAX_RESTARTS:
                    self._start(trial, params, restarts + 1)
                    continue
                stopped, values, error = False, {}, f"its worker died {restarts + 1} times: {_line(problem)}"
            except RayError as problem:
                stopped, values, error = False, {}, _line(problem)
            if self._idle and len(self._running) + len(self._idle) > self.num_slots:
                self._ray.kill(self._idle.pop())  # others have a right to its core
            curve = self._asked(self._desk.end.remote(trial))
            ended.append(Ended(trial=trial, curve=curve, stopped=stopped, values=values, error=error))
        return ended

    def curves(self) -> dict[int, Curve]:
        """See `Workers`."""
        found: dict[int, Curve] = self._asked(self._desk.curves.remote())
        return found

    def _asked(self, answer: Any) -> Any:
        from ray.exceptions import RayActorError

        try:
            return self._ray.get(answer)
        except RayActorError as error:
            raise WorkError(f"the node that took the reports of the trials was lost: {_line(error)}") from error

    def close(self) -> None:
        """See `Workers`."""
        for actor in (*self._idle, *(actor for _, _, actor, _ in self._running.values())):
            self._ray.kill(actor)
        if self._desk is not None:
            self._ray.kill(self._desk)
            self._share.close()
        self._idle, self._running, self._desk = [], {}, None


class _Worker:
    """One process for many trials."""

    def run(
        self, trial: int, params: dict[str, Any], objective: Objective, data: Any, desk: Any
    ) -> tuple[bool, dict[str, float], str]:
        import ray

        def report(epoch: int, metric: float) -> None:
            stop, cores = ray.get(desk.report.remote(trial, epoch, float(metric)))
            _use(cores)
            if stop:
                raise StopTrial

        ray.get(desk.begin.remote(trial))
        _use(1)
        return _run(objective, params, data, report)


def _use(cores: int) -> None:
    """Threads of torch; one that is imported later begins with the one that Ray gives a worker of one core."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != cores:
        torch.set_num_threads(cores)


def _line(problem: Exception) -> str:
    return str(problem).strip().splitlines()[-1]
