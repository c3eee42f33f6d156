"""A table in chunks is the table at once."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from assay_features.schema import RecommendSchema
from assay_pipelines.console import Reporter
from assay_pipelines.datasets import table as table_module
from assay_pipelines.datasets.interactions import load_interactions
from assay_pipelines.datasets.table import load_table
from assay_pipelines.options import RunOptions
from assay_pipelines.recommend import pipeline
from assay_pipelines.recommend.pipeline import Prepared
from assay_platform.config import load_config
from assay_platform.errors import DataError

pytestmark = pytest.mark.ray
SCHEMA = RecommendSchema(
    user="user", item="item", timestamp="time", weight="rating", action="did", actions=("view", "buy")
)
NUM_ROWS = 700


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "user": rng.integers(0, 50, NUM_ROWS), "item": [f"i{i}" for i in rng.integers(0, 90, NUM_ROWS)],
        "time": rng.integers(10**9, 10**9 + 300, NUM_ROWS),
        "rating": np.where(rng.random(NUM_ROWS) < 0.1, np.nan, rng.random(NUM_ROWS)),
        "did": rng.choice(["view", "buy"], NUM_ROWS),
    })  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "_ROWS_A_CHUNK", 100)


def written(rows: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        rows.to_csv(path, index=False)
    else:
        pq.write_table(pa.Table.from_pandas(rows, preserve_index=False), path, row_group_size=60)
    return path


@pytest.mark.parametrize("name", ["events.csv", "events.parquet"])
def test_chunks_are_put_together_in_order_of_time_and_of_the_file(name: str, tmp_path: Path, ray_session: str) -> None:
    path = written(frame(), tmp_path / name)
    done: list[float] = []
    here, there = (
        load_interactions(path, SCHEMA, on_progress=lambda part, _: done.append(part)),
        load_table(path, SCHEMA),
    )
    np.testing.assert_array_equal(here.events.time_us, there.events.time_us)
    for column in SCHEMA.keys:
        assert here.events.keys[column].tolist() == there.events.keys[column].tolist()
    np.testing.assert_array_equal(here.events.numbers["rating"], there.events.numbers["rating"])
    assert here.fingerprint == there.fingerprint
    assert done[-1] == 1.0
    if name.endswith("parquet"):
        assert len(done) > 3


@pytest.mark.parametrize(
    ("column", "value"), [("user", None), ("item", None), ("did", "stole"), ("time", "yesterday"), ("rating", "good")]
)
def test_errors_name_the_same_row(column: str, value: object, tmp_path: Path, ray_session: str) -> None:
    rows = frame().astype({column: object})
    rows.loc[437, column] = value
    path = written(rows, tmp_path / "events.csv")
    with pytest.raises(DataError, match=rf"column '{column}', row 438: ") as at_once:
        load_table(path, SCHEMA)
    with pytest.raises(DataError) as in_chunks:
        load_interactions(path, SCHEMA)
    assert str(in_chunks.value) == str(at_once.value)


def test_a_run_reads_a_large_table_in_chunks(tmp_path: Path, ray_session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RunOptions(
        config=load_config(), application="recommend", data="own", table=written(frame(), tmp_path / "events.parquet"),
        schema=SCHEMA, schema_folder=tmp_path, model_name="recommend-own",
    )  # fmt: skip
    at_once = Prepared(options, Reporter())
    monkeypatch.setattr(pipeline, "MOST_AT_ONCE", NUM_ROWS - 1)
    monkeypatch.delattr(pipeline, "load_table")
    in_chunks = Prepared(options, Reporter())
    assert in_chunks.items == at_once.items
    np.testing.assert_array_equal(in_chunks.user, at_once.user)
    assert (in_chunks.test != at_once.test).nnz == 0
