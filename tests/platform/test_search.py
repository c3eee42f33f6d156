"""Searches: in this process and on the run's Ray cluster, to their end, cut off, killed, and gone on with."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from assay_platform.errors import ConfigError, WorkError
from assay_platform.tuning.report import search_figures
from assay_platform.tuning.search import Progress, Report, SearchBudget, Strategy, TrialResult, search
from assay_platform.tuning.space import OneOf, Real, Space, Whole
from assay_platform.tuning.stopping import Stopping
from assay_platform.tuning.trials import Desk, HereWorkers, RayWorkers, Workers

SPACE: Space = {"x": Real(low=0.0, high=1.0), "k": Whole(low=1, high=8), "c": OneOf(("a", "b"))}
DEFAULTS = {"x": 0.9, "k": 8, "c": "a", "fixed": 7}
BUDGET = SearchBudget(num_trials=8, time_s=300, max_epochs=3)


def bowl(params: dict[str, Any], data: list[float], report: Report) -> None:
    assert params["fixed"] == 7
    for epoch in range(1, 4):
        report(epoch, data[0] - (params["x"] - 0.3) ** 2 - 0.01 * (params["k"] - 3) ** 2 - 0.1 / epoch)


@pytest.mark.ray
def test_search_beats_the_defaults_and_reports_every_trial(ray_session: str) -> None:
    trials: list[TrialResult] = []
    seen: list[Progress] = []
    result = search(
        bowl, data=[1.0], space=SPACE, defaults=DEFAULTS, budget=BUDGET, seed=1, on_trial=trials.append,
        on_progress=seen.append,
    )  # fmt: skip
    assert trials[0].params == DEFAULTS or trials[1].params == DEFAULTS  # the default is always tried
    assert len(trials) == 8
    assert result.metric > 0.8
    assert result.metric == max(trial.metric for trial in trials)
    assert {trial.state for trial in trials} <= {"done", "stopped"}
    assert any(progress.running for progress in seen)


def test_a_search_stops_trials_early() -> None:
    # In this process the order of reports, on which it depends who is stopped, is always the same. Halving keeps every
    # trial that is in the better half after its second epoch; with other seeds all of these eight are.
    result = search(bowl, data=[1.0], space=SPACE, defaults=DEFAULTS, budget=BUDGET, seed=3, here=True)
    assert min(trial.epochs for trial in result.trials) == 2
    assert {trial.state for trial in result.trials} == {"done", "stopped"}


def killed_once(params: dict[str, Any], data: str, report: Report) -> None:
    marker = Path(data)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    report(1, 0.5)


@pytest.mark.ray
def test_a_killed_worker_is_started_again(ray_session: str, tmp_path: Path) -> None:
    budget = SearchBudget(num_trials=2, time_s=300, max_epochs=1)
    result = search(killed_once, data=str(tmp_path / "killed"), space=SPACE, defaults=DEFAULTS, budget=budget, seed=0)
    assert (tmp_path / "killed").exists()
    assert result.metric == 0.5
    assert [trial.state for trial in result.trials] == ["done", "done"]


def sleeping(params: dict[str, Any], data: None, report: Report) -> None:
    report(1, 0.25)
    time.sleep(60)


@pytest.mark.ray
def test_the_deadline_holds_and_what_was_reported_counts(ray_session: str) -> None:
    began = time.monotonic()
    budget = SearchBudget(num_trials=9, time_s=12, max_epochs=5)
    result = search(sleeping, data=None, space=SPACE, defaults=DEFAULTS, budget=budget, seed=0)
    assert time.monotonic() - began < 12 * 1.05
    assert result.metric == 0.25
    assert {trial.state for trial in result.trials} == {"cut"}


def broken(params: dict[str, Any], data: None, report: Report) -> None:
    raise ValueError("this objective is broken")


def made_here(objective: Any, data: Any) -> Workers:
    return HereWorkers(objective, data, Desk(Stopping(9, halving=False, curves=False), 1, False))


def made_on_ray(objective: Any, data: Any) -> Workers:
    return RayWorkers(objective, data, Desk(Stopping(9, halving=False, curves=False), 2, True), num_slots=1)


@pytest.fixture(params=["here", pytest.param("ray", marks=pytest.mark.ray)])
def make_workers(request: pytest.FixtureRequest) -> Callable[[Any, Any], Workers]:
    if request.param == "here":
        return made_here
    request.getfixturevalue("ray_session")
    return made_on_ray


def told(params: dict[str, Any], data: float, report: Report) -> dict[str, float]:
    if params["fail"]:
        raise RuntimeError("bad luck\nand more of it")
    report(1, data)
    report(2, data + params["more"])
    return {"size": 3}


def test_workers_keep_their_promises(make_workers: Callable[[Any, Any], Workers]) -> None:
    workers = make_workers(told, 0.5)
    try:
        assert workers.wait(0.1) == []
        found = {}
        for trial, params in ((3, {"fail": False, "more": 0.25}), (4, {"fail": True, "more": 0.0})):
            workers.start(trial, params)
            until = time.monotonic() + 60
            while trial not in found and time.monotonic() < until:
                found |= {ended.trial: ended for ended in workers.wait(60)}
        assert found[3].curve == [(1, 0.5), (2, 0.75)]
        assert found[3].values == {"size": 3.0}
        assert not found[3].error
        assert found[4].error == "RuntimeError: bad luck"
        assert workers.curves() == {}
    finally:
        workers.close()
        workers.close()


def here(objective: Any, **settings: Any) -> Any:
    return search(objective, **{"space": SPACE, "defaults": DEFAULTS, "budget": BUDGET, "seed": 0, "data": [1.0],
                                "here": True, **settings})  # fmt: skip


def test_when_no_trial_reports_the_first_error_is_told() -> None:
    with pytest.raises(WorkError, match="this objective is broken"):
        here(broken)


def test_a_budget_too_short_for_any_trial_gives_the_defaults() -> None:
    times = iter([0.0, 0.0, 0.0, *[400.0] * 99])
    result = here(bowl, clock=lambda: next(times))
    assert result.best == DEFAULTS
    assert math.isnan(result.metric)


@pytest.mark.parametrize("sampler", ["auto", "gp", "tpe", "random", "grid"])
def test_every_sampler_finds_the_bowl_and_repeats_itself(sampler: Any) -> None:
    budget = SearchBudget(num_trials=25, time_s=300, max_epochs=3)
    found = [here(bowl, budget=budget, strategy=Strategy(sampler=sampler)) for _ in range(2)]
    assert found[0].metric > here(bowl, budget=SearchBudget(num_trials=1, time_s=9, max_epochs=3)).metric
    assert [trial.params for trial in found[0].trials] == [trial.params for trial in found[1].trials]
    assert all(SPACE[name].holds(trial.params[name]) for trial in found[0].trials for name in SPACE)


def test_a_search_of_a_name_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    journal = tmp_path / "searches" / "night.log"
    calls: list[dict[str, Any]] = []

    def killed_in_the_third(params: dict[str, Any], data: list[float], report: Report) -> None:
        calls.append(params)
        if len(calls) == 3:
            raise KeyboardInterrupt
        bowl(params, data, report)

    with pytest.raises(KeyboardInterrupt):
        here(killed_in_the_third, journal=journal)
    assert len(calls) == 3
    result = here(killed_in_the_third, journal=journal)
    assert len(calls) == 3 + 6  # two ended before; the third is tried again, and five more
    assert calls[3] == calls[2]
    assert len(result.trials) == 8
    assert here(killed_in_the_third, journal=journal).best == result.best  # nothing is left to do
    assert len(calls) == 9
    here(killed_in_the_third, journal=journal, budget=SearchBudget(num_trials=9, time_s=300, max_epochs=3))
    assert len(calls) == 10
    assert calls[9] not in calls[:9]


KILLED = """
import os, signal, sys
from pathlib import Path
from assay_platform.tuning.search import SearchBudget, search
from assay_platform.tuning.space import Real

def objective(params, data, report):
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(params)
    report(1, params["x"])

seen = []
search(objective, data=None, space={"x": Real(low=0.0, high=1.0)}, defaults={"x": 0.5}, seed=0, here=True,
       budget=SearchBudget(num_trials=6, time_s=300, max_epochs=1), journal=Path(sys.argv[1]))
"""


def test_what_had_ended_survives_a_kill_of_the_process(tmp_path: Path) -> None:
    journal = tmp_path / "night.log"
    done = subprocess.run([sys.executable, "-c", KILLED, str(journal)], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    again: list[float] = []

    def objective(params: dict[str, Any], data: Any, report: Report) -> None:
        again.append(params["x"])
        report(1, params["x"])

    budget = SearchBudget(num_trials=6, time_s=300, max_epochs=1)
    result = here(objective, space={"x": Real(low=0.0, high=1.0)}, defaults={"x": 0.5}, budget=budget, journal=journal)
    assert len(again) == 3
    assert len({trial.params["x"] for trial in result.trials}) == 6


def test_a_trial_that_was_cut_off_is_tried_again(tmp_path: Path) -> None:
    journal, now = tmp_path / "night.log", [0.0]

    def slow(params: dict[str, Any], data: list[float], report: Report) -> None:
        for epoch in range(1, 4):
            now[0] += 100.0
            report(epoch, data[0] - params["x"])

    first = here(
        slow, journal=journal, clock=lambda: now[0], budget=SearchBudget(num_trials=8, time_s=400, max_epochs=3)
    )
    assert [trial.state for trial in first.trials] == ["done", "cut"]
    again = here(
        slow, journal=journal, clock=lambda: now[0], budget=SearchBudget(num_trials=2, time_s=900, max_epochs=3)
    )
    assert [trial.params for trial in again.trials] == [trial.params for trial in first.trials]
    assert "cut" not in [trial.state for trial in again.trials]


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "night.log"
    here(bowl, journal=journal, identity="table one")
    with pytest.raises(ConfigError, match="identity differ"):
        here(bowl, journal=journal, identity="table two")
    with pytest.raises(ConfigError, match="x differ"):
        here(bowl, journal=journal, identity="table one", space={**SPACE, "x": Real(low=0.0, high=2.0)})


def test_what_was_best_elsewhere_is_tried_after_the_defaults() -> None:
    earlier = [{"x": 0.31, "k": 3, "c": "b"}, {"x": 7.0, "k": 3, "c": "b"}, {"x": 0.1}]
    trials = here(bowl, earlier=earlier).trials
    assert trials[0].params == DEFAULTS
    assert trials[1].params == {**DEFAULTS, **earlier[0]}
    assert len(trials) == 8


def test_a_search_ends_when_it_is_good_enough() -> None:
    budget = SearchBudget(num_trials=8, time_s=300, max_epochs=3, enough=0.0)
    assert len(here(bowl, budget=budget).trials) == 1


def test_several_aims_have_a_front() -> None:
    def costly(params: dict[str, Any], data: list[float], report: Report) -> dict[str, float]:
        report(1, data[0] - (params["x"] - 0.8) ** 2)
        return {"latency_ms": 10 * params["x"]}

    budget = SearchBudget(num_trials=20, time_s=300, max_epochs=1)
    result = here(costly, budget=budget, strategy=Strategy(minimised=("latency_ms",)))
    front = result.front(["latency_ms"])
    assert 1 < len(front) <= 20
    ordered = sorted(front, key=lambda trial: trial.values["latency_ms"])
    assert [t.metric for t in ordered] == sorted(t.metric for t in ordered)
    assert result.metric == max(trial.metric for trial in front)


def test_a_metric_that_is_no_number_fails_the_trial_alone() -> None:
    def diverges(params: dict[str, Any], data: list[float], report: Report) -> None:
        report(1, math.nan if params["c"] == "a" else data[0])

    result = here(diverges, strategy=Strategy(sampler="random"))
    assert {trial.state for trial in result.trials} == {"done", "failed"}
    assert result.best["c"] == "b"


def test_figures_are_drawn_of_choices_numbers_and_conditions(tmp_path: Path) -> None:
    trials = here(bowl, strategy=Strategy(sampler="random")).trials
    figures = search_figures(trials, SPACE, metric="NDCG@10")
    assert set(figures) == {"search-history.png", "search-parallel.png", "search-importance.png"}
    for name, draw in figures.items():
        draw(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert search_figures(trials[:2], SPACE, metric="NDCG@10") == {}
