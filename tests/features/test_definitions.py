"""Definitions are values: they compare, serialise and version themselves."""

import json

import numpy as np
import pandas as pd
import pytest
from assay_features import definitions
from assay_features.definitions import (
    Calendar,
    Cross,
    Decay,
    Definition,
    Embedding,
    FeaturePlan,
    Latest,
    Ratio,
    Sequence,
    SinceLatest,
    Where,
    Window,
    as_code,
)
from assay_features.embeddings import EmbeddingTable
from assay_features.events import Events
from assay_features.row_features import calendar_column, cross_column, model_columns, ratio_columns
from assay_platform.errors import DataError, SchemaError

PLAN = FeaturePlan(
    (
        Window(entity="card", aggregate="count", length_s=3600),
        Decay(entity="card", half_life_s=86_400),
        Latest(entity="card", column="amount"),
        SinceLatest(entity="store"),
        Sequence(entity="user", column="item", length=5),
        Cross(columns=("a", "b")),
        Calendar(part="hour"),
        Window(
            entity=("card", "store"),
            aggregate="rate",
            length_s=60,
            against_s=600,
            where=Where(column="a", values=("x",)),
        ),
        Decay(entity="card", half_life_s=60, column="amount", where=Where(column="amount", at_least=0.0)),
        Cross(columns=("a", "amount"), edges=((), (1.0, 5.0)), num_buckets=8),
        Ratio(numerator="amount", denominator="card__amount__latest"),
        Calendar(part="weekday", timezone="Europe/Oslo"),
        Embedding(column="store", width=2, table="0123456789ab"),
    )
)


def test_a_plan_survives_json_and_keeps_its_version() -> None:
    again = FeaturePlan.from_dict(PLAN.to_dict())
    assert again == PLAN
    assert again.version == PLAN.version
    assert FeaturePlan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


@pytest.mark.parametrize("definition", PLAN.definitions, ids=lambda d: d.name)
def test_a_definition_hashes_and_is_written_as_code_that_reads_back(definition: Definition) -> None:
    again = eval(as_code(definition), vars(definitions))  # noqa: S307 - our own rendering
    assert again == definition
    assert hash(again) == hash(definition)
    assert "num_tiles" not in as_code(definition)  # defaults are left out


def test_any_change_of_a_definition_is_another_version() -> None:
    changed = FeaturePlan((Window(entity="card", aggregate="count", length_s=7200), *PLAN.definitions[1:]))
    assert changed.version != PLAN.version


def test_names_are_derived_and_grouped_by_entity() -> None:
    assert PLAN.entities == ("card", "store", "user", ("card", "store"))
    assert PLAN.numeric_names == (
        "card__events__count__1h", "card__events__decay__1d", "card__amount__latest",
        "card__amount__decay__1m__where_amount_0_up", "store__since_latest_s",
        "card_and_store__events__rate__1m_of_10m__where_a_x",
    )  # fmt: skip
    assert PLAN.key_columns() == ("card", "store", "user", "item", "a")
    assert PLAN.number_columns() == ("amount",)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Window(entity="c", aggregate="median", length_s=60),  # type: ignore[arg-type]
        lambda: Window(entity="c", aggregate="sum", length_s=60),
        lambda: Window(entity="c", aggregate="count", length_s=0),
        lambda: Window(entity="c", aggregate="count", length_s=1, num_tiles=7),
        lambda: Decay(entity="c", half_life_s=0),
        lambda: Window(entity=(), aggregate="count", length_s=60),
        lambda: Window(entity=("a", "a"), aggregate="count", length_s=60),
        lambda: Window(entity="c", aggregate="rate", length_s=60),
        lambda: Window(entity="c", aggregate="rate", length_s=60, against_s=60),
        lambda: Window(entity="c", aggregate="count", length_s=60, against_s=600),
        lambda: Window(entity="c", aggregate="count", length_s=60, max_events=5000),
        lambda: Where(column="c"),
        lambda: Where(column="c", values=("a",), below=1.0),
        lambda: Ratio(numerator="a", denominator="a"),
        lambda: Calendar(part="hour", timezone="Europe/Olso"),
        lambda: Embedding(column="a", width=0, table="0123456789ab"),
        lambda: Embedding(column="a", width=2, table="newest"),
        lambda: Cross(columns=("a", "b"), edges=((1.0,),)),
        lambda: Cross(columns=("a", "b"), edges=((2.0, 1.0), ())),
        lambda: FeaturePlan((Sequence(entity="u", column="a", length=2), Sequence(entity="u", column="b", length=2))),
        lambda: FeaturePlan.from_dict(
            {"definitions": [{"kind": "Decay", "entity": "c", "half_life_s": 1, "where": {"x": 1}}]}
        ),
        lambda: Cross(columns=("a",)),
        lambda: FeaturePlan((SinceLatest(entity="c"), SinceLatest(entity="c"))),
        lambda: FeaturePlan.from_dict({"definitions": [{"kind": "Eval", "code": "1"}]}),
        lambda: FeaturePlan.from_dict({"definitions": [{"kind": "Decay", "speed": 1}]}),
    ],
)
def test_an_impossible_definition_is_refused(wrong: object) -> None:
    with pytest.raises(SchemaError):
        wrong()  # type: ignore[operator]


def test_a_cross_keeps_pairs_apart_and_is_missing_where_a_part_is() -> None:
    keys = {"a": np.array(["x", "x_y", None], dtype=object), "b": np.array(["y_z", "z", "z"], dtype=object)}
    out = cross_column(Cross(columns=("a", "b")), keys)
    assert out[0] != out[1]
    assert out[2] is None
    hashed = cross_column(Cross(columns=("a", "b"), num_buckets=5), keys)
    assert set(hashed[:2]) <= {str(i) for i in range(5)}


def test_calendar_reads_utc() -> None:
    monday_six = 1_700_460_000 * 1_000_000  # Monday 2023-11-20 06:00 UTC
    assert calendar_column(Calendar(part="hour"), np.array([monday_six]))[0] == pytest.approx(6.0)
    assert calendar_column(Calendar(part="weekday"), np.array([monday_six]))[0] == pytest.approx(0.25)


def test_summer_time_shifts_local_clocks_and_not_ours() -> None:
    before, after = (pd.Timestamp(t).value // 1000 for t in ("2024-03-31T00:30Z", "2024-03-31T01:30Z"))
    times = np.array([before, after])
    np.testing.assert_allclose(calendar_column(Calendar(part="hour"), times), [0.5, 1.5])
    np.testing.assert_allclose(calendar_column(Calendar(part="hour", timezone="Europe/Oslo"), times), [1.5, 3.5])
    # An hour that comes twice in autumn has the same clock twice.
    autumn = np.array([pd.Timestamp(t).value // 1000 for t in ("2024-10-27T00:30Z", "2024-10-27T01:30Z")])
    np.testing.assert_allclose(calendar_column(Calendar(part="hour", timezone="Europe/Oslo"), autumn), [2.5, 2.5])


def test_calendar_keeps_microseconds_in_far_years() -> None:
    last = 253_402_300_799 * 1_000_000 + 999_999
    assert calendar_column(Calendar(part="hour"), np.array([last]))[0] == pytest.approx(24 - 1e-6 / 3600, abs=1e-12)


def test_a_ratio_is_missing_where_it_has_no_value() -> None:
    columns = {"a": np.array([1.0, 1.0, np.nan, 4.0, 1e308]), "b": np.array([2.0, 0.0, 1.0, np.nan, 1e-10])}
    found = ratio_columns([Ratio(numerator="a", denominator="b")], columns)["a__over__b"]
    np.testing.assert_array_equal(found, [0.5, np.nan, np.nan, np.nan, np.nan])
    with pytest.raises(DataError, match="'c' is neither a column"):
        ratio_columns([Ratio(numerator="a", denominator="c")], columns)


def test_numbers_in_a_cross_go_into_buckets() -> None:
    columns = {"a": np.array(["x", "x", "x", "x"], dtype=object), "n": np.array([0.5, 1.0, 9.0, np.nan])}
    out = cross_column(Cross(columns=("a", "n"), edges=((), (1.0, 5.0))), columns)
    assert [o and o[-1] for o in out] == ["0", "1", "2", None]
    with pytest.raises(DataError, match="give edges"):
        cross_column(Cross(columns=("a", "n")), columns)


def test_model_columns_hold_every_feature_of_the_row() -> None:
    table = EmbeddingTable(
        "store", ("s1",), np.array([[[1, 2], [3, 4]]], dtype=np.float32), np.zeros(1, dtype=np.int64)
    )
    plan = FeaturePlan(
        (
            Latest(entity="card", column="amount"),
            Ratio(numerator="amount", denominator="card__amount__latest"),
            Cross(columns=("store", "card__amount__latest"), edges=((), (2.0,))),
            table.definition,
        )
    )
    store = np.array(["s1", "never seen"], dtype=object)
    events = Events(
        time_us=np.zeros(2, dtype=np.int64), keys={"store": store}, numbers={"amount": np.array([6.0, 6.0])}
    )
    history = {"card__amount__latest": np.array([3.0, 1.0])}
    columns = model_columns(plan, events, history, {table.digest: table})
    np.testing.assert_array_equal(columns["amount__over__card__amount__latest"], [2.0, 6.0])
    np.testing.assert_array_equal(columns["store__embedding__1"], [2.0, 4.0])
    assert columns["store_x_card__amount__latest"][0].endswith("1")
    assert set(plan.row_numeric_names) <= set(columns)
    with pytest.raises(DataError, match="its table"):
        model_columns(plan, events, history)
