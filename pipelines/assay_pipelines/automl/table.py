"""A table as people have it → columns that a model can take: cleaned, typed, in the order that it is split in.

What the schema does not name is looked at: a column is numeric, a category, or left out, with the reason in a note.
What the schema names has to be what it says. Every split of the table is a cut of one order of its rows, of time or,
where there is none, of chance, between two groups: rows that belong together stay on one side.
"""

# N rows

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from assay_features.events import MAX_KEY_LENGTH, canonical_key, timestamp_us
from assay_features.schema import Split, TableSchema
from assay_platform.errors import DataError
from numpy.typing import NDArray

from assay_pipelines.datasets.table import (
    both_classes,
    events_of_frame,
    fingerprint,
    parsed_labels,
    read_frame,
)
from assay_pipelines.fraud.evaluate import auc

# What people write where they know nothing.
_MISSING = ("", "?", "-", "na", "n/a", "nan", "null", "none", "missing")
_ID_SHARE, _MIN_ROWS = 0.95, 100
# Of a column of text, so many values have to be numbers.
_NUMBERS_SHARE = 0.99
_NOT_SCALAR = ("bytes", "mixed", "complex", "interval", "period")
# With fewer different rows among all, rows are alike because there is little to tell, not because they are copies.
_COPIES_BELOW = 0.1
_LOOKED_AT = 1000
# A column that orders the labels so well alone is usually known only afterwards.
_TOO_GOOD = 0.999

Kind = Literal["numeric", "categorical"]
Rows = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class CleanTable:
    """A cleaned table, in the order that it is split in.

    columns: numeric ones as float64 with NaN, categories as str or None. starts (N,): whether a row begins a group.
    num_train, num_validation: rows of these parts, in this order; the rest is the test part. in_time: whether the order
    is one of time. notes: what was done and seen.
    """

    columns: dict[str, NDArray[Any]]
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    labels: NDArray[np.bool_]
    starts: NDArray[np.bool_]
    num_train: int
    num_validation: int
    in_time: bool
    fingerprint: str
    notes: tuple[str, ...]


def read_table(path: Path, schema: TableSchema, *, seed: int, max_rows: int | None = None) -> CleanTable:
    """Read, clean, type, order and split.

    seed: of the order of a table without time. max_rows: only the newest, or so many by chance.

    Raises:
        DataError: the file cannot be read, a column is missing, a value does not fit, or a part has one class only.
    """
    frame = read_frame(path).reset_index(drop=True)
    _require(frame, schema, path)
    unused = {name for name in (*schema.ignore, schema.id) if name is not None}
    frame = frame[[name for name in frame.columns if name not in unused - {schema.group, schema.timestamp}]]
    notes: list[str] = []
    frame = _without_markers(frame, schema, notes)
    unlabelled = frame[schema.label].isna().to_numpy()
    if unlabelled.any():
        notes.append(f"{unlabelled.sum():,} rows without a label are left out")
        frame = frame[~unlabelled]
    if frame.empty:
        raise DataError(f"{path}: has no rows with a label")
    labels = both_classes(_labels(frame[schema.label], schema, path), schema.label, path)
    frame, numeric, categorical = _inputs(frame, schema, notes)
    if not numeric and not categorical:
        raise DataError(f"{path}: no column is left that a model could use: {'; '.join(notes)}")
    # A timestamp may be an input too, by its own detection; here it orders rows.
    timed = frame if schema.timestamp is not None else frame.assign(**{_NO_TIME: 0.0})
    events = events_of_frame(
        timed, path, timestamp=schema.timestamp or _NO_TIME, keys=(*categorical, *_group(schema)), numbers=numeric
    )
    group = events.keys[schema.group] if schema.group is not None else None
    time_us = events.time_us if schema.timestamp is not None else None
    columns: dict[str, NDArray[Any]] = {n: events.numbers[n] for n in numeric}
    columns |= {n: events.keys[n] for n in categorical}
    numeric, categorical = _without_copies(columns, numeric, categorical, notes)
    if group is None and time_us is None:
        # Rows that say the same have to stay together, or one is learned and its copy is tested.
        group = _same_rows(columns, labels, notes)
    order, starts = order_of(len(labels), time_us, group, seed=seed)
    if max_rows is not None and max_rows < len(order):
        order, starts = order[-max_rows:], starts[-max_rows:].copy()
        starts[0] = True
    num_train, num_validation = cuts(starts, schema.split)
    if time_us is not None and group is not None:
        ordered, end = time_us[order], num_train + num_validation
        late = int((ordered[:end] >= ordered[end:].min()).sum()) if end < len(ordered) else 0
        notes.append(
            f"groups are split whole, by their first row: {late:,} rows learned from are later than a test row"
        )
    table = CleanTable(
        columns={name: columns[name][order] for name in (*numeric, *categorical)},
        numeric=numeric,
        categorical=categorical,
        labels=labels[order],
        starts=starts,
        num_train=num_train,
        num_validation=num_validation,
        in_time=time_us is not None,
        fingerprint=fingerprint(path),
        notes=(*notes, *_too_good(columns, labels, order[:num_train], numeric, categorical)),
    )
    _check_parts(table, path)
    return table


_NO_TIME = "\x1fno time"


def _group(schema: TableSchema) -> tuple[str, ...]:
    return () if schema.group is None else (schema.group,)


def _require(frame: pd.DataFrame, schema: TableSchema, path: Path) -> None:
    named = (schema.label, schema.timestamp, schema.group, schema.id, *schema.numeric, *schema.categorical)
    for name in (*named, *schema.ignore):
        if name is not None and name not in frame.columns:
            shown = ", ".join(map(str, frame.columns[:20])) + (", …" if len(frame.columns) > 20 else "")
            raise DataError(f"{path}: has no column {name!r}, which the schema names; it has {shown}")


def _without_markers(frame: pd.DataFrame, schema: TableSchema, notes: list[str]) -> pd.DataFrame:
    """Text without spaces around it; what stands for nothing is missing. A label may be '-' or 'none'."""
    cleaned, num_marked = {}, 0
    for name in frame.columns:
        column = frame[name]
        if name == schema.label and schema.positive is not None:
            cleaned[name] = _canonical(column)
            continue
        if column.dtype == object or isinstance(column.dtype, pd.StringDtype):
            try:
                codes, distinct = pd.factorize(column)
            except TypeError:  # lists and the like; `kind_of` says so
                cleaned[name] = column
                continue
            words = [value.strip() if isinstance(value, str) else value for value in distinct]
            is_marker = np.array([isinstance(v, str) and v.lower() in _MISSING for v in words], dtype=bool)
            marked = np.r_[is_marker, False][codes]
            num_marked += int(marked.sum())
            values = np.empty(len(words) + 1, dtype=object)
            values[:-1] = [None if m else w for w, m in zip(words, is_marker, strict=True)]
            column = pd.Series(values[codes], index=frame.index, name=name, dtype=object)
        cleaned[name] = column
    if num_marked:
        notes.append(f"{num_marked:,} values such as '?' or 'NA' are taken as missing")
    return pd.DataFrame(cleaned, index=frame.index)


def _canonical(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Values as the schema file writes them."""
    codes, distinct = pd.factorize(column)
    words = np.array([*(_word(value) for value in distinct.tolist()), None], dtype=object)
    return pd.Series(words[codes], index=column.index, name=column.name, dtype=object)


def _word(value: Any) -> str | None:
    word = canonical_key(value.strip() if isinstance(value, str) else value) or None
    return word.lower() if word is not None and word.lower() in ("true", "false") else word


def _labels(series: "pd.Series[Any]", schema: TableSchema, path: Path) -> NDArray[np.bool_]:
    if schema.positive is None:
        return parsed_labels(series, path)
    values = sorted(series.unique())
    if len(values) > 2:
        raise DataError(
            f"{path}: column {series.name!r} has {len(values)} labels ({', '.join(values[:5])}); two are allowed"
        )
    positive = _word(schema.positive)
    if positive not in values:
        raise DataError(f"{path}: column {series.name!r} is never {schema.positive!r}; it has {', '.join(values)}")
    return (series == positive).to_numpy()


def _inputs(
    frame: pd.DataFrame, schema: TableSchema, notes: list[str]
) -> tuple[pd.DataFrame, tuple[str, ...], tuple[str, ...]]:
    """The frame with columns made what they are; numeric and categorical ones, those that the schema names first."""
    numeric, categorical = list(schema.numeric), list(schema.categorical)
    reserved = {schema.label, schema.timestamp, schema.group, *numeric, *categorical}
    notes += [
        f"{name}: {frame[name].nunique():,} different numbers; the schema says that it is a category"
        for name in categorical
        if frame[name].nunique() > _LOOKED_AT and kind_of(frame[name])[0] == "numeric"
    ]
    made = {}
    for name in (name for name in frame.columns if name not in reserved):
        kind, reason = kind_of(frame[name])
        if kind is None:
            notes.append(f"{name}: left out, {reason}")
        elif kind == "numeric":
            numeric.append(name)
            made[name] = _numbers(frame[name])
            lost = int((made[name].isna() & frame[name].notna()).sum())
            if lost:
                notes.append(f"{name}: {lost:,} values that are no finite numbers are taken as missing")
        else:
            categorical.append(name)
    return frame.assign(**made), tuple(numeric), tuple(categorical)


def kind_of(column: "pd.Series[Any]") -> tuple[Kind | None, str]:
    """What a column seems to be; None with the reason if a model can learn nothing from it that holds later."""
    known = column.dropna()
    what = pd.api.types.infer_dtype(known, skipna=True) if known.dtype == object else ""
    if what.startswith(("date", "time")) or pd.api.types.is_datetime64_any_dtype(known.dtype):
        return None, "it holds moments; as `timestamp` in the schema it says how to split"
    if what in _NOT_SCALAR or pd.api.types.is_timedelta64_dtype(known.dtype):
        return None, f"its values are {what or known.dtype}"
    num_distinct = int(known.nunique())
    if num_distinct <= 1:
        return None, "it has one value" if num_distinct else "it is empty"
    if _is_moments(known):
        return None, "it holds moments; as `timestamp` in the schema it says how to split"
    return _kind_of_known(known, num_distinct)


def _kind_of_known(known: "pd.Series[Any]", num_distinct: int) -> tuple[Kind | None, str]:
    if _is_numeric(known):
        numbers, many = _numbers(known), len(known) >= _MIN_ROWS
        # Some rows may be missing by now.
        if many and numbers.diff().min() >= 1 and numbers.iloc[-1] - numbers.iloc[0] < 1.1 * len(known):
            return None, "it numbers the rows"
        return "numeric", ""
    if len(known) >= _MIN_ROWS and num_distinct >= _ID_SHARE * len(known):
        return None, f"it is different in nearly every row ({num_distinct:,} values), as an id is"
    if known.astype(str).str.len().max() > MAX_KEY_LENGTH:
        return None, f"it has texts of more than {MAX_KEY_LENGTH} characters"
    return "categorical", ""


def _is_numeric(known: "pd.Series[Any]") -> bool:
    """Whether a column is one of numbers; codes such as '007' are none, nor are true and false."""
    if pd.api.types.is_bool_dtype(known.dtype):
        return False
    if pd.api.types.is_numeric_dtype(known.dtype):
        return True
    if known.astype(str).str.match(r"-?0\d").any():
        return False
    share = float(_numbers(known).notna().mean())
    # Some stray words among many numbers are mistakes; a few words among few numbers make a category.
    return share == 1 or (share >= _NUMBERS_SHARE and len(known) >= _MIN_ROWS)


def _numbers(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """As numbers; what is none, or not finite, is missing."""
    found = pd.to_numeric(column, errors="coerce").astype(np.float64)
    return found.where(np.isfinite(found))


def _is_moments(known: "pd.Series[Any]") -> bool:
    sample = known.iloc[:: max(1, len(known) // _LOOKED_AT)]
    texts = [value for value in sample if isinstance(value, str) and "-" in value[1:]]
    if len(texts) < len(sample):
        return False
    try:
        for text in texts:
            timestamp_us(text)
    except ValueError:
        return False
    return True


def _without_copies(
    columns: dict[str, NDArray[Any]], numeric: Sequence[str], categorical: Sequence[str], notes: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    first: dict[int, str] = {}
    for name in (*numeric, *categorical):
        digest = hash(_hashes(columns[name]).tobytes())
        if digest in first:
            notes.append(f"{name}: left out, it is a copy of {first[digest]}")
        first.setdefault(digest, name)
    kept = set(first.values())
    return tuple(n for n in numeric if n in kept), tuple(n for n in categorical if n in kept)


def _hashes(column: NDArray[Any]) -> NDArray[np.uint64]:
    return pd.util.hash_array(np.where(pd.isna(column), "\x1f", column) if column.dtype == object else column)


def _same_rows(columns: dict[str, NDArray[Any]], labels: NDArray[np.bool_], notes: list[str]) -> NDArray[Any] | None:
    total = np.zeros(len(labels), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in columns.values():
            total = total * np.uint64(1_000_003) + _hashes(column)
    repeated = len(total) - len(np.unique(total))
    if len(total) - repeated < _COPIES_BELOW * len(total):
        notes.append(f"only {len(total) - repeated:,} rows differ, so rows that say the same may be in several parts")
        return None
    if repeated:
        notes.append(f"{repeated:,} rows repeat another one; such rows stay in one part of the split")
    return total


def order_of(
    num_rows: int, time_us: NDArray[np.int64] | None, group: NDArray[Any] | None, *, seed: int
) -> tuple[Rows, NDArray[np.bool_]]:
    """The order of rows in which a table is cut, and whether a group of rows begins at each place of it.

    Groups lie in the order of their first row in time; without time, of chance. Rows of a group lie beside each other.
    A missing group is a group of its own.
    """
    alone = np.arange(num_rows)
    codes = alone if group is None else pd.factorize(group, use_na_sentinel=True)[0]
    codes = np.where(codes < 0, codes.max(initial=0) + 1 + alone, codes)
    _, codes = np.unique(codes, return_inverse=True)
    if time_us is None:
        rank = np.random.default_rng(seed).permutation(codes.max() + 1)[codes]
        within = alone
    else:
        first = np.full(codes.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(first, codes, time_us)
        rank, within = first[codes], time_us
    order = np.lexsort((within, codes, rank))
    return order, np.r_[True, codes[order][1:] != codes[order][:-1]]


def cuts(starts: NDArray[np.bool_], split: Split) -> tuple[int, int]:
    """Rows of the train and the validation part; a group is never cut."""
    places = np.r_[np.flatnonzero(starts), len(starts)]
    train, both = (
        int(places[np.argmin(np.abs(places - share * len(starts)))])
        for share in (split.train, split.train + split.validation)
    )
    return train, both - train


def _check_parts(table: CleanTable, path: Path) -> None:
    bounds = (0, table.num_train, table.num_train + table.num_validation, len(table.labels))
    for name, start, end in zip(("train", "validation", "test"), bounds[:-1], bounds[1:], strict=True):
        labels = table.labels[start:end]
        if labels.all() or not labels.any():
            raise DataError(
                f"{path}: the {name} part has {len(labels)} rows of which {int(labels.sum())} are positive; every "
                "part needs both classes. Bring more rows or groups, or change [split]."
            )


def _too_good(
    columns: dict[str, NDArray[Any]], labels: NDArray[np.bool_], train: Rows, numeric: Sequence[str],
    categorical: Sequence[str],
) -> Iterator[str]:  # fmt: skip
    half = len(train) // 2
    learned, held = train[:half], train[half:]
    if len({*labels[learned]}) < 2 or len({*labels[held]}) < 2:
        return
    for name in (*numeric, *categorical):
        if name in numeric:
            values = columns[name][held]
            if np.isnan(values).all():
                continue
            alone = auc(labels[held], np.nan_to_num(values, nan=float(np.nanmedian(values))))
        else:
            rates = pd.Series(labels[learned]).groupby(columns[name][learned]).mean()
            rate = pd.Series(columns[name][held]).map(rates).fillna(labels[learned].mean())
            alone = auc(labels[held], rate.to_numpy(dtype=np.float64))
        if max(alone, 1 - alone) >= _TOO_GOOD:
            yield f"{name}: orders the labels by itself; if it is known only afterwards, list it under ignore"
