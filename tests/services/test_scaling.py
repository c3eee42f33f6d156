"""How many replicas a load needs."""

from types import SimpleNamespace
from typing import Any

import pytest
from assay_platform.errors import ConfigError
from assay_services.scaling import Load, ScalingRule, ServePolicy
from hypothesis import given
from hypothesis import strategies as st

RULE = ScalingRule(max_replicas=50)


def under_way(rule: ScalingRule, rate: float, replicas: int) -> float:
    """What so many requests a second have under way, by the model of `scaling`."""
    each = rate / replicas
    return replicas * 1.5 * rule.fixed_s * each / (1 - rule.a_row_s * each)


def steady(rule: ScalingRule, rate: float, replicas: int, seconds: int) -> list[Load]:
    return [Load(float(t), under_way(rule, rate, replicas), replicas) for t in range(0, seconds, 5)]


@given(st.floats(1.0, 20_000.0), st.integers(1, 50))
def test_what_is_under_way_says_how_many_come_however_full_replicas_are(rate: float, replicas: int) -> None:
    if rate / replicas * RULE.a_row_s < 0.99:
        assert RULE.rate_of(Load(0.0, under_way(RULE, rate, replicas), replicas)) == pytest.approx(rate)


@given(st.floats(1.0, 20_000.0), st.integers(1, 50))
def test_one_look_is_enough_and_there_it_stays(rate: float, replicas: int) -> None:
    if rate / replicas * RULE.a_row_s >= 0.99:
        return
    wanted = RULE.wanted(steady(RULE, rate, replicas, 300))
    assert wanted == min(50, max(1, RULE.replicas_for(rate)))
    if wanted * RULE.capacity > rate:
        assert RULE.wanted(steady(RULE, rate, wanted, 300)) == wanted


def test_a_rising_load_gets_its_replicas_before_it_is_there() -> None:
    rising = [Load(float(t), under_way(RULE, 1000 + 50 * t, 10), 10) for t in range(0, 60, 5)]
    at_once = RULE.replicas_for(1000 + 50 * 55)
    assert RULE.wanted(rising) == RULE.replicas_for(1000 + 50 * (55 + RULE.start_s))
    assert RULE.wanted(rising) > at_once


def test_replicas_go_when_they_were_not_needed_for_a_while() -> None:
    loads = steady(RULE, 8000, 10, 60)
    loads += [Load(60.0 + t, under_way(RULE, 500, 10), 10) for t in range(0, 200, 5)]
    wanted = {load.at_s: RULE.wanted(loads[: i + 1]) for i, load in enumerate(loads)}
    assert wanted[100.0] == wanted[55.0] == RULE.replicas_for(8000)
    assert wanted[145.0] == RULE.replicas_for(500)


def test_the_last_one_goes_after_ten_quiet_minutes_and_the_first_request_brings_it_back() -> None:
    rule = ScalingRule(min_replicas=0, max_replicas=4)
    quiet = [Load(float(t), 0.0, 1) for t in range(0, 605, 5)]
    assert rule.wanted(quiet[:-1]) == 1
    assert rule.wanted(quiet) == 0
    assert rule.wanted([*quiet, Load(610.0, 1.0, 0)]) == 1
    assert ScalingRule(max_replicas=4).wanted(quiet) == 1, "unless one is to stay"


def test_ray_serve_gets_the_same_and_remembers_what_was_seen() -> None:
    policy, state = ServePolicy(max_replicas=50), {}
    loads = steady(RULE, 5000, 3, 400)
    for load in loads:
        context = SimpleNamespace(current_time=load.at_s, total_num_requests=load.under_way,
                                  current_num_replicas=load.replicas, policy_state=state)  # fmt: skip
        wanted, state = policy(context)
    assert wanted == RULE.wanted(loads)
    assert len(state["seen"]) < 60


@pytest.mark.parametrize(
    "odd", [{"fixed_s": 0.0}, {"utilisation": 1.1}, {"max_batch_s": 0.001}, {"min_replicas": 2}, {"a_row_s": -1.0}]
)
def test_a_rule_that_makes_no_sense_is_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ScalingRule(**odd)
