"""Our online store behind the real Feast."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from assay_features.feast.online_store import CLASS_PATH, ColumnarResponse, TieredOnlineStore
from assay_features.vectors import EXPIRED, NOT_FOUND, NULL, PRESENT
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Array, Bool, Float32, Float64, Int64, String, UnixTimestamp

NOW = pd.Timestamp(datetime.now(UTC)).floor("s")


def open_feast(folder: Path, **online: Any) -> FeatureStore:
    folder.mkdir(exist_ok=True)
    return FeatureStore(
        config=RepoConfig(
            project="shop", provider="local", registry=str(folder / "registry.db"), repo_path=folder,
            online_store={"type": CLASS_PATH, **online}, entity_key_serialization_version=3,
            offline_store={"type": "assay_features.feast.offline_store.ColumnarOfflineStore"},
        )
    )  # fmt: skip


CARD = Entity(name="card", join_keys=["card"], value_type=ValueType.STRING)
STORE = Entity(name="store", join_keys=["store"], value_type=ValueType.INT64)


def view(folder: Path, name: str, entities: list[Entity], fields: dict[str, Any], **more: Any) -> FeatureView:
    path = folder / f"{name}.parquet"
    if not path.exists():
        pd.DataFrame(
            {"card": ["x"], "store": [0], "event_timestamp": [NOW], **{field: [None] for field in fields}}
        ).to_parquet(path)
    schema = [Field(name=field, dtype=dtype) for field, dtype in fields.items()]
    source = FileSource(path=str(path), timestamp_field="event_timestamp")
    return FeatureView(name=name, entities=entities, schema=schema, source=source, **more)


def write(store: FeatureStore, name: str, rows: list[dict[str, Any]]) -> None:
    store.write_to_online_store(name, pd.DataFrame([{"event_timestamp": NOW, **row} for row in rows]))


@pytest.fixture
def shop(tmp_path: Path) -> FeatureStore:
    store = open_feast(tmp_path / "repo")
    amounts = view(tmp_path, "amounts", [CARD], {"mean": Float64, "count": Int64}, ttl=timedelta(hours=2))
    looks = view(tmp_path, "looks", [CARD], {"name": String, "vip": Bool, "seen": UnixTimestamp, "last": Array(Int64)})
    pairs = view(tmp_path, "pairs", [CARD, STORE], {"share": Float32})
    service = FeatureService(name="all", features=[amounts, looks, pairs])
    store.apply([CARD, STORE, amounts, looks, pairs, service])
    return store


def test_every_type_comes_back_and_what_is_missing_says_why(shop: FeatureStore) -> None:
    seen = datetime(2024, 5, 1, tzinfo=UTC)
    write(shop, "amounts", [{"card": "a", "mean": 1.5, "count": 7}, {"card": "b", "mean": None, "count": 0}])
    write(shop, "amounts", [{"card": "old", "mean": 9.0, "count": 1, "event_timestamp": NOW - pd.Timedelta(hours=3)}])
    write(shop, "looks", [{"card": "a", "name": "Åse", "vip": True, "seen": seen, "last": [1, 2]}])
    write(shop, "pairs", [{"card": "a", "store": 3, "share": 0.25}])
    rows = [{"card": card, "store": 3} for card in ("a", "b", "old", "nobody")]
    response = shop.get_online_features(shop.get_feature_service("all"), rows)
    answer = response.to_dict()
    assert answer["card"] == ["a", "b", "old", "nobody"]
    assert answer["mean"] == [1.5, None, 9.0, None]
    assert answer["count"] == [7, 0, 1, None]
    assert answer["name"] == ["Åse", None, None, None]
    assert answer["vip"] == [True, None, None, None]
    assert answer["seen"][0] == seen
    assert answer["last"] == [[1, 2], None, None, None]
    assert answer["share"] == [0.25, None, None, None]
    assert isinstance(response, ColumnarResponse)
    assert response.status["mean"].tolist() == [PRESENT, NULL, EXPIRED, NOT_FOUND]
    assert response.status["count"].tolist() == [PRESENT, PRESENT, EXPIRED, NOT_FOUND]
    assert response.column("count").tolist()[:2] == [7, 0]
    # Feast's own message says the same, through its own reading of it.
    from feast.online_response import OnlineResponse

    again = OnlineResponse(response.proto, feature_types=response._feature_types)
    assert again.to_dict() == answer
    assert again.to_df().equals(response.to_df())


def test_one_look_up_a_request_however_many_views(shop: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = shop._get_provider().online_store.tiers(shop.config)
    calls: list[int] = []
    get_many = type(tiers).get_many

    def counted(self: Any, keys: Any) -> Any:
        calls.append(len(keys))
        return get_many(self, keys)

    write(shop, "amounts", [{"card": "a", "mean": 1.0, "count": 1}])
    monkeypatch.setattr(type(tiers), "get_many", counted)
    refs = ["amounts:mean", "amounts:count", "looks:name"]
    shop.get_online_features(refs, [{"card": "a"}, {"card": "b"}])
    assert calls == [2]


def test_an_older_row_never_replaces_a_newer_one(shop: FeatureStore) -> None:
    write(shop, "amounts", [{"card": "a", "mean": 2.0, "count": 2}])
    write(shop, "amounts", [{"card": "a", "mean": 1.0, "count": 1, "event_timestamp": NOW - pd.Timedelta(hours=1)}])
    write(shop, "amounts", [
        {"card": "b", "mean": 4.0, "count": 4},
        {"card": "b", "mean": 3.0, "count": 3, "event_timestamp": NOW - pd.Timedelta(hours=1)},
    ])  # fmt: skip
    answer = shop.get_online_features(["amounts:mean"], [{"card": "a"}, {"card": "b"}]).to_dict()
    assert answer["mean"] == [2.0, 4.0]


def test_deleting_a_view_leaves_the_others_and_a_changed_one_keeps_its_rows(shop: FeatureStore, tmp_path: Path) -> None:
    write(shop, "amounts", [{"card": "a", "mean": 1.0, "count": 1}])
    write(shop, "looks", [{"card": "a", "name": "x", "vip": None, "seen": None, "last": None}])
    shop.delete_feature_service("all")
    shop.apply([], objects_to_delete=[shop.get_feature_view("looks")], partial=False)
    wider = view(tmp_path, "amounts", [CARD], {"count": Int64, "largest": Float64, "mean": Float64})
    shop.apply([CARD, wider])
    answer = shop.get_online_features(["amounts:mean", "amounts:largest", "amounts:count"], [{"card": "a"}]).to_dict()
    assert (answer["mean"], answer["largest"], answer["count"]) == ([1.0], [None], [1])


def test_rows_survive_a_new_process_and_materialisation_fills_them(tmp_path: Path) -> None:
    folder = tmp_path / "repo"
    pd.DataFrame(
        {
            "card": ["a", "a", "b"],
            "event_timestamp": [NOW - pd.Timedelta(hours=h) for h in (5, 1, 2)],
            "mean": [1.0, 2.0, 3.0],
        }
    ).to_parquet(tmp_path / "amounts.parquet")
    store = open_feast(folder)
    store.apply([CARD, view(tmp_path, "amounts", [CARD], {"mean": Float64})])
    store.materialize(NOW - pd.Timedelta(days=1), NOW)
    del store
    again = open_feast(folder)
    assert again.get_online_features(["amounts:mean"], {"card": ["b", "a"]}).to_dict()["mean"] == [3.0, 2.0]


@pytest.mark.services
def test_processes_share_a_hot_tier(tmp_path: Path, valkey_url: str) -> None:
    store = open_feast(tmp_path / "repo", valkey=valkey_url)
    store.apply([CARD, view(tmp_path, "amounts", [CARD], {"mean": Float64})])
    write(store, "amounts", [{"card": "a", "mean": 1.0}])
    online = store._get_provider().online_store
    assert isinstance(online, TieredOnlineStore)
    before = online.tiers(store.config).statistics.hot_hits
    assert store.get_online_features(["amounts:mean"], [{"card": "a"}]).to_dict()["mean"] == [1.0]
    assert online.tiers(store.config).statistics.hot_hits == before + 1


def test_requests_that_need_feasts_own_way_get_it(shop: FeatureStore) -> None:
    write(shop, "amounts", [{"card": "a", "mean": 1.0, "count": 1}])
    with pytest.raises(Exception, match="card"):
        shop.get_online_features(["amounts:mean"], [{"shop": "a"}])
    answer = shop.get_online_features(["amounts:mean"], [{"card": "a"}], full_feature_names=True).to_dict()
    assert answer["amounts__mean"] == [1.0]
    began = time.perf_counter()
    for _ in range(20):
        shop.get_online_features(["amounts:mean"], [{"card": "a"}])
    assert time.perf_counter() - began < 2
