"""The point-in-time join: for each asked (key, time), the newest row of that key that is not later.

Keys become integers by Arrow's hash tables, rows are put into buckets by a counting sort, each bucket is sorted by
time, and each asked row is a binary search in its bucket: O(n log n) with small constants, one pass over memory, on
all cores. No key is ever merged with all of its rows, which is what makes the usual data-frame join slow and large. No
Feast is needed here.
"""

# N rows of the source, M asked rows, V keys

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from assay_platform.errors import DataError
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_Function = TypeVar("_Function", bound=Callable[..., Any])
_MICROSECONDS = pa.timestamp("us", tz="UTC")
# What stands for a missing time: earlier than any.
MISSING_US = np.iinfo(np.int64).min
_ROWS_A_THREAD = 50_000
_LARGE_BUCKET = 64


def _compiled(function: _Function) -> _Function:
    return cast(_Function, numba.njit(cache=True, nogil=True)(function))


def microseconds(column: pa.ChunkedArray) -> Ints:
    """Times as µs since 1970 UTC, MISSING_US where null; those without a zone are UTC, nanoseconds are cut."""
    if pa.types.is_timestamp(column.type) and column.type.tz is None:
        column = pc.assume_timezone(column, "UTC")
    numbers = column.cast(_MICROSECONDS, safe=False).cast(pa.int64())
    return np.asarray(pc.fill_null(numbers, MISSING_US).to_numpy())


def key_codes(
    source: pa.Table, source_keys: Sequence[str], asked: pa.Table, asked_keys: Sequence[str]
) -> tuple[Ints, Ints, int]:
    """Keys of both tables as the same integers below V, -1 for null or, of the asked, unknown; and V.

    Key columns may be dictionary-encoded; that saves work where one table is joined with many.

    Raises:
        DataError: a key column has types that cannot be compared.
    """
    if not source_keys:
        return np.zeros(len(source), dtype=np.int64), np.zeros(len(asked), dtype=np.int64), 1
    have = want = np.zeros(0, dtype=np.int64)
    num_keys = 1
    for place, (source_key, asked_key) in enumerate(zip(source_keys, asked_keys, strict=True)):
        codes, values = _encoded(source[source_key])
        wanted = _found(asked[asked_key], values, f"entity_df column {asked_key!r}")
        if place == 0:
            have, want, num_keys = codes, wanted, len(values)
            continue
        # Pairs that occur in the source get numbers of their own; others cannot match.
        joint = np.where((have < 0) | (codes < 0), -1, have * len(values) + codes)
        pairs = np.unique(joint[joint >= 0])
        have = np.where(joint < 0, -1, np.searchsorted(pairs, joint))
        asked_joint = np.where((want < 0) | (wanted < 0), -1, want * len(values) + wanted)
        near = np.minimum(np.searchsorted(pairs, asked_joint), max(len(pairs) - 1, 0))
        known = (asked_joint >= 0) & (pairs[near] == asked_joint) if len(pairs) else np.zeros(len(asked), dtype=bool)
        want, num_keys = np.where(known, near, -1), len(pairs)
    return have, want, num_keys


def _encoded(column: pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    encoded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
    encoded = encoded.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0) if encoded.num_chunks else pa.DictionaryArray.from_arrays([], [])
    return np.asarray(pc.fill_null(encoded.indices, -1)).astype(np.int64), encoded.dictionary


def _found(column: pa.ChunkedArray, values: pa.Array, what: str) -> Ints:
    if not len(values):
        return np.full(len(column), -1)
    codes, asked = _encoded(column)
    try:
        asked = asked.cast(values.type)
    except pa.ArrowException as error:
        raise DataError(f"{what} has type {asked.type}, the feature view's key has {values.type} ({error})") from error
    places = np.asarray(pc.fill_null(pc.index_in(asked, value_set=values), -1)).astype(np.int64)
    return np.append(places, -1)[codes]


@_compiled
def _bucketed(codes: Ints, source_us: Ints, num_keys: int) -> tuple[Ints, Ints, Ints]:
    """Counting sort: rows in the order of the file, bucket by bucket; their times; and where each bucket begins."""
    bounds = np.zeros(num_keys + 1, dtype=np.int64)
    for code in codes:
        if code >= 0:
            bounds[code + 1] += 1
    for key in range(num_keys):
        bounds[key + 1] += bounds[key]
    place = bounds[:-1].copy()
    rows = np.empty(bounds[num_keys], dtype=np.int64)
    times = np.empty(bounds[num_keys], dtype=np.int64)
    for row in range(len(codes)):
        code = codes[row]
        if code >= 0:
            rows[place[code]] = row
            times[place[code]] = source_us[row]
            place[code] += 1
    return rows, times, bounds


@_compiled
def _sort_buckets(first: int, end: int, rows: Ints, times: Ints, bounds: Ints, created: Ints) -> None:
    """Order the rows of buckets `first` to `end` by (time, created, row), and their times. created may be empty."""
    for key in range(first, end):
        low, high = bounds[key], bounds[key + 1]
        if high - low > _LARGE_BUCKET:
            own, own_times = rows[low:high].copy(), times[low:high].copy()
            if len(created):
                order = np.argsort(created[own], kind="mergesort")
                own, own_times = own[order], own_times[order]
            order = np.argsort(own_times, kind="mergesort")
            rows[low:high], times[low:high] = own[order], own_times[order]
            continue
        for i in range(low + 1, high):  # most buckets are short, and often in order already
            row, time = rows[i], times[i]
            j = i - 1
            while j >= low and (
                times[j] > time or (len(created) > 0 and times[j] == time and created[rows[j]] > created[row])
            ):
                rows[j + 1], times[j + 1] = rows[j], times[j]
                j -= 1
            rows[j + 1], times[j + 1] = row, time


@_compiled
def _search(
    first: int,
    end: int,
    rows: Ints,
    times: Ints,
    created: Ints,
    bounds: Ints,
    want: Ints,
    asked: Ints,
    ttl_us: int,
    out: Ints,
) -> None:
    """The match of asked rows `first` to `end`. created: empty, or rows must be created by the asked time too."""
    for i in range(first, end):
        out[i] = -1
        code, time = want[i], asked[i]
        if code < 0 or time == MISSING_US or bounds[code] == bounds[code + 1]:
            continue
        start, left = bounds[code], bounds[code + 1] - bounds[code]
        place = start
        while left > 1:  # no branch to predict: the step is taken or is zero
            half = left // 2
            place += half * (times[place + half] <= time)
            left -= half
        if times[place] > time:
            continue
        while place >= start and len(created) and not (MISSING_US < created[place] <= time):
            place -= 1
        if place >= start and times[place] != MISSING_US and (ttl_us < 0 or time - times[place] <= ttl_us):
            out[i] = rows[place]


def latest_rows(
    have: Ints,
    source_us: Ints,
    want: Ints,
    asked_us: Ints,
    *,
    num_keys: int,
    created_us: Ints | None = None,
    ttl_us: int | None = None,
    only_created: bool = False,
) -> Ints:
    """(M,) row of the source for each asked row, -1 where there is none.

    Of rows with one key and time the one created last holds, of those the last in the file. ttl_us: a row of just
    that age still counts. only_created: rows created after the asked time do not count, nor those without one.
    """
    rows, times, bounds = _bucketed(have, source_us, num_keys)
    by_created = np.empty(0, dtype=np.int64) if created_us is None else created_us
    _in_parallel(bounds, lambda a, b: _sort_buckets(a, b, rows, times, bounds, by_created))
    created = created_us[rows] if only_created and created_us is not None else np.empty(0, dtype=np.int64)
    out = np.empty(len(want), dtype=np.int64)
    limit = -1 if ttl_us is None else ttl_us
    each = np.arange(len(want) + 1)
    _in_parallel(each, lambda a, b: _search(a, b, rows, times, created, bounds, want, asked_us, limit, out))
    return out


def _in_parallel(load: Ints, work: Callable[[int, int], None]) -> None:
    """Call work(first, end) over parts of about equal load, on as many threads as there are cores. load ascends."""
    num_parts = max(1, min(os.cpu_count() or 1, int(load[-1]) // _ROWS_A_THREAD))
    cuts = np.searchsorted(load, load[-1] * np.arange(1, num_parts) // num_parts).tolist()
    edges = [0, *cuts, len(load) - 1]
    with ThreadPoolExecutor(num_parts) as pool:
        list(pool.map(lambda i: work(edges[i], edges[i + 1]), range(num_parts)))


@_compiled
def _gather(values: NDArray[Any], rows: Ints, out: NDArray[Any]) -> None:
    for i in range(len(rows)):
        row = rows[i]
        if row >= 0:
            out[i] = values[row]


def gathered(table: pa.Table, columns: Sequence[str], rows: Ints) -> list[pa.ChunkedArray]:
    """The columns at given rows, null for -1; under a null of a float column there is NaN (see `frame_of`)."""
    index = pa.array(rows, mask=rows < 0)
    found = rows >= 0
    found_bits = pa.py_buffer(np.packbits(found, bitorder="little")) if index.null_count else None

    def take(name: str) -> pa.ChunkedArray:
        column = table[name].combine_chunks() if table[name].num_chunks != 1 else table[name].chunk(0)
        kind = column.type
        if not pa.types.is_primitive(kind) or kind.bit_width < 8:
            return pa.chunked_array([pc.take(column, index, boundscheck=False)])
        floating = pa.types.is_floating(kind)
        dtype = np.dtype(kind.to_pandas_dtype() if floating else f"u{kind.bit_width // 8}")
        unsigned = f"u{dtype.itemsize}"
        values = np.frombuffer(column.buffers()[1] or b"", dtype=unsigned)[column.offset :]
        out = np.full(len(rows), np.nan, dtype) if floating else np.zeros(len(rows), dtype)
        _gather(values, rows, out.view(unsigned))
        bits, num_missing = found_bits, index.null_count
        if column.null_count:
            valid = found & column.is_valid().to_numpy(zero_copy_only=False)[rows]
            bits, num_missing = pa.py_buffer(np.packbits(valid, bitorder="little")), int((~valid).sum())
            if floating:
                out[~valid] = np.nan
        return pa.chunked_array([pa.Array.from_buffers(kind, len(rows), [bits, pa.py_buffer(out)], num_missing)])

    return [take(name) for name in columns]


def frame_of(table: pa.Table, given: pd.DataFrame, *, gathered: Sequence[str]) -> pd.DataFrame:
    """The table as a data frame. Columns of `given` are its own; floats that `gathered` made are not copied."""
    handed = dict.fromkeys(gathered)
    columns: dict[str, Any] = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        if field.name in given.columns:
            columns[field.name] = given[field.name].array.copy()
        elif field.name in handed and pa.types.is_floating(field.type) and column.num_chunks == 1:
            columns[field.name] = np.frombuffer(column.chunk(0).buffers()[1], dtype=field.type.to_pandas_dtype())
        else:
            columns[field.name] = column.to_pandas()
    return pd.DataFrame(columns, copy=False)
