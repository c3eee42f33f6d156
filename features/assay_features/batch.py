"""Features of a whole table, point in time: for every query (entity, time) from events strictly earlier.

Same definitions and same edges as `state`, computed in columns: events are sorted by (entity, time) once,
windows become differences of running sums at two positions, decays an associative scan. O(n log n), no loop
over rows or entities. An event never sees itself, events of the same instant, later events, or any label.

Not covered yet: tables beyond memory.
"""

# N events, Q queries, V entities

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from assay_features.definitions import Decay, FeaturePlan, Latest, SinceLatest
from assay_features.events import Events, Keys
from assay_features.state import (
    LAST_TIME,
    Component,
    Floats,
    StateLayout,
    TileGroup,
    Times,
    finish_window,
    read_decay,
)

Index = NDArray[np.int64]


@dataclass(frozen=True)
class EntityStates:
    """The state of every entity after all its events."""

    keys: Keys  # (V,)
    time_us: Times  # (V,) last event
    states: Floats  # (V, S)
    sequences: list[list[str]]  # (V,) of the plan's Sequence, oldest first; empty lists without one


class _SortedEvents:
    """Events of one entity column, sorted by (entity, time), rows without a key left out."""

    def __init__(self, layout: StateLayout, entity: str, events: Events) -> None:
        codes, self.keys = pd.factorize(events.keys[entity], use_na_sentinel=True)
        order = np.lexsort((events.time_us, codes))
        order = order[codes[order] >= 0]
        self.order, self.code, self.time_us = order, codes[order].astype(np.int64), events.time_us[order]
        self._layout = layout
        self.columns = {name: events.numbers[name][order] for name in layout.columns}
        # Times as ranks make (entity, time) one integer that a binary search can use.
        self._times = np.unique(self.time_us)
        self._stride = len(self._times) + 1
        self._position = self.code * self._stride + np.searchsorted(self._times, self.time_us)
        is_first = np.r_[True, self.code[1:] != self.code[:-1]] if len(order) else np.zeros(0, dtype=bool)
        self.start = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
        self._running: dict[Component, Floats] = {}

    def find(self, code: Index, time_us: Times) -> Index:
        """Position of the first event of `code` that is not earlier than `time_us`."""
        rank = np.searchsorted(self._times, time_us)
        return np.searchsorted(self._position, code * self._stride + rank)

    def running_sum(self, component: Component, upto: Index, start: Index) -> Floats:
        """Σ over the entity's events at positions [start, upto)."""
        if component not in self._running:
            column = None if component.column is None else self.columns[component.column]
            values = np.broadcast_to(component.contribution(column), self.code.shape)
            # Compensated and per entity, so that one entity's large values cannot blur another's small ones.
            self._running[component] = pd.Series(values).groupby(self.code).cumsum().to_numpy()
        running = self._running[component]
        out = np.zeros(len(upto))
        some = upto > start
        out[some] = running[upto[some] - 1]
        return out

    def decayed(self, column: str | None, half_life_s: int) -> Floats:
        """Value of a decayed sum right after every event, by an associative scan.

        D_i = a_i D_{i-1} + x_i with a_i the decay since the previous event, 0 at an entity's first. Pairs
        (a, x) compose, so log2(longest history) doubling steps replace the recurrence (Hillis and Steele 1986).
        Unlike the quotient of running sums of 2^(t/h), nothing overflows.
        """
        value = np.ones(len(self.code)) if column is None else np.nan_to_num(self.columns[column], nan=0.0)
        first = self.start == np.arange(len(self.code))
        age_us = np.diff(self.time_us, prepend=self.time_us[:1])
        factor = np.where(first, 0.0, np.exp2(-np.maximum(age_us, 0) / (half_life_s * 1e6)))
        longest = int(np.max(np.arange(len(self.code)) - self.start, initial=0)) + 1
        step = 1
        while step < longest:
            value[step:] = value[step:] + factor[step:] * value[:-step]
            factor[step:] = factor[step:] * factor[:-step]
            step *= 2
        return value


def features_at(plan: FeaturePlan, events: Events, queries: Events) -> dict[str, Floats]:
    """Every numeric feature of the plan, one value a query.

    queries: times and entity keys; often the events themselves. A query without a key has missing features.
    """
    out: dict[str, Floats] = {}
    for entity in plan.entities:
        layout = StateLayout(plan.of_entity(entity))
        if layout.features:
            values = _entity_features(layout, entity, events, queries)
            out.update(zip(layout.names, values.T, strict=True))
    return out


def _entity_features(layout: StateLayout, entity: str, events: Events, queries: Events) -> Floats:
    history = _SortedEvents(layout, entity, events)
    has_key = np.array([key is not None for key in queries.keys[entity]], dtype=bool)
    out = np.full((len(queries), len(layout.features)), np.nan)
    rows = np.flatnonzero(has_key)
    if not len(rows):
        return out
    code = pd.Index(history.keys).get_indexer(pd.Index(queries.keys[entity][rows])).astype(np.int64)
    known = code >= 0
    time_us = queries.time_us[rows]
    # A key without any event has an empty history; code 0 stands in and its range is emptied.
    safe = np.where(known, code, 0)
    start = np.where(known, history.find(safe, np.full(len(rows), np.iinfo(np.int64).min)), 0)
    end = np.where(known, history.find(safe, time_us), 0)
    seen = end > start
    previous = np.where(seen, end - 1, 0)

    def at_previous(values: Floats | Times, otherwise: float) -> Floats:
        if not len(values):
            return np.full(len(rows), otherwise)
        return np.where(seen, values[previous], otherwise)

    last_us = at_previous(history.time_us, np.nan)
    sums = {key: _window_sums(group, history, safe, time_us, start, end) for key, group in layout.groups.items()}
    decayed = {key: history.decayed(*key) for key in layout.decays}
    for i, feature in enumerate(layout.features):
        if isinstance(feature, SinceLatest):
            out[rows, i] = (time_us - last_us) / 1e6
        elif isinstance(feature, Latest):
            out[rows, i] = at_previous(history.columns[feature.column], np.nan)
        elif isinstance(feature, Decay):
            value = at_previous(decayed[feature.column, feature.half_life_s], 0.0)
            out[rows, i] = read_decay(value, last_us, time_us, feature.half_life_s)
        else:
            out[rows, i] = finish_window(feature, sums[feature.length_s, feature.num_tiles])
    return out


def _window_sums(
    group: TileGroup, history: _SortedEvents, code: Index, time_us: Times, start: Index, end: Index
) -> dict[Component, Floats]:
    window_start_us = (time_us // group.tile_us - group.num_tiles + 1) * group.tile_us
    left = np.clip(history.find(code, window_start_us), start, end)
    sums = {}
    for component in group.components:
        total = history.running_sum(component, end, start) - history.running_sum(component, left, start)
        sums[component] = np.where(left < end, total, 0.0)
    return sums


def final_states(plan: FeaturePlan, entity: str, events: Events) -> EntityStates:
    """What every entity's state is after all events: what the online store starts from."""
    layout = StateLayout(plan.of_entity(entity))
    history = _SortedEvents(layout, entity, events)
    num_entities = len(history.keys)
    last = np.searchsorted(history.code, np.arange(num_entities), side="right") - 1
    states = layout.empty(num_entities)
    states[:, LAST_TIME] = history.time_us[last]
    for (column, half_life_s), slot in layout.decays.items():
        states[:, slot] = history.decayed(column, half_life_s)[last]
    for column, slot in layout.latest.items():
        states[:, slot] = history.columns[column][last]
    for group in layout.groups.values():
        tile = history.time_us // group.tile_us
        newest = tile[last]
        states[:, group.start] = newest
        live = tile > newest[history.code] - group.num_tiles
        slot_of = history.code[live] * group.num_tiles + tile[live] % group.num_tiles
        for component in group.components:
            column_values = None if component.column is None else history.columns[component.column]
            added = np.broadcast_to(component.contribution(column_values), history.code.shape)[live]
            tiles = np.bincount(slot_of, weights=added, minlength=num_entities * group.num_tiles)
            states[:, group.ring(component)] = tiles.reshape(num_entities, group.num_tiles)
    sequences: list[list[str]] = [[] for _ in range(num_entities)]
    sequence = plan.sequence_of(entity)
    if sequence is not None:
        values = events.keys[sequence.column][history.order]
        bounds = np.r_[history.start[last], len(history.code)] if num_entities else np.zeros(1, dtype=np.int64)
        for v in range(num_entities):
            tail = values[bounds[v] : last[v] + 1][-sequence.length :]
            sequences[v] = [value for value in tail if value is not None]
    return EntityStates(
        keys=np.asarray(history.keys, dtype=object),
        time_us=history.time_us[last],
        states=states,
        sequences=sequences,
    )
