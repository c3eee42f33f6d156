"""Estimates of another way to choose, against what it really earns."""

import numpy as np
import pytest
from assay_pipelines.recommend.off_policy import Shown, doubly_robust, inverse_propensity, self_normalised
from assay_platform.errors import DataError

ARMS = 8
EARNS = np.linspace(0.02, 0.4, ARMS)
SHOWS = np.array([0.6, 0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05])
OTHER = np.array([0.0, 0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.4])
TRUTH = float(OTHER @ EARNS)


def world(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    arm = rng.choice(ARMS, num, p=SHOWS)
    return arm, (rng.random(num) < EARNS[arm]).astype(float)


def test_the_other_way_is_found_where_the_mean_of_what_was_earned_is_far_from_it() -> None:
    arm, reward = world(40_000, 0)
    assert abs(reward.mean() - TRUTH) > 0.1
    model = EARNS + 0.2  # wrong everywhere
    found = (
        inverse_propensity(reward, SHOWS[arm], OTHER[arm]),
        self_normalised(reward, SHOWS[arm], OTHER[arm]),
        doubly_robust(
            reward, SHOWS[arm], OTHER[arm], modelled_shown=model[arm], modelled_target=np.full(len(arm), OTHER @ model)
        ),
    )
    for estimate in found:
        assert estimate.value == pytest.approx(TRUTH, abs=0.02)
        assert estimate.low < TRUTH < estimate.high
        assert estimate.effective < 0.3 * len(arm)


def test_intervals_hold_as_often_as_they_say() -> None:
    hits = {"ips": 0, "snips": 0}
    for seed in range(60):
        arm, reward = world(2_000, seed)
        for name, of in (("ips", inverse_propensity), ("snips", self_normalised)):
            estimate = of(reward, SHOWS[arm], OTHER[arm])
            hits[name] += estimate.low <= TRUTH <= estimate.high
    assert min(hits.values()) >= 51


def test_a_right_model_makes_up_for_wrong_propensities() -> None:
    arm, reward = world(40_000, 1)
    wrong = np.full(len(arm), 1 / ARMS)
    target = np.full(len(arm), TRUTH)
    estimate = doubly_robust(reward, wrong, OTHER[arm], modelled_shown=EARNS[arm], modelled_target=target)
    assert estimate.value == pytest.approx(TRUTH, abs=0.01)
    assert abs(inverse_propensity(reward, wrong, OTHER[arm]).value - TRUTH) > 0.03


def test_the_same_way_earns_what_was_earned() -> None:
    arm, reward = world(1_000, 2)
    same = inverse_propensity(reward, SHOWS[arm], SHOWS[arm])
    assert same.value == pytest.approx(reward.mean())
    assert same.effective == pytest.approx(1_000)


def test_lists_on_record_and_what_cannot_be_estimated() -> None:
    full = {"list_id": "a", "items": ["x", "y"], "propensity": [1.0, 0.25]}
    shown = Shown.of([full, {"list_id": "b", "items": [], "propensity": []}])
    assert (shown.list_id, shown.item, shown.propensity.tolist()) == (["a"], ["y"], [0.25])
    with pytest.raises(DataError, match=r"propensity\[1\] = 0.0"):
        inverse_propensity(np.ones(2), np.array([0.5, 0.0]), np.ones(2))
    with pytest.raises(DataError, match="no lists"):
        self_normalised(np.zeros(0), np.zeros(0), np.zeros(0))
