"""Batch, stream and a brute-force oracle agree for every definition; the future and the label never leak in."""

from dataclasses import replace

import numpy as np
import pytest
from assay_features.batch import EntityStates, History, features_at, final_states
from assay_features.definitions import (
    Decay,
    EntityFeature,
    FeaturePlan,
    Latest,
    Ratio,
    Sequence,
    SinceLatest,
    Where,
    Window,
)
from assay_features.events import KEY_SEPARATOR, Events, Reports, key_column
from assay_features.row_features import model_columns
from assay_features.state import StateLayout, entity_keys
from assay_platform.errors import DataError
from hypothesis import example, given, settings
from hypothesis import strategies as st

US = 1_000_000
WEB = Where(column="item", values=("i1", "i2"))
LARGE = Where(column="amount", at_least=10.0)
NIGHT = Where(column="calendar_hour", at_least=22.0, below=6.0)


def windows(entity: str | tuple[str, ...], **kwargs: int) -> list[Window]:
    return [
        Window(entity=entity, aggregate="count", length_s=60, num_tiles=6, **kwargs),
        Window(entity=entity, aggregate="count", column="amount", length_s=60, num_tiles=6, **kwargs),
        Window(entity=entity, aggregate="sum", column="amount", length_s=60, num_tiles=3, **kwargs),
        Window(entity=entity, aggregate="mean", column="amount", length_s=600, **kwargs),
        Window(entity=entity, aggregate="std", column="amount", length_s=600, **kwargs),
        Window(entity=entity, aggregate="min", column="amount", length_s=600, **kwargs),
        Window(entity=entity, aggregate="max", column="amount", length_s=300, num_tiles=4, **kwargs),
        Window(entity=entity, aggregate="distinct", column="item", length_s=300, **kwargs),
        Window(entity=entity, aggregate="last", column="amount", length_s=120, **kwargs),
        Window(entity=entity, aggregate="since_last", length_s=120, num_tiles=1, **kwargs),
        Window(entity=entity, aggregate="rate", length_s=60, against_s=600, **kwargs),
        Window(entity=entity, aggregate="rate", column="amount", length_s=60, against_s=600, **kwargs),
    ]


PLAN = FeaturePlan(
    (
        *windows("card"),
        *windows("card", max_events=100),
        Window(entity="card", aggregate="sum", column="amount", length_s=300, where=WEB),
        Window(entity="card", aggregate="count", length_s=86_400, where=NIGHT),
        Window(entity="card", aggregate="max", column="amount", length_s=300, where=LARGE, max_events=100),
        Window(entity="card", aggregate="distinct", column="item", length_s=300, where=LARGE),
        Decay(entity="card", half_life_s=30),
        Decay(entity="card", half_life_s=300, column="amount"),
        Decay(entity="card", half_life_s=300, column="amount", where=WEB),
        Latest(entity="card", column="amount"),
        Latest(entity="card", column="amount", where=WEB),
        SinceLatest(entity="card"),
        SinceLatest(entity="card", where=LARGE),
        Sequence(entity="card", column="item", length=3),
        Window(entity=("card", "item"), aggregate="count", length_s=600),
        Decay(entity=("card", "item"), half_life_s=100, column="amount"),
    )
)
DEFINITIONS: dict[str, EntityFeature] = {d.name: d for e in PLAN.entities for d in PLAN.of_entity(e)}


def passes(events: Events, where: Where | None) -> np.ndarray:
    if where is None:
        return np.ones(len(events), dtype=bool)
    if where.values:
        return np.array([key in where.values for key in events.keys[where.column]], dtype=bool)
    if where.column == "amount":
        return np.array([value >= 10.0 for value in events.numbers["amount"]], dtype=bool)
    hour = events.time_us // (3600 * US) % 24
    return (hour >= 22) | (hour < 6)


def brute_force(events: Events, definition: EntityFeature, key: str | None, time_us: int) -> float:
    """One feature of one query, straight from its definition."""
    if key is None:
        return np.nan
    mine = (entity_keys(definition.entity, events) == key) & (events.time_us < time_us)
    mine &= passes(events, definition.where)
    time, amount, item = (column[mine] for column in (events.time_us, events.numbers["amount"], events.keys["item"]))
    if isinstance(definition, SinceLatest):
        return (time_us - time.max()) / US if len(time) else np.nan
    if isinstance(definition, Latest):
        return amount[np.flatnonzero(time == time.max())[-1]] if len(time) else np.nan
    if isinstance(definition, Decay):
        value = np.ones(len(time)) if definition.column is None else np.nan_to_num(amount)
        return float((value * 2.0 ** (-(time_us - time) / US / definition.half_life_s)).sum())

    def inside(length_s: int) -> np.ndarray:
        if definition.max_events:
            return time >= time_us - length_s * US
        tile = length_s * US // definition.num_tiles
        return time // tile > time_us // tile - definition.num_tiles

    window = inside(definition.length_s)
    value = np.ones(len(time)) if definition.column in (None, "item") else amount
    here = value[window & ~np.isnan(value)]
    match definition.aggregate:
        case "count":
            return float(len(here))
        case "sum":
            return float(here.sum())
        case "rate":
            assert definition.against_s is not None
            longer = value[inside(definition.against_s) & ~np.isnan(value)].sum()
            return here.sum() / longer * definition.against_s / definition.length_s if longer != 0 else np.nan
        case "distinct":
            return float(len({i for i in item[window] if i is not None}))
    if definition.aggregate in ("last", "since_last"):
        if not window.any():
            return np.nan
        newest = np.flatnonzero(time == time.max())[-1]
        return (time_us - time[newest]) / US if definition.aggregate == "since_last" else amount[newest]
    return float(getattr(np, definition.aggregate)(here)) if len(here) else np.nan


@st.composite
def event_tables(draw: st.DrawFn, step_s: int = 1) -> Events:
    """Few cards and instants, so that ties, duplicates and late rows are common; missing keys, items and amounts."""
    num_rows = draw(st.integers(0, 25))
    rows = st.lists
    seconds = draw(rows(st.integers(-400, 1500).map(lambda s: s * step_s), min_size=num_rows, max_size=num_rows))
    cards = draw(rows(st.sampled_from(["a", "b", None]), min_size=num_rows, max_size=num_rows))
    items = draw(rows(st.sampled_from(["i1", "i2", "i3", None]), min_size=num_rows, max_size=num_rows))
    # Whole numbers: sums of any order are exact, so 'the rate over nothing' is decided alike.
    amounts = draw(rows(st.one_of(st.just(np.nan), st.integers(-50, 100)), min_size=num_rows, max_size=num_rows))
    card, item = np.empty(num_rows, dtype=object), np.empty(num_rows, dtype=object)
    card[:], item[:] = cards, items
    return Events(
        time_us=np.asarray(seconds, dtype=np.int64) * US,
        keys={"card": card, "item": item},
        numbers={"amount": np.asarray(amounts, dtype=np.float64)},
    )


tables = st.one_of(event_tables(), event_tables(step_s=30), event_tables(step_s=3600))


def close(actual: object, expected: object, name: str = "") -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9, err_msg=name)


@settings(max_examples=150, deadline=None)
@given(tables)
def test_batch_equals_brute_force(events: Events) -> None:
    values = features_at(PLAN, events, events)
    assert set(values) == set(DEFINITIONS)
    for name, column in values.items():
        keys = entity_keys(DEFINITIONS[name].entity, events)
        expected = [
            brute_force(events, DEFINITIONS[name], k, int(t)) for k, t in zip(keys, events.time_us, strict=True)
        ]
        close(column, expected, name)


def stream(events: Events, entity: str | tuple[str, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Each event scored, then folded in, one at a time in order of time: what serving does."""
    layout = StateLayout(PLAN.of_entity(entity))
    keys = entity_keys(entity, events)
    inputs = layout.inputs(events)
    states: dict[str, np.ndarray] = {}
    out = np.full((len(events), len(layout.features)), np.nan)
    for i in np.argsort(events.time_us, kind="stable"):
        if keys[i] is not None:
            state = states.setdefault(keys[i], layout.empty())
            out[i] = layout.apply(state, events.time_us[i : i + 1])
            layout.fold(state, np.zeros(1, dtype=np.int64), events.time_us[i : i + 1], inputs[i : i + 1])
    return out, states


# Two events of one instant, and older ones at both ends of the ring of tiles.
TURNED = Events(
    time_us=np.array([-301, 250, 300, -1, *[0] * 16, 300]) * 1_000_000,
    keys={name: np.array([value] * 21, dtype=object) for name, value in (("card", "a"), ("item", "i1"))},
    numbers={"amount": np.array([np.nan, -3.0, np.nan, 5.0, *[np.nan] * 15, 0.0, np.nan])},
)


@pytest.mark.parametrize("entity", PLAN.entities)
@settings(max_examples=100, deadline=None)
@example(events=TURNED)
@given(events=tables)
def test_stream_equals_batch_to_the_bit_and_leaves_the_same_state(
    entity: str | tuple[str, ...], events: Events
) -> None:
    """Ties included: an event of the very instant is folded in already, and is not seen."""
    batch = features_at(PLAN, events, events)
    streamed, states = stream(events, entity)
    for i, definition in enumerate(PLAN.of_entity(entity)):
        np.testing.assert_array_equal(streamed[:, i], batch[definition.name], err_msg=definition.name)
    final = final_states(PLAN, entity, events)
    assert len(final.keys) == len(states)
    for key, state in zip(final.keys, final.states, strict=True):
        np.testing.assert_array_equal(state.view(np.int64), states[key][0].view(np.int64))


@settings(max_examples=100, deadline=None)
@given(tables, st.randoms(use_true_random=False))
def test_events_in_any_order_lead_to_the_same_features(events: Events, random: object) -> None:
    """Late events count everywhere, as long as fewer than two newer instants hide a latest value."""
    order = list(range(len(events)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = events.take(np.array(order, dtype=np.intp))
    layout = StateLayout(PLAN.of_entity("card"))
    inputs = layout.inputs(shuffled)
    rows = np.array([{"a": 0, "b": 1, None: 2}[k] for k in shuffled.keys["card"]], dtype=np.int64)
    states = layout.empty(3)
    for i in range(len(rows)):
        layout.fold(states, rows[i : i + 1], shuffled.time_us[i : i + 1], inputs[i : i + 1])
    later = int(events.time_us.max(initial=0)) + 60 * US
    keys = np.array(["a", "b"], dtype=object)
    queries = Events(time_us=np.array([later, later]), keys={"card": keys, "item": keys})
    expected = features_at(PLAN, shuffled, queries)
    got = layout.apply(states[:2], queries.time_us)
    for i, definition in enumerate(layout.features):
        close(got[:, i], expected[definition.name], definition.name)


@settings(max_examples=100, deadline=None)
@given(tables, st.integers(-400, 1500))
def test_changing_the_future_changes_no_feature(events: Events, cut_s: int) -> None:
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


def card_events(times_s: list[int], **columns: list[object]) -> Events:
    def keys(values: list[object]) -> np.ndarray:
        out = np.empty(len(values), dtype=object)
        out[:] = values
        return out

    return Events(
        time_us=np.array(times_s, dtype=np.int64) * US,
        keys={"card": keys(["a"] * len(times_s)), "item": keys(columns.get("item", ["x"] * len(times_s)))},
        numbers={"amount": np.array(columns.get("amount", [1.0] * len(times_s)), dtype=np.float64)},
    )


def query(time_s: float) -> Events:
    return Events(time_us=np.array([round(time_s * US)]), keys={"card": np.array(["a"], dtype=object)})


def test_a_count_of_different_values_stops_at_its_capacity() -> None:
    events = card_events(list(range(10)), item=[f"v{i}" for i in range(10)])
    plan = FeaturePlan(
        tuple(
            Window(entity="card", aggregate="distinct", column="item", length_s=length_s, max_distinct=4, max_events=1)
            for length_s in (3, 60)
        )
    )
    values = features_at(plan, events, query(10))
    assert [float(v[0]) for v in values.values()] == [3.0, 4.0]


def test_an_exact_window_sees_the_newest_events_up_to_its_capacity() -> None:
    events = card_events(list(range(10)), amount=list(range(10)))
    plan = FeaturePlan((Window(entity="card", aggregate="sum", column="amount", length_s=60, max_events=3),))
    assert features_at(plan, events, query(20))["card__amount__sum__1m__exact"][0] == 7 + 8 + 9


def test_exact_windows_include_their_first_instant_and_exclude_their_last() -> None:
    events = card_events([0, 10, 60])
    plan = FeaturePlan((Window(entity="card", aggregate="count", length_s=60, max_events=8),))
    assert features_at(plan, events, query(60))["card__events__count__1m__exact"][0] == 2
    assert features_at(plan, events, query(60.000001))["card__events__count__1m__exact"][0] == 2
    assert features_at(plan, events, query(70.000001))["card__events__count__1m__exact"][0] == 1


@pytest.mark.parametrize("offset_s", [-62_135_596_800 + 86_400, 0, 1_700_000_000, 253_402_214_400 - 4000])
def test_years_1_to_9999_keep_their_microseconds(offset_s: int) -> None:
    events = replace(card_events([0, 1, 2]), time_us=np.array([0, 1, 2]) + offset_s * US)
    moment = replace(query(0), time_us=np.array([offset_s * US + 3]))
    values = features_at(FeaturePlan((SinceLatest(entity="card"), *windows("card", max_events=4))), events, moment)
    assert values["card__since_latest_s"][0] == pytest.approx(1e-6)
    assert values["card__events__count__1m__exact"][0] == 3


def test_amounts_of_any_size_neither_overflow_nor_blur() -> None:
    events = card_events([0, 1, 2, 3], amount=[2.0**60, 2.0**60, -(2.0**60), 1e300])
    plan = FeaturePlan(tuple(windows("card")))
    values = features_at(plan, events, query(4))
    assert values["card__amount__max__5m"][0] == 1e300
    assert values["card__amount__sum__1m"][0] == 1e300
    near = card_events([0, 1, 2], amount=[1e9 + 1, 1e9 + 2, 1e9 + 3])
    assert features_at(plan, near, query(4))["card__amount__std__10m"][0] == pytest.approx(np.std([1, 2, 3]), rel=1e-12)


def test_sequences_keep_the_latest_in_order() -> None:
    events = card_events([5, 1, 3, 2, 4], item=list("vwxyz"))
    assert [s.values for s in final_states(PLAN, "card", events).sequences] == [("x", "z", "v")]


def test_a_composite_entity_is_one_key_and_needs_every_part() -> None:
    events = card_events([0, 1, 2], item=["x", None, "x"])
    states: EntityStates = final_states(PLAN, ("card", "item"), events)
    assert list(states.keys) == [f"a{KEY_SEPARATOR}x"]
    values = features_at(PLAN, events, events)
    np.testing.assert_array_equal(values["card_and_item__events__count__10m"], [0, np.nan, 1])


def test_queries_about_unknown_and_missing_keys() -> None:
    events = card_events([0])
    keys = {"card": np.array(["new", None], dtype=object), "item": np.array(["x", "x"], dtype=object)}
    values = features_at(PLAN, events, Events(time_us=np.array([9, 9]), keys=keys))
    assert values["card__events__count__1m"][0] == 0
    assert np.isnan(values["card__events__count__1m"][1])
    assert np.isnan(values["card__since_latest_s"][0])


def test_a_column_that_is_not_there_is_named() -> None:
    events = card_events([0])
    for plan, missing in (
        (FeaturePlan((Latest(entity="card", column="price"),)), "numeric column 'price'"),
        (FeaturePlan((SinceLatest(entity="device"),)), "key column 'device'"),
        (FeaturePlan((SinceLatest(entity="card", where=Where(column="shop", values=("a",))),)), "key column 'shop'"),
    ):
        with pytest.raises(DataError, match=missing):
            features_at(plan, events, events)


def test_a_state_of_another_layout_is_refused() -> None:
    layout = StateLayout((SinceLatest(entity="card"),))
    with pytest.raises(DataError, match="publish the features again"):
        layout.unpack([b"\0" * 24])


@pytest.mark.parametrize("num_entities", [1, 1000, 60_000])
def test_one_entity_with_large_values_does_not_blur_another(num_entities: int) -> None:
    """The largest number also runs on every core."""
    card = np.array([f"c{i}" for i in range(num_entities)] + ["small"] * 2, dtype=object)
    amount = np.r_[np.full(num_entities, 1e15), 0.1, 0.2]
    events = Events(time_us=np.arange(len(card)) * US, keys={"card": card}, numbers={"amount": amount})
    plan = FeaturePlan((Window(entity="card", aggregate="sum", column="amount", length_s=100_000, num_tiles=10),))
    asked = Events(time_us=np.full(len(card), len(card) * US), keys={"card": card})
    values = features_at(plan, events, asked)["card__amount__sum__100000s"]
    assert values[-1] == pytest.approx(0.3, abs=1e-12)
    if num_entities < 60_000:
        np.testing.assert_array_equal(values[:-2], 1e15)


def test_reports_are_seen_only_after_their_delay() -> None:
    rng = np.random.default_rng(3)
    times = np.sort(rng.integers(0, 50, 300)) * 1_000_000
    card = np.array([f"c{k}" for k in rng.integers(0, 4, 300)], dtype=object)
    events = Events(times, {"card": card}, {"amount": rng.normal(size=300)}, labels=rng.random(300) < 0.3)
    assert events.labels is not None
    frauds = Window(entity="card", aggregate="sum", column="fraud", length_s=24, num_tiles=1, max_events=400)
    counts = [Window(entity="card", aggregate="count", length_s=n, num_tiles=1, max_events=400) for n in (31, 7)]
    share = Ratio(numerator=frauds.name, denominator=counts[0].name, less=counts[1].name)
    plan = FeaturePlan((frauds, *counts, share))
    found = features_at(plan, events, events, reports=Reports("fraud", 7))
    alone = features_at(FeaturePlan(tuple(counts)), events, events)
    for count in counts:
        np.testing.assert_array_equal(found[count.name], alone[count.name])
    columns = model_columns(plan, events, found)
    for i in range(300):
        age = (times[i] - times) / 1_000_000 - 7
        known = (card == card[i]) & (age > 0) & (age <= 24)
        assert found[frauds.name][i] == events.labels[known].sum()
        np.testing.assert_allclose(columns[share.name][i], events.labels[known].mean() if known.any() else np.nan)
    with pytest.raises(DataError, match="no labels, so nothing is reported as 'fraud'"):
        features_at(plan, Events(times, events.keys), events, reports=Reports("fraud", 7))


def test_a_number_can_be_part_of_an_entity() -> None:
    """The same amount at the same card, whether it came as a number, as text with zeros, or as a key column."""
    amount = np.array([5.0, 68.5, 5.0, np.nan, 5.0, 68.5])
    events = Events(
        np.arange(6) * 1_000_000, {"card": np.array(["a", "a", "a", "a", "b", "a"], dtype=object)}, {"amount": amount}
    )
    plan = FeaturePlan((Window(entity=("card", "amount"), aggregate="count", length_s=100, num_tiles=1, max_events=9),))
    expected = [0, 0, 1, np.nan, 0, 1]
    np.testing.assert_array_equal(
        features_at(plan, events, events)["card_and_amount__events__count__100s__exact"], expected
    )
    assert plan.inputs(("amount",)) == (("card",), ("amount",))
    assert key_column(events, "amount").tolist() == ["5", "68.5", "5", None, "5", "68.5"]
    assert key_column(events.take(slice(1, 2)), "amount").tolist() == ["68.5"]
    with pytest.raises(DataError, match="key column 'shop'"):
        key_column(events, "shop")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), num_queries=st.integers(0, 40))
def test_a_history_asked_with_few_queries_gives_what_the_whole_table_does(seed: int, num_queries: int) -> None:
    rng = np.random.default_rng(seed)

    def some(num: int) -> Events:
        card = np.array([None if k == 9 else f"c{k}" for k in rng.integers(0, 10, num)], dtype=object)
        shop = np.array([f"s{k}" for k in rng.integers(0, 3, num)], dtype=object)
        times = rng.integers(0, 500, num) * 1_000_000
        return Events(times, {"card": card, "shop": shop}, {"amount": rng.integers(0, 4, num).astype(float)})

    events, queries = some(200), some(num_queries)
    plan = FeaturePlan((
        Window(entity="card", aggregate="sum", column="amount", length_s=60),
        Window(entity=("card", "shop"), aggregate="count", length_s=120),
        Window(entity=("shop", "amount"), aggregate="distinct", column="card", length_s=240),
        Decay(entity="shop", half_life_s=50),
        SinceLatest(entity="card", where=Where(column="amount", at_least=2.0)),
    ))  # fmt: skip
    found, expected = History(plan, events).at(queries), features_at(plan, events, queries)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
