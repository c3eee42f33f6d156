"""Fair shares of a cluster: by the rule alone, and between two searches that meet on one cluster."""

import threading
import time
from typing import Any

import pytest
from assay_platform.tasks.shares import Share, fair_shares
from assay_platform.tuning.search import Report, SearchBudget, SearchResult, search
from assay_platform.tuning.space import Real
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_nobody_gets_more_by_anothers_getting_less_than_it(num_cores: int, wants: list[int]) -> None:
    wanted = {f"p{n}": want for n, want in enumerate(wants)}
    shares = fair_shares(num_cores, wanted)
    assert all(1 <= shares[name] <= want for name, want in wanted.items())
    assert sum(shares.values()) == max(len(wants), min(num_cores, sum(wants)))
    hungry = [share for name, share in shares.items() if share < wanted[name]]
    assert all(share >= max(shares.values()) - 1 for share in hungry)


def test_what_does_not_divide_goes_to_who_came_first() -> None:
    assert fair_shares(8, {"a": 8, "b": 2, "c": 8}) == {"a": 3, "b": 2, "c": 3}
    assert fair_shares(7, {"a": 8, "b": 8}) == {"a": 4, "b": 3}
    assert fair_shares(1, {"a": 8, "b": 8}) == {"a": 1, "b": 1}


def waiting(params: dict[str, Any], data: Any, report: Report) -> None:
    time.sleep(0.3)
    report(1, params["x"])


def run_search(num_trials: int, found: dict[str, SearchResult], name: str, ended: list[tuple[str, float]]) -> None:
    found[name] = search(
        waiting,
        data=None,
        space={"x": Real(low=0.0, high=1.0)},
        defaults={"x": 0.5},
        budget=SearchBudget(num_trials=num_trials, time_s=90, max_epochs=1, num_parallel=2),
        seed=0,
        on_trial=lambda _: ended.append((name, time.monotonic())),
    )


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_two_searches_on_a_cluster_share_it(ray_session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # as in a job; a cluster of one's own has nobody to share with
    found: dict[str, SearchResult] = {}
    ended: list[tuple[str, float]] = []
    first = threading.Thread(target=run_search, args=(50, found, "first", ended))
    first.start()
    while len(ended) < 6:
        time.sleep(0.1)  # it has both cores
    second = threading.Thread(target=run_search, args=(12, found, "second", ended))
    second.start()
    second.join()
    alone = Share(2)
    first.join()
    assert [len(found[name].trials) for name in ("first", "second")] == [50, 12]
    moments = [moment for name, moment in ended if name == "second"]
    between = sum(moments[0] <= moment <= moments[-1] for name, moment in ended if name == "first")
    assert 6 <= between <= 24, "each had a core"
    assert alone.cores(wait_s=30) == 2, "who has ended wants nothing"
    alone.close()
