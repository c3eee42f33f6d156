"""Definitions are values: they compare, serialise and version themselves."""

import numpy as np
import pytest
from assay_features.definitions import Calendar, Cross, Decay, FeaturePlan, Latest, Sequence, SinceLatest, Window
from assay_features.row_features import calendar_column, cross_column
from assay_platform.errors import SchemaError

PLAN = FeaturePlan(
    (
        Window(entity="card", aggregate="count", length_s=3600),
        Decay(entity="card", half_life_s=86_400),
        Latest(entity="card", column="amount"),
        SinceLatest(entity="store"),
        Sequence(entity="user", column="item", length=5),
        Cross(columns=("a", "b")),
        Calendar(part="hour"),
    )
)


def test_a_plan_survives_json_and_keeps_its_version() -> None:
    again = FeaturePlan.from_dict(PLAN.to_dict())
    assert again == PLAN
    assert again.version == PLAN.version


def test_any_change_of_a_definition_is_another_version() -> None:
    changed = FeaturePlan((Window(entity="card", aggregate="count", length_s=7200), *PLAN.definitions[1:]))
    assert changed.version != PLAN.version


def test_names_are_derived_and_grouped_by_entity() -> None:
    assert PLAN.entities == ("card", "store", "user")
    assert PLAN.numeric_names == (
        "card__events__count__1h", "card__events__decay__1d", "card__amount__latest", "store__since_latest_s",
    )  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Window(entity="c", aggregate="median", length_s=60),  # type: ignore[arg-type]
        lambda: Window(entity="c", aggregate="sum", length_s=60),
        lambda: Window(entity="c", aggregate="count", length_s=0),
        lambda: Window(entity="c", aggregate="count", length_s=1, num_tiles=7),
        lambda: Decay(entity="c", half_life_s=0),
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
