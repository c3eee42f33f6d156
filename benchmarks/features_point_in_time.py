"""Point-in-time join through Feast's API: our offline store, Feast's duckdb and Dask stores, one process each.

Every store gets the same Parquet files and entity rows; results are compared with an oracle (`pandas.merge_asof`,
view by view) before a time counts. Peak memory is of the whole process, imports included. A store that has not
finished a case in TIME_LIMIT_S is stopped.

    assay bench features_point_in_time [--json]
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, median, row, spread

OURS = "assay_features.feast.offline_store.ColumnarOfflineStore"
STORES = {"ours": OURS, "duckdb": "duckdb", "dask": "dask"}
TIME_LIMIT_S = 400


class Case(NamedTuple):
    """A retrieval. Rows of the entity frame and of every view, features a view."""

    name: str
    num_rows: int
    num_views: int
    num_features: int
    num_keys: int
    runs: int


CASES = (
    Case("1,000,000 rows x 20 features", 1_000_000, 1, 20, 50_000, 3),
    Case("17,000 rows x 1,000 features", 17_000, 1, 1_000, 2_000, 3),
    Case("100,000 rows x 20 views of 5 features", 100_000, 20, 5, 20_000, 3),
)


def make(case: Case, folder: Path) -> None:
    """Write the views and the entity rows; a tenth of these come before their key's first row, some are duplicates."""
    rng = np.random.default_rng(0)
    start = pd.Timestamp("2024-01-01", tz="UTC")

    def times(low_h: float, high_h: float) -> pd.Series:
        seconds = rng.integers(int(low_h * 3600), int(high_h * 3600), case.num_rows)
        return pd.Series(start + pd.to_timedelta(seconds, unit="s"))

    def keys() -> list[str]:
        return [f"k{i}" for i in rng.integers(0, case.num_keys, case.num_rows)]

    for view in range(case.num_views):
        frame = pd.DataFrame({"key": keys(), "event_timestamp": times(0, 1000)})
        # One row a (key, time): what a tie means is not the same in all stores.
        frame = frame.drop_duplicates(["key", "event_timestamp"])
        values = pd.DataFrame(
            {f"v{view}_f{i}": rng.normal(size=len(frame)) for i in range(case.num_features)}, index=frame.index
        )
        table = pa.Table.from_pandas(pd.concat([frame, values], axis=1), preserve_index=False)
        pq.write_table(table, folder / f"view{view}.parquet", coerce_timestamps="us")
    asked = pd.DataFrame({"key": keys(), "event_timestamp": times(-100, 1000), "row": np.arange(case.num_rows)})
    asked.iloc[-10:, :2] = asked.iloc[:10, :2].to_numpy()
    asked.to_parquet(folder / "asked.parquet")


def oracle(case: Case, folder: Path) -> pd.DataFrame:
    """Every feature of every entity row, by row number."""
    asked = pd.read_parquet(folder / "asked.parquet").sort_values("event_timestamp", kind="stable")
    parts = []
    for view in range(case.num_views):
        source = pd.read_parquet(folder / f"view{view}.parquet").sort_values("event_timestamp", kind="stable")
        source["event_timestamp"] = source["event_timestamp"].astype(asked["event_timestamp"].dtype)
        joined = pd.merge_asof(asked, source, on="event_timestamp", by="key").set_index("row").sort_index()
        parts.append(joined.drop(columns=["key", "event_timestamp"]))
    return pd.concat(parts, axis=1)


def child(case: Case, folder: Path, store_name: str) -> None:
    """Retrieve `runs` times; print seconds and peak memory, leave the last result for the parent."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64

    home = folder / store_name
    home.mkdir()
    config = RepoConfig(
        project="bench", provider="local", registry=str(home / "registry.db"), entity_key_serialization_version=3,
        offline_store={"type": STORES[store_name]}, online_store={"type": "sqlite", "path": str(home / "online.db")},
    )  # fmt: skip
    store = FeatureStore(config=config)
    key = Entity(name="key", join_keys=["key"], value_type=ValueType.STRING)
    views, refs = [], []
    for v in range(case.num_views):
        names = [f"v{v}_f{i}" for i in range(case.num_features)]
        source = FileSource(path=str(folder / f"view{v}.parquet"), timestamp_field="event_timestamp")
        schema = [Field(name=name, dtype=Float64) for name in names]
        views.append(FeatureView(name=f"view{v}", entities=[key], schema=schema, source=source))
        refs += [f"view{v}:{name}" for name in names]
    store.apply([key, *views])
    asked = pd.read_parquet(folder / "asked.parquet")
    seconds = []
    for _ in range(case.runs + 1):  # the first one also loads code
        result = None  # or the last one would count as memory of this one
        began = time.perf_counter()
        result = store.get_historical_features(entity_df=asked, features=refs).to_df()
        seconds.append(time.perf_counter() - began)
    # Not getrusage: its high-water mark survives exec, so a child would report its parent's.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1e6
    assert result is not None
    result.to_parquet(home / "result.parquet")
    print(json.dumps({"seconds": seconds[1:], "peak_gb": peak, "rows": len(result)}))


def measure(case: Case) -> list[dict[str, Any]]:
    """One case in all stores."""
    out: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(case, folder)
        expected = oracle(case, folder)
        for name in STORES:
            command = [sys.executable, __file__, "--child", case.name, scratch, name]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=True)
                out[name] = json.loads(done.stdout.splitlines()[-1])
            except subprocess.TimeoutExpired:
                out[name] = {"seconds": [float(TIME_LIMIT_S)], "peak_gb": float("nan"), "rows": 0, "equal": 0.0}
                continue
            except subprocess.CalledProcessError as error:
                print(f"{name}: {case.name}: {error.stderr.splitlines()[-1]}", file=sys.stderr)
                continue
            result = pd.read_parquet(folder / name / "result.parquet").drop_duplicates("row").set_index("row")
            got = result.reindex(expected.index)[expected.columns].to_numpy(dtype=np.float64)
            same = np.isclose(got, expected.to_numpy(), rtol=0, atol=0, equal_nan=True).all(axis=1)
            present = np.isin(expected.index, result.index)
            out[name]["equal"] = float((same & present).mean())
    ours = out["ours"]
    assert ours["equal"] == 1.0, f"{case.name}: {ours['equal']:.4%} of our rows equal the oracle"
    rows = []
    for peer in ("duckdb", "dask"):
        if peer not in out:
            continue
        common = {"runs": case.runs, "peer_name": f"feast 0.67 {peer}"}
        rows += [
            row(case.name, median(ours["seconds"]), "s", peer=median(out[peer]["seconds"]),
                spread=spread(ours["seconds"]), **common),
            row(f"{case.name}, peak memory", ours["peak_gb"], "GB", peer=out[peer]["peak_gb"], **common),
            row(f"{case.name}, rows equal to the oracle", ours["equal"], "share", peer=out[peer]["equal"],
                higher_is_better=True, limit=1.0, limit_name="all", **common),
        ]  # fmt: skip
    return rows


def main() -> None:
    """Run everything, or one child."""
    if "--child" in sys.argv:
        _, _, name, folder, store = sys.argv
        child(next(c for c in CASES if c.name == name), Path(folder), store)
        return
    finish("features_point_in_time", [line for case in CASES for line in measure(case)])


if __name__ == "__main__":
    main()
