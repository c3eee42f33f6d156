"""What is remembered of an entity, and how features are read from it: the part that batch and stream share.

A state is one vector of float64, laid out by `StateLayout`:

    [ last event time (µs), NaN if none
    | one slot a Decay: its value at the last event time
    | one slot a Latest
    | for each (length, tiles) group of windows: the newest tile's number, then for each component its ring
      of tiles: tile number k lives in slot k mod tiles ]

A component is Σ value^power over a tile, power 0 (how many), 1 or 2; windows of the same length over the same
column share components. Everything is closed-form, so reading at a later time needs no upkeep in between.
"""

# N rows (entities), S length of a state, J tiles of a window

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay_features.definitions import Decay, EntityFeature, Latest, SinceLatest, Window

Floats = NDArray[np.float64]
Times = NDArray[np.int64]

# A variance below this fraction of the mean square is rounding, not spread.
_VARIANCE_FLOOR = 1e-9
_POWERS = {"count": (0,), "sum": (1,), "mean": (0, 1), "std": (0, 1, 2)}
LAST_TIME = 0


@dataclass(frozen=True)
class Component:
    """Σ value^power of one column over the tiles of one window length; column None is the event itself."""

    column: str | None
    power: int

    def contribution(self, values: Floats | None) -> Floats | float:
        """What events add to a tile: missing values add nothing."""
        if values is None:
            return 1.0
        present = ~np.isnan(values)
        if self.power == 0:
            return present.astype(np.float64)
        filled: Floats = np.where(present, values, 0.0)
        return filled**self.power


@dataclass(frozen=True)
class TileGroup:
    """All components of windows with one length and number of tiles. `start` is the slot of the newest tile."""

    length_s: int
    num_tiles: int
    start: int
    components: tuple[Component, ...]

    @property
    def tile_us(self) -> int:
        """Width of a tile."""
        return self.length_s * 1_000_000 // self.num_tiles

    def ring(self, component: Component) -> slice:
        """Slots of a component's tiles."""
        first = self.start + 1 + self.components.index(component) * self.num_tiles
        return slice(first, first + self.num_tiles)


class StateLayout:
    """Where everything lies in the state of one entity's features."""

    def __init__(self, features: tuple[EntityFeature, ...]) -> None:
        self.features = features
        self.decays: dict[tuple[str | None, int], int] = {}
        self.latest: dict[str, int] = {}
        slot = LAST_TIME + 1
        for feature in features:
            if isinstance(feature, Decay) and (feature.column, feature.half_life_s) not in self.decays:
                self.decays[feature.column, feature.half_life_s] = slot
                slot += 1
            if isinstance(feature, Latest) and feature.column not in self.latest:
                self.latest[feature.column] = slot
                slot += 1
        self.groups: dict[tuple[int, int], TileGroup] = {}
        windows = [f for f in features if isinstance(f, Window)]
        for length_s, num_tiles in dict.fromkeys((w.length_s, w.num_tiles) for w in windows):
            components = tuple(
                dict.fromkeys(
                    Component(w.column, power)
                    for w in windows
                    if (w.length_s, w.num_tiles) == (length_s, num_tiles)
                    for power in _POWERS[w.aggregate]
                )
            )
            self.groups[length_s, num_tiles] = TileGroup(length_s, num_tiles, slot, components)
            slot += 1 + num_tiles * len(components)
        self.size = slot
        columns = [f.column for f in features if not isinstance(f, SinceLatest)]
        self.columns = tuple(dict.fromkeys(c for c in columns if c is not None))

    @property
    def names(self) -> tuple[str, ...]:
        """Feature names in the order of `apply`'s columns."""
        return tuple(feature.name for feature in self.features)

    def empty(self, num_rows: int = 1) -> Floats:
        """(N, S) states of entities never seen."""
        states = np.zeros((num_rows, self.size))
        states[:, LAST_TIME] = np.nan
        for slot in self.latest.values():
            states[:, slot] = np.nan
        return states

    def update(self, state: Floats, time_us: int, values: Mapping[str, float]) -> Floats:
        """The state after one more event. Events may come out of order: a late one still counts in every
        decay, and in every window whose tiles still reach back to it.
        """
        after = state.copy()
        last = state[LAST_TIME]
        is_newest = not time_us < last  # also when there is no last event
        after[LAST_TIME] = time_us if is_newest else last
        for (column, half_life_s), slot in self.decays.items():
            value = 1.0 if column is None else values[column]
            value = 0.0 if np.isnan(value) else value
            if np.isnan(last):
                after[slot] = value
            elif is_newest:
                after[slot] = state[slot] * _halvings(time_us - last, half_life_s) + value
            else:
                after[slot] = state[slot] + value * _halvings(last - time_us, half_life_s)
        if is_newest:
            for column, slot in self.latest.items():
                after[slot] = values[column]
        for group in self.groups.values():
            self._add_to_tiles(group, after, time_us, values, never_seen=bool(np.isnan(last)))
        return after

    def _add_to_tiles(
        self, group: TileGroup, state: Floats, time_us: int, values: Mapping[str, float], *, never_seen: bool
    ) -> None:
        tile, newest = time_us // group.tile_us, int(state[group.start])
        if never_seen or tile > newest:
            num_new = group.num_tiles if never_seen else min(tile - newest, group.num_tiles)
            stale = (tile - np.arange(num_new)) % group.num_tiles
            for component in group.components:
                state[group.ring(component)][stale] = 0.0
            state[group.start] = tile
        elif tile <= newest - group.num_tiles:
            return
        for component in group.components:
            column = None if component.column is None else np.array([values[component.column]])
            added = component.contribution(column)
            state[group.ring(component)][tile % group.num_tiles] += float(np.asarray(added).item())

    def apply(self, states: Floats, time_us: Times) -> Floats:
        """Features (N, len(features)) of N states, each read at its own time."""
        last = states[:, LAST_TIME]
        out = np.empty((len(states), len(self.features)))
        sums: dict[tuple[int, int], dict[Component, Floats]] = {}
        for key, group in self.groups.items():
            # The tile that a ring slot holds is the latest tile number ≤ newest that is ≡ slot mod tiles.
            newest_N1 = states[:, group.start : group.start + 1]
            held_NJ = newest_N1 - (newest_N1 - np.arange(group.num_tiles)) % group.num_tiles
            current_N1 = (time_us // group.tile_us)[:, None]
            live_NJ = (held_NJ > current_N1 - group.num_tiles) & ~np.isnan(last)[:, None]
            sums[key] = {c: (states[:, group.ring(c)] * live_NJ).sum(axis=1) for c in group.components}
        for i, feature in enumerate(self.features):
            if isinstance(feature, SinceLatest):
                out[:, i] = (time_us - last) / 1e6
            elif isinstance(feature, Latest):
                out[:, i] = states[:, self.latest[feature.column]]
            elif isinstance(feature, Decay):
                value = states[:, self.decays[feature.column, feature.half_life_s]]
                out[:, i] = read_decay(value, last, time_us, feature.half_life_s)
            else:
                out[:, i] = finish_window(feature, sums[feature.length_s, feature.num_tiles])
        return out


def _halvings(age_us: Floats | float, half_life_s: float) -> Floats | float:
    return np.exp2(-np.maximum(age_us, 0.0) / (half_life_s * 1e6))


def read_decay(value: Floats, last_us: Floats, time_us: Times, half_life_s: float) -> Floats:
    """A decayed sum at `time_us`, from its value at the last event; 0 for an entity never seen."""
    age_us = np.where(np.isnan(last_us), 0.0, time_us - last_us)
    return value * _halvings(age_us, half_life_s)


def finish_window(window: Window, sums: Mapping[Component, Floats]) -> Floats:
    """An aggregate from the window's sums of powers."""
    if window.aggregate == "count":
        return sums[Component(window.column, 0)]
    total = sums[Component(window.column, 1)]
    if window.aggregate == "sum":
        return total
    count = sums[Component(window.column, 0)]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean: Floats = np.where(count > 0, total / count, np.nan)
        if window.aggregate == "mean":
            return mean
        mean_square = sums[Component(window.column, 2)] / count
        variance = mean_square - mean**2
        variance = np.where(variance < _VARIANCE_FLOOR * mean_square, 0.0, variance)
        return np.where(count > 0, np.sqrt(variance), np.nan)
