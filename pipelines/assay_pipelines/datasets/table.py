"""A table that a user brings → canonical `Events`, sorted by time.

Every row is checked before any work starts. An error names the file, the column, the row (counted from 1,
without the header) and what is allowed.
"""

import csv
import hashlib
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from assay_features.accounts import columns_read, links_of, with_accounts
from assay_features.backfill import Source
from assay_features.definitions import FeaturePlan
from assay_features.events import (
    Events,
    Keys,
    Numbers,
    Reports,
    canonical_key,
    key_column,
    number,
    timestamp_us,
)
from assay_features.schema import ACCOUNT, FraudSchema, ItemTable, Schema
from assay_platform.errors import DataError
from assay_platform.storage import atomic_file
from numpy.typing import NDArray

# A chunk of a table that is not read at once: so many rows, or one row group if that is larger.
_ROWS_A_CHUNK = 250_000
Flags = NDArray[np.bool_]
_TRUE, _FALSE = {"1", "true"}, {"0", "false"}


@dataclass(frozen=True)
class LoadedTable:
    """A checked table. fingerprint: SHA-256 of the file, so that a run says which data it saw.

    history: all rows; of a table that was read in chunks, with no other columns than features need.
    """

    events: Events
    path: Path
    fingerprint: str
    history: Events


def load_table(path: Path, schema: Schema) -> LoadedTable:
    """Read and check a CSV or Parquet file.

    Raises:
        DataError: the file cannot be read, a column is missing, or a value does not fit.
    """
    columns = [schema.timestamp, *schema.keys, *schema.numbers]
    columns += [name for name in (schema.id, schema.label) if name is not None]
    frame = read_frame(path, list(dict.fromkeys(columns)))
    if frame.empty:
        raise DataError(f"{path}: has no rows")
    events = events_of_frame(frame, path, timestamp=schema.timestamp, keys=schema.keys, numbers=schema.numbers)
    time_us, keys, numbers = events.time_us, events.keys, events.numbers
    labels = ids = None
    if isinstance(schema, FraudSchema):
        labels = _labels(frame[schema.label], path)
        if schema.id is not None:
            ids = _ids(frame[schema.id], path)
    else:
        for name in schema.keys:
            none_missing(keys[name], name, path)
        if schema.action is not None:
            all_known(keys[schema.action], schema.action, schema.actions, path)
    events = Events(time_us=time_us, keys=keys, numbers=numbers, ids=ids, labels=labels)
    events = with_accounts(events.take(np.argsort(time_us, kind="stable")), schema)
    return LoadedTable(events, path, fingerprint(path), events)


def load_newest(path: Path, schema: FraudSchema, plan: FeaturePlan, num_rows: int) -> LoadedTable:
    """The newest rows of a table that does not fit into memory, and of all rows what the plan needs, read in chunks.

    Rows that are too old are checked in what the plan needs of them.

    Raises:
        DataError: the file cannot be read, a column is missing, or a value does not fit.
    """
    keys, numbers = columns_read(plan, schema)
    numbers = tuple(name for name in numbers if name != schema.label)
    also = [schema.label, *([schema.id] if schema.id else [])]
    with tempfile.TemporaryDirectory(prefix="assay-table-") as scratch:
        columns = list(dict.fromkeys([schema.timestamp, *schema.keys, *schema.numbers, *also]))
        file = _as_parquet(path, columns, Path(scratch))
        parts, labels, ids = [], [], []
        for frame in _chunks(file, list(dict.fromkeys([schema.timestamp, *keys, *numbers, *also])), path):
            parts.append(events_of_frame(frame, path, timestamp=schema.timestamp, keys=keys, numbers=numbers))
            labels.append(parsed_labels(frame[schema.label], path))
            ids += [] if schema.id is None else [_keys(frame[schema.id], path)]
        if not parts:
            raise DataError(f"{path}: has no rows")
        all_labels = both_classes(np.concatenate(labels), schema.label, path)
        all_ids = None if schema.id is None else _unique_ids(np.concatenate(ids), schema.id, path)
        history = replace(_joined(parts), labels=all_labels, ids=all_ids)
        order = np.argsort(history.time_us, kind="stable")
        history = with_accounts(history.take(order), schema)
        wanted = np.zeros(len(history), dtype=bool)
        wanted[order[-num_rows:]] = True
        newest, first = [], 0
        for frame in _chunks(file, columns, path):
            chosen = wanted[first : first + len(frame)]
            first += len(frame)
            if chosen.any():
                newest.append(
                    events_of_frame(
                        frame[chosen], path, timestamp=schema.timestamp, keys=schema.keys, numbers=schema.numbers
                    )
                )
    events = replace(_joined(newest), labels=all_labels[wanted], ids=None if all_ids is None else all_ids[wanted])
    events = events.take(np.argsort(events.time_us, kind="stable"))
    known = {name: history.keys[name][-len(events) :] for name in schema.worked_out}
    return LoadedTable(replace(events, keys={**events.keys, **known}), path, fingerprint(path), history)


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, lines after the first of a CSV file (a quoted line break counts too many).

    Raises:
        DataError: the file cannot be read.
    """
    _check_file(path)
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return int(pq.read_metadata(path).num_rows)
        with path.open("rb") as handle:
            return max(0, sum(block.count(b"\n") for block in iter(partial(handle.read, 1 << 20), b"")) - 1)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as CSV or Parquet: {error}") from error


def _as_parquet(path: Path, columns: list[str], scratch: Path) -> Path:
    """The file itself, or a CSV file turned into Parquet as text."""
    try:
        if path.suffix.lower() not in (".parquet", ".pq"):
            return _csv_as_parquet(path, columns, scratch / "table.parquet")
        _require(columns, pq.read_schema(path).names, path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as CSV or Parquet: {error}") from error
    return path


def _chunks(file: Path, columns: list[str], path: Path) -> Iterator[pd.DataFrame]:
    """Rows of a Parquet file in parts; the index counts the rows of the table."""
    first = 0
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(_ROWS_A_CHUNK, columns=columns):
                frame = batch.to_pandas()
                frame.index = pd.RangeIndex(first, first + len(frame))
                first += len(frame)
                yield frame
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read as CSV or Parquet: {error}") from error


def _joined(parts: Sequence[Events]) -> Events:
    return Events(
        time_us=np.concatenate([p.time_us for p in parts]),
        keys={name: np.concatenate([p.keys[name] for p in parts]) for name in parts[0].keys},
        numbers={name: np.concatenate([p.numbers[name] for p in parts]) for name in parts[0].numbers},
    )


def events_of_frame(
    frame: pd.DataFrame, path: Path, *, timestamp: str, keys: Sequence[str], numbers: Sequence[str]
) -> Events:
    """Canonical events from raw columns. The frame's index counts the rows of the file, for errors.

    Raises:
        DataError: a value does not fit.
    """
    return Events(
        time_us=_times(frame[timestamp], path),
        keys={name: _keys(frame[name], path) for name in keys},
        numbers={name: _numbers(frame[name], path) for name in numbers},
    )


def read_events(path: Path, schema: Schema, plan: FeaturePlan) -> Events:
    """Events without labels and accounts, in the order of the file, with what the plan needs of them: what is pushed.

    Raises:
        DataError: the file cannot be read, a column is missing, or a value does not fit.
    """
    keys, numbers = columns_read(plan, schema)
    columns = [schema.timestamp, *keys, *numbers, *([schema.id] if schema.id else [])]
    frame = read_frame(path, list(dict.fromkeys(columns)))
    if frame.empty:
        raise DataError(f"{path}: has no rows")
    events = events_of_frame(frame, path, timestamp=schema.timestamp, keys=keys, numbers=numbers)
    return events if schema.id is None else replace(events, ids=_keys(frame[schema.id], path))


def recent_ids(path: Path, schema: Schema, seconds: float) -> dict[str, int] | None:
    """Event id → µs of the events in the last so many seconds of a table; None without an id column."""
    if schema.id is None:
        return None
    frame = read_frame(path, [schema.timestamp, schema.id])
    time_us = _times(frame[schema.timestamp], path)
    late = time_us >= time_us.max() - int(seconds * 1e6)
    return {str(key): int(t) for key, t in zip(_keys(frame[schema.id][late], path), time_us[late], strict=True)}


def chunked_source(
    path: Path,
    schema: Schema,
    plan: FeaturePlan,
    scratch: Path,
    *,
    reports: Reports | None = None,
    accounts: Path | None = None,
) -> Source:
    """The same table in chunks, for a backfill: the columns that the plan needs, checked as they are read.

    accounts: where `read_accounts` has put them, for a plan that needs them. reports: given, the source is the frauds
    of the table, each when it is reported. A CSV file is turned into Parquet in `scratch` first, as text and in
    bounded memory.

    Raises:
        DataError: the file cannot be read or a column is missing.
    """
    keys, numbers = columns_read(plan, schema)
    if reports is not None:
        keys, numbers = (*keys, reports.column), tuple(name for name in numbers if name != reports.column)
    columns = list(dict.fromkeys([schema.timestamp, *keys, *numbers]))
    _check_file(path)
    named, given = path, path.stat()
    identity = f"{path.name}:{given.st_size}:{given.st_mtime_ns}:{schema.timestamp}:{reports}:{links_of(schema)}"
    try:
        if path.suffix.lower() not in (".parquet", ".pq"):
            kind = f"{zlib.crc32(repr(columns).encode()):08x}"
            path = _csv_as_parquet(path, columns, scratch / f"{path.stem}-{given.st_mtime_ns}-{kind}.parquet")
        metadata = pq.read_metadata(path)
        _require(columns, metadata.schema.to_arrow_schema().names, path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as CSV or Parquet: {error}") from error
    groups: list[tuple[int, int, int]] = []  # first row group, one past the last, first row
    row = 0
    for i in range(metadata.num_row_groups):
        if not groups or row - groups[-1][2] >= _ROWS_A_CHUNK:
            groups.append((i, i + 1, row))
        else:
            groups[-1] = (groups[-1][0], i + 1, groups[-1][2])
        row += metadata.row_group(i).num_rows
    if row == 0:
        raise DataError(f"{path}: has no rows")
    read: Callable[[int], Events] = partial(_read_chunk, path, named, tuple(groups), schema.timestamp, keys, numbers)
    if accounts is not None:
        read = partial(_read_with_accounts, read, accounts, tuple(first_row for *_, first_row in groups))
    if reports is not None:
        read = partial(_read_reported, read, reports)
    return Source(num_rows=row, num_chunks=len(groups), identity=identity, read=read)


def read_accounts(path: Path, schema: FraudSchema, target: Path) -> Events:
    """What the accounts of a table leave for payments that follow; and the account of every row, in the order of the
    file, as a column of numbers in `target`. Only what accounts are known by is read at once.

    Raises:
        DataError: the file cannot be read, a column is missing, or a value does not fit.
    """
    links = links_of(schema)
    assert links is not None
    keys = tuple(name for name in links.columns if name in schema.keys)
    numbers = tuple(name for name in links.columns if name in schema.numbers)
    columns = list(dict.fromkeys([schema.timestamp, *keys, *numbers]))
    _check_file(path)
    with tempfile.TemporaryDirectory(prefix="assay-table-") as scratch:
        events = _joined(
            [
                events_of_frame(frame, path, timestamp=schema.timestamp, keys=keys, numbers=numbers)
                for frame in _chunks(_as_parquet(path, columns, Path(scratch)), columns, path)
            ]
        )
    order = np.argsort(events.time_us, kind="stable")
    events = links.assign(events.take(order))
    accounts = np.full(len(order), np.nan)
    accounts[order] = [np.nan if name is None else float(name) for name in events.keys[ACCOUNT]]
    with atomic_file(target) as part, part.open("wb") as file:
        np.save(file, accounts)
    return links.of(events)


def _read_with_accounts(read: Callable[[int], Events], accounts: Path, first_rows: Sequence[int], chunk: int) -> Events:
    events = read(chunk)
    first = first_rows[chunk]
    numbers = np.load(accounts, mmap_mode="r")[first : first + len(events)]
    named = Events(events.time_us, {}, {ACCOUNT: np.asarray(numbers)})
    return replace(events, keys={**events.keys, ACCOUNT: key_column(named, ACCOUNT)})


def _read_reported(read: Callable[[int], Events], reports: Reports, chunk: int) -> Events:
    events = read(chunk)
    is_fraud = np.array([value in _TRUE for value in events.keys[reports.column]], dtype=bool)
    return reports.of(replace(events, labels=is_fraud))


def _read_chunk(
    path: Path,
    named: Path,
    groups: Sequence[tuple[int, int, int]],
    timestamp: str,
    keys: Sequence[str],
    numbers: Sequence[str],
    chunk: int,
) -> Events:
    first, end, first_row = groups[chunk]
    columns = list(dict.fromkeys([timestamp, *keys, *numbers]))
    frame: pd.DataFrame = pq.ParquetFile(path).read_row_groups(range(first, end), columns=columns).to_pandas()
    frame.index = pd.RangeIndex(first_row, first_row + len(frame))
    return events_of_frame(frame, named, timestamp=timestamp, keys=keys, numbers=numbers)


def _csv_as_parquet(path: Path, columns: list[str], target: Path) -> Path:
    if target.is_file():
        return target
    with path.open("rb") as handle:
        present = next(csv.reader([handle.readline().decode("utf-8-sig")]), [])
    _require(columns, present, path)
    options = pacsv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=columns,
                                   strings_can_be_null=True)  # fmt: skip
    with (
        pacsv.open_csv(path, convert_options=options) as reader,
        atomic_file(target) as part,
        pq.ParquetWriter(part, reader.schema) as writer,
    ):
        for batch in reader:
            writer.write_batch(batch)
    return target


def load_items(table: ItemTable, base: Path) -> dict[str, dict[str, str]]:
    """Item id → its text and categorical columns. A relative path is relative to `base`, the schema's folder."""
    path = Path(table.path) if Path(table.path).is_absolute() else base / table.path
    names = list(dict.fromkeys((table.id, *table.text, *table.categorical)))
    frame = read_frame(path, names)
    ids = _keys(frame[table.id], path)
    none_missing(ids, table.id, path)
    others = {name: _keys(frame[name], path) for name in names if name != table.id}
    return {
        str(item): {name: str(column[i]) for name, column in others.items() if column[i] is not None}
        for i, item in enumerate(ids)
    }


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty")


def read_frame(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """Columns of a file, all by default; those of a CSV file as text.

    Raises:
        DataError: the file cannot be read or a column is missing.
    """
    _check_file(path)
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            present = pq.read_schema(path).names
            _require(columns or (), present, path)
            parquet: pd.DataFrame = pq.read_table(path, columns=columns).to_pandas()
            return parquet
        present = pd.read_csv(path, nrows=0).columns.tolist()
        _require(columns or (), present, path)
        # Text first: pandas' own guesses would turn '007' into 7.
        return pd.read_csv(path, usecols=columns, dtype=str, skip_blank_lines=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as CSV or Parquet: {error}") from error


def _require(columns: Sequence[str], present: Sequence[str], path: Path) -> None:
    for name in columns:
        if name not in present:
            shown = ", ".join(map(str, present[:20])) + (", …" if len(present) > 20 else "")
            raise DataError(f"{path}: has no column {name!r}, which the schema names; it has {shown}")


def _bad(path: Path, column: str, row: int, message: str) -> DataError:
    return DataError(f"{path}: column {column!r}, row {row + 1}: {message}")


def _parse_unique(series: "pd.Series[Any]", path: Path, parse: Callable[[Any], Any]) -> list[Any]:
    """`parse` every distinct value once; the first row with a bad value is named, by the series' index."""
    codes, distinct = pd.factorize(series, use_na_sentinel=False)
    parsed: list[Any] = []
    first_bad: tuple[int, ValueError] | None = None
    for code, value in enumerate(distinct):
        try:
            parsed.append(parse(None if pd.isna(value) else value))
        except ValueError as error:
            row = int(np.argmax(codes == code))
            if first_bad is None or row < first_bad[0]:
                first_bad = (row, error)
            parsed.append(None)
    if first_bad is not None:
        raise _bad(path, str(series.name), int(series.index[first_bad[0]]), str(first_bad[1])) from first_bad[1]
    return [parsed[code] for code in codes]


def _keys(series: "pd.Series[Any]", path: Path) -> Keys:
    out = np.empty(len(series), dtype=object)
    out[:] = _parse_unique(series, path, canonical_key)
    return out


def _numbers(series: "pd.Series[Any]", path: Path) -> Numbers:
    if pd.api.types.is_numeric_dtype(series) and not pd.api.types.is_bool_dtype(series):
        values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        values = np.asarray(pd.to_numeric(series, errors="coerce"), dtype=np.float64)
        unparsed = np.flatnonzero(np.isnan(values) & series.notna().to_numpy())
        if len(unparsed):
            # Not all that pandas rejects is wrong (a blank is missing), so our own rule decides.
            values[unparsed] = _parse_unique(series.iloc[unparsed].astype(str), path, number)
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        row = int(infinite[0])
        raise _bad(path, str(series.name), int(series.index[row]), f"{series.iloc[row]} is not a finite number")
    return values


def _times(series: "pd.Series[Any]", path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    if isinstance(series.dtype, pd.DatetimeTZDtype) or pd.api.types.is_datetime64_any_dtype(series):
        if series.isna().any():
            row = int(series.index[int(series.isna().to_numpy().argmax())])
            raise _bad(path, str(series.name), row, "the timestamp is missing")
        return pd.DatetimeIndex(pd.to_datetime(series, utc=True)).as_unit("us").asi8
    return np.asarray(_parse_unique(series, path, timestamp_us), dtype=np.int64)


def _labels(series: "pd.Series[Any]", path: Path) -> Flags:
    return both_classes(parsed_labels(series, path), str(series.name), path)


def both_classes(labels: Flags, column: str, path: Path) -> Flags:
    """The labels, if there are two kinds of them.

    Raises:
        DataError: there are not.
    """
    if labels.all() or not labels.any():
        only = "1" if labels.all() else "0"
        raise DataError(f"{path}: column {column!r} has only the label {only}; both classes are needed")
    return labels


def parsed_labels(series: "pd.Series[Any]", path: Path) -> Flags:
    """0/1 or true/false as flags.

    Raises:
        DataError: a value is another, or missing.
    """

    def parse(value: Any) -> bool:
        text = str(canonical_key(value)).lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if value is None:
            raise ValueError("the label is missing; allowed are 0/1 or true/false")
        raise ValueError(f"{value!r} is not a label; allowed are 0/1 or true/false")

    return np.asarray(_parse_unique(series, path, parse), dtype=bool)


def _ids(series: "pd.Series[Any]", path: Path) -> Keys:
    return _unique_ids(_keys(series, path), str(series.name), path)


def _unique_ids(ids: Keys, column: str, path: Path) -> Keys:
    none_missing(ids, column, path)
    repeated = pd.Series(ids).duplicated().to_numpy()
    if repeated.any():
        row = int(repeated.argmax())
        first = int(np.argmax(ids == ids[row]))
        raise _bad(
            path,
            column,
            row,
            f"id {ids[row]!r} was already used in row {first + 1}; ids must be unique",
        )
    return ids


def none_missing(values: Keys, column: str, path: Path) -> None:
    """Every row must have a key. values (N,): in the order of the file.

    Raises:
        DataError: one has none.
    """
    missing = np.array([value is None for value in values], dtype=bool)
    if missing.any():
        raise _bad(path, column, int(missing.argmax()), "the value is missing")


def all_known(values: Keys, column: str, allowed: Sequence[str], path: Path) -> None:
    """Every value (N,) must be one of a few.

    Raises:
        DataError: one is another.
    """
    unknown = ~np.isin(values.astype(str), allowed)
    if unknown.any():
        row = int(unknown.argmax())
        raise _bad(path, column, row, f"{values[row]!r} is unknown; allowed are {', '.join(allowed)}")


def fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1024 * 1024):
            digest.update(block)
    return digest.hexdigest()
