"""Bad tables: the error names the file, the column, the row and what is allowed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from assay_features.definitions import FeaturePlan, Window
from assay_features.schema import ACCOUNT, Account, FraudSchema, RecommendSchema
from assay_pipelines.datasets import table
from assay_pipelines.datasets.table import count_rows, load_newest, load_table
from assay_platform.errors import DataError

SCHEMA = FraudSchema(
    id="id", timestamp="t", label="y", amount="a", entities=("card",), numeric=("a",), categorical=("kind",)
)
PLAN = FeaturePlan((Window(entity="card", aggregate="sum", column="a", length_s=60),))
WITH_ACCOUNTS = replace(SCHEMA, numeric=("a", "spent"), account=Account(total="spent", within=("card",)))
PLAN_OF_ACCOUNTS = FeaturePlan((*PLAN.definitions, Window(entity=ACCOUNT, aggregate="count", length_s=60)))
GOOD = pd.DataFrame(
    {
        "id": ["1", "2", "3"],
        "t": [3, 1, 2],
        "y": [0, 1, 0],
        "card": ["x", None, "007"],
        "a": [1, 2, 3],
        "kind": list("pqp"),
    }
)


def written(folder: Path, frame: pd.DataFrame, name: str = "events.csv") -> Path:
    path = folder / name
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path, index=False)
    return path


@pytest.mark.parametrize("name", ["events.csv", "events.parquet"])
def test_rows_come_back_in_order_of_time(tmp_path: Path, name: str) -> None:
    events = load_table(written(tmp_path, GOOD, name), SCHEMA).events
    assert events.ids is not None
    assert events.ids.tolist() == ["2", "3", "1"]
    assert events.keys["card"].tolist() == [None, "007", "x"]
    assert events.time_us.tolist() == [1_000_000, 2_000_000, 3_000_000]


@pytest.mark.parametrize(("schema", "plan"), [(SCHEMA, PLAN), (WITH_ACCOUNTS, PLAN_OF_ACCOUNTS)])
@pytest.mark.parametrize("name", ["events.csv", "events.parquet"])
def test_the_newest_rows_read_in_chunks_are_those_of_the_whole_table(
    tmp_path: Path, name: str, schema: FraudSchema, plan: FeaturePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_ROWS_A_CHUNK", 7)
    rng = np.random.default_rng(0)
    num = 100
    frame = pd.DataFrame({
        "id": [f"e{i}" for i in range(num)], "t": rng.integers(0, 60, num), "y": rng.integers(0, 2, num),
        "card": rng.choice(np.array(["a", "b", None], dtype=object), num), "a": rng.normal(size=num).round(2),
        "kind": rng.choice(["p", "q"], num), "spent": rng.integers(0, 4, num),
    })  # fmt: skip
    path = written(tmp_path, frame, name)
    whole, part = load_table(path, schema), load_newest(path, schema, plan, 30)
    assert count_rows(path) == num
    assert part.fingerprint == whole.fingerprint
    for held, found in ((whole.events.take(slice(num - 30, None)), part.events), (whole.history, part.history)):
        for one, other in ((held.time_us, found.time_us), (held.ids, found.ids), (held.labels, found.labels)):
            np.testing.assert_array_equal(one, other)
        for column, values in found.keys.items():
            assert values.tolist() == held.keys[column].tolist()
        for column, values in found.numbers.items():
            np.testing.assert_array_equal(values, held.numbers[column])
    assert part.events.keys.keys() == whole.events.keys.keys()
    assert "kind" not in part.history.keys, "no feature needs it"


def with_value(column: str, row: int, value: object) -> pd.DataFrame:
    frame = GOOD.astype(object)
    frame.loc[row, column] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "named"),
    [
        (GOOD.drop(columns="a"), "has no column 'a'"),
        (with_value("t", 1, "yesterday"), "column 't', row 2: 'yesterday' is neither epoch seconds nor ISO 8601"),
        (with_value("t", 2, None), "column 't', row 3"),
        (with_value("t", 0, "1e300"), "years 1 to 9999"),
        (with_value("y", 2, 2), "column 'y', row 3: '2' is not a label; allowed are 0/1 or true/false"),
        (with_value("y", 0, None), "column 'y', row 1: the label is missing"),
        (GOOD.assign(y=1), "column 'y' has only the label 1"),
        (GOOD.assign(y=0), "column 'y' has only the label 0"),
        (with_value("a", 1, "much"), "column 'a', row 2: 'much' is not a number"),
        (with_value("a", 2, "inf"), "column 'a', row 3: inf is not a finite number"),
        (with_value("id", 2, "1"), "column 'id', row 3: id '1' was already used in row 1"),
        (with_value("id", 1, None), "column 'id', row 2: the value is missing"),
        (with_value("card", 2, "9" * 300), "column 'card', row 3: has 300 characters; at most 256"),
        (GOOD.iloc[:0], "has no rows"),
    ],
)
@pytest.mark.parametrize("in_chunks", [False, True])
def test_a_bad_table_is_named(
    tmp_path: Path, frame: pd.DataFrame, named: str, in_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "_ROWS_A_CHUNK", 2)
    path = written(tmp_path, frame)
    with pytest.raises(DataError) as error:
        load_newest(path, SCHEMA, PLAN, 3) if in_chunks else load_table(path, SCHEMA)
    assert named in str(error.value)
    assert str(path) in str(error.value)


def test_infinity_in_parquet_is_named_too(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.assign(a=[1.0, np.nan, np.inf]), "events.parquet")
    with pytest.raises(DataError, match="row 3: inf"):
        load_table(path, SCHEMA)


@pytest.mark.parametrize(
    ("name", "content"), [("e.csv", b""), ("e.parquet", b"not parquet"), ("e.csv", b"\xff\xfe\xfa\n\xff")]
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=name):
        load_table(path, SCHEMA)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_table(tmp_path / "none.csv", SCHEMA)


def test_true_false_and_iso_times_are_read(tmp_path: Path) -> None:
    frame = GOOD.assign(
        y=["false", "True", "FALSE"], t=["2024-01-03", "2024-01-01T00:00:00Z", "2024-01-02 01:00+01:00"]
    )
    events = load_table(written(tmp_path, frame), SCHEMA).events
    assert events.labels is not None
    assert events.labels.tolist() == [True, False, False]
    assert np.diff(events.time_us).tolist() == [86_400_000_000] * 2


def test_an_interaction_without_user_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, pd.DataFrame({"u": ["a", None], "i": ["x", "y"], "t": [1, 2]}))
    with pytest.raises(DataError, match="column 'u', row 2: the value is missing"):
        load_table(path, RecommendSchema(user="u", item="i", timestamp="t"))
