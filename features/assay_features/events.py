"""Events in columns, the one form that batch, stream and services share.

The rules that turn raw values into canonical ones live here and nowhere else, so that a card number means the
same in a CSV file, in Parquet and in JSON.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter
from types import NoneType
from typing import Any

import numpy as np
import pandas as pd
from assay_platform.errors import DataError
from numpy.typing import NDArray

MAX_KEY_LENGTH = 256
# Joins the parts of a composite key or a cross; canonical keys cannot contain it, so parts stay apart.
KEY_SEPARATOR = "\x1f"
_INTEGRAL_FLOAT = re.compile(r"-?\d+\.0+")
# Whole years 1 to 9999, what ISO 8601 can write.
_MIN_TIME_S, _MAX_TIME_S = -62_135_596_800.0, 253_402_300_799.0

Keys = NDArray[np.object_]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Events:
    """N events as columns of equal length.

    time_us: microseconds since 1970 UTC. keys: entity and categorical columns, str or None. numbers: numeric
    columns, NaN where missing.
    """

    time_us: NDArray[np.int64]
    keys: Mapping[str, Keys]
    numbers: Mapping[str, Numbers] = field(default_factory=dict)
    ids: Keys | None = None
    labels: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.time_us)

    def take(self, rows: NDArray[np.intp] | slice) -> "Events":
        """A subset or another order of rows."""
        return Events(
            time_us=self.time_us[rows],
            keys={name: column[rows] for name, column in self.keys.items()},
            numbers={name: column[rows] for name, column in self.numbers.items()},
            ids=None if self.ids is None else self.ids[rows],
            labels=None if self.labels is None else self.labels[rows],
        )


@dataclass(frozen=True)
class Reports:
    """How labels become known: frauds are reported `delay_s` after their event, as 1 in a column of this name.

    Nobody reports that a payment was honest, so what is not reported by then is taken to be.
    """

    column: str
    delay_s: float

    def of(self, events: Events) -> Events:
        """One event a fraud, when it is reported.

        Raises:
            DataError: the events have no labels.
        """
        if events.labels is None:
            raise DataError(f"the events have no labels, so nothing is reported as {self.column!r}")
        frauds = events.take(np.flatnonzero(events.labels))
        return Events(
            frauds.time_us + round(self.delay_s * 1_000_000),
            frauds.keys,
            {**frauds.numbers, self.column: np.ones(len(frauds))},
            ids=frauds.ids,
        )


def key_column(events: Events, name: str) -> Keys:
    """A column as keys: an entity or category as it is, or a number as text, so that the same amount is one key.

    Raises:
        DataError: the events have no such column.
    """
    if name in events.keys:
        return events.keys[name]
    if name not in events.numbers:
        known = ", ".join(sorted({*events.keys, *events.numbers})) or "none"
        raise DataError(f"the events have no key column {name!r}; they have {known}")
    numbers = events.numbers[name]
    if len(numbers) == 1:
        return _objects([canonical_key(float(numbers[0]))])
    codes, values = pd.factorize(numbers, use_na_sentinel=True)
    return _objects([*map(canonical_key, values.tolist()), None])[codes]


def canonical_key(value: Any) -> str | None:
    """The string form of an id or a category; None where missing.

    A float with no fraction loses its '.0', since the same id is an integer in one file and, next to a
    missing value, a float in another. Leading zeros stay.

    Raises:
        ValueError: the value is no scalar or is longer than 256 characters.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a usable id")
        text = str(int(value)) if float(value).is_integer() else repr(float(value))
    elif isinstance(value, str | int | np.integer):
        return _canonical_text(str(value))
    else:
        raise ValueError(f"{type(value).__name__} is not a string or a number")
    return _canonical_text(text)


@lru_cache(maxsize=100_000)
def _canonical_text(text: str) -> str | None:
    text = text.strip()
    if len(text) > MAX_KEY_LENGTH:
        raise ValueError(f"has {len(text)} characters; at most {MAX_KEY_LENGTH} are allowed")
    if KEY_SEPARATOR in text:
        raise ValueError("contains the control character U+001F, which is not allowed")
    if _INTEGRAL_FLOAT.fullmatch(text):
        text = text.partition(".")[0]
    return text or None


def number(value: Any) -> float:
    """A finite number, or NaN where missing.

    Raises:
        ValueError: the value is neither.
    """
    if value is None:
        return math.nan
    if isinstance(value, str) and not value.strip():
        return math.nan
    if not isinstance(value, str | int | float | np.integer | np.floating):
        raise ValueError(f"{value!r} is not a number")
    try:
        parsed = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{_shown(value)} is not a number") from None
    if math.isinf(parsed):
        raise ValueError(f"{_shown(value)} is not a finite number")
    return parsed


def timestamp_us(value: Any) -> int:
    """Epoch seconds or ISO 8601 → microseconds since 1970 UTC. A time without a zone is UTC.

    Raises:
        ValueError: the value is neither, is missing, or lies outside of years 1 to 9999.
    """
    if isinstance(value, datetime):
        moment = value if value.tzinfo else value.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1_000_000)
    if isinstance(value, str):
        text = value.strip()
        try:
            seconds = float(text)
        except ValueError:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                raise ValueError(f"{_shown(value)} is neither epoch seconds nor ISO 8601") from None
            return timestamp_us(moment)
    elif isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:
            raise ValueError(f"{_shown(value)} lies outside of the years 1 to 9999") from None
    else:
        raise ValueError(f"{_shown(value)} is neither epoch seconds nor ISO 8601")
    if math.isnan(seconds):
        raise ValueError("the timestamp is missing")
    if not _MIN_TIME_S <= seconds <= _MAX_TIME_S:
        raise ValueError(f"{_shown(value)} lies outside of the years 1 to 9999")
    return round(seconds * 1_000_000)


def events_from_records(
    records: Sequence[Mapping[str, Any]],
    *,
    timestamp: str,
    keys: Sequence[str],
    numbers: Sequence[str],
    id_column: str | None = None,
    places: Sequence[str] | None = None,
) -> Events:
    """Canonical events from parsed JSON objects; other columns are ignored. places: what errors call each record.

    Raises:
        DataError: a column is missing or has a value that does not fit; the message names event and column.
    """

    def place(i: int) -> str:
        return f"events[{i}]" if places is None else places[i]

    # One column at a time is slow, and says where a value does not fit.
    def column(name: str, parse: Any) -> list[Any]:
        values = []
        for i, record in enumerate(records):
            if name not in record:
                raise DataError(f"{place(i)}.{name}: is missing; send null for an unknown value")
            try:
                values.append(parse(record[name]))
            except ValueError as error:
                raise DataError(f"{place(i)}.{name}: {error}") from error
        return values

    ids = None
    if id_column is not None:
        ids = _objects([canonical_key(record.get(id_column)) for record in records])
    time_us = np.asarray(column(timestamp, timestamp_us), dtype=np.int64)
    found_keys = {name: _objects(column(name, canonical_key)) for name in keys}
    matrix_FN = _plain_numbers(records, numbers)
    if matrix_FN is None:
        found = {name: np.asarray(column(name, number), dtype=np.float64) for name in numbers}
    else:
        found = dict(zip(numbers, matrix_FN, strict=True))
    return Events(time_us, found_keys, found, ids=ids)


_PLAIN_NUMBERS = frozenset({float, int, NoneType})


def _plain_numbers(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> NDArray[np.float64] | None:
    """(F, N) if all values are finite numbers or None, which is what they nearly always are."""
    if not names:
        return np.empty((0, len(records)))
    # itemgetter of one name gives no tuple.
    pick = itemgetter(*names) if len(names) > 1 else lambda record: (record[names[0]],)
    try:
        rows = list(map(pick, records))
        if not all(_PLAIN_NUMBERS.issuperset(map(type, row)) for row in rows):
            return None
        matrix_NF = np.array(rows, dtype=np.float64).reshape(len(rows), len(names))
    except (KeyError, OverflowError):
        return None
    return None if np.isinf(matrix_NF).any() else matrix_NF.T


def _objects(values: Sequence[Any]) -> Keys:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
