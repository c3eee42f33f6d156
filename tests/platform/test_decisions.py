"""Probabilities become decisions: thresholds keep to their rates, costs choose the cheapest."""

import numpy as np
import pytest
from assay_platform.errors import ConfigError
from assay_platform.models.decisions import DECISIONS, Costs, DecisionSettings, Policy
from hypothesis import given
from hypothesis import strategies as st


def test_thresholds_keep_to_the_false_positive_rates() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < 0.05
    probability = np.clip(rng.beta(1, 8, 20_000) + 0.3 * labels, 0, 1)
    policy = Policy.fit(DecisionSettings(target_fpr=0.01, review_fpr=0.05), probability, labels)
    decided = policy.decide(probability).decision
    assert (decided[~labels] == DECISIONS.index("decline")).mean() <= 0.01
    assert 0.04 < (decided[~labels] > 0).mean() <= 0.05
    without = Policy.fit(DecisionSettings(target_fpr=0.01), probability, labels)
    assert set(without.decide(probability).decision.tolist()) == {0, 2}


money = st.floats(0, 1000)


@given(p=st.floats(0, 1), amount=money, missed=st.floats(0, 5), good=money, review=money, finds=st.floats(0, 1))
def test_the_cheapest_decision_is_made_and_the_threshold_is_where_declining_becomes_it(
    p: float, amount: float, missed: float, good: float, review: float, finds: float
) -> None:
    policy = Policy(costs=Costs(missed_fraud=missed, declined_good=good, review=review, review_finds=finds))
    decided = policy.decide(np.array([p]), np.array([amount]))
    loss = missed * amount
    cost = {"approve": p * loss, "review": review + p * (1 - finds) * loss, "decline": (1 - p) * good}
    assert cost[DECISIONS[decided.decision[0]]] <= min(cost.values()) + 1e-9
    threshold = float(decided.threshold[0])
    if threshold < 0.99:
        above = policy.decide(np.array([min(1.0, threshold + 0.005)]), np.array([amount]))
        q = min(1.0, threshold + 0.005)
        cheapest = min(q * loss, review + q * (1 - finds) * loss)
        assert (1 - q) * good <= cheapest + 1e-6 or DECISIONS[above.decision[0]] == "decline"
    if threshold > 0.01:
        q = threshold - 0.005
        assert (1 - q) * good >= min(q * loss, review + q * (1 - finds) * loss) - 1e-6


def test_a_missing_amount_costs_nothing_to_miss() -> None:
    policy = Policy(costs=Costs(declined_good=10, review=1))
    assert DECISIONS[policy.decide(np.array([0.9]), np.array([np.nan])).decision[0]] == "approve"
    assert DECISIONS[policy.decide(np.array([0.02]), np.array([500.0])).decision[0]] == "review"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Costs(declined_good=-1, review=1), "declined_good"),
        (lambda: Costs(declined_good=1, review=float("nan")), "review"),
        (lambda: Costs(declined_good=1, review=1, review_finds=2), "review_finds"),
        (lambda: DecisionSettings(target_fpr=1.0), "target_fpr"),
        (lambda: DecisionSettings(target_fpr=0.1, review_fpr=0.05), "review_fpr"),
    ],
)
def test_settings_that_cannot_be_are_named(make: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()  # type: ignore[operator]
