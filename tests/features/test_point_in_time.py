"""The join against an obvious loop: ties, nulls, duplicates, TTL, created times, keys of one or two columns."""

from datetime import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from assay_features.point_in_time import MISSING_US, frame_of, gathered, key_codes, latest_rows, microseconds
from assay_platform.errors import DataError
from hypothesis import given, settings
from hypothesis import strategies as st

source_rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", None]),
        st.sampled_from([1, 2, None]),
        st.integers(0, 12),
        st.none() | st.integers(0, 12),
    ),
    max_size=200,
)
asked_rows = st.lists(
    st.tuples(st.sampled_from(["a", "b", "new", None]), st.sampled_from([1, 2, 9, None]), st.integers(-2, 15)),
    max_size=30,
)


def table(rows: list[tuple[object, ...]]) -> pa.Table:
    return pa.table({"k": pa.array([r[0] for r in rows], pa.string()), "n": pa.array([r[1] for r in rows], pa.int64())})


@pytest.mark.parametrize("keys", [["k"], ["k", "n"], []])
@settings(max_examples=80, deadline=None)
@given(
    source=source_rows,
    asked=asked_rows,
    ttl=st.none() | st.integers(0, 6),
    use_created=st.booleans(),
    only=st.booleans(),
)
def test_the_latest_row_is_found(
    keys: list[str],
    source: list[tuple[str | None, int | None, int, int | None]],
    asked: list[tuple[str | None, int | None, int]],
    ttl: int | None,
    use_created: bool,
    only: bool,
) -> None:
    have, want, num_keys = key_codes(table(source), keys, table(asked), keys)
    created = np.array([MISSING_US if r[3] is None else r[3] for r in source], dtype=np.int64)
    got = latest_rows(
        have, np.array([r[2] for r in source], dtype=np.int64), want, np.array([r[2] for r in asked], dtype=np.int64),
        num_keys=num_keys, created_us=created if use_created else None, ttl_us=ttl, only_created=only,
    )  # fmt: skip
    places = [{"k": 0, "n": 1}[key] for key in keys]
    for i, row in enumerate(asked):
        fits = []
        for j, other in enumerate(source):
            own, asked_key = [other[p] for p in places], [row[p] for p in places]
            if None in own or own != asked_key or other[2] > row[2]:
                continue
            if only and use_created and (other[3] is None or other[3] > row[2]):
                continue
            fits.append((other[2], created[j] if use_created else 0, j))
        best = max(fits, default=None)
        expected = -1 if best is None or (ttl is not None and row[2] - best[0] > ttl) else best[2]
        assert got[i] == expected


def test_times_of_every_kind_are_microseconds_and_missing_ones_are_marked() -> None:
    naive = pa.chunked_array([pa.array([0, None, 1_500], pa.timestamp("ms"))])
    zoned = pa.chunked_array([pa.array([0, None, 1_500_000_999], pa.timestamp("ns", tz="Europe/Oslo"))])
    for column in (naive, zoned):
        assert microseconds(column).tolist() == [0, MISSING_US, 1_500_000]


KINDS = {
    "double": pa.float64(), "float": pa.float32(), "long": pa.int64(), "byte": pa.int8(), "time": pa.timestamp("us"),
    "flag": pa.bool_(), "text": pa.string(), "list": pa.list_(pa.int64()), "never": pa.null(),
}  # fmt: skip


def value(kind: pa.DataType, number: int | None) -> object:
    if number is None or pa.types.is_null(kind):
        return None
    if pa.types.is_list(kind):
        return [number] * (number % 3)
    return {"string": str(number), "bool": number % 2 == 0, "timestamp[us]": datetime(2024, 1, number)}.get(
        str(kind), number
    )


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.none() | st.integers(1, 28), max_size=20),
    cut=st.integers(0, 5),
    data=st.data(),
)
def test_gathered_columns_equal_a_loop_in_arrow_and_in_pandas(
    numbers: list[int | None], cut: int, data: st.DataObject
) -> None:
    whole = pa.table({n: pa.array([value(kind, x) for x in numbers], kind) for n, kind in KINDS.items()})
    # An offset into the buffers, and two chunks.
    table = pa.concat_tables([whole.slice(cut), whole])
    rows = np.array(data.draw(st.lists(st.integers(-1, len(table) - 1), min_size=1, max_size=30)))
    columns = gathered(table, list(KINDS), rows)
    for name, column in zip(KINDS, columns, strict=True):
        have = table[name].to_pylist()
        assert column.to_pylist() == [None if row < 0 else have[row] for row in rows]
        column.validate(full=True)
    given_rows = pd.DataFrame({"who": [f"w{i}" for i in range(len(rows))]})
    joined = pa.table([pa.array(given_rows["who"]), *columns], names=["who", *KINDS])
    frame = frame_of(joined, given_rows, gathered=list(KINDS))
    pd.testing.assert_frame_equal(frame, joined.to_pandas())
    frame.loc[0, ["who", "double", "float"]] = "me", 5.0, 5.0  # its own, and writable
    assert given_rows["who"][0] == "w0"


def test_keys_of_another_type_are_named() -> None:
    asked = pa.table({"k": pa.array(["one"], pa.string())})
    with pytest.raises(DataError, match="entity_df column 'k' has type string, the feature view's key has int64"):
        key_codes(pa.table({"k": [1]}), ["k"], asked, ["k"])
