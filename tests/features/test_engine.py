"""Batch, stream and a brute-force oracle agree; the future and the label never leak in."""

from dataclasses import replace

import numpy as np
import pytest
from assay_features.batch import features_at, final_states
from assay_features.definitions import Decay, FeaturePlan, Latest, Sequence, SinceLatest, Window
from assay_features.events import Events
from assay_features.state import StateLayout
from hypothesis import given, settings
from hypothesis import strategies as st

US = 1_000_000
PLAN = FeaturePlan(
    (
        Window(entity="card", aggregate="count", length_s=60, num_tiles=6),
        Window(entity="card", aggregate="count", column="amount", length_s=60, num_tiles=6),
        Window(entity="card", aggregate="sum", column="amount", length_s=60, num_tiles=3),
        Window(entity="card", aggregate="mean", column="amount", length_s=600, num_tiles=12),
        Window(entity="card", aggregate="std", column="amount", length_s=600, num_tiles=12),
        Decay(entity="card", half_life_s=30),
        Decay(entity="card", half_life_s=300, column="amount"),
        Latest(entity="card", column="amount"),
        SinceLatest(entity="card"),
        Sequence(entity="card", column="item", length=3),
    )
)


def brute_force(events: Events, name: str, card: str | None, time_us: int) -> float:
    """One feature of one query, straight from its definition."""
    definition = next(d for d in PLAN.definitions if d.name == name)
    if card is None:
        return np.nan
    mine = (events.keys["card"] == card) & (events.time_us < time_us)
    time, amount = events.time_us[mine], events.numbers["amount"][mine]
    if isinstance(definition, SinceLatest):
        return (time_us - time.max()) / US if len(time) else np.nan
    if isinstance(definition, Latest):
        return amount[np.flatnonzero(time == time.max())[-1]] if len(time) else np.nan
    if isinstance(definition, Decay):
        value = np.ones(len(time)) if definition.column is None else np.nan_to_num(amount)
        return float((value * 2.0 ** (-(time_us - time) / US / definition.half_life_s)).sum())
    assert isinstance(definition, Window)
    tile = definition.length_s * US // definition.num_tiles
    inside = time // tile > time_us // tile - definition.num_tiles
    if definition.column is None:
        return float(inside.sum())
    value = amount[inside & ~np.isnan(amount)]
    if definition.aggregate == "count":
        return float(len(value))
    if definition.aggregate == "sum":
        return float(value.sum())
    if not len(value):
        return np.nan
    return float(value.mean() if definition.aggregate == "mean" else value.std())


@st.composite
def event_tables(draw: st.DrawFn) -> Events:
    num_rows = draw(st.integers(0, 25))
    rows = st.lists
    seconds = draw(rows(st.integers(-400, 1500), min_size=num_rows, max_size=num_rows))
    cards = draw(rows(st.sampled_from(["a", "b", None]), min_size=num_rows, max_size=num_rows))
    amounts = draw(
        rows(st.one_of(st.just(np.nan), st.floats(-1e4, 1e4, width=32)), min_size=num_rows, max_size=num_rows)
    )
    card, item = np.empty(num_rows, dtype=object), np.empty(num_rows, dtype=object)
    card[:], item[:] = cards, [f"i{k}" for k in range(num_rows)]
    return Events(
        time_us=np.asarray(seconds, dtype=np.int64) * US,
        keys={"card": card, "item": item},
        numbers={"amount": np.asarray(amounts, dtype=np.float64)},
    )


@settings(max_examples=150, deadline=None)
@given(event_tables())
def test_batch_equals_brute_force(events: Events) -> None:
    values = features_at(PLAN, events, events)
    for name, column in values.items():
        expected = [
            brute_force(events, name, c, int(t)) for c, t in zip(events.keys["card"], events.time_us, strict=True)
        ]
        np.testing.assert_allclose(column, expected, rtol=1e-6, atol=1e-2 if "std" in name else 1e-6, err_msg=name)


def stream(events: Events) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Each event scored from the state of the events before its instant, then folded in."""
    layout = StateLayout(PLAN.of_entity("card"))
    states: dict[str, np.ndarray] = {}
    out = np.full((len(events), len(layout.features)), np.nan)
    for time in np.unique(events.time_us):
        rows = [i for i in np.flatnonzero(events.time_us == time) if events.keys["card"][i] is not None]
        for i in rows:
            state = states.get(events.keys["card"][i], layout.empty()[0])
            out[i] = layout.apply(state[None], np.array([time]))[0]
        for i in rows:
            key = events.keys["card"][i]
            value = {"amount": float(events.numbers["amount"][i])}
            states[key] = layout.update(states.get(key, layout.empty()[0]), int(time), value)
    return dict(zip(layout.names, out.T, strict=True)), states


@settings(max_examples=100, deadline=None)
@given(event_tables())
def test_stream_equals_batch_and_leaves_the_same_state(events: Events) -> None:
    batch = features_at(PLAN, events, events)
    streamed, states = stream(events)
    for name in batch:
        tolerance = 1e-2 if "std" in name else 1e-6
        np.testing.assert_allclose(streamed[name], batch[name], rtol=1e-6, atol=tolerance, err_msg=name)
    final = final_states(PLAN, "card", events)
    for key, state in zip(final.keys, final.states, strict=True):
        np.testing.assert_allclose(state, states[key], rtol=1e-9, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(event_tables(), st.integers(-400, 1500), st.randoms(use_true_random=False))
def test_changing_the_future_changes_no_feature(events: Events, cut_s: int, random: object) -> None:
    """Everything at or after a moment is altered: values, keys, labels, how many; nothing before may move."""
    cut = cut_s * US
    before = events.time_us < cut
    queries = events.take(np.flatnonzero(events.time_us <= cut))
    future = np.flatnonzero(~before)
    amount = events.numbers["amount"].copy()
    amount[future] = amount[future] * -3 + 77
    card = events.keys["card"].copy()
    card[future] = "a"
    changed = replace(
        events, keys={**events.keys, "card": card}, numbers={"amount": amount}, labels=np.ones(len(events), bool)
    )
    doubled = changed.take(np.r_[np.flatnonzero(before), future, future])
    original, altered = features_at(PLAN, events, queries), features_at(PLAN, doubled, queries)
    for name in original:
        np.testing.assert_array_equal(original[name], altered[name], err_msg=name)


def test_a_late_event_still_counts_where_its_tile_is_kept() -> None:
    layout = StateLayout(PLAN.of_entity("card"))
    in_order, late = layout.empty()[0], layout.empty()[0]
    for time_s in (100, 130, 150):
        in_order = layout.update(in_order, time_s * US, {"amount": time_s})
    for time_s in (100, 150, 130):
        late = layout.update(late, time_s * US, {"amount": time_s})
    np.testing.assert_allclose(late, in_order)


def test_sequences_keep_the_latest_in_order() -> None:
    card, item = np.array(["a"] * 5, dtype=object), np.array(list("vwxyz"), dtype=object)
    times = np.array([5, 1, 3, 2, 4]) * US
    events = Events(time_us=times, keys={"card": card, "item": item}, numbers={"amount": np.ones(5)})
    assert final_states(PLAN, "card", events).sequences == [["x", "z", "v"]]


def test_queries_about_unknown_and_missing_keys() -> None:
    events = Events(time_us=np.array([0]), keys={"card": np.array(["a"], dtype=object)}, numbers={"amount": np.ones(1)})
    keys = {"card": np.array(["new", None], dtype=object)}
    values = features_at(PLAN, events, Events(time_us=np.array([9, 9]), keys=keys))
    assert values["card__events__count__1m"][0] == 0
    assert np.isnan(values["card__events__count__1m"][1])
    assert np.isnan(values["card__since_latest_s"][0])


@pytest.mark.parametrize("num_entities", [1, 1000])
def test_one_entity_with_large_values_does_not_blur_another(num_entities: int) -> None:
    card = np.array([f"c{i}" for i in range(num_entities)] + ["small"] * 2, dtype=object)
    amount = np.r_[np.full(num_entities, 1e15), 0.1, 0.2]
    events = Events(time_us=np.arange(len(card)) * US, keys={"card": card}, numbers={"amount": amount})
    plan = FeaturePlan((Window(entity="card", aggregate="sum", column="amount", length_s=100_000, num_tiles=10),))
    query = Events(time_us=np.array([len(card) * US]), keys={"card": np.array(["small"], dtype=object)})
    assert features_at(plan, events, query)["card__amount__sum__100000s"][0] == pytest.approx(0.3, abs=1e-12)
