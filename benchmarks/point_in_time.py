"""Point-in-time join of training rows: our offline store against Feast's own (dask), through the same Feast API.

Both get the same Parquet file and the same entity rows. Before anything is timed the outputs are compared on the rows
that the peer returns: Feast's dask store drops entity rows whose features are all missing, and that count is printed
as a case of its own. Limit: reading the view's file and copying the entity frame, without any join.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from assay_features.feast.offline_store import CLASS_PATH
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Float64

NUM_FEATURES, NUM_KEYS, RUNS = 20, 20_000, 3
SIZES = (10_000, 100_000)


def tables(num_rows: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The view's rows and the entity rows; a tenth of the entity rows come before their key's first row."""
    rng = np.random.default_rng(0)
    start = pd.Timestamp("2024-01-01", tz="UTC")

    def times(low_h: float, high_h: float) -> pd.Series:
        return pd.Series(start + pd.to_timedelta(rng.uniform(low_h, high_h, num_rows), unit="h")).dt.floor("us")

    keys = [f"k{i}" for i in rng.integers(0, NUM_KEYS, num_rows)]
    view = pd.DataFrame({"key": keys, "event_timestamp": times(0, 1000)})
    for i in range(NUM_FEATURES):
        view[f"f{i}"] = rng.normal(size=num_rows)
    asked = pd.DataFrame({"key": [f"k{i}" for i in rng.integers(0, NUM_KEYS, num_rows)]})
    asked["event_timestamp"] = times(-100, 1000)
    asked["row"] = np.arange(num_rows)
    return view, asked


def open_store(folder: Path, offline: str, source_path: Path) -> FeatureStore:
    """A Feast store with one view and the named offline store."""
    folder.mkdir()
    config = RepoConfig(
        project="bench", provider="local", registry=str(folder / "registry.db"), entity_key_serialization_version=3,
        offline_store={"type": offline}, online_store={"type": "sqlite", "path": str(folder / "online.db")},
    )  # fmt: skip
    store = FeatureStore(config=config)
    key = Entity(name="key", join_keys=["key"], value_type=ValueType.STRING)
    schema = [Field(name=f"f{i}", dtype=Float64) for i in range(NUM_FEATURES)]
    source = FileSource(path=str(source_path), timestamp_field="event_timestamp")
    store.apply([key, FeatureView(name="view", entities=[key], schema=schema, source=source)])
    return store


def measure(num_rows: int) -> list[dict[str, Any]]:
    """One size: compare, then time in turn."""
    view, asked = tables(num_rows)
    refs = [f"view:f{i}" for i in range(NUM_FEATURES)]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "view.parquet"
        pq.write_table(pa.Table.from_pandas(view, preserve_index=False), path, coerce_timestamps="us")
        stores = {"ours": open_store(Path(scratch) / "a", CLASS_PATH, path),
                  "peer": open_store(Path(scratch) / "b", "dask", path)}  # fmt: skip

        def retrieve(name: str) -> pd.DataFrame:
            return stores[name].get_historical_features(entity_df=asked, features=refs).to_df()

        ours, peer = retrieve("ours"), retrieve("peer").set_index("row").sort_index()
        assert ours["row"].tolist() == asked["row"].tolist()
        np.testing.assert_allclose(ours.set_index("row").loc[peer.index, "f0":], peer.loc[:, "f0":])
        seconds: dict[str, list[float]] = {"ours": [], "peer": [], "limit": []}
        for _ in range(RUNS):
            for name in ("ours", "peer", "limit"):
                began = time.perf_counter()
                if name == "limit":
                    pq.read_table(path).to_pandas()
                    asked.copy()
                else:
                    retrieve(name)
                seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    spread = (max(seconds["ours"]) - min(seconds["ours"])) / median["ours"]
    common = {"peer_name": "feast 0.67 dask", "spread": round(spread, 3), "runs": RUNS}
    return [
        {"case": f"{num_rows} rows x {NUM_FEATURES} features", "ours": round(median["ours"], 3),
         "peer": round(median["peer"], 3), "limit": round(median["limit"], 3), "limit_name": "read the file",
         "unit": "s", "higher_is_better": False, **common},
        {"case": f"{num_rows} rows asked, rows returned", "ours": len(ours), "peer": len(peer), "limit": num_rows,
         "limit_name": "rows asked", "unit": "rows", "higher_is_better": True, **common},
    ]  # fmt: skip


def main() -> None:
    """Print a line a case, and with --json one object at the end."""
    rows = [row for num_rows in SIZES for row in measure(num_rows)]
    for row in rows:
        figures = f"ours {row['ours']} {row['unit']}, {row['peer_name']} {row['peer']}, limit {row['limit']}"
        print(f"{row['case']:<34} {figures}")
    if "--json" in sys.argv:
        print(json.dumps({"name": "point_in_time", "device": "CPU", "rows": rows}))


if __name__ == "__main__":
    main()
