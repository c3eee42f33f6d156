"""Spaces with conditions, curves that are continued, cores that are shared."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assay_platform.errors import ConfigError
from assay_platform.tuning.journal import Journal
from assay_platform.tuning.search import Report, SearchBudget, Strategy, search
from assay_platform.tuning.space import (
    OneOf,
    Real,
    Space,
    When,
    Whole,
    active,
    check_space,
    contains,
    from_unit,
    read_value,
    to_unit,
)
from assay_platform.tuning.stopping import Stopping, expected_end, predict, share_cores
from hypothesis import given
from hypothesis import strategies as st

NETS = When("family", ("net", "wide"))
SPACE: Space = {
    "family": OneOf(("trees", "net", "wide")),
    "leaves": Whole(low=4, high=64, log=True, when=When("family", ("trees",))),
    "depth": OneOf((1, 2), when=NETS),
    "dropout": Real(low=0.0, high=0.5, when=When("depth", (2,))),
}
DEFAULTS = {"family": "net", "leaves": 31, "depth": 2, "dropout": 0.1}


def test_only_what_hangs_on_a_choice_is_there() -> None:
    assert active(SPACE, DEFAULTS) == {"family": "net", "depth": 2, "dropout": 0.1}
    assert active(SPACE, {**DEFAULTS, "family": "trees"}) == {"family": "trees", "leaves": 31}
    assert contains(SPACE, {"family": "trees", "leaves": 8})
    assert not contains(SPACE, {"family": "trees", "depth": 1})
    assert not contains(SPACE, {"family": "net", "depth": 2, "dropout": 0.7})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": Real(low=0.0, high=0.5, when=When("leaves", (4,)))}, "dropout hangs on"),
        ({"dropout": Real(low=0.0, high=0.5, when=When("depth", (3,)))}, "dropout hangs on"),
        ({"dropout": Real(low=0.2, high=0.5)}, "default of dropout is 0.1"),
        ({"new": Real(low=0.2, high=0.5)}, "varies new"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_space({**SPACE, **change}, DEFAULTS)


@given(st.integers(4, 64), st.floats(0.0, 0.5), st.sampled_from(("trees", "net", "wide")))
def test_values_are_read_back_as_they_were_written(leaves: int, dropout: float, family: str) -> None:
    for name, value in (("leaves", leaves), ("dropout", dropout), ("family", family)):
        assert read_value(SPACE[name], str(value)) == value
    assert read_value(SPACE["leaves"], "many") is None
    assert read_value(SPACE["family"], "forest") is None


@pytest.mark.parametrize("sampler", ["auto", "grid"])
def test_a_search_over_conditions_gives_only_points_of_the_space(sampler: Any) -> None:
    seen: list[dict[str, Any]] = []

    def objective(params: dict[str, Any], data: None, report: Report) -> None:
        seen.append(params)
        report(1, params["dropout"] if params["family"] == "net" else params["leaves"] / 100)

    budget = SearchBudget(num_trials=30, time_s=300, max_epochs=1)
    search(objective, data=None, space=SPACE, defaults=DEFAULTS, budget=budget, seed=0, here=True,
           strategy=Strategy(sampler=sampler))  # fmt: skip
    assert all(contains(SPACE, params) for params in seen)
    assert {params["family"] for params in seen} == {"trees", "net", "wide"}
    if sampler == "grid":  # 4 sizes of trees, and two kinds of nets with depth 1 or one of 4 dropouts, and the default
        assert len(seen) == 4 + 2 * (1 + 4) + 1


@given(st.floats(0.2, 2.5), st.floats(0.05, 1.0), st.floats(0.3, 0.9))
def test_a_power_law_is_continued(power: float, slope: float, level: float) -> None:
    curve = [(epoch, level - slope * epoch**-power) for epoch in range(1, 10)]
    found = predict(curve, 30)
    assert found.mean == pytest.approx(level - slope * 30**-power, abs=0.12 * slope)
    assert found.mean >= curve[-1][1]


def test_a_falling_curve_is_taken_to_stay_at_its_best() -> None:
    curve = [(epoch, 0.5 - 0.01 * epoch) for epoch in range(1, 8)]
    assert predict(curve, 30).mean == 0.49
    assert predict(curve[:1], 30).std == math.inf


def test_halving_keeps_the_better_half_of_those_that_came_as_far() -> None:
    stopping = Stopping(27, halving=True, curves=False)
    metrics = np.random.default_rng(0).permutation(30) / 30
    kept = [metric for trial, metric in enumerate(metrics) if not stopping.add(trial, 2, metric)]
    assert max(metrics) in kept
    for trial, metric in enumerate(metrics):  # at its report: as ASHA has it, without waiting for others
        better_half = math.ceil((trial + 1) / 2)
        assert (metric in kept) == (sum(metrics[: trial + 1] > metric) < better_half)
    assert not stopping.add(30, 1, -2.0)  # a first epoch says nothing yet
    assert not stopping.add(30, 2, 2.0)


def test_a_curve_that_ends_below_the_best_stops() -> None:
    stopping = Stopping(20, halving=False, curves=True)
    for epoch in range(1, 21):
        assert not stopping.add(0, epoch, 0.9 - 0.5 / epoch)
    low = [stopping.add(1, epoch, 0.5 - 0.5 / epoch) for epoch in range(1, 21)]
    assert low.index(True) + 1 == 6  # 30 % of the epochs are always given
    high = [stopping.add(2, epoch, 0.95 - 0.7 / epoch) for epoch in range(1, 21)]
    assert not any(high)


@given(st.integers(1, 64), st.dictionaries(st.integers(0, 99), st.floats(-1, 1), max_size=16))
def test_every_trial_has_a_core_and_none_is_left(num_cores: int, promise: dict[int, float]) -> None:
    cores = share_cores(num_cores, promise)
    assert set(cores) == set(promise)
    assert sum(cores.values()) == (max(num_cores, len(promise)) if promise else 0)
    ordered = sorted(promise, key=lambda trial: -promise[trial])
    assert all(cores[a] >= cores[b] >= 1 for a, b in pairwise(ordered) if promise[a] > promise[b])


def test_a_stopped_trial_counts_as_far_from_the_best_as_it_was() -> None:
    best, other = [(1, 0.5), (2, 0.7), (3, 0.8)], [(1, 0.6), (2, 0.61), (3, 0.62)]
    assert expected_end([(1, 0.45)], [best, other], 3) == pytest.approx(0.75)
    assert expected_end([(1, 0.9)], [best, other], 3) == 0.9  # never less than it reached
    assert expected_end([(1, 0.6), (2, 0.9)], [best, other], 3) == 0.9
    assert expected_end(other, [best, other], 3) == 0.62
    assert expected_end([(1, 0.4)], [[(1, 0.4)]], 3) == 0.4


def test_shares_of_a_dimension_cover_it_evenly() -> None:
    shares = (np.arange(1000) + 0.5) / 1000
    whole = Whole(low=1, high=4)
    assert np.bincount([from_unit(whole, share) for share in shares]).tolist() == [0, 250, 250, 250, 250]
    real = Real(low=0.01, high=100.0, log=True)
    values = [from_unit(real, share) for share in shares]
    assert sum(value < 1.0 for value in values) == 500
    assert all(real.holds(value) for value in values)
    assert {from_unit(OneOf(("a", None)), share) for share in shares} == {"a", None}
    for dimension in (whole, real, OneOf(("a", None))):
        for share in shares[::50]:
            value = from_unit(dimension, share)
            assert from_unit(dimension, min(to_unit(dimension, value), 1 - 1e-9)) == pytest.approx(value)


def test_no_point_is_tried_twice_on_a_plateau() -> None:
    points: list[tuple[Any, ...]] = []

    def plateau(params: dict[str, Any], data: None, report: Report) -> None:
        points.append((params["x"], params["k"]))
        report(1, 1.0)

    space: Space = {"x": Real(low=0.0, high=1.0), "k": Whole(low=1, high=8)}
    budget = SearchBudget(num_trials=30, time_s=300, max_epochs=1)
    search(plateau, data=None, space=space, defaults={"x": 0.5, "k": 1}, budget=budget, seed=0, here=True)
    assert len(set(points)) == 30


def test_a_line_of_a_journal_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "night.log", {"x": "1"})
    journal.begin(0, {"x": 1})
    journal.end(0, {"metric": 0.5})
    with (tmp_path / "night.log").open("a") as file:
        file.write('{"event": "ended", "tri')
    again = Journal(tmp_path / "night.log", {"x": "1"})
    assert again.ended == {0: {"metric": 0.5}}
    again.begin(1, {"x": 2})
    assert Journal(tmp_path / "night.log", {"x": "1"}).begun == {0: {"x": 1}, 1: {"x": 2}}
