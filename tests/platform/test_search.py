"""Bayesian search on the run's Ray cluster."""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from assay_platform.errors import ConfigError, WorkError
from assay_platform.tuning.search import Report, SearchBudget, TrialResult, search
from assay_platform.tuning.space import OneOf, Real, Whole

pytestmark = pytest.mark.ray
SPACE: dict[str, Any] = {"x": Real(low=0.0, high=1.0), "k": Whole(low=1, high=8), "c": OneOf(("a", "b"))}
DEFAULTS = {"x": 0.9, "k": 8, "c": "a", "fixed": 7}
BUDGET = SearchBudget(num_trials=8, time_s=300, max_epochs=3)


def bowl(params: dict[str, Any], data: list[float], report: Report) -> None:
    assert params["fixed"] == 7
    for epoch in range(1, 4):
        report(epoch, data[0] - (params["x"] - 0.3) ** 2 - 0.01 * (params["k"] - 3) ** 2)


def test_search_beats_the_defaults_and_reports_every_trial(ray_session: str) -> None:
    trials: list[TrialResult] = []
    result = search(bowl, data=[1.0], space=SPACE, defaults=DEFAULTS, budget=BUDGET, seed=1, on_trial=trials.append)
    assert DEFAULTS in [trial.params for trial in trials]  # the default is always tried
    assert len(trials) == 8
    assert result.metric > 0.9
    assert result.metric == max(trial.metric for trial in trials)
    assert min(trial.epochs for trial in trials) < 3  # early stopping stopped some


def killed_once(params: dict[str, Any], data: str, report: Report) -> None:
    marker = Path(data)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    report(1, 0.5)


def test_a_killed_worker_is_started_again(ray_session: str, tmp_path: Path) -> None:
    budget = SearchBudget(num_trials=2, time_s=300, max_epochs=1)
    result = search(killed_once, data=str(tmp_path / "killed"), space=SPACE, defaults=DEFAULTS, budget=budget, seed=0)
    assert (tmp_path / "killed").exists()
    assert result.metric == 0.5


def broken(params: dict[str, Any], data: None, report: Report) -> None:
    raise ValueError("this objective is broken")


def test_when_no_trial_reports_the_first_error_is_told(ray_session: str) -> None:
    budget = SearchBudget(num_trials=1, time_s=300, max_epochs=1)
    with pytest.raises(WorkError, match="this objective is broken"):
        search(broken, data=None, space=SPACE, defaults=DEFAULTS, budget=budget, seed=0)


def test_a_budget_too_short_for_any_trial_gives_the_defaults(ray_session: str) -> None:
    budget = SearchBudget(num_trials=1, time_s=0.1, max_epochs=1)
    result = search(slow, data=None, space=SPACE, defaults=DEFAULTS, budget=budget, seed=0)
    assert result.best == DEFAULTS
    assert math.isnan(result.metric)


def slow(params: dict[str, Any], data: None, report: Report) -> None:
    time.sleep(60)


def test_a_varied_parameter_needs_a_default() -> None:
    with pytest.raises(ConfigError, match="varies x"):
        search(bowl, data=[1.0], space={"x": Real(low=0, high=1)}, defaults={}, budget=BUDGET, seed=0)
