"""Which version answers: swaps, rehearsals, canaries, shadows and ways back."""

import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from assay_platform.config import Rollout
from assay_platform.errors import ConfigError, DataError, RegistryError
from assay_platform.monitoring.drift import band_distance
from assay_platform.monitoring.metrics import ServiceMetrics
from assay_platform.tracking import CHALLENGER, CHAMPION, AuditLog
from assay_services.hot_swap import Follower, Loaded, Slot
from assay_services.problems import ProblemError
from assay_services.rehearsal import Answer, rehearse


class Aliases:
    """Aliases that move as in the registry; version 13 cannot be downloaded."""

    def __init__(self) -> None:
        self.at: dict[str, int] = {}
        self.unchecked: set[int] = set()
        self.replaced: list[tuple[int, int, str]] = []

    def newest_champion(self, application: str) -> str | None:
        return "model" if CHAMPION in self.at else None

    def version_of(self, name: str, alias: str) -> int | None:
        return self.at.get(alias)

    def is_unchecked(self, name: str, version: int) -> bool:
        return version in self.unchecked

    def download(self, name: str, version: int) -> Path:
        if version == 13:
            raise RegistryError("no such artifact")
        return Path(str(version))

    def replace(self, name: str, wrong: int, right: int, *, reason: str) -> None:
        if self.at[CHAMPION] != wrong:
            raise RegistryError("it points elsewhere")
        self.replaced.append((wrong, right, reason))
        self.at[CHAMPION] = right


class Version:
    """Scores by its number: even ones alike, odd ones far higher; from 20 on slowly; from 30 on columns are needed."""

    def __init__(self, name: str, folder: Path) -> None:
        self.number = int(str(folder))

    def rehearse(self, requests: Sequence[dict[str, float]]) -> list[Answer | DataError]:
        return [self._said(request) for request in requests]

    def _said(self, request: dict[str, float]) -> Answer | DataError:
        if self.number >= 30 and "country" not in request:
            return DataError("events[0].country: is missing")
        if 20 <= self.number < 30:
            time.sleep(0.01)
        score = request["x"] if self.number % 2 == 0 else min(1.0, request["x"] + 0.6)
        return Answer(frozenset([score > 0.5]), (score,))


class Clock:
    """Time that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry() -> Aliases:
    return Aliases()


@pytest.fixture
def audit(tmp_path: Path) -> AuditLog:
    return AuditLog(tmp_path / "audit.jsonl")


def slot_of(audit: AuditLog, metrics: ServiceMetrics | None = None, clock: Any = None, **rollout: Any) -> Slot[Version]:
    more = {} if clock is None else {"clock": clock}
    return Slot("fraud", Version, metrics or ServiceMetrics(), audit=audit, rollout=Rollout(**rollout), **more)


def move(registry: Aliases, slot: Slot[Version], version: int, alias: str = CHAMPION) -> Loaded[Version]:
    registry.at[alias] = version
    slot.refresh(registry)  # type: ignore[arg-type]
    return slot.require()


def asked(slot: Slot[Version], num: int = 50) -> None:
    for i in range(num):
        slot.remember({"x": i / num})


def test_a_slot_follows_the_alias_and_survives_a_broken_version(registry: Aliases, audit: AuditLog) -> None:
    metrics = ServiceMetrics()
    slot = slot_of(audit, metrics)
    assert not slot.refresh(registry)  # type: ignore[arg-type]
    with pytest.raises(ProblemError, match="no fraud model"):
        slot.require()
    for version, answers in ((1, 1), (2, 2), (13, 2), (1, 1)):
        assert move(registry, slot, version).model.number == answers
    text = metrics.render().decode()
    assert 'assay_model_swaps_total{application="fraud",outcome="failed"} 1.0' in text
    assert 'assay_model_version{application="fraud",model="model"} 1.0' in text


def test_requests_during_a_slow_load_are_answered_by_the_old_version(registry: Aliases) -> None:
    release = threading.Event()

    def load(name: str, folder: Path) -> Version:
        if str(folder) == "2":
            release.wait(10)
        return Version(name, folder)

    slot: Slot[Version] = Slot("fraud", load, ServiceMetrics())
    move(registry, slot, 1)
    loading = threading.Thread(target=move, args=(registry, slot, 2))
    loading.start()
    time.sleep(0.05)
    assert slot.require().version == 1
    release.set()
    loading.join()
    assert slot.require().version == 2


def test_a_version_that_decides_otherwise_does_not_take_over_and_the_log_says_why(
    registry: Aliases, audit: AuditLog
) -> None:
    metrics = ServiceMetrics()
    slot = slot_of(audit, metrics)
    move(registry, slot, 2)
    asked(slot)
    assert move(registry, slot, 3).version == 2
    assert slot.refused is not None
    assert slot.refused.version == 3
    slot.refresh(registry)  # type: ignore[arg-type]
    refusals = [entry for entry in audit.entries() if entry["action"] == "refuse"]
    assert len(refusals) == 1, "said once, however often it is looked at"
    assert "decides" in refusals[0]["reason"]
    assert refusals[0]["evidence"]["requests"] == 50
    assert 'outcome="refused"' in metrics.render().decode()
    assert move(registry, slot, 4).version == 4
    assert slot.refused is None


@pytest.mark.parametrize(("version", "objection"), [(20, "times as long"), (30, "refuses 50 of 50.*country")])
def test_a_version_that_is_slow_or_takes_less_does_not_take_over(
    registry: Aliases, audit: AuditLog, version: int, objection: str
) -> None:
    slot = slot_of(audit)
    move(registry, slot, 2)
    asked(slot)
    move(registry, slot, version)
    assert slot.require().version == 2
    assert slot.refused is not None
    assert re.search(objection, slot.refused.reason)


def test_whoever_promotes_unchecked_gets_it_at_once(registry: Aliases, audit: AuditLog) -> None:
    slot = slot_of(audit)
    move(registry, slot, 2)
    asked(slot)
    registry.unchecked.add(3)
    assert move(registry, slot, 3).version == 3
    off = slot_of(audit, rehearse=False)
    move(registry, off, 2)
    asked(off)
    assert move(registry, off, 3).version == 3


def test_a_refused_version_that_is_promoted_again_unchecked_answers_at_once(registry: Aliases, audit: AuditLog) -> None:
    slot = slot_of(audit)
    move(registry, slot, 2)
    asked(slot)
    assert move(registry, slot, 3).version == 2
    registry.unchecked.add(3)
    assert move(registry, slot, 3).version == 3


def test_few_requests_are_no_evidence_of_a_distribution() -> None:
    few = [{"x": i / 10} for i in range(10)]
    evidence = rehearse(Version("", Path("2")), Version("", Path("3")), few, Rollout(), threading.Lock())
    assert evidence.changed > 0.4
    assert not evidence.objections


def test_a_version_that_fails_requests_is_taken_back_with_its_alias(registry: Aliases, audit: AuditLog) -> None:
    metrics, clock = ServiceMetrics(), Clock()
    slot = slot_of(audit, metrics, clock)
    before = move(registry, slot, 2)
    after = move(registry, slot, 4)
    after.outcomes.answered, after.outcomes.failed = 18, 1
    slot.refresh(registry)  # type: ignore[arg-type]
    assert slot.require() is after, "nineteen requests are too few to judge by"
    after.outcomes.failed = 2
    slot.refresh(registry)  # type: ignore[arg-type]
    assert slot.require() is before
    assert registry.replaced == [(4, 2, "by the service: version 4 failed 2 of 20 requests")]
    assert 'outcome="rolled_back"' in metrics.render().decode()


def test_a_version_whose_scores_leave_their_bands_is_taken_back(registry: Aliases, audit: AuditLog) -> None:
    slot = slot_of(audit, clock=Clock())
    before = move(registry, slot, 2)
    before.outcomes.scores.extend(i / 500 for i in range(500))
    after = move(registry, slot, 4)
    after.outcomes.scores.extend([0.9] * 300)
    slot.refresh(registry)  # type: ignore[arg-type]
    assert slot.require() is before
    assert "other bands" in registry.replaced[0][2]


def test_after_its_time_of_trial_a_version_stays(registry: Aliases, audit: AuditLog) -> None:
    clock = Clock()
    slot = slot_of(audit, clock=clock, watch_s=60.0)
    move(registry, slot, 2)
    after = move(registry, slot, 4)
    assert slot.instead_of(after) is not None, "the one before answers what it fails"
    clock.now = 61.0
    slot.refresh(registry)  # type: ignore[arg-type]
    assert slot.instead_of(after) is None
    after.outcomes.failed = 100
    slot.refresh(registry)  # type: ignore[arg-type]
    assert slot.require() is after


def test_an_alias_that_somebody_has_moved_meanwhile_is_followed_not_moved(registry: Aliases, audit: AuditLog) -> None:
    slot = slot_of(audit, clock=Clock())
    move(registry, slot, 2)
    after = move(registry, slot, 4)
    after.outcomes.failed = 50
    assert move(registry, slot, 6).version == 6
    assert not registry.replaced


def test_a_canary_answers_its_share_and_the_same_user_meets_the_same_version(
    registry: Aliases, audit: AuditLog
) -> None:
    slot = slot_of(audit, canary_share=0.2)
    move(registry, slot, 2)
    move(registry, slot, 3, CHALLENGER)
    chosen = [slot.chosen(f"user {i}").version for i in range(5000)]
    assert 0.18 < chosen.count(3) / 5000 < 0.22
    assert chosen == [slot.chosen(f"user {i}").version for i in range(5000)]
    challenger = slot.chosen(f"user {chosen.index(3)}")
    assert slot.instead_of(challenger) is slot.require(), "what it fails, the champion answers"
    del registry.at[CHALLENGER]
    slot.refresh(registry)  # type: ignore[arg-type]
    assert {slot.chosen(f"user {i}").version for i in range(100)} == {2}


def test_a_shadow_is_asked_everything_aside_and_compared(registry: Aliases, audit: AuditLog) -> None:
    metrics = ServiceMetrics()
    slot = slot_of(audit, metrics, shadow=True)
    move(registry, slot, 2)
    move(registry, slot, 3, CHALLENGER)
    asked(slot)
    assert slot.chosen("anybody").version == 2
    slot.refresh(registry)  # type: ignore[arg-type]
    text = metrics.render().decode()
    assert 'assay_shadow_requests_total{application="fraud"} 50.0' in text
    changed = float(text.split('assay_shadow_changed{application="fraud"} ')[1].split()[0])
    assert 0.5 < changed < 0.7


def test_a_challenger_that_becomes_champion_is_not_loaded_again(registry: Aliases, audit: AuditLog) -> None:
    slot = slot_of(audit, shadow=True)
    move(registry, slot, 2)
    move(registry, slot, 4, CHALLENGER)
    challenger = slot.challenger
    assert challenger is not None
    assert move(registry, slot, 4).model is challenger.model
    slot.refresh(registry)  # type: ignore[arg-type]
    assert slot.challenger is None


def test_bands_tell_how_much_of_the_scores_has_moved() -> None:
    assert band_distance([0.001, 0.3], [0.002, 0.4]) == 0.0
    assert band_distance([0.001] * 4, [0.001, 0.001, 0.9, 0.9]) == 0.5
    assert band_distance([], [0.5]) == 0.0


def test_shares_of_a_rollout_lie_between_0_and_1() -> None:
    with pytest.raises(ConfigError, match=r"canary_share is 1\.5"):
        Rollout(canary_share=1.5)


def test_a_registry_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay_services.hot_swap._STOP_S", 0.2)
    asked, go_on = threading.Event(), threading.Event()

    def opened() -> Any:
        asked.set()
        go_on.wait(30)
        raise RegistryError("away")

    follower = Follower(opened, [], poll_s=0.01)
    follower.start()
    assert asked.wait(10)
    began = time.monotonic()
    follower.stop()
    assert time.monotonic() - began < 5
    go_on.set()
