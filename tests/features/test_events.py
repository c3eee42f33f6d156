"""Canonical values: the same in a file and in JSON."""

import math
from datetime import UTC, datetime

import numpy as np
import pytest
from assay_features.events import canonical_key, events_from_records, number, timestamp_us
from assay_platform.errors import DataError


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (315, "315"), (315.0, "315"), ("315.0", "315"), ("007", "007"), (" a ", "a"), ("", None), (None, None),
        (float("nan"), None), (True, "true"), (2.5, "2.5"), (10**30, "1" + "0" * 30), (np.int64(4), "4"),
        ("x" * 256, "x" * 256),
    ],
)  # fmt: skip
def test_one_id_has_one_form(value: object, key: str | None) -> None:
    assert canonical_key(value) == key


@pytest.mark.parametrize("value", ["x" * 257, 10**300, [1], {}, float("inf")])
def test_what_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"characters|not a"):
        canonical_key(value)


@pytest.mark.parametrize(("value", "expected"), [("1.5", 1.5), (2, 2.0), (None, math.nan), (" ", math.nan)])
def test_numbers(value: object, expected: float) -> None:
    assert number(value) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("value", ["abc", "inf", 1e999, [1], 10**400, {"a": 1}])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="not a"):
        number(value)


def test_every_way_to_write_a_moment_gives_the_same() -> None:
    expected = 1_700_000_000_000_000
    moment = datetime.fromtimestamp(1_700_000_000, tz=UTC)
    text = ["1700000000", moment.isoformat(), "2023-11-14T22:13:20Z", "2023-11-14 22:13:20"]
    writings = [1_700_000_000, 1.7e9, moment, *text]
    assert {timestamp_us(w) for w in writings} == {expected}
    assert timestamp_us("2023-11-14T23:13:20+01:00") == expected


@pytest.mark.parametrize("value", ["yesterday", None, float("nan"), 1e15, 10**400, True, "2023-13-01"])
def test_what_is_no_moment_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"timestamp|ISO 8601|years"):
        timestamp_us(value)


def test_a_bad_record_is_named_by_place_and_column() -> None:
    good = {"t": 0, "card": "a", "amount": 1}
    bad = {"t": 0, "card": "a", "amount": "much"}
    with pytest.raises(DataError, match=r"events\[1\]\.amount: 'much' is not a number"):
        events_from_records([good, bad], timestamp="t", keys=["card"], numbers=["amount"])
    with pytest.raises(DataError, match=r"events\[0\]\.card: is missing"):
        events_from_records([{"t": 0, "amount": 1}], timestamp="t", keys=["card"], numbers=["amount"])
