"""Who pays, where no column says so: accounts told by their running totals.

Payment feeds often leave the account's number away and bring what the processor has counted of it, such as all that it
has spent so far. That is enough: a payment whose total before is the total after an earlier one, of the same card and
address, is that account's next. Each payment so continues the account of one strictly earlier or begins a new one.

What is known is one number a total: `Latest` of a plan of its own, so that links are computed in batch, stored, logged
and read online as every other feature is.
"""

# N events

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, repeat
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from assay_features.definitions import FeaturePlan, Latest
from assay_features.events import KEY_SEPARATOR, Events, Keys, canonical_key, key_column
from assay_features.schema import ACCOUNT, FraudSchema, Schema
from assay_features.state import Floats, Times

if TYPE_CHECKING:  # Feast takes seconds to import, and who reads a table needs no store
    from assay_features.feast.repository import FeatureRepository
    from assay_features.stream import EventStream

_LINK = "account_link"
# Totals are added up by somebody else, and no currency has more.
_DECIMALS = 3
_MAX_UNITS = 2.0**62
Bits = NDArray[np.uint64]
# N keys of what is followed, when → account numbers that strictly earlier events left there, NaN without one.
Known = Callable[[list[str | None], Times], Floats]


class _Links(NamedTuple):
    """(N,) keys by which payments follow one another, None where there is none."""

    before: Keys  # what the payment follows
    after: Keys  # what follows it
    first: Keys  # what its account is called if it follows nothing


@dataclass(frozen=True)
class AccountLinks:
    """How payments of one account are known. total: what it had spent before the payment. amount: of the payment.

    within: columns that stay the same for an account; missing is a value as others are.
    """

    total: str
    amount: str
    within: tuple[str, ...]

    @property
    def plan(self) -> FeaturePlan:
        """What is remembered of every total."""
        return FeaturePlan((Latest(entity=_LINK, column=ACCOUNT),))

    @property
    def columns(self) -> tuple[str, ...]:
        """What is read of an event."""
        return (self.total, self.amount, *self.within)

    def assign(self, events: Events, known: Known | None = None, apart: Sequence[int] | None = None) -> Events:
        """The events, in order of time, with the key of their account, None where the total is missing.

        known: what events that are not among these have left. apart: (N,) a number an event; those of different numbers
        do not follow one another.
        """
        links = self._links(events)
        left = None if known is None else known(links.before.tolist(), events.time_us)
        part = [0] * len(events) if apart is None else apart
        account_of: dict[tuple[int, str], str] = {}
        accounts = np.empty(len(events), dtype=object)
        # Events of one instant do not see each other.
        bounds = np.flatnonzero(np.r_[True, np.diff(events.time_us) != 0, True]) if len(events) else np.empty(0, int)
        for first, end in pairwise(bounds.tolist()):
            for i in range(first, end):
                found = account_of.get((part[i], links.before[i]))
                if found is None and left is not None and not np.isnan(left[i]):
                    found = canonical_key(float(left[i]))
                accounts[i] = links.first[i] if found is None else found
            for i in range(first, end):
                if links.after[i] is not None:
                    account_of[part[i], links.after[i]] = accounts[i]
        return replace(events, keys={**events.keys, ACCOUNT: accounts})

    def of(self, events: Events) -> Events:
        """What events with accounts leave for those that follow."""
        numbers = np.array([math.nan if key is None else float(key) for key in events.keys[ACCOUNT]], dtype=np.float64)
        _, after = self._totals(events)
        left = _keys(after, self._within(events))
        return Events(events.time_us, {_LINK: left}, {ACCOUNT: numbers}, ids=events.ids)

    def _links(self, events: Events) -> _Links:
        within = self._within(events)
        before, after = self._totals(events)
        first = _mixed(within, events.time_us.astype(np.uint64))
        return _Links(
            _keys(np.where(np.round(before, _DECIMALS) > 0, before, np.nan), within),
            _keys(after, within),
            _keys(before, first),
        )

    def _totals(self, events: Events) -> tuple[Floats, Floats]:
        """Before and after each payment; NaN after none of an amount."""
        before, amount = events.numbers[self.total], events.numbers[self.amount]
        return before, np.where(amount > 0, before + amount, np.nan)

    def _within(self, events: Events) -> Bits:
        """(N,) what stays the same for an account, as a number."""
        columns = [key_column(events, name) for name in self.within]
        parts = zip(*columns, strict=True) if columns else repeat((), len(events))
        return np.fromiter(map(_number_of, parts), dtype=np.uint64, count=len(events))


class AccountStream:
    """Accounts of events as they come, by what is remembered online."""

    def __init__(self, links: AccountLinks, stream: "EventStream") -> None:
        self._links, self._stream = links, stream
        [self._name] = links.plan.numeric_names

    @staticmethod
    def open(repository: "FeatureRepository", schema: Schema, plan: FeaturePlan) -> "AccountStream | None":
        """None where the schema knows no accounts or the plan has no use for them."""
        links = links_of(schema)
        if links is None or ACCOUNT not in plan.key_columns():
            return None
        return AccountStream(links, repository.online(links.plan))

    def assign(self, events: Events, apart: Sequence[int] | None = None) -> Events:
        """The events with their accounts, nothing remembered. They may be in any order; each sees what is strictly
        earlier, and nothing of those that are `apart` from it: see `AccountLinks.assign`.
        """
        order = np.argsort(events.time_us, kind="stable")
        ordered = events.take(order)
        parts = None if apart is None else [apart[i] for i in order]
        accounts = np.empty(len(events), dtype=object)
        accounts[order] = self._links.assign(ordered, self._known, parts).keys[ACCOUNT]
        return replace(events, keys={**events.keys, ACCOUNT: accounts})

    def _known(self, keys: list[str | None], time_us: Times) -> Floats:
        return self._stream.read({_LINK: keys}, time_us).values[self._name]

    def push(self, events: Events) -> Events:
        """The events with their accounts, which those that follow are to find.

        Raises:
            DataError: an event is ahead of the clock; nothing was taken in.
            StorageError: the log cannot be written; nothing was taken in.
        """
        named = self.assign(events)
        self._stream.push(self._links.of(named))
        return named


def links_of(schema: Schema) -> AccountLinks | None:
    """How the schema says that accounts are known, if it does."""
    if not isinstance(schema, FraudSchema) or schema.account is None:
        return None
    assert schema.amount is not None
    return AccountLinks(schema.account.total, schema.amount, schema.account.within)


def with_accounts(events: Events, schema: Schema) -> Events:
    """The events of a table, in order of time, with their accounts if the schema says how they are known."""
    links = links_of(schema)
    return events if links is None else links.assign(events)


def columns_read(plan: FeaturePlan, schema: Schema) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns of an event that a plan needs, as keys and as numbers; for its account those that it is known by."""
    keys, numbers = plan.inputs((*schema.numbers, schema.label or ""))
    links = links_of(schema)
    if links is None or ACCOUNT not in keys:
        return keys, numbers
    keys = tuple(name for name in keys if name != ACCOUNT)
    return (
        tuple(dict.fromkeys((*keys, *(name for name in links.columns if name not in schema.numbers)))),
        tuple(dict.fromkeys((*numbers, *(name for name in links.columns if name in schema.numbers)))),
    )


@lru_cache(maxsize=100_000)
def _number_of(parts: tuple[str | None, ...]) -> int:
    text = KEY_SEPARATOR.join("" if part is None else part for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _keys(totals: Floats, within: Bits) -> Keys:
    """(N,) a number of 52 bits, exact as a float, as text; None where the total is missing."""
    has = ~np.isnan(totals)
    units = np.rint(np.where(has, totals, 0.0) * 10**_DECIMALS).clip(-_MAX_UNITS, _MAX_UNITS).astype(np.int64)
    out = np.empty(len(totals), dtype=object)
    out[:] = list(map(str, (_mixed(within, units.view(np.uint64)) >> np.uint64(12)).tolist()))
    out[~has] = None
    return out


def _mixed(first: Bits, second: Bits) -> Bits:
    """One number of two, by the finalizer of SplitMix64 (Steele, Lea and Flood, 2014): the same in every process."""
    mixed: Bits = first + np.uint64(0x9E3779B97F4A7C15) * (second + np.uint64(1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed
