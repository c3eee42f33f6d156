"""The recommendation pipeline over kinds of tables: it trains, ranks, and never looks ahead."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from assay_features.schema import RecommendSchema, schema_from_dict
from assay_pipelines.console import Reporter
from assay_pipelines.options import RunOptions
from assay_pipelines.recommend import pipeline, train, train_graph
from assay_pipelines.recommend.evaluate import ranking_metrics
from assay_pipelines.recommend.pipeline import Prepared, choose_recipe
from assay_pipelines.recommend.train import (
    RankerTraining,
    fit_earliest,
    fit_holdouts,
    fit_sources,
    make_lists,
    train_ranker,
)
from assay_pipelines.recommend.train_graph import DEFAULTS
from assay_platform.config import load_config
from assay_platform.errors import DataError
from assay_platform.models.graph import GraphEncoder, ItemGraph
from assay_platform.models.recommender import Recommender
from assay_platform.models.sources import Wanted

GRAPH = {**DEFAULTS, "num_epochs": 1, "width": 8}
ITEMS = {"path": "items.csv", "id": "item", "text": ["title"], "categorical": ["kind"]}


def table(num_events: int = 900, seed: int = 0) -> pd.DataFrame:
    """Users of three tastes, 30 items, 100 days."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, 40, num_events)
    item = np.where(
        rng.random(num_events) < 0.7, user % 3 * 10 + rng.integers(0, 10, num_events), rng.integers(0, 30, num_events)
    )
    return pd.DataFrame({
        "user": [f"u{u}" for u in user], "item": [f"i{i}" for i in item], "rating": rng.integers(1, 6, num_events),
        "did": rng.choice(["view", "click", "buy"], num_events, p=[0.5, 0.2, 0.3]),
        "time": np.sort(rng.integers(0, 100 * 86_400, num_events)) + 1_600_000_000,
    })  # fmt: skip


def prepared(folder: Path, frame: pd.DataFrame, **schema: Any) -> Prepared:
    folder.mkdir(exist_ok=True)
    frame.to_csv(folder / "events.csv", index=False)
    pd.DataFrame({
        "item": [f"i{i}" for i in range(30)], "title": [f"item {i}" for i in range(30)],
        "kind": [f"kind {i // 10}" for i in range(30)],
    }).to_csv(folder / "items.csv", index=False)  # fmt: skip
    columns = {"user": "user", "item": "item", "timestamp": "time", **schema.pop("columns", {})}
    read = schema_from_dict({"kind": "recommend", "columns": columns, **schema})
    assert isinstance(read, RecommendSchema)
    options = RunOptions(
        config=load_config(), application="recommend", data="own", table=folder / "events.csv", schema=read,
        schema_folder=folder, model_name="recommend-own",
    )  # fmt: skip
    return Prepared(options, Reporter())


def trained(data: Prepared) -> Recommender:
    recipe = choose_recipe(data, GRAPH, Reporter(), seed=0).recipe
    holdouts = data.holdouts(data.train_rows)
    earliest = fit_earliest(holdouts, recipe, seed=0)
    sources = fit_sources(data.train, recipe, seed=0, shared=earliest.encoders)
    of_holdouts = fit_holdouts(holdouts, recipe, earliest, seed=0)
    lists = make_lists(holdouts, of_holdouts, recipe, data.ranker_config, seed=0)
    ranker, _ = train_ranker(lists, data.ranker_config, seed=0, training=RankerTraining(num_epochs=1))
    return Recommender(
        ranker=ranker, config=data.ranker_config, users=data.users, items=data.items, histories=data.train,
        sources=sources, store_features_IF=data.item_features(data.train_rows, data.train), again=recipe.again,
    )  # fmt: skip


ACTIONS: dict[str, Any] = {"columns": {"action": "did"}, "actions": {"order": ["view", "click", "buy"]}}
VARIATIONS: dict[str, dict[str, Any]] = {
    "by time, bought again": {"split": {"repeats": True}},
    "by time, new things only": {"split": {}},
    "at moments": {"split": {"validation_from": "2020-11-20", "test_from": "2020-12-04", "repeats": True}},
    "at random, rated": {"split": {"protocol": "random"}, "columns": {"weight": "rating"}},
    "the last left out": {"split": {"protocol": "leave-last-out", "repeats": True}},
    "with an item table": {"split": {"protocol": "random"}, "items": ITEMS},
    "of several actions": {"split": {}, **ACTIONS},
    "of several actions, again": {"split": {"protocol": "leave-last-out", "repeats": True}, **ACTIONS},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_every_kind_of_table_trains_and_ranks(name: str, tmp_path: Path) -> None:
    data = prepared(tmp_path, table(), **{k: dict(v) for k, v in VARIATIONS[name].items()})
    model = trained(data)
    seen = data.again.excluded(data.train, len(data.items))
    top, _ = model.rank(data.train, num=20, wanted=Wanted(seen))
    metrics = ranking_metrics(top, data.test, data.train_matrix)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["ndcg_at_10"] > 0.05
    if seen is not None:
        assert not any(
            set(top[u]) & set(seen[u].indices) for u in range(len(top)) if len(data.items) - seen[u].nnz >= 20
        )


@pytest.mark.parametrize("name", VARIATIONS)
def test_holdouts_keep_their_labels_from_what_is_seen(name: str, tmp_path: Path) -> None:
    data = prepared(tmp_path, table(), **{k: dict(v) for k, v in VARIATIONS[name].items()})
    holdouts = data.holdouts(data.parts.fit)
    assert holdouts
    for holdout in holdouts:
        assert len(holdout.wanted) == len(data.tasks)
        assert all(wanted.nnz for wanted in holdout.wanted)
        for stronger, weaker in pairwise(holdout.wanted):
            assert not (stronger > weaker).nnz, "whoever bought has looked"
        seen_events = len(holdout.seen.item)
        assert 0 < seen_events < len(data.parts.fit)
        if data.schema.split.protocol != "random":
            assert (holdout.seen.time_us <= holdout.seen.now_us[holdout.seen.users()]).all()
        excluded = data.again.excluded(holdout.seen, len(data.items))
        if excluded is not None:
            assert not any(wanted.multiply(excluded).nnz for wanted in holdout.wanted)


def test_the_future_changes_nothing(tmp_path: Path) -> None:
    frame = table()
    moments = {"validation_from": "2020-11-20", "test_from": "2020-12-04", "repeats": True}
    later = frame["time"] >= pd.Timestamp("2020-12-04", tz="UTC").timestamp()
    assert 50 < later.sum() < 300
    changed = frame.copy()
    changed.loc[later, "item"] = frame.loc[later, "item"].to_numpy()[::-1]
    changed.loc[later, "rating"] = 5
    here, there = (
        prepared(tmp_path / name, rows, columns={"weight": "rating"}, split=moments)
        for name, rows in (("a", frame), ("b", changed))
    )
    first, second = (trained(data).rank(data.train, num=10) for data in (here, there))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_allclose(first[1], second[1], atol=1e-6)


def test_lists_find_more_than_they_would_of_items_with_other_names(tmp_path: Path) -> None:
    data = prepared(tmp_path, table(4000), split={"protocol": "random"})
    model = trained(data)
    top, _ = model.rank(data.train, num=20, wanted=Wanted(data.train_matrix))
    reached = ranking_metrics(top, data.test, data.train_matrix)["ndcg_at_10"]
    order = np.random.default_rng(0).permutation(data.test.shape[1])
    shuffled = data.test[:, order]
    chance = ranking_metrics(top, shuffled.tocsr(), data.train_matrix)["ndcg_at_10"]
    assert reached > 1.3 * chance


def test_the_limit_on_items_counts_what_is_known_before_the_test(tmp_path: Path) -> None:
    frame = table()
    frame.loc[frame.index[-60:], "item"] = "only in the future"
    data = prepared(tmp_path, frame, split={"repeats": True, "max_items": 10})
    assert len(data.items) == 10
    assert "only in the future" not in data.items


def test_lists_are_of_what_users_will_buy(tmp_path: Path) -> None:
    frame = table()
    data = prepared(tmp_path, frame, split={}, **{name: dict(value) for name, value in ACTIONS.items()})
    assert list(data.tasks) == ["buy", "click", "view"]
    bought = (frame["did"] == "buy").to_numpy()
    rows = data.parts.test[bought[data.parts.test]]
    pairs = set(zip(data.user[rows].tolist(), data.item[rows].tolist(), strict=True))
    before = data.train_rows[bought[data.train_rows]]
    had = set(zip(data.user[before].tolist(), data.item[before].tolist(), strict=True))
    assert set(zip(*(side.tolist() for side in data.test.nonzero()), strict=True)) == pairs - had
    model = trained(data)
    assert model._ranker.mix_T.tolist() == [1.0, 0.0, 0.0]
    other = model._ranker.mixed(0.5)
    assert other.mix_T.tolist() == [1.0, 0.5, 0.5]
    assert model._ranker.mix_T.tolist() == [1.0, 0.0, 0.0]


def test_an_action_that_the_schema_does_not_name_is_an_error(tmp_path: Path) -> None:
    frame = table()
    frame.loc[7, "did"] = "stole"
    with pytest.raises(DataError, match=r"column 'did', row 8: 'stole' is unknown; allowed are view, click, buy"):
        prepared(tmp_path, frame, split={}, **{name: dict(value) for name, value in ACTIONS.items()})


@pytest.mark.parametrize("protocol", ["temporal", "random", "leave-last-out"])
def test_models_learn_from_some_users_and_features_are_of_all(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared(tmp_path / "whole", table(), split={"protocol": protocol})
    monkeypatch.setattr(pipeline, "MOST_LEARNED", 300)
    some = prepared(tmp_path / "some", table(), split={"protocol": protocol})
    assert 200 < len(some.events) <= 300
    assert some.items == whole.items
    per_user = pd.Series(whole.user).value_counts()
    assert all(
        np.sum(some.user == number) == per_user[whole.users.index(user)] for number, user in enumerate(some.users)
    )
    moment = some.train.now_us.max()
    everything = whole.histories(np.arange(len(whole.events)), moment)
    rows = np.arange(len(some.events))
    np.testing.assert_allclose(
        some.item_features(rows, some.histories(rows, moment)),
        whole.item_features(np.arange(len(whole.events)), everything),
        atol=1e-5,
    )
    labels_left_out = some.item_features(some.train_rows, some.train)
    of_all = whole.item_features(np.arange(len(whole.events)), everything)
    assert (labels_left_out != of_all).any() == (protocol != "temporal"), "by time nothing after the moment counts"
    model = trained(some)
    top, _ = model.rank(some.train, num=20, wanted=Wanted(some.train_matrix))
    assert ranking_metrics(top, some.test, some.train_matrix)["ndcg_at_10"] > 0.03


def test_a_large_graph_is_trained_on_once_and_smoothed_over_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_graph, "MOST_AT_ONCE", 0)
    trainings: list[int] = []
    train_encoder = train.train_encoder

    def counted(graph: ItemGraph, *args: Any, **settings: Any) -> GraphEncoder:
        trainings.append(len(graph.user))
        return train_encoder(graph, *args, **settings)

    monkeypatch.setattr(train, "train_encoder", counted)
    data = prepared(tmp_path, table(4_000), split={})
    recipe = choose_recipe(data, GRAPH, Reporter(), seed=0).recipe
    assert len(trainings) == 1
    holdouts = data.holdouts(data.parts.fit)
    assert len(holdouts) > 1
    earliest = fit_earliest(holdouts, recipe, seed=0)
    of_holdouts = fit_holdouts(holdouts, recipe, earliest, seed=0)
    assert len(trainings) == 2
    assert trainings[1] == min(len(holdout.seen.once().item) for holdout in holdouts)
    vectors = [sources.vectors.item_ID for sources in of_holdouts]
    assert not np.allclose(vectors[0], vectors[-1])
