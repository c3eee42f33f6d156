"""Features of the event itself, and the columns that a model takes. Batch and service call the same functions."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from assay_platform.errors import DataError

from assay_features.definitions import Calendar, Cross, FeaturePlan, Ratio
from assay_features.embeddings import EmbeddingTable
from assay_features.events import KEY_SEPARATOR, Events, Keys
from assay_features.state import Floats, Times

_HOUR_US = 3_600_000_000
# 1970-01-01 was a Thursday.
_EPOCH_WEEKDAY = 3.0


def cross_column(cross: Cross, columns: Mapping[str, Any]) -> Keys:
    """One category a row; None where any part is missing.

    Raises:
        DataError: a part is neither a column nor a feature, or is a number without edges.
    """
    edges = cross.edges or ((),) * len(cross.columns)
    parts = [_cross_part(columns, name, cuts) for name, cuts in zip(cross.columns, edges, strict=True)]
    out = np.empty(len(parts[0]), dtype=object)
    for i, row in enumerate(zip(*parts, strict=True)):
        if None not in row:
            text = KEY_SEPARATOR.join(row)
            out[i] = str(zlib.crc32(text.encode()) % cross.num_buckets) if cross.num_buckets else text
    return out


def _cross_part(columns: Mapping[str, Any], name: str, edges: tuple[float, ...]) -> Keys:
    values = np.asarray(_named(columns, name))
    if edges:
        numbers = values.astype(np.float64)
        buckets = np.searchsorted(np.asarray(edges), numbers, side="right").astype(str).astype(object)
        return np.where(np.isnan(numbers), None, buckets)  # type: ignore[call-overload,no-any-return]
    if values.dtype != object:
        raise DataError(f"cross of {name!r}: it is a number; give edges to put it into buckets")
    return values


def ratio_columns(ratios: Sequence[Ratio], columns: Mapping[str, Any]) -> dict[str, Floats]:
    """One number over another, (N,) a ratio; missing where either is, or the denominator is 0.

    Raises:
        DataError: a part is neither a column nor a feature.
    """
    if not ratios:
        return {}

    def named(names: Iterable[str]) -> Floats:
        return np.array([_named(columns, name) for name in names], dtype=np.float64)

    # All at once: a service has dozens of them, and one row.
    value_RN = named(ratio.numerator for ratio in ratios)
    below_RN = named(ratio.denominator for ratio in ratios)
    lessened = [i for i, ratio in enumerate(ratios) if ratio.less is not None]
    if lessened:
        below_RN[lessened] -= named(str(ratios[i].less) for i in lessened)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value_RN /= below_RN
    value_RN[~np.isfinite(value_RN)] = np.nan
    return {ratio.name: row for ratio, row in zip(ratios, value_RN, strict=True)}


def _named(columns: Mapping[str, Any], name: str) -> Any:
    if name not in columns:
        raise DataError(f"{name!r} is neither a column of the events nor a numeric feature of the plan")
    return columns[name]


def calendar_column(calendar: Calendar, time_us: Times) -> Floats:
    """Hours of the day or days of the week, with fractions, on the clocks of the time zone."""
    local_us = time_us
    if calendar.timezone != "UTC":
        moments = pd.DatetimeIndex(time_us.astype("datetime64[us]"), tz="UTC").tz_convert(calendar.timezone)
        local_us = np.asarray(moments.tz_localize(None)).astype("datetime64[us]").astype(np.int64)
    # Whole days go first: hours since 1970 have too few digits left for microseconds.
    day, within_us = np.divmod(local_us, 24 * _HOUR_US)
    hours: Floats = within_us / _HOUR_US
    return hours if calendar.part == "hour" else (day + _EPOCH_WEEKDAY) % 7 + hours / 24


def model_columns(
    plan: FeaturePlan,
    events: Events,
    history: Mapping[str, Floats],
    tables: Mapping[str, EmbeddingTable] | None = None,
) -> dict[str, Any]:
    """Everything that a model may name: the event's own columns, its history, and the features of the row.

    tables: the trained tables of the plan's embeddings, by digest.

    Raises:
        DataError: a feature of the row names what is not there.
    """
    columns: dict[str, Any] = {**events.numbers, **events.keys, **history}
    for calendar in plan.calendar:
        columns[calendar.name] = calendar_column(calendar, events.time_us)
    left = plan.ratios
    while left:
        made_later = {ratio.name for ratio in left}
        ready = [r for r in left if made_later.isdisjoint((r.numerator, r.denominator, r.less))] or left
        columns |= ratio_columns(ready, columns)
        left = tuple(ratio for ratio in left if ratio.name not in columns)
    for embedding in plan.embeddings:
        if tables is None or embedding.table not in tables:
            raise DataError(f"feature {embedding.name!r}: its table {embedding.table} is not there")
        vectors = tables[embedding.table].apply(_named(events.keys, embedding.column), events.time_us)
        columns.update(zip(embedding.names, vectors.T, strict=True))
    for cross in plan.crosses:
        columns[cross.name] = cross_column(cross, columns)
    return columns
