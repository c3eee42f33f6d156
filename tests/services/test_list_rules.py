"""Rules of the schema in lists that are served, and lists on record."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from assay_features.feast.repository import FeatureRepository
from assay_features.items import item_plan
from assay_features.schema import ItemTable, RecommendSchema, schema_to_dict
from assay_pipelines.recommend.off_policy import Shown
from assay_platform.errors import ArtifactError, DataError
from assay_platform.models import sentences
from assay_platform.models.content import ItemFacts, fit_content_map
from assay_platform.models.histories import DAY_US, Again, Histories
from assay_platform.models.item_regression import RegressionConfig, fit_item_regression
from assay_platform.models.list_rules import ListRules
from assay_platform.models.recommender import PairRanker, RankerConfig, Recommender
from assay_platform.models.sources import ItemPast, ItemVectors, Sources
from assay_services.new_items import SharedLines
from assay_services.recommend import ItemRecommender
from assay_services.schemas import ModelRef

NUM_ITEMS, NUM_USERS = 30, 20
TABLE = ItemTable(path="items.csv", id="item", text=("title",), categorical=("kind",))
SCHEMA = RecommendSchema(user="user", item="item", timestamp="time", items=TABLE)


def model(again: Again = Again.NOTHING, *, read: bool = False) -> Recommender:
    rng = np.random.default_rng(0)
    now_us = 100 * DAY_US
    histories = Histories.of(
        rng.integers(0, NUM_USERS, 200), rng.integers(0, NUM_ITEMS, 200), rng.integers(0, now_us, 200),
        num_users=NUM_USERS, now_us=now_us,
    )  # fmt: skip
    items = [f"i{i}" for i in range(NUM_ITEMS)]
    table = {item: {"title": f"Item {i}", "kind": f"k{i % 3}"} for i, item in enumerate(items)}
    facts, past = (
        ItemFacts.of(items, table, text=["title"], categorical=["kind"], sentences=read),
        ItemPast.of(histories, NUM_ITEMS),
    )
    vectors = ItemVectors(rng.normal(size=(NUM_ITEMS, 8)).astype("f4"), np.zeros(NUM_ITEMS, dtype="f4"), 1.0)
    regression = fit_item_regression(histories, NUM_ITEMS, RegressionConfig(penalty=5.0))
    content = fit_content_map(facts, vectors.stacked(), past.takers)
    config = RankerConfig(num_store_features=len(item_plan(SCHEMA).numeric_names))
    return Recommender(
        ranker=PairRanker(config), config=config, users=[f"u{u}" for u in range(NUM_USERS)], items=items,
        histories=histories, again=again, use_ranker=False,
        sources=Sources(regression, None, vectors, past, facts, content, past.head(NUM_ITEMS)),
        store_features_IF=np.zeros((NUM_ITEMS, config.num_store_features), dtype=np.float32),
    )  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[FeatureRepository]:
    opened = FeatureRepository(tmp_path / "shop")
    yield opened
    opened.close()


def serving(repository: FeatureRepository, rules: ListRules) -> ItemRecommender:
    schema = replace(SCHEMA, rules=rules)
    return ItemRecommender(model(), schema, item_plan(schema), repository)


def test_rules_hold_for_everybody(repository: FeatureRepository) -> None:
    service = serving(repository, ListRules(at_most={"kind": 2}, never={"kind": ("k1",)}))
    for user in ("u1", "u2", "somebody new"):
        items, cold = service.recommend(user, k=10, exclude_seen=None, context={})
        kinds = [int(item.item_id[1:]) % 3 for item in items]
        assert 1 not in kinds
        assert sorted(kinds) == [0, 0, 2, 2]
        assert cold == (user == "somebody new")


def test_a_list_that_chance_had_part_in_is_on_record(repository: FeatureRepository) -> None:
    service, shown_by = serving(repository, ListRules(explore=0.5)), ModelRef(name="shop", version=3)
    given = {}
    for user in ("u1", "u2", "u3"):
        items, _ = service.recommend(user, k=4, exclude_seen=None, context={})
        given[service.keep_list(shown_by, user, items)] = items
        assert 0 < items[-1].propensity < 1
        assert [item.propensity for item in items[:-1]] == [1.0] * 3
    records, _ = SharedLines(repository.folder / "lists.jsonl").since(0)
    assert [record["list_id"] for record in records] == list(given)
    assert records[0]["model"] == {"name": "shop", "version": 3}
    shown = Shown.of(records)
    assert shown.item == [items[-1].item_id for items in given.values()]
    assert shown.propensity.tolist() == [items[-1].propensity for items in given.values()]
    assert serving(repository, ListRules()).keep_list(shown_by, "u1", []) is None


def test_items_told_to_one_process_are_known_to_another_and_after_a_restart(repository: FeatureRepository) -> None:
    one, other = serving(repository, ListRules()), serving(repository, ListRules())
    record = {"item": "new", "title": "Item 3", "kind": ["k0", "k2"]}
    assert one.add_items([record, {"item": "i3", "title": "known"}]) == (1, [1])
    only = {"only": {"kind": ["k0|k2"]}}
    for service in (one, other, serving(repository, ListRules())):
        items, _ = service.recommend("u1", k=5, exclude_seen=None, context=only)
        assert [item.item_id for item in items] == ["new"]
        assert items[0].title == "Item 3"


def test_what_was_only_looked_at_may_be_in_a_list_and_what_was_bought_may_not(repository: FeatureRepository) -> None:
    schema = replace(SCHEMA, action="did", actions=("view", "buy"))
    plan = item_plan(schema)
    service = ItemRecommender(model(Again.UNDONE), schema, plan, repository)
    at = 200 * 86_400
    events = [
        {"user": "new one", "item": "i3", "did": "view", "time": at},
        {"user": "new one", "item": "i4", "did": "buy", "time": at + 1},
    ]
    service.add(service.parse_events(events))
    shown = {
        seen: [item.item_id for item in service.recommend("new one", k=NUM_ITEMS, exclude_seen=seen, context={})[0]]
        for seen in (None, True, False)
    }
    assert set(shown[False]) - set(shown[None]) == {"i4"}
    assert set(shown[False]) - set(shown[True]) == {"i3", "i4"}
    assert shown[None][0] == "i3", "the sources put what was looked at last first"
    with pytest.raises(DataError, match=r"events\[0\].did: 'stole' is unknown; allowed are view, buy"):
        service.parse_events([{**events[0], "did": "stole"}])
    with pytest.raises(DataError, match=r"events\[0\].did: is missing"):
        service.parse_events([{key: value for key, value in events[0].items() if key != "did"}])


def test_a_model_that_reads_titles_serves_new_ones_or_says_what_is_missing(
    repository: FeatureRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {"schema": schema_to_dict(SCHEMA), "plan": item_plan(SCHEMA).to_dict(), "repository": "shop"}
    model(read=True).save(tmp_path / "model", {"features": features})
    service = ItemRecommender.load(tmp_path / "model", repository)
    assert service.add_items([{"item": "new", "title": "Item 3", "kind": "k0"}]) == (1, [])
    everything, _ = service.recommend("u1", k=NUM_ITEMS + 1, exclude_seen=False, context={})
    assert "new" in {item.item_id for item in everything}
    monkeypatch.setattr(sentences, "_PACKAGE", "not_installed")
    sentences._model.cache_clear()
    with pytest.raises(ArtifactError, match=r"model: .*pip install 'assay\[text\]'"):
        ItemRecommender.load(tmp_path / "model", repository)
