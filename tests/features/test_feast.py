"""The Feast plug-in and repository against the real Feast."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from assay_features.batch import features_at, final_states
from assay_features.definitions import Decay, FeaturePlan, Sequence, SinceLatest, Window
from assay_features.embeddings import EmbeddingTable
from assay_features.events import Events
from assay_features.feast import offline_store
from assay_features.feast.offline_store import CLASS_PATH
from assay_features.feast.repository import FeatureRepository, value_frames
from assay_features.row_features import model_columns
from assay_platform.errors import ArtifactError, DataError
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float64

T0 = pd.Timestamp("2024-01-01", tz="UTC")


def store_with_view(folder: Path, frame: pd.DataFrame, *, ttl: timedelta | None = None) -> FeatureStore:
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), folder / "rows.parquet", coerce_timestamps="us")
    (folder / "feature_store.yaml").write_text(
        yaml.safe_dump(
            {
                "project": "p",
                "provider": "local",
                "registry": "registry.db",
                "offline_store": {"type": CLASS_PATH},
                "online_store": {"type": "sqlite", "path": "online.db"},
                "entity_key_serialization_version": 3,
            }
        )
    )
    created = "created" if "created" in frame.columns else ""
    source = FileSource(
        path=str(folder / "rows.parquet"), timestamp_field="event_timestamp", created_timestamp_column=created
    )
    card = Entity(name="card", join_keys=["card"], value_type=ValueType.STRING)
    view = FeatureView(name="view", entities=[card], schema=[Field(name="x", dtype=Float64)], source=source, ttl=ttl)
    store = FeatureStore(repo_path=str(folder))
    store.apply([card, view])
    return store


def retrieve(store: FeatureStore, cards: list[str | None], hours: list[float]) -> list[float]:
    frame = pd.DataFrame(
        {"card": pd.Series(cards, dtype=object), "event_timestamp": [T0 + pd.Timedelta(hours=h) for h in hours]}
    )
    table = store.get_historical_features(entity_df=frame, features=["view:x"]).to_arrow()
    assert table["card"].to_pylist() == cards  # every row, in order
    return [np.nan if v is None else v for v in table["x"].to_pylist()]


def rows(*values: tuple[str | None, float, float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "card": pd.Series([v[0] for v in values], dtype=object),
            "event_timestamp": [T0 + pd.Timedelta(hours=v[1]) for v in values],
            "x": [v[2] for v in values],
        }
    )


def test_every_entity_row_comes_back_in_order_also_where_nothing_matches(tmp_path: Path) -> None:
    store = store_with_view(tmp_path, rows(("a", 1, 1.0), ("a", 3, 3.0), ("b", 2, 20.0), (None, 0, 9.0)))
    got = retrieve(store, ["a", "a", "a", "b", "new", None, "a", "a"], [2, 2, 0.5, 2, 9, 9, 3, 99])
    np.testing.assert_array_equal(got, [1, 1, np.nan, 20, np.nan, np.nan, 3, 3])


def test_ttl_counts_back_from_the_entity_row(tmp_path: Path) -> None:
    store = store_with_view(tmp_path, rows(("a", 0, 1.0)), ttl=timedelta(hours=2))
    np.testing.assert_array_equal(retrieve(store, ["a", "a", "a"], [1, 2, 2.01]), [1, 1, np.nan])


def test_among_equal_timestamps_the_last_created_wins(tmp_path: Path) -> None:
    frame = rows(("a", 1, 1.0), ("a", 1, 2.0), ("a", 1, 3.0))
    frame["created"] = [T0, T0 + pd.Timedelta(hours=5), T0 + pd.Timedelta(hours=1)]
    assert retrieve(store_with_view(tmp_path, frame), ["a"], [2]) == [2.0]


@pytest.mark.parametrize("cells", [4, 10**6])
def test_random_joins_equal_an_obvious_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(offline_store, "_CELLS_A_READ", cells)  # features read with the keys, and after them
    rng = np.random.default_rng(0)
    source = rows(*[(f"c{rng.integers(0, 5)}", float(rng.integers(0, 40)), float(i)) for i in range(200)])
    store = store_with_view(tmp_path, source, ttl=timedelta(hours=10))
    cards, hours = [f"c{i}" for i in rng.integers(0, 7, 300)], [float(h) for h in rng.integers(-5, 50, 300)]
    expected = []
    for card, hour in zip(cards, hours, strict=True):
        age = hour - (source["event_timestamp"] - T0) / pd.Timedelta(hours=1)
        fits = source[(source["card"] == card) & (age >= 0) & (age <= 10)]
        expected.append(fits.iloc[np.lexsort((fits.index, fits["event_timestamp"]))[-1]]["x"] if len(fits) else np.nan)
    np.testing.assert_array_equal(retrieve(store, cards, hours), expected)


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    store = store_with_view(tmp_path, rows(("a", 1, 1.0)))
    frame = pd.DataFrame({"event_timestamp": [T0]})
    with pytest.raises((DataError, Exception), match="card"):
        store.get_historical_features(entity_df=frame, features=["view:x"]).to_df()


PLAN = FeaturePlan(
    (
        Window(entity="card", aggregate="mean", column="amount", length_s=86_400),
        Decay(entity="card", half_life_s=3600),
        SinceLatest(entity="store"),
        Sequence(entity="card", column="store", length=3),
    )
)


@pytest.fixture
def events() -> Events:
    rng = np.random.default_rng(0)
    card, store = np.empty(300, dtype=object), np.empty(300, dtype=object)
    card[:] = [None if k == 0 else f"c{k}" for k in rng.integers(0, 20, 300)]
    store[:] = [f"s{k}" for k in rng.integers(0, 5, 300)]
    times = np.sort(rng.integers(0, 5 * 86_400, 300)) * 1_000_000
    return Events(time_us=times, keys={"card": card, "store": store}, numbers={"amount": rng.lognormal(size=300)})


def publish(folder: Path, events: Events) -> FeatureRepository:
    repository = FeatureRepository(folder)
    values = features_at(PLAN, events, events)
    states = {entity: final_states(PLAN, entity, events) for entity in PLAN.entities}
    repository.publish(PLAN, value_frames(PLAN, events, values), states)
    return repository


def test_training_features_through_feast_equal_the_engine(tmp_path: Path, events: Events) -> None:
    retrieved = publish(tmp_path, events).training_features(PLAN, events)
    for name, expected in features_at(PLAN, events, events).items():
        np.testing.assert_array_equal(retrieved[name], expected, err_msg=name)


def test_online_features_equal_batch_features_at_the_time_of_the_request(tmp_path: Path, events: Events) -> None:
    online = publish(tmp_path, events).online(PLAN)
    later = int(events.time_us.max()) + 3_600_000_000
    card = np.array(["c1", "c7", "new", None], dtype=object)
    store = np.array(["s1", "new", None, "s2"], dtype=object)
    queries = Events(time_us=np.full(4, later), keys={"card": card, "store": store})
    read = online.read({"card": list(card), "store": list(store)}, queries.time_us)
    for name, expected in features_at(PLAN, events, queries).items():
        np.testing.assert_allclose(read.values[name], expected, rtol=1e-9, err_msg=name)


def test_an_added_event_shows_in_the_next_read_and_survives_a_restart(tmp_path: Path, events: Events) -> None:
    repository = publish(tmp_path, events)
    first, second = events.take(slice(0, 250)), events.take(slice(250, 300))
    online = publish(tmp_path / "half", first).online(PLAN)
    assert online.push(second).accepted == 50
    online.close()
    keys = [f"c{k}" for k in range(1, 20)]
    later = np.full(len(keys), int(events.time_us.max()) + 60_000_000)
    reopened = FeatureRepository(tmp_path / "half").online(PLAN)
    streamed, whole = reopened.read({"card": keys}, later), repository.online(PLAN).read({"card": keys}, later)
    for name, expected in whole.values.items():
        np.testing.assert_allclose(streamed.values[name], expected, rtol=1e-9, err_msg=name)
    assert streamed.sequences == whole.sequences


def test_embeddings_are_published_with_the_plan_and_found_by_their_digest(tmp_path: Path, events: Events) -> None:
    vectors = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    table = EmbeddingTable("store", ("s1", "s2"), vectors, np.zeros(1, dtype=np.int64))
    plan = FeaturePlan((*PLAN.definitions, table.definition))
    repository = FeatureRepository(tmp_path / "shop")
    states = {entity: final_states(plan, entity, events) for entity in plan.entities}
    repository.publish(plan, {}, states, schema={"kind": "x"}, tables={table.digest: table})
    reopened = FeatureRepository(tmp_path / "shop")
    [(version, (found, schema))] = reopened.plans().items()
    assert (version, found, schema) == (plan.version, plan, {"kind": "x"})
    tables = reopened.embedding_tables(found)
    columns = model_columns(found, events, features_at(PLAN, events, events), tables)
    expected = np.where(events.keys["store"] == "s2", 3.0, np.where(events.keys["store"] == "s1", 1.0, 5.0))
    np.testing.assert_array_equal(columns["store__embedding__1"], expected)
    (tmp_path / "shop" / "embeddings" / f"{table.digest}.parquet").unlink()
    with pytest.raises(ArtifactError):
        reopened.embedding_tables(found)
