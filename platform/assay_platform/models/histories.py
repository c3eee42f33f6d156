"""What users took and when, as arrays; and what a recommender wants to know of a user and an item of its history."""

# N users, E events, I items, P different (user, item) pairs of the events, C candidates, F features

from enum import StrEnum
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Index = NDArray[np.int64]
Flags = NDArray[np.bool_]

DAY_US = 86_400_000_000
# Days in which what was taken counts half.
HALF_LIVES_D = (7.0, 21.0, 60.0, 150.0)
OWN_FEATURES = (
    *(f"own_decayed_{h:g}d" for h in HALF_LIVES_D),
    *(f"own_share_{h:g}d" for h in HALF_LIVES_D),
    "own_days", "own_strongest", "own_last_strength", "own_rate",
    "own_days_since_last", "own_days_since_first", "own_gap_days", "own_gaps_since_last",
)  # fmt: skip
USER_FEATURES = ("user_items", "user_days", "user_recent_days", "user_span_days")
_NEVER_D = 1000.0


class Histories(NamedTuple):
    """Events of N users, each user's in order of time.

    start (N + 1,): where a user's events begin. item, time_us (E,). strength (E,): 1 for what was rated well, or
    done what lists are for (bought); below, down to 0, for less (looked at); 1 where a table says neither.
    now_us (N,): the moment that is asked about, after the events; ages are counted from it.
    """

    start: Index
    item: Index
    time_us: Index
    strength: Floats
    now_us: Index

    @staticmethod
    def of(
        user: Index,
        item: Index,
        time_us: Index,
        *,
        num_users: int,
        now_us: int | Index,
        strength: Floats | None = None,
    ) -> "Histories":
        """Events in any order. now_us: one moment, or (N,). strength: by default 1."""
        strength = np.ones(len(item), dtype=np.float32) if strength is None else strength
        order = np.lexsort((time_us, user))
        start = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=num_users))])
        now = np.broadcast_to(np.asarray(now_us, dtype=np.int64), num_users).copy()
        item, time_us = item[order].astype(np.int64), time_us[order].astype(np.int64)
        return Histories(start.astype(np.int64), item, time_us, strength[order], now)

    @property
    def num_users(self) -> int:
        """N."""
        return len(self.start) - 1

    @property
    def liked(self) -> Flags:
        """(E,)."""
        return self.strength >= 1.0

    def users(self) -> Index:
        """(E,) row of each event."""
        return np.repeat(np.arange(self.num_users), np.diff(self.start))

    def part(self, first: int, end: int) -> "Histories":
        """Some rows."""
        begin, stop = self.start[first], self.start[end]
        rows = slice(begin, stop)
        start = self.start[first : end + 1] - begin
        return Histories(start, self.item[rows], self.time_us[rows], self.strength[rows], self.now_us[first:end])

    def of_users(self, rows: Index) -> "Histories":
        """Some rows, in any order."""
        length = np.diff(self.start)[rows]
        start = np.concatenate([[0], np.cumsum(length)])
        at = np.repeat(self.start[rows] - start[:-1], length) + np.arange(start[-1])
        return Histories(start, self.item[at], self.time_us[at], self.strength[at], self.now_us[rows])

    def latest(self, num: Index) -> "Histories":
        """The last events of each user, at most num (N,)."""
        user = self.users()
        from_last = self.start[1:][user] - 1 - np.arange(len(user))
        return self.where(from_last < num[user])

    def where(self, chosen: Flags) -> "Histories":
        """Some events of all users. chosen (E,)."""
        counts = np.bincount(self.users()[chosen], minlength=self.num_users)
        start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Histories(start, self.item[chosen], self.time_us[chosen], self.strength[chosen], self.now_us)

    def matrix(self, num_items: int) -> sp.csr_matrix:
        """(N, I) 0/1."""
        key = np.unique(self.users() * num_items + self.item)
        start = np.searchsorted(key, np.arange(self.num_users + 1) * num_items)
        ones = np.ones(len(key), dtype=np.float32)
        taken = sp.csr_matrix((ones, key % num_items, start), (self.num_users, num_items))
        taken.has_sorted_indices = taken.has_canonical_format = True
        return taken

    def once(self) -> "Histories":
        """Every item of a user at its first time only."""
        user = self.users()
        order = np.lexsort((self.time_us, self.item, user))
        first = np.ones(len(order), dtype=bool)
        first[1:] = (np.diff(user[order]) != 0) | (np.diff(self.item[order]) != 0)
        chosen = np.zeros(len(order), dtype=bool)
        chosen[order[first]] = True
        return self.where(chosen)


class Again(StrEnum):
    """What of a user's past a list may have."""

    NOTHING = "nothing"
    UNDONE = "undone"  # what a user did not get to: looked at, not bought
    ALL = "all"

    @property
    def own_past(self) -> bool:
        """Whether it matters what the user did with an item before."""
        return self is not Again.NOTHING

    def excluded(self, histories: Histories, num_items: int) -> sp.csr_matrix | None:
        """(N, I): what lists must not have."""
        if self is Again.ALL:
            return None
        return (histories if self is Again.NOTHING else histories.where(histories.liked)).matrix(num_items)


class OwnPast:
    """Features of (user, item) pairs that come from the user's own events, and of users.

    Counts are of different days, so that lines of one basket count once.
    """

    def __init__(self, histories: Histories, num_items: int) -> None:
        self._num_items = num_items
        user, day = histories.users(), histories.time_us // DAY_US
        age_d = np.maximum(0.0, (histories.now_us[user] - histories.time_us) / DAY_US)
        self.num_users = histories.num_users
        key = user * num_items + histories.item
        order = np.argsort(key, kind="stable")
        key, age_d, day, strength = key[order], age_d[order], day[order], histories.strength[order]
        first = np.ones(len(key), dtype=bool)
        first[1:] = key[1:] != key[:-1]
        another_day = first.copy()
        another_day[1:] |= day[1:] != day[:-1]
        starts = np.flatnonzero(first)
        self.pair = key[starts]
        self.user, self.item = self.pair // num_items, self.pair % num_items
        decayed = np.stack([0.5 ** (age_d / h) * another_day for h in HALF_LIVES_D])
        if len(starts):
            self._decayed = np.add.reduceat(decayed, starts, axis=1)
            self.days = np.add.reduceat(another_day.astype(np.float64), starts)
            last = np.r_[starts[1:], len(key)] - 1
            self._since_first, self._since_last = age_d[starts], age_d[last]
            self._strongest, self._last_strength = np.maximum.reduceat(strength, starts), strength[last]
        else:
            self._decayed = np.zeros((len(HALF_LIVES_D), 0))
            self.days = self._since_first = self._since_last = np.zeros(0)
            self._strongest = self._last_strength = np.zeros(0, dtype=np.float32)
        self._users(histories)

    def _users(self, histories: Histories) -> None:
        user, day = histories.users(), histories.time_us // DAY_US
        another = np.ones(len(user), dtype=bool)
        another[1:] = (np.diff(user) != 0) | (np.diff(day) != 0)
        recent = another & (histories.now_us[user] - histories.time_us < 28 * DAY_US)
        self._user_days = np.bincount(user[another], minlength=self.num_users).astype(np.float64)
        recent_days = np.bincount(user[recent], minlength=self.num_users)
        items = np.bincount(self.user, minlength=self.num_users)
        self._totals = np.stack([np.bincount(self.user, row, self.num_users) for row in self._decayed])
        some = np.diff(histories.start) > 0
        self.first_us, self.last_us = histories.now_us.copy(), histories.now_us.copy()
        self.first_us[some] = histories.time_us[histories.start[:-1][some]]
        self.last_us[some] = histories.time_us[histories.start[1:][some] - 1]
        span_d = (self.last_us - self.first_us) / DAY_US
        self.user_features = np.log1p(np.stack([items, self._user_days, recent_days, span_d], axis=-1)).astype(
            np.float32
        )

    def decayed(self, half_life: int) -> Floats:
        """(P,) of the pairs: days on which the item was taken, old ones for less."""
        return np.asarray(self._decayed[half_life], dtype=np.float32)

    def decayed_matrix(self, half_life: int) -> sp.csr_matrix:
        """(N, I) of `decayed`."""
        shape = (self.num_users, self._num_items)
        return sp.csr_matrix((self.decayed(half_life), (self.user, self.item)), shape)

    def features(self, candidates_NC: Index) -> Floats:
        """(N, C, F) of OWN_FEATURES."""
        users = np.arange(self.num_users)[:, None]
        asked = (users * self._num_items + candidates_NC).ravel()
        shape = (*candidates_NC.shape, len(OWN_FEATURES))
        out = np.zeros((len(asked), len(OWN_FEATURES)), dtype=np.float32)
        # What was never taken: long ago, and no gap.
        for name in ("own_days_since_last", "own_days_since_first"):
            out[:, OWN_FEATURES.index(name)] = np.log1p(_NEVER_D)
        at = np.searchsorted(self.pair, asked)
        found = np.flatnonzero(at < len(self.pair))
        found = found[self.pair[at[found]] == asked[found]]
        at = at[found]
        user, days = self.user[at], self.days[at]
        since_first, since_last = self._since_first[at], self._since_last[at]
        gap = np.where(days > 1, (since_first - since_last) / np.maximum(days - 1, 1), 0.0)
        columns = [
            *np.log1p(self._decayed[:, at]),
            *(self._decayed[:, at] / np.maximum(self._totals[:, user], 0.1)),
            np.log1p(days),
            self._strongest[at],
            self._last_strength[at],
            days / np.maximum(self._user_days[user], 1.0),
            np.log1p(since_last),
            np.log1p(since_first),
            np.log1p(gap),
            np.where(days > 1, np.log1p(since_last / np.maximum(gap, 1.0)), -1.0),
        ]
        out[found] = np.stack(columns, axis=-1)
        return out.reshape(shape)
