"""Feasible attacks: nothing infeasible is ever proposed, and a planted weakness is found."""

import numpy as np
import pytest
from assay_platform.errors import ConfigError
from assay_platform.robustness.attacks import (
    DescentConfig,
    EvolutionConfig,
    Slopes,
    descend,
    evolve,
    swap_with_donors,
)
from assay_platform.robustness.constraints import Constraints, FeasibleSet, Transactions
from hypothesis import given, settings
from hypothesis import strategies as st

NUMERIC, KEYS = ("amount", "hour_count", "day_count", "age"), ("device", "card")
CONSTRAINTS = Constraints(
    immutable=("card",),
    integer=("hour_count", "day_count"),
    increasing=("hour_count", "day_count"),
    decreasing=("age",),
    bounds={"age": (0.0, 100.0)},
    times={"amount": (0.5, 2.0)},
    values={"device": ("phone", "laptop")},
    relations=(("hour_count", "day_count"),),
)


def some(rng: np.random.Generator, num: int) -> Transactions:
    hour = rng.integers(0, 5, num).astype(float)
    numbers = np.column_stack(
        [rng.lognormal(3, 1, num), hour, hour + rng.integers(-1, 5, num), rng.uniform(-10, 120, num)]
    )
    numbers[rng.random(numbers.shape) < 0.1] = np.nan
    keys = np.empty((num, 2), dtype=object)
    keys[:, 0] = rng.choice(np.array(["phone", "fridge", None], dtype=object), num)
    keys[:, 1] = [f"card {i}" for i in range(num)]
    return Transactions(numbers, keys)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_what_is_repaired_is_feasible_whatever_it_was(seed: int) -> None:
    rng = np.random.default_rng(seed)
    original, wild = some(rng, 40), some(rng, 40)
    wild.numbers[:] *= rng.choice([-3.0, 0.1, 1.0, 50.0], wild.numbers.shape)
    feasible = FeasibleSet.fit(CONSTRAINTS, NUMERIC, KEYS, original)
    assert feasible.holds(original, original).all()
    repaired = feasible.repair(original, wild)
    assert feasible.holds(original, repaired).all()
    again = feasible.repair(original, repaired)
    np.testing.assert_array_equal(again.numbers, repaired.numbers)
    assert (repaired.keys[:, 1] == original.keys[:, 1]).all()


@pytest.mark.parametrize(
    ("column", "value", "allowed"),
    [
        (0, 19.0, True),  # half up to twice of 20
        (0, 45.0, False),
        (0, 9.0, False),
        (1, 3.0, True),
        (1, 1.0, False),  # cannot go down
        (1, 2.5, False),  # whole numbers
        (1, 9.0, False),  # above the day's
        (3, 10.0, True),
        (3, 60.0, False),  # cannot go up
        (3, -5.0, False),
    ],
)
def test_each_limit_is_kept(column: int, value: float, allowed: bool) -> None:
    original = Transactions(np.array([[20.0, 2.0, 4.0, 50.0]]), np.array([["phone", "c"]], dtype=object))
    table = Transactions(
        np.array([[1.0, 0.0, 0.0, 0.0], [99.0, 50.0, 90.0, 99.0]]), np.array([["phone", "c"]] * 2, dtype=object)
    )
    feasible = FeasibleSet.fit(CONSTRAINTS, NUMERIC, KEYS, table)
    changed = original.copy()
    changed.numbers[0, column] = value
    assert feasible.holds(original, changed)[0] == allowed


def test_categories_stay_within_the_allowed_and_missing_numbers_missing() -> None:
    original = Transactions(np.array([[np.nan, 0.0, 0.0, 0.0]]), np.array([["fridge", "c"]], dtype=object))
    feasible = FeasibleSet.fit(CONSTRAINTS, NUMERIC, KEYS, original)
    changed = Transactions(np.array([[5.0, 0.0, 0.0, 0.0]]), np.array([["toaster", "d"]], dtype=object))
    assert not feasible.holds(original, changed)[0]
    repaired = feasible.repair(original, changed)
    assert np.isnan(repaired.numbers[0, 0])
    assert repaired.keys.tolist() == [["fridge", "c"]]


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        ({"bounds": {"a": (2, 1)}}, "bounds.a"),
        ({"times": {"a": (1.5, 2)}}, "times.a"),
        ({"times": {"a": (-1, 2)}}, "times.a"),
        ({"increasing": ("a",), "decreasing": ("a",)}, "'a' is increasing and decreasing"),
        ({"values": {"a": ()}}, "values.a"),
    ],
)
def test_constraints_that_cannot_be_are_named(given_: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Constraints(**given_)  # type: ignore[arg-type]


def test_evolution_finds_the_best_feasible_row_and_changes_nothing_else() -> None:
    rng = np.random.default_rng(0)
    original, donors = some(rng, 50), some(rng, 500)
    original.numbers[:, 0] = 20.0
    original.keys[:, 0] = "phone"
    feasible = FeasibleSet.fit(CONSTRAINTS, NUMERIC, KEYS, donors)

    def score(rows: np.ndarray, written: Transactions) -> np.ndarray:
        assert feasible.holds(original.take(rows), written).all(), "only feasible rows are scored"
        return np.abs(written.numbers[:, 0] - 33.0) - 5.0 * (written.keys[:, 0] == "laptop")

    config = EvolutionConfig(num_generations=30, population=12)
    found = evolve(score, original, donors, feasible, np.random.default_rng(1), config)
    np.testing.assert_allclose(found.logits, score(np.arange(50), found.transactions))
    # No donor has a laptop: it is found among the allowed categories.
    assert np.median(found.logits) < -4.7
    assert found.logits.max() < -2.0
    assert found.num_scores == 50 + 30 * 12 * 50
    again = evolve(score, original, donors, feasible, np.random.default_rng(1), config)
    np.testing.assert_array_equal(again.logits, found.logits)


def test_descent_goes_down_slopes_through_feasible_rows_only() -> None:
    rng = np.random.default_rng(0)
    original, donors = some(rng, 50), some(rng, 500)
    original.numbers[:, 0] = 20.0
    original.keys[:, 0] = "phone"
    feasible = FeasibleSet.fit(CONSTRAINTS, NUMERIC, KEYS, donors)
    worth = {"phone": 0.0, "laptop": -5.0}

    def score(rows: np.ndarray, written: Transactions) -> np.ndarray:
        assert feasible.holds(original.take(rows), written).all(), "only feasible rows are scored"
        return np.abs(written.numbers[:, 0] - 33.0) + np.array([worth[key] for key in written.keys[:, 0]])

    def slope(rows: np.ndarray, written: Transactions) -> Slopes:
        numbers = np.zeros(written.numbers.shape)
        numbers[:, 0] = np.sign(written.numbers[:, 0] - 33.0)
        falls = [[worth[new] - worth[old] for new in feasible.allowed[0]] for old in written.keys[:, 0]]
        return Slopes(numbers, (np.array(falls), np.zeros((len(rows), len(feasible.allowed[1])))))

    config = DescentConfig(num_starts=2, num_steps=8)
    found = descend(score, slope, original, donors, feasible, np.random.default_rng(1), config)
    np.testing.assert_allclose(found.logits, score(np.arange(50), found.transactions))
    assert found.logits.max() < -3.5
    again = descend(score, slope, original, donors, feasible, np.random.default_rng(1), config)
    np.testing.assert_array_equal(again.logits, found.logits)
    with pytest.raises(ConfigError, match="num_starts 0"):
        DescentConfig(num_starts=0)


def test_a_row_that_nothing_improves_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    original = some(rng, 20)
    feasible = FeasibleSet.fit(Constraints(immutable=(*NUMERIC, *KEYS)), NUMERIC, KEYS, original)
    found = evolve(lambda rows, _: np.zeros(len(rows)), original, some(rng, 9), feasible, rng)
    np.testing.assert_array_equal(found.transactions.numbers, original.numbers)
    assert (found.transactions.keys == original.keys).all()


def test_clothes_come_from_donors_as_far_as_they_may() -> None:
    rng = np.random.default_rng(0)
    original, donors = some(rng, 200), some(rng, 200)
    donors.keys[:, 0] = "laptop"
    feasible = FeasibleSet.fit(CONSTRAINTS, NUMERIC, KEYS, original)
    dressed = swap_with_donors(original, donors, feasible, rng, share=1.0)
    assert (dressed.keys[:, 0] == "laptop").all()
    assert (dressed.keys[:, 1] == original.keys[:, 1]).all()
    assert feasible.holds(original, dressed).all()


@pytest.mark.parametrize("wrong", [{"num_generations": 0}, {"population": 2}, {"num_elite": 0}])
def test_a_search_without_candidates_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="elite"):
        EvolutionConfig(**wrong)
