"""Features of the event itself, and the columns that a model takes. Batch and service call the same functions."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from assay_features.definitions import Calendar, Cross, FeaturePlan
from assay_features.events import Events, Keys
from assay_features.state import Floats, Times

_HOUR_US = 3_600_000_000
# 1970-01-01 was a Thursday.
_EPOCH_WEEKDAY = 3.0
# Not part of any value that people type, so that ('a', 'b_c') and ('a_b', 'c') stay apart.
_SEPARATOR = "\x1f"


def cross_column(cross: Cross, keys: Mapping[str, Keys]) -> Keys:
    """One category a row; None where any part is missing."""
    columns = [keys[name] for name in cross.columns]
    out = np.empty(len(columns[0]), dtype=object)
    for i, parts in enumerate(zip(*columns, strict=True)):
        if None in parts:
            continue
        text = _SEPARATOR.join(parts)
        out[i] = str(zlib.crc32(text.encode()) % cross.num_buckets) if cross.num_buckets else text
    return out


def calendar_column(calendar: Calendar, time_us: Times) -> Floats:
    """Hours of the day or days of the week, with fractions."""
    hours = time_us / _HOUR_US
    return hours % 24 if calendar.part == "hour" else (hours / 24 + _EPOCH_WEEKDAY) % 7


def model_columns(plan: FeaturePlan, events: Events, history: Mapping[str, Floats]) -> dict[str, Any]:
    """Everything that a model may name: the event's own columns, its history, calendar and crosses."""
    columns: dict[str, Any] = {**events.numbers, **events.keys, **history}
    for calendar in plan.calendar:
        columns[calendar.name] = calendar_column(calendar, events.time_us)
    for cross in plan.crosses:
        columns[cross.name] = cross_column(cross, events.keys)
    return columns
