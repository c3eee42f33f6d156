"""Counterfactuals: few, feasible, and true to the judge."""

import numpy as np
import pytest
from assay_platform.robustness.constraints import Constraints, FeasibleSet, Transactions
from assay_platform.robustness.counterfactual import Choices, counterfactual

NUMERIC, KEYS = ("amount", "age"), ("device", "card")
LIMITS = Constraints(immutable=("card",), times={"amount": (0.5, 2.0)}, decreasing=("age",))


def legitimate() -> Transactions:
    rng = np.random.default_rng(0)
    keys = np.empty((300, 2), dtype=object)
    keys[:, 0] = rng.choice(["phone", "laptop", "tablet"], 300)
    keys[:, 1] = "c"
    return Transactions(np.column_stack([rng.uniform(1, 100, 300), rng.uniform(0, 50, 300)]), keys)


@pytest.fixture
def choices() -> Choices:
    table = legitimate()
    return Choices.fit(FeasibleSet.fit(LIMITS, NUMERIC, KEYS, table), table)


def asked(amount: float, age: float, device: str | None) -> Transactions:
    return Transactions(np.array([[amount, age]]), np.array([[device, "c9"]], dtype=object))


def judge(forms: Transactions) -> tuple[np.ndarray, np.ndarray]:
    """Risk rises with the amount, on phones, and with age; approved below 1."""
    score = forms.numbers[:, 0] / 60 + (forms.keys[:, 0] == "phone") * 0.5 + forms.numbers[:, 1] / 500
    return score, score < 1.0


def test_one_change_is_found_where_one_is_enough(choices: Choices) -> None:
    feasible = choices.feasible(LIMITS, NUMERIC, KEYS)
    found = counterfactual(judge, asked(45.0, 10.0, "phone"), feasible, choices)
    assert found is not None
    [change] = found.changes
    assert change.column in ("device", "amount")
    assert found.score < 1.0
    # The least that is enough: of all approved single changes the one with the highest score.
    assert found.score > 0.7


def test_several_changes_are_found_and_none_is_needless(choices: Choices) -> None:
    feasible = choices.feasible(LIMITS, NUMERIC, KEYS)
    original = asked(90.0, 10.0, "phone")
    found = counterfactual(judge, original, feasible, choices)
    assert found is not None
    assert {c.column for c in found.changes} == {"amount", "device"}
    form = original.copy()
    for change in found.changes:
        if change.column == "amount":
            form.numbers[0, 0] = change.would_be
        else:
            form.keys[0, 0] = change.would_be
    assert feasible.holds(original, form)[0]
    assert judge(form)[0][0] == pytest.approx(found.score)
    assert judge(form)[1][0]


def test_what_cannot_be_reached_is_said_by_none(choices: Choices) -> None:
    feasible = choices.feasible(LIMITS, NUMERIC, KEYS)
    assert counterfactual(judge, asked(500.0, 10.0, "phone"), feasible, choices) is None
    fixed = Choices(numbers={}, values={}, ranges={})
    assert counterfactual(judge, asked(45.0, 1.0, "phone"), fixed.feasible(LIMITS, NUMERIC, KEYS), fixed) is None


def test_choices_survive_the_artifact_and_leave_out_what_cannot_change(choices: Choices) -> None:
    again = Choices.from_dict(choices.to_dict())
    assert again == choices
    assert set(choices.values) == {"device"}
    assert set(choices.numbers) == {"amount", "age"}
    feasible = choices.feasible(LIMITS, NUMERIC, KEYS)
    assert feasible.movable_C.tolist() == [True, False]
    missing = asked(np.nan, np.nan, None)
    found = counterfactual(lambda f: (np.ones(len(f.numbers)), f.keys[:, 0] == "tablet"), missing, feasible, choices)
    assert found is not None
    assert found.changes[0].was is None
