"""Features of a whole table, point in time: for every query (entity, time) from events strictly earlier.

Events and queries are sorted by (entity, time) once; then each entity's history is replayed through the same compiled
`fold` and `read` that the stream uses, on as many threads as there are cores. An event never sees itself, events of
the same instant, later events, or any label. Not covered: tables beyond memory, see `backfill`.
"""

# N events, Q queries, V entities, S slots of a state, F features

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import pandas as pd
import pyarrow as pa

from assay_features import kernels
from assay_features.definitions import Entity, FeaturePlan, entity_columns
from assay_features.events import KEY_SEPARATOR, Events, Keys, Reports
from assay_features.state import Floats, Index, StateLayout, Times, entity_keys, last_times

_MIN_ROWS_A_THREAD, _ENTITIES_A_PART = 20_000, 10_000


@dataclass(frozen=True)
class EntityStates:
    """The state of every entity after all its events."""

    keys: Keys  # (V,)
    time_us: Times  # (V,) last event
    states: Floats  # (V, S)
    sequences: Sequence["RecentValues"]  # (V,) of the plan's Sequence; empty ones without

    def parts(self) -> Iterator["EntityStates"]:
        """All of them, as many at a time as are written at once; one part at least."""
        for first in range(0, max(1, len(self.keys)), _ENTITIES_A_PART):
            rows = slice(first, first + _ENTITIES_A_PART)
            yield EntityStates(self.keys[rows], self.time_us[rows], self.states[rows], self.sequences[rows])

    def to_arrow(self, entity: Entity) -> pa.Table:
        """Key columns, event_timestamp, state and sequence as bytes: what the entity's state view holds."""
        parts = [key.split(KEY_SEPARATOR) for key in self.keys]
        names = entity_columns(entity)
        return pa.table(
            {name: pa.array([part[i] for part in parts], pa.string()) for i, name in enumerate(names)}
            | {
                "event_timestamp": pa.array(self.time_us, pa.timestamp("us", tz="UTC")),
                "state": pa.array([row.astype("<f8", copy=False).tobytes() for row in self.states], pa.binary()),
                "sequence": pa.array([_packed(s) for s in self.sequences], pa.binary()),
            }
        )

    @staticmethod
    def from_arrow(entity: Entity, table: pa.Table) -> "EntityStates":
        """Read back what `to_arrow` made of at least one row."""
        columns = [table[name].to_pylist() for name in entity_columns(entity)]
        keys = np.empty(len(table), dtype=object)
        keys[:] = [KEY_SEPARATOR.join(parts) for parts in zip(*columns, strict=True)]
        content = bytearray(b"".join(table["state"].to_pylist()))
        states = np.frombuffer(content, dtype="<f8").reshape(len(table), -1)
        sequences = [RecentValues(*map(tuple, json.loads(text))) for text in table["sequence"].to_pylist()]
        return EntityStates(keys, last_times(states), states, sequences)


class RecentValues(NamedTuple):
    """The newest values of a sequence with their times, oldest first."""

    time_us: tuple[int, ...] = ()
    values: tuple[str, ...] = ()

    def with_event(self, time_us: int, value: str, length: int) -> "RecentValues":
        """One more event, sorted in by time, after those of the same instant; the newest `length` stay."""
        place = len(self.time_us)
        while place and self.time_us[place - 1] > time_us:
            place -= 1
        times = (*self.time_us[:place], time_us, *self.time_us[place:])
        values = (*self.values[:place], value, *self.values[place:])
        return RecentValues(times[-length:], values[-length:])


class _Sequences(Sequence[RecentValues]):
    """Sequences of V entities in columns: numbers of events and references to values, however many there are.

    rows (E,): of the events, each entity's together. start (V + 1,): where an entity's begin.
    """

    def __init__(self, start: Index, rows: Index, time_us: Times, values: Keys) -> None:
        self._start, self._rows, self._time_us, self._values = start, rows, time_us, values

    def __len__(self) -> int:
        return len(self._start) - 1

    @overload
    def __getitem__(self, at: int) -> RecentValues: ...
    @overload
    def __getitem__(self, at: slice) -> "_Sequences": ...
    def __getitem__(self, at: int | slice) -> "RecentValues | _Sequences":
        if isinstance(at, slice):
            first, end, _ = at.indices(len(self))
            return _Sequences(self._start[first : max(first, end) + 1], self._rows, self._time_us, self._values)
        place = range(len(self))[at]
        rows = self._rows[self._start[place] : self._start[place + 1]]
        return RecentValues(tuple(self._time_us[rows].tolist()), tuple(self._values[rows].tolist()))


_NO_VALUES = json.dumps(RecentValues()).encode()


def _packed(sequence: RecentValues) -> bytes:
    """Most entities have no sequence, and there are many of them."""
    return json.dumps(sequence).encode() if sequence.values else _NO_VALUES


class _Grouped(NamedTuple):
    """Rows with a key, ordered by (entity, time, row)."""

    order: Index  # row numbers
    bounds: Index  # (V + 1,) where each entity begins


def features_at(
    plan: FeaturePlan, events: Events, queries: Events, *, reports: Reports | None = None
) -> dict[str, Floats]:
    """Every numeric feature of the plan's entities, one value a query.

    queries: times and entity keys; often the events themselves. A query without a key has missing features.
    reports: given, definitions over its column are computed of the labels reported by then, all others of events.

    Raises:
        DataError: the events or queries lack a column that the plan needs.
    """
    if reports is not None:
        of_reports, of_events = plan.split(reports.column)
        found = features_at(of_events, events, queries)
        found |= features_at(of_reports, reports.of(events), queries)
        return {name: found[name] for name in plan.numeric_names}
    out: dict[str, Floats] = {}
    for entity in plan.entities:
        layout = StateLayout(plan.of_entity(entity))
        if layout.features:
            values, _, _ = replay(layout, entity, events, queries)
            out.update(zip(layout.names, values.T, strict=True))
    return out


class History:
    """Events of a plan, sorted and numbered once, to be asked many times with few queries.

    `at` gives what `features_at` does, in time that grows with the events of the entities asked about.
    """

    def __init__(self, plan: FeaturePlan, events: Events) -> None:
        """Raises:
        DataError: the events lack a column that the plan needs.
        """
        self._entities = [
            _EntityHistory(StateLayout(plan.of_entity(entity)), entity, events)
            for entity in plan.entities
            if plan.of_entity(entity)
        ]

    def at(self, queries: Events) -> dict[str, Floats]:
        """Every numeric feature of the plan's entities, one value a query."""
        out: dict[str, Floats] = {}
        for held in self._entities:
            out.update(zip(held.layout.names, held.at(queries).T, strict=True))
        return out


class _EntityHistory:
    """One entity's events, grouped."""

    def __init__(self, layout: StateLayout, entity: Entity, events: Events) -> None:
        self.layout, self._entity, self._time_us = layout, entity, events.time_us
        codes, _, keys = _codes(entity, events, events)
        self._known = pd.Index(keys)
        self._grouped = _grouped(codes, events.time_us, len(keys))
        self._inputs = layout.inputs(events)

    def at(self, queries: Events) -> Floats:
        keys = entity_keys(self._entity, queries)
        asked, names = pd.factorize(keys, use_na_sentinel=True)
        place = self._known.get_indexer(pd.Index(names, dtype=object)) if len(names) else np.empty(0, dtype=np.int64)
        bounds = self._grouped.bounds
        # An entity that was never seen has no events.
        first, num = bounds[place], np.where(place >= 0, bounds[place + 1] - bounds[place], 0)
        ends = np.concatenate([[0], np.cumsum(num)]).astype(np.int64)
        order = self._grouped.order[np.repeat(first - ends[:-1], num) + np.arange(ends[-1])]
        by_query = _grouped(asked.astype(np.int64), queries.time_us, len(names))
        history = kernels.Replay(
            ends, order, self._time_us, self._inputs, by_query.bounds, by_query.order, queries.time_us
        )
        out = np.full((len(queries), len(self.layout.features)), np.nan)
        states = self.layout.empty(0)

        def work(start: int, end: int) -> None:
            kernels.sweep(self.layout.program, start, end, history, self.layout.empty()[0], out, states)

        _in_parallel(work, ends + by_query.bounds)
        return out


def final_states(plan: FeaturePlan, entity: Entity, events: Events) -> EntityStates:
    """What every entity's state is after all events: what the online store starts from."""
    layout = StateLayout(plan.of_entity(entity))
    nobody = Events(
        time_us=np.empty(0, dtype=np.int64),
        keys={name: np.empty(0, dtype=object) for name in entity_columns(entity)},
    )
    _, keys, states = replay(layout, entity, events, nobody, want_states=True)
    sequences = _recent_values(plan, entity, events, keys)
    return EntityStates(keys=keys, time_us=last_times(states), states=states, sequences=sequences)


def replay(
    layout: StateLayout, entity: Entity, events: Events, queries: Events, *, want_states: bool = False
) -> tuple[Floats, Keys, Floats]:
    """Features (Q, F), keys (V,) of the entities that have events, and if wanted their final states (V, S)."""
    event_codes, query_codes, keys = _codes(entity, events, queries)
    num_seen = int(event_codes.max(initial=-1)) + 1
    num_entities = max(num_seen, int(query_codes.max(initial=-1)) + 1)
    by_event = _grouped(event_codes, events.time_us, num_entities)
    by_query = by_event if queries is events else _grouped(query_codes, queries.time_us, num_entities)
    history = kernels.Replay(
        by_event.bounds, by_event.order, events.time_us, layout.inputs(events),
        by_query.bounds, by_query.order, queries.time_us,
    )  # fmt: skip
    out = np.full((len(queries), len(layout.features)), np.nan)
    states = layout.empty(num_seen if want_states else 0)

    def work(first: int, end: int) -> None:
        kernels.sweep(layout.program, first, end, history, layout.empty()[0], out, states)

    _in_parallel(work, by_event.bounds + by_query.bounds)
    return out, keys[:num_seen], states


def _in_parallel(work: Callable[[int, int], None], load: Index) -> None:
    """Call work(first, end) over ranges of entities with about equal load. load (V + 1,): ascending sums."""
    num_entities, total = len(load) - 1, int(load[-1])
    num_threads = max(1, min(os.cpu_count() or 1, num_entities, total // _MIN_ROWS_A_THREAD))
    cuts = np.searchsorted(load, total * np.arange(1, num_threads) // num_threads)
    edges = [0, *cuts.tolist(), num_entities]
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda i: work(edges[i], edges[i + 1]), range(num_threads)))


def _codes(entity: Entity, events: Events, queries: Events) -> tuple[Index, Index, Keys]:
    """An entity number for each event and query, -1 without a key; entities with events come first."""
    same = queries is events
    num_events = len(events)
    columns = entity_columns(entity)
    stacked, uniques = [], []
    for name in columns:
        own = entity_keys(name, events)
        both = own if same else np.concatenate([own, entity_keys(name, queries)])
        codes, values = pd.factorize(both, use_na_sentinel=True)
        stacked.append(codes.astype(np.int64))
        uniques.append(values)
    code = stacked[0]
    keys = np.asarray(uniques[0], dtype=object)
    for part, values in zip(stacked[1:], uniques[1:], strict=True):
        # Exact as floats: fewer than 2^53 pairs of codes.
        joined = np.where((code < 0) | (part < 0), np.nan, code * float(len(values)) + part)
        renumbered, pairs = pd.factorize(joined, use_na_sentinel=True)
        code = renumbered.astype(np.int64)
        left, right = np.divmod(pairs.astype(np.int64), max(len(values), 1))
        joint = np.empty(len(pairs), dtype=object)
        joint[:] = [KEY_SEPARATOR.join((keys[a], values[b])) for a, b in zip(left, right, strict=True)]
        keys = joint
    return code[:num_events], (code if same else code[num_events:]), keys


def _grouped(codes: Index, time_us: Times, num_entities: int) -> _Grouped:
    is_sorted = bool(np.all(time_us[1:] >= time_us[:-1])) if len(time_us) else True
    rows = np.arange(len(codes)) if is_sorted else np.argsort(time_us, kind="stable")
    order = rows[np.argsort(codes[rows], kind="stable")]
    num_missing = int((codes < 0).sum())
    counts = np.bincount(codes[codes >= 0], minlength=num_entities)
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return _Grouped(order[num_missing:].astype(np.int64), bounds)


def _recent_values(plan: FeaturePlan, entity: Entity, events: Events, keys: Keys) -> Sequence[RecentValues]:
    sequence = plan.sequence_of(entity)
    if sequence is None:
        return [RecentValues()] * len(keys)
    codes, _, _ = _codes(entity, events, events)
    values = entity_keys(sequence.column, events)
    order, bounds = _grouped(np.where(pd.isna(values), -1, codes), events.time_us, len(keys))
    kept = np.minimum(np.diff(bounds), sequence.length)
    start = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    rows = order[np.repeat(bounds[1:] - start[1:], kept) + np.arange(start[-1])]
    return _Sequences(start, rows, events.time_us, values)
