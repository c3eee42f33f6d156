"""Accounts told by their running totals: the same in batch, in parts and online, and never by what comes later."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assay_features.accounts import AccountLinks, AccountStream, columns_read
from assay_features.batch import features_at
from assay_features.definitions import FeaturePlan, Window
from assay_features.events import Events
from assay_features.schema import ACCOUNT, Account, FraudSchema
from assay_features.stream import EventStream, StreamSettings
from assay_platform.errors import SchemaError
from assay_platform.storage.disk import DiskTier
from assay_platform.storage.tiered import TieredStore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T0 = 1_700_000_000
LINKS = AccountLinks("spent", "amount", ("card",))


def payments(rows: list[tuple[int, str | None, float, float]]) -> Events:
    """(seconds, card, spent before, amount) a payment, in order of time."""
    card = np.empty(len(rows), dtype=object)
    card[:] = [row[1] for row in rows]
    return Events(
        np.array([(T0 + row[0]) * 1_000_000 for row in rows], dtype=np.int64),
        {"card": card},
        {"spent": np.array([row[2] for row in rows]), "amount": np.array([row[3] for row in rows])},
    )


def accounts(events: Events) -> list[str | None]:
    return LINKS.assign(events).keys[ACCOUNT].tolist()


def as_said(events: Events) -> list[int | None]:
    """The definition, slowly: the account of the newest earlier payment after which the total was this one's before,
    as the place of its first payment.
    """
    card, time_us = events.keys["card"], events.time_us
    spent, amount = events.numbers["spent"], events.numbers["amount"]
    first: list[int | None] = []
    for i in range(len(events)):
        found: int | None = i
        for j in range(i):
            follows = card[j] == card[i] and amount[j] > 0 and abs(spent[j] + amount[j] - spent[i]) < 5e-4
            if follows and time_us[j] < time_us[i] and spent[i] > 0:
                found = first[j]
        first.append(None if np.isnan(spent[i]) else found)
    # Payments that begin an account in the same way at the same instant are one account.
    begins = {}
    for i, place in enumerate(first):
        if place == i:
            begins[i] = begins.setdefault((card[i], round(float(spent[i]), 3), int(time_us[i])), i)
    return [None if place is None else begins[place] for place in first]


ROWS = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.sampled_from(["a", "b", None]),
        st.sampled_from([0.0, 0.1, 0.3, 0.4, 0.6, 0.7, np.nan]),
        st.sampled_from([0.0, 0.1, 0.2, 0.3, np.nan]),
    ),
    max_size=14,
)


@given(ROWS)
def test_accounts_are_what_the_definition_says(rows: list[tuple[int, str | None, float, float]]) -> None:
    events = payments(sorted(rows, key=lambda row: row[0]))
    names, places = accounts(events), as_said(events)
    assert [name is None for name in names] == [place is None for place in places]
    for i, name in enumerate(names):
        for j in range(i):
            assert (name == names[j] and name is not None) == (places[i] == places[j] and places[i] is not None)


@given(ROWS, st.integers(0, 14))
def test_what_comes_later_changes_no_account(rows: list[tuple[int, str | None, float, float]], num: int) -> None:
    events = payments(sorted(rows, key=lambda row: row[0]))
    assert accounts(events.take(slice(0, num))) == accounts(events)[:num]


def open_stream(folder: Path) -> EventStream:
    store = TieredStore(DiskTier(folder / "warm", sync=False))
    given = StreamSettings(allowed_lateness_s=900, checkpoint_s=1000)
    return EventStream("shop", LINKS.plan, store, folder / "log", given, clock=lambda: T0 + 10**6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 6), st.integers(0, 3)), max_size=14),
    st.lists(st.integers(0, 14), max_size=4),
)
def test_events_that_come_in_parts_get_the_accounts_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str | None, int, int]], cuts: list[int]
) -> None:
    # One instant a payment, as they come; tenths, so that sums of floats are not what they look like.
    events = payments([(i, card, spent / 10, amount / 10) for i, (card, spent, amount) in enumerate(rows)])
    stream = open_stream(tmp_path_factory.mktemp("accounts"))
    online = AccountStream(LINKS, stream)
    bounds = sorted({0, len(events), *(cut for cut in cuts if cut < len(events))})
    found: list[str | None] = []
    for first, end in pairwise(bounds):
        part = events.take(slice(first, end))
        asked = online.assign(part).keys[ACCOUNT].tolist()
        pushed = online.push(part).keys[ACCOUNT].tolist()
        assert asked == pushed
        found += pushed
    stream.close()
    assert found == accounts(events)


def test_an_account_is_an_entity_as_others_are() -> None:
    events = LINKS.assign(
        payments([(0, "a", 0, 5), (10, "a", 0, 7), (20, "a", 5, 1), (25, "a", 7, 1), (30, "a", 6, 1)])
    )
    count = Window(entity=ACCOUNT, aggregate="count", length_s=3600)
    assert features_at(FeaturePlan((count,)), events, events)[count.name].tolist() == [0, 0, 1, 1, 2]


def schema(**changes: Any) -> FraudSchema:
    given: dict[str, Any] = {
        "timestamp": "t", "label": "fraud", "amount": "amount", "numeric": ("amount", "spent"), "entities": ("card",),
        "account": Account(total="spent", within=("card",)),
    }  # fmt: skip
    return FraudSchema(**{**given, **changes})


def test_a_plan_of_accounts_reads_what_they_are_known_by() -> None:
    plan = FeaturePlan((Window(entity=ACCOUNT, aggregate="count", length_s=60),))
    assert columns_read(plan, schema()) == (("card",), ("spent", "amount"))
    assert schema().limits.immutable == ("spent", "card")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"amount": None}, "amount"),
        ({"numeric": ("amount",)}, "'spent' must also be listed in numeric"),
        ({"account": Account(total="spent", within=("shop",))}, "within names 'shop'"),
        ({"entities": ("card", "account")}, "has a column 'account' already"),
    ],
)
def test_an_account_that_nothing_tells_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SchemaError, match=named):
        schema(**changes)
