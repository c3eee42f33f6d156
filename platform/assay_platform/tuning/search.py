"""A search for the best parameters within a budget: Bayesian, with early stopping, on all cores, resumable by name.

A Gaussian process proposes, or trees of Parzen estimators where many dimensions hang on others. The first trial is
the default configuration, so a search never ends below it for want of trials; points that were best elsewhere come
next. Finished trials are in a journal on disk before the next one starts, and whoever searches again under that name
goes on from there.

Not covered: changing the GPUs of a trial that runs.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from assay_platform.errors import ConfigError, WorkError
from assay_platform.tuning.journal import Journal
from assay_platform.tuning.proposals import AtRandom, GaussianProcess, Grid, Known, Parzen, Proposals
from assay_platform.tuning.space import OneOf, Space, active, check_space, contains
from assay_platform.tuning.stopping import Curve, Stopping, expected_end
from assay_platform.tuning.trials import Desk, Ended, HereWorkers, Objective, RayWorkers, Report, Workers

__all__ = ["Objective", "Progress", "Report", "SearchBudget", "SearchResult", "Strategy", "TrialResult", "search"]

Sampler = Literal["auto", "gp", "tpe", "random", "grid"]
State = Literal["done", "stopped", "cut", "failed"]

_POLL_S = 0.5
# Dimensions, some hanging on others, up to which a Gaussian process is as good as trees.
_MOST_OF_A_PROCESS = 12


@dataclass(frozen=True, kw_only=True)
class SearchBudget:
    """When to stop: after so many trials or seconds, or at a metric that is `enough`, whichever comes first.

    num_parallel: trials at once.
    """

    num_trials: int
    time_s: float
    max_epochs: int
    num_parallel: int = 2
    enough: float | None = None

    def __post_init__(self) -> None:
        if self.num_trials < 1 or self.max_epochs < 1 or self.num_parallel < 1 or not self.time_s > 0:
            raise ConfigError(f"search budget {self}: every number must be above 0")


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How to search. sampler: 'auto' is 'gp', or 'tpe' for a large space with conditions.

    halving, curves: see `stopping`. elastic: cores beyond one a trial go to those that promise most. minimised: names
    of what the objective returns that should be small as well; then there is a front of best trials, and nothing is
    stopped early.
    """

    sampler: Sampler = "auto"
    halving: bool = True
    curves: bool = True
    elastic: bool = True
    minimised: tuple[str, ...] = ()


class TrialResult(NamedTuple):
    """One trial that ended. metric: its best. values: what it measured besides. state: 'cut' by the end of time."""

    number: int
    params: dict[str, Any]
    metric: float
    curve: Curve
    values: Mapping[str, float]
    state: State
    seconds: float
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it says something of its parameters."""
        return self.state != "failed"

    @property
    def epochs(self) -> int:
        """How many it got before it ended or was stopped."""
        return self.curve[-1][0] if self.curve else 0


class Progress(NamedTuple):
    """While a search runs. running: parameters and reports by trial; ended: all so far."""

    running: Mapping[int, tuple[dict[str, Any], Curve]]
    ended: Sequence[TrialResult]
    spent_s: float


class SearchResult(NamedTuple):
    """best: params of the trial with the highest metric. trials: all that ended, failed ones among them.

    If the time ended before any trial had an epoch behind it, best is the defaults and the metric is NaN.
    """

    best: dict[str, Any]
    metric: float
    trials: list[TrialResult]

    def front(self, minimised: Sequence[str]) -> list[TrialResult]:
        """Trials that no other beats in everything: the metric, which should be high, and values that should be low."""
        done = [t for t in self.trials if t.state == "done" and all(name in t.values for name in minimised)]
        points = [(-t.metric, *(t.values[name] for name in minimised)) for t in done]
        return [
            trial
            for trial, mine in zip(done, points, strict=True)
            if not any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in points)
        ]


def search(
    objective: Objective,
    *,
    data: Any,
    space: Space,
    defaults: Mapping[str, Any],
    budget: SearchBudget,
    seed: int,
    strategy: Strategy = Strategy(),
    journal: Path | None = None,
    identity: str = "",
    earlier: Sequence[Mapping[str, Any]] = (),
    here: bool = False,
    on_trial: Callable[[TrialResult], None] = lambda trial: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> SearchResult:
    """Run trials until the budget is spent.

    data: handed to every trial. defaults: the params of the first trial; what the space does not vary is passed on
    unchanged, and so is the default of a dimension that is not there. journal: a file that remembers ended trials; what
    is in it counts towards the number of trials, not towards the time. identity: of data and metric, without which
    trials of a journal cannot be compared. earlier: points to try after the defaults, unless they are outside of the
    space. here: in this process instead of on the Ray cluster that the caller opened.

    Raises:
        ConfigError: the space does not fit its defaults, or the journal is of another search.
        StorageError: the journal cannot be written.
        WorkError: no trial reported a metric and some failed (the message has the first one's error), or what trials
            reported is lost with a node.
    """
    check_space(space, defaults)
    began = clock()
    shape = {name: repr(dimension) for name, dimension in space.items()}
    held = Journal(journal, {**shape, "minimised": repr(strategy.minimised), "identity": identity})
    trials = _Trials(space, defaults, budget, strategy, seed, held)
    for point in (defaults, *earlier):
        trials.propose(point)
    one_aim = not strategy.minimised
    stopping = Stopping(budget.max_epochs, halving=strategy.halving and one_aim, curves=strategy.curves and one_aim)
    for trial in trials.ended:
        for epoch, metric in trial.curve:
            stopping.add(trial.number, epoch, metric)
    desk = Desk(stopping, _num_cores(here), strategy.elastic)
    workers: Workers = (
        HereWorkers(objective, data, desk, clock=clock)
        if here
        else RayWorkers(objective, data, desk, num_slots=budget.num_parallel)
    )
    started: dict[int, float] = {}

    def end(found: Ended, state: State) -> None:
        finite = [(epoch, value) for epoch, value in found.curve if math.isfinite(value)]
        error = found.error or ("" if finite or state == "cut" else "it reported no finite metric")
        metric = max((value for _, value in finite), default=-math.inf)
        params, seconds = trials.running[found.trial], clock() - started[found.trial]
        trial = TrialResult(
            found.trial, params, metric, finite, found.values, "failed" if error else state, seconds, error
        )
        trials.end(trial)
        on_trial(trial)

    def is_enough() -> bool:
        return budget.enough is not None and any(t.ok and t.metric >= budget.enough for t in trials.ended)

    try:
        while (left_s := budget.time_s - (clock() - began)) > 0 and not is_enough():
            if len(trials.running) < min(workers.num_slots, budget.num_trials - len(trials.ended)):
                asked = trials.next()
                if asked is not None:
                    started[asked[0]] = clock()
                    workers.start(*asked)
                    continue
            if not trials.running:
                break
            # In one process nobody looks at the clock but the trial itself, when it reports.
            for found in workers.wait(left_s if here else min(left_s, _POLL_S)):
                end(found, "stopped" if found.stopped else "done")
            curves = workers.curves()
            running = {number: (params, curves.get(number, [])) for number, params in trials.running.items()}
            on_progress(Progress(running, trials.ended, clock() - began))
        curves = workers.curves() if trials.running else {}
        for number in list(trials.running):
            end(Ended(trial=number, curve=curves.get(number, [])), "cut")
    finally:
        workers.close()
    return _result(trials.ended, dict(defaults))


def _result(ended: list[TrialResult], defaults: dict[str, Any]) -> SearchResult:
    useful = [trial for trial in ended if trial.ok and math.isfinite(trial.metric)]
    if not useful:
        failed = [trial.error for trial in ended if trial.state == "failed"]
        if failed:
            raise WorkError(f"no trial of the search finished an epoch: {failed[0]}")
        return SearchResult(defaults, math.nan, [trial for trial in ended if trial.curve])
    best = max(useful, key=lambda trial: trial.metric)
    return SearchResult(best.params, best.metric, [trial for trial in ended if trial.curve or not trial.ok])


def _num_cores(here: bool) -> int:
    if here:
        return 1
    import ray

    cluster: Any = ray
    return int(cluster.cluster_resources().get("CPU", 1))


def _proposals(space: Space, defaults: Mapping[str, Any], sampler: Sampler, seed: int) -> Proposals:
    if sampler == "auto":
        sampler = "tpe" if _is_large(space) else "gp"
    if sampler == "gp":
        return GaussianProcess(space, defaults, seed)
    if sampler == "tpe":
        return Parzen(space, seed)
    return Grid(space, seed) if sampler == "grid" else AtRandom(space, seed)


def _is_large(space: Space) -> bool:
    return len(space) > _MOST_OF_A_PROCESS and any(dimension.when is not None for dimension in space.values())


class _Trials:
    """What was tried and what comes next. Numbers of trials go on over restarts."""

    def __init__(
        self,
        space: Space,
        defaults: Mapping[str, Any],
        budget: SearchBudget,
        strategy: Strategy,
        seed: int,
        journal: Journal,
    ) -> None:
        self._space, self._defaults, self._max_epochs = space, dict(defaults), budget.max_epochs
        self._strategy, self._journal = strategy, journal
        self._proposals = _proposals(space, defaults, strategy.sampler, seed)
        self.running: dict[int, dict[str, Any]] = {}
        self.ended = [self._read(record) for record in journal.ended.values()]
        self._next_number = max([-1, *journal.begun]) + 1
        # What ran when a process was killed, or when its time was over, comes first: again, from its start.
        begun = [self._values(held) for trial, held in journal.begun.items() if trial not in journal.ended]
        tried = [active(space, trial.params) for trial in self.ended]
        self._queue = [point for at, point in enumerate(begun) if point not in (*tried, *begun[:at])]

    def propose(self, params: Mapping[str, Any]) -> None:
        """Try a point soon, unless it is outside of the space or was tried."""
        point = active(self._space, params) if contains(self._space, params) else None
        tried = [active(self._space, trial.params) for trial in self.ended]
        if point is not None and point not in (*tried, *self._queue):
            self._queue.append(point)

    def next(self) -> tuple[int, dict[str, Any]] | None:
        """A trial's number and parameters; None where nothing is left."""
        running = [active(self._space, params) for params in self.running.values()]
        point = self._queue.pop(0) if self._queue else self._proposals.next(self._known(), running, self._next_number)
        if point is None:
            return None
        number, self._next_number = self._next_number, self._next_number + 1
        self.running[number] = {**self._defaults, **point}
        self._journal.begin(number, {name: self._places(name, value) for name, value in point.items()})
        return number, self.running[number]

    def end(self, trial: TrialResult) -> None:
        """A trial has ended: into the journal, unless it was cut off."""
        del self.running[trial.number]
        self.ended.append(trial)
        if trial.state == "cut":
            return
        point = {name: self._places(name, value) for name, value in active(self._space, trial.params).items()}
        record = trial._asdict() | {"params": point, "values": dict(trial.values)}
        self._journal.end(trial.number, record | {"metric": trial.metric if trial.curve else None})

    def _known(self) -> list[Known]:
        """Points with all aims. Of one that was stopped, the metric that it would have come to."""
        curves = [trial.curve for trial in self.ended if trial.ok and trial.curve]
        found: list[Known] = []
        for trial in self.ended:
            values = [trial.values.get(name, math.nan) for name in self._strategy.minimised]
            if trial.ok and math.isfinite(trial.metric) and all(math.isfinite(value) for value in values):
                metric = expected_end(trial.curve, curves, self._max_epochs)
                found.append((active(self._space, trial.params), [metric, *values]))
        return found

    def _places(self, name: str, value: Any) -> Any:
        """JSON has fewer kinds of values than a choice: its place."""
        dimension = self._space[name]
        return dimension.values.index(value) if isinstance(dimension, OneOf) else value

    def _values(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: dimension.values[record[name]] if isinstance(dimension, OneOf) else record[name]
            for name, dimension in self._space.items()
            if name in record
        }

    def _read(self, record: Mapping[str, Any]) -> TrialResult:
        params = {**self._defaults, **self._values(record["params"])}
        metric = -math.inf if record["metric"] is None else record["metric"]
        curve = [(int(epoch), float(value)) for epoch, value in record["curve"]]
        return TrialResult(**{**record, "params": params, "metric": metric, "curve": curve})
