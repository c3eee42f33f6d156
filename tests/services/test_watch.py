"""Windows of what was scored, held against the reference."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from assay_features.events import Events
from assay_platform.monitoring.calibration import Calibration
from assay_platform.monitoring.drift_reference import Reference, ReferenceConfig
from assay_platform.storage import write_json
from assay_services.watch import SCORE, CalibrationWatch, DriftWatch, SkewWatch

WINDOW = 200


def scored(rng: np.random.Generator, num: int, factor: float = 1.0) -> tuple[Events, dict[str, np.ndarray]]:
    """Events with an amount, a card and a score."""
    card = np.empty(num, dtype=object)
    card[:] = [f"c{c}" for c in rng.integers(0, 20, num)]
    events = Events(np.arange(num), {"card": card}, {"amount": rng.normal(50, 5, num) * factor})
    return events, {SCORE: rng.beta(1, 20, num)}


def watch(clock: Callable[[], float] = lambda: 0.0) -> DriftWatch:
    events, others = scored(np.random.default_rng(0), 30 * WINDOW)
    columns = {"amount": events.numbers["amount"], "card": events.keys["card"], **others}
    return DriftWatch(Reference.of(columns, ReferenceConfig(window_rows=WINDOW)), clock=clock)


def test_a_window_is_looked_at_when_it_is_full_however_its_events_came() -> None:
    seen, rng = watch(), np.random.default_rng(1)
    for num in (1, 50, 100):
        seen.add(*scored(rng, num))
        assert not seen.look()
    seen.add(*scored(rng, 60))
    assert seen.look()
    assert seen.seen.windows == 1
    assert not seen.seen.findings
    assert not seen.look(), "what was looked at is gone"


def test_what_two_windows_running_have_is_an_alarm() -> None:
    seen, rng = watch(), np.random.default_rng(2)
    for number, factor in enumerate((100.0, 100.0, 1.0)):
        seen.add(*scored(rng, WINDOW, factor))
        assert seen.look()
        assert bool(seen.seen.findings) == (factor != 1.0)
        assert [one.column for one in seen.seen.alarms] == (["amount"] if number == 1 else [])


def test_a_key_that_has_an_eighth_of_all_events_is_named_and_columns_with_few_values_are_not() -> None:
    rng = np.random.default_rng(5)
    window = 2000

    def events(share: float) -> Events:
        card, kind = np.empty(window, dtype=object), np.empty(window, dtype=object)
        card[:] = ["busy" if rng.random() < share else f"c{i}" for i in rng.integers(0, 5000, window)]
        kind[:] = [f"k{i}" for i in rng.integers(0, 3, window)]
        return Events(np.arange(window), {"card": card, "kind": kind}, {"amount": rng.normal(50, 5, window)})

    amounts = {"amount": rng.normal(50, 5, 30 * window)}
    reference = Reference.of(amounts, ReferenceConfig(window_rows=window))
    seen = DriftWatch(reference, entities=("card", "kind"), clock=lambda: 0.0)
    for share, named in ((0.02, []), (0.2, ["busy"]), (0.2, ["busy"])):
        seen.add(events(share))
        assert seen.look()
        assert [one.value for one in seen.seen.findings if one.kind == "partition"] == named
    assert [(one.column, one.value) for one in seen.seen.alarms] == [("card", "busy")]


def test_what_a_comparison_with_batch_left_is_shown_until_the_next(tmp_path: Path) -> None:
    file = tmp_path / "skew.json"
    watching = SkewWatch(file)
    assert not watching.look()
    finding = {"column": "n", "kind": "cells", "statistic": 1.0, "log_p": -math.inf, "moved": 0.1, "text": "n: …"}
    write_json(file, {"findings": [finding]})
    assert watching.look()
    assert [one.column for one in watching.found] == ["n"]
    assert not watching.look()
    file.write_text("{")
    os.utime(file, (1, 1))
    assert not watching.look()
    assert watching.found, "what was found before stays"


def test_looking_takes_a_small_part_of_the_time() -> None:
    times = iter([10.0, 10.1, 20.0, 30.0, 40.0, 40.1])
    seen, rng = watch(lambda: next(times)), np.random.default_rng(4)
    for looked in (True, False, False, True):
        seen.add(*scored(rng, WINDOW))
        assert seen.look() == looked


def test_when_nobody_looks_the_oldest_events_are_forgotten() -> None:
    seen, rng = watch(), np.random.default_rng(3)
    for factor in (100.0, 100.0, 100.0, 1.0, 1.0):
        seen.add(*scored(rng, WINDOW, factor))
    assert seen.look()
    assert not seen.seen.findings
    assert not seen.look()


def test_labels_against_scores_are_looked_at_in_windows_and_twice_in_a_row_is_an_alarm() -> None:
    rng = np.random.default_rng(0)
    scores = rng.beta(0.5, 5.0, 20_000)
    labels = rng.random(20_000) < scores
    watch = CalibrationWatch(Calibration.of(scores, labels, window_rows=2000))

    def look(share: float) -> tuple[int, int]:
        drawn = rng.beta(0.5, 5.0, 2000)
        pairs = list(zip(drawn.tolist(), (rng.random(2000) < share * drawn).tolist(), strict=True))
        assert not watch.add(pairs[:1500]), "not enough for a window"
        assert watch.add(pairs[1500:])
        return len(watch.seen.findings), len(watch.seen.alarms)

    assert look(1.0) == (0, 0)
    assert look(3.0) == (1, 0)
    assert look(3.0) == (1, 1)
    assert watch.seen.windows == 3
