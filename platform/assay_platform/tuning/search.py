"""Bayesian search with early stopping: Optuna's Gaussian-process sampler under Ray Tune's ASHA scheduler.

The first trial is always the default configuration, so a search never ends below it for want of trials. A
trial whose worker dies is started again. Everything runs in the cluster that the caller opened.

Source: Li et al., 'A System for Massively Parallel Hyperparameter Tuning' (ASHA), arXiv:1810.05934.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from assay_platform.errors import ConfigError, WorkError
from assay_platform.tasks.cluster import quiet_ray_environment
from assay_platform.tuning.space import OneOf, Real, Space

# objective(params, data, report): trains, calls report(epoch, metric) once an epoch; higher is better.
Report = Callable[[int, float], None]
Objective = Callable[[dict[str, Any], Any, Report], None]

METRIC = "metric"
_MAX_RESTARTS = 2


@dataclass(frozen=True, kw_only=True)
class SearchBudget:
    """When to stop: after so many trials or seconds, whichever comes first."""

    num_trials: int
    time_s: float
    max_epochs: int
    num_parallel: int = 2

    def __post_init__(self) -> None:
        if self.num_trials < 1 or self.max_epochs < 1 or self.num_parallel < 1 or not self.time_s > 0:
            raise ConfigError(f"search budget {self}: every number must be above 0")


class TrialResult(NamedTuple):
    """One finished trial. epochs: how many it got before it ended or was stopped."""

    params: dict[str, Any]
    metric: float
    epochs: int
    ok: bool


class SearchResult(NamedTuple):
    """best: params of the trial with the highest metric. trials: all that completed.

    If the time ended before any trial had an epoch behind it, best is the defaults and the metric is NaN.
    """

    best: dict[str, Any]
    metric: float
    trials: list[TrialResult]


def search(
    objective: Objective,
    *,
    data: Any,
    space: Space,
    defaults: Mapping[str, Any],
    budget: SearchBudget,
    seed: int,
    on_trial: Callable[[TrialResult], None] = lambda trial: None,
) -> SearchResult:
    """Run trials until the budget is spent.

    data: put into the object store once and handed to every trial. defaults: the params of the first trial;
    what the space does not vary is passed on unchanged.

    Raises:
        WorkError: no trial reported a metric and some failed; the message has the first one's error.
    """
    quiet_ray_environment()
    import optuna
    from optuna.samplers import GPSampler
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    unknown = set(space) - set(defaults)
    if unknown:
        raise ConfigError(f"the search space varies {', '.join(sorted(unknown))}, which has no default")
    fixed = {name: value for name, value in defaults.items() if name not in space}

    def trial(config: dict[str, Any], data: Any) -> None:
        import torch

        torch.set_num_threads(1)  # trials share the machine; one core each
        objective({**fixed, **config}, data, lambda epoch, metric: tune.report({METRIC: metric, "epoch": epoch}))

    sampler = GPSampler(seed=seed, n_startup_trials=max(2, min(10, budget.num_trials // 3)))
    searcher = OptunaSearch(
        space={name: _distribution(dimension) for name, dimension in space.items()},
        metric=METRIC,
        mode="max",
        sampler=sampler,
        points_to_evaluate=[{name: defaults[name] for name in space}],
    )
    finished: list[TrialResult] = []

    class Collect(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._collect(trial, ok=True)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self._collect(trial, ok=False)

        def _collect(self, trial: Any, *, ok: bool) -> None:
            last = trial.last_result or {}
            if METRIC in last:
                best = trial.metric_analysis.get(METRIC, {}).get("max", last[METRIC])
                finished.append(TrialResult({**fixed, **trial.config}, best, int(last.get("epoch", 0)), ok))
                on_trial(finished[-1])

    with tempfile.TemporaryDirectory(prefix="assay-search-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(trial, data=data), {"cpu": 1}),
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=budget.num_trials,
                time_budget_s=budget.time_s,
                search_alg=ConcurrencyLimiter(searcher, max_concurrent=budget.num_parallel),
                scheduler=ASHAScheduler(time_attr="epoch", max_t=budget.max_epochs, grace_period=1, reduction_factor=3),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=folder,
                verbose=0,
                callbacks=[Collect()],
                failure_config=tune.FailureConfig(max_failures=_MAX_RESTARTS),
            ),
        )
        grid = tuner.fit()
    # A trial cut off by the time budget has reported but may not have completed.
    results = [r for r in (grid[i] for i in range(len(grid))) if r.metrics and METRIC in r.metrics]
    if not results:
        if grid.errors:
            raise WorkError(f"no trial of the search finished an epoch: {_first_error(grid)}")
        return SearchResult(dict(defaults), math.nan, [])
    best = max(results, key=_best_metric)
    return SearchResult({**fixed, **(best.config or {})}, _best_metric(best), finished)


def _best_metric(result: Any) -> float:
    frame = result.metrics_dataframe
    value = float(frame[METRIC].max()) if frame is not None and METRIC in frame else float(result.metrics[METRIC])
    return value if math.isfinite(value) else -math.inf


def _first_error(grid: Any) -> str:
    errors = [str(error) for error in grid.errors]
    return errors[0].strip().splitlines()[-1]


def _distribution(dimension: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, OneOf):
        return CategoricalDistribution(list(dimension.values))
    if isinstance(dimension, Real):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(dimension.low, dimension.high, log=dimension.log)
