"""Packed rows: what goes in comes out, of one view among many, of today's layout and of older ones."""

import math

import numpy as np
import pytest
from assay_features.vectors import (
    NEVER_US,
    NOT_FOUND,
    NULL,
    PRESENT,
    RecordKeys,
    VectorReader,
    ViewLayout,
    read_rows,
    record_prefix,
    segment_times,
    with_segment,
    without_view,
)
from assay_platform.errors import DataError
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from hypothesis import given, settings
from hypothesis import strategies as st

LAYOUT = ViewLayout("v", (("x", "float"), ("n", "int"), ("b", "bool"), ("t", "time"), ("s", "str"), ("raw", "bytes")))
OTHER = ViewLayout("w", (("x", "float"),))

values = st.fixed_dictionaries(
    {
        "x": st.none() | st.floats(allow_nan=False),
        "n": st.none() | st.integers(-(2**63), 2**63 - 1),
        "b": st.none() | st.booleans(),
        "t": st.none() | st.integers(-(2**40), 2**40),
        "s": st.none() | st.text(max_size=9).map(str.encode),
        "raw": st.none() | st.binary(max_size=300),
    }
)


@settings(deadline=None)
@given(st.lists(st.none() | st.tuples(values, st.integers(-(2**50), 2**50), st.booleans()), max_size=8))
def test_any_rows_come_back(rows: list[tuple[dict[str, object], int, bool] | None]) -> None:
    records = []
    for row in rows:
        record = None
        if row is not None:
            given_values, event_us, with_other = row
            if with_other:
                record = with_segment(record, OTHER.pack({"x": 7.0}, 1))
            record = with_segment(record, LAYOUT.pack({"x": 0.5}, 0))
            record = with_segment(record, LAYOUT.pack(given_values, event_us))
        records.append(record)
    names = [name for name, _ in LAYOUT.fields]
    read = read_rows(records, LAYOUT, names)
    for i, row in enumerate(rows):
        if row is None:
            assert (read.status[i] == NOT_FOUND).all()
            assert read.event_us[i] == NEVER_US
            continue
        assert read.event_us[i] == row[1]
        for f, name in enumerate(names):
            expected = row[0][name]
            assert read.status[i, f] == (NULL if expected is None else PRESENT)
            if expected is not None:
                assert read.columns[name][i] == expected
        if row[2]:
            other = read_rows([records[i]], OTHER, ["x"])
            assert other.columns["x"][0] == 7.0
            assert segment_times(records[i], "w") == (1, NEVER_US)


def test_columns_are_packed_like_rows() -> None:
    layout = ViewLayout("v", (("x", "float"), ("n", "int")))
    x, n = np.array([1.5, math.nan, -2.0]), np.array([1, None, 3], dtype=object)
    times = np.array([5, 6, 7])
    packed = layout.pack_columns({"x": x, "n": n}, times, np.full(3, NEVER_US))
    one_by_one = [layout.pack({"x": None if math.isnan(x[i]) else x[i], "n": n[i]}, int(times[i])) for i in range(3)]
    assert packed == one_by_one
    mixed = ViewLayout("v", (("x", "float"), ("s", "str")))
    [first, second] = mixed.pack_columns({"x": [1.0, 2.0], "s": [b"a", None]}, times[:2], times[:2])
    read = read_rows([first, second], mixed, ["s", "x"])
    assert read.columns["s"].tolist() == [b"a", None]
    assert read.status.tolist() == [[PRESENT, PRESENT], [NULL, PRESENT]]


def test_a_view_that_changed_reads_its_older_rows_by_name_and_kind() -> None:
    old = ViewLayout("v", (("gone", "float"), ("x", "float"), ("n", "int")))
    new = ViewLayout("v", (("n", "float"), ("x", "float"), ("added", "str")))
    record = old.pack({"gone": 1.0, "x": 2.0, "n": 3}, 9)
    read = read_rows([record], new, ["n", "x", "added"], lambda i: ViewLayout.from_json(old.to_json()))
    assert read.columns["x"][0] == 2.0
    assert read.status[0].tolist() == [NULL, PRESENT, NULL]
    unknown = read_rows([record], new, ["x"])
    assert unknown.status[0, 0] == NOT_FOUND
    with pytest.raises(DataError, match="no field 'y'; it has n, x, added"):
        read_rows([record], new, ["y"])


def test_removing_a_view_leaves_the_others() -> None:
    record = with_segment(OTHER.pack({"x": 1.0}, 1), LAYOUT.pack({"x": 2.0}, 2))
    left = without_view(record, "v")
    assert read_rows([left], OTHER, ["x"]).columns["x"][0] == 1.0
    assert without_view(left, "w") == b""


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3, unique=True), st.data())
def test_keys_are_those_of_feast(names: list[str], data: st.DataObject) -> None:
    parts = [data.draw(st.text(max_size=9)) for _ in names]
    entity_key = EntityKey(join_keys=names, entity_values=[Value(string_val=part) for part in parts])
    expected = record_prefix("p", "f") + bytes(serialize_entity_key(entity_key, 3))
    assert RecordKeys("p", "f", names).of_parts(parts) == expected


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["both", "swapped", "one", "old", "none"]), max_size=12), st.randoms(use_true_random=False)
)
def test_vectors_of_many_views_equal_each_view_alone(kinds: list[str], random: object) -> None:
    """Records laid out alike take the fast way; others, of any mixture, come out the same."""
    a = ViewLayout("a", (("x", "float"), ("n", "int"), ("b", "bool")))
    b = ViewLayout("b", (("y", "float"),))
    older = ViewLayout("b", (("gone", "int"), ("y", "float")))
    records: list[bytes | None] = []
    for i, kind in enumerate(kinds):
        row = a.pack({"x": i + 0.5, "n": None if i % 3 == 0 else i, "b": i % 2 == 0}, i)
        other = (older if kind == "old" else b).pack({"y": -float(i)}, 100 + i)
        records.append(
            {"both": row + other, "swapped": other + row, "one": row, "old": row + other, "none": None}[kind]
        )
    reader = VectorReader([(b, ["y"]), (a, ["b", "n", "x"])])
    vectors = reader.read(records, lambda layout_id: older if layout_id == older.id else None)
    rows_a = read_rows(records, a, ["b", "n", "x"])
    rows_b = read_rows(records, b, ["y"], lambda _: older)
    np.testing.assert_array_equal(vectors.status, np.concatenate([rows_b.status, rows_a.status], axis=1))
    np.testing.assert_array_equal(vectors.event_us, np.stack([rows_b.event_us, rows_a.event_us], axis=1))
    for field, (kind, expected) in enumerate(
        [
            ("float", rows_b.columns["y"]),
            ("bool", rows_a.columns["b"]),
            ("int", rows_a.columns["n"]),
            ("float", rows_a.columns["x"]),
        ]
    ):
        np.testing.assert_array_equal(vectors.column(field, kind), expected)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no number 'z'"):
        VectorReader([(a, ["z"])])
