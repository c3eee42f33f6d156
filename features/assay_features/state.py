"""What is remembered of an entity, and how features are read from it: the part that batch and stream share.

`StateLayout` lays the features of one entity out as one row of float64 (`kernels.Program`) and turns events into the
numeric inputs that the compiled loops take. Everything is closed-form, so reading at a later time needs no upkeep in
between. Features and filters over the same column share their inputs and tiles.
"""

# N events or states, C inputs, S slots of a state, F features

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from assay_platform.errors import DataError
from numpy.typing import NDArray

from assay_features import kernels
from assay_features.definitions import (
    CALENDAR_COLUMNS,
    Calendar,
    Decay,
    Entity,
    EntityFeature,
    Latest,
    SinceLatest,
    Where,
    Window,
    entity_columns,
)
from assay_features.events import KEY_SEPARATOR, Events, Keys, key_column
from assay_features.kernels import HEADER, LAST_TIME, POSITION, Program

Floats = NDArray[np.float64]
Times = NDArray[np.int64]
Index = NDArray[np.int64]
_Array = TypeVar("_Array", bound=NDArray[Any])

_TILED = {
    "count": kernels.TILE_COUNT, "sum": kernels.TILE_SUM, "mean": kernels.TILE_MEAN, "std": kernels.TILE_STD,
    "min": kernels.TILE_MIN, "max": kernels.TILE_MAX, "rate": kernels.TILE_RATE,
}  # fmt: skip
_EXACT = {
    "count": kernels.EXACT_COUNT, "sum": kernels.EXACT_SUM, "mean": kernels.EXACT_MEAN, "std": kernels.EXACT_STD,
    "min": kernels.EXACT_MIN, "max": kernels.EXACT_MAX, "rate": kernels.EXACT_RATE,
}  # fmt: skip
_COMPONENT = {
    "count": kernels.COUNT, "sum": kernels.SUM, "min": kernels.MIN, "max": kernels.MAX, "std": kernels.MOMENTS,
}  # fmt: skip
_STRIDE = {kernels.MOMENTS: 3}


@dataclass(frozen=True)
class _Input:
    """One number an event gives to the loops: NaN where the event does not count.

    column None: 1 for an event that passes the filter. is_key: a number that stands for a key's value.
    """

    column: str | None
    where: Where | None
    is_key: bool = False


class StateLayout:
    """Where everything lies in the state of one entity's features."""

    def __init__(self, features: tuple[EntityFeature, ...]) -> None:
        self.features = features
        self.names = tuple(feature.name for feature in features)  # in the order of `apply`'s columns
        self._inputs: dict[_Input, int] = {}
        self._groups: dict[tuple[int, int], int] = {}
        self._components: dict[tuple[int, int, int], int] = {}  # (group, input, kind)
        self._decays: dict[tuple[int, int], int] = {}  # (input, half-life)
        self._latest: dict[tuple[int, int], int] = {}  # (mask, value)
        self._distinct: dict[tuple[int, int], int] = {}  # (input, capacity)
        self._buffers: dict[int, dict[int, int]] = {}  # capacity → input → place
        rows = [self._add(feature) for feature in features]
        self.program, self.size = self._program(rows)
        # Two layouts for which this is equal read states alike, whatever the columns are that they came from.
        self.reads = tuple((table.shape, table.tobytes()) for table in self.program)
        self._where = tuple(dict.fromkeys(i.where for i in self._inputs if i.where is not None))

    # ------------------------------------------------------------------ layout

    def _input(self, column: str | None, where: Where | None, *, is_key: bool = False) -> int:
        return self._inputs.setdefault(_Input(column, where, is_key), len(self._inputs))

    def _component(self, length_s: int, num_tiles: int, column: int, kind: int) -> int:
        group = self._groups.setdefault((length_s * 1_000_000 // num_tiles, num_tiles), len(self._groups))
        return self._components.setdefault((group, column, kind), len(self._components))

    def _latest_slot(self, column: str | None, where: Where | None) -> int:
        mask = self._input(None, where)
        value = -1 if column is None else self._input(column, where)
        return self._latest.setdefault((mask, value), len(self._latest))

    def _add(self, feature: EntityFeature) -> tuple[list[int], float]:
        """The feature's row of the program, and its scale."""
        if isinstance(feature, Decay):
            key = (self._input(feature.column, feature.where), feature.half_life_s)
            return [kernels.DECAY, self._decays.setdefault(key, len(self._decays))], 1.0
        if isinstance(feature, Latest):
            return [kernels.LATEST, self._latest_slot(feature.column, feature.where), 0, 0], 1.0
        if isinstance(feature, SinceLatest):
            return [kernels.SINCE, self._latest_slot(None, feature.where), 0, 0], 1.0
        return self._add_window(feature)

    def _add_window(self, window: Window) -> tuple[list[int], float]:
        window_us = window.length_s * 1_000_000
        tile_us = 0 if window.max_events else window_us // window.num_tiles
        if window.aggregate in ("last", "since_last"):
            column = window.column if window.aggregate == "last" else None
            kind = kernels.LATEST if window.aggregate == "last" else kernels.SINCE
            return [kind, self._latest_slot(column, window.where), window_us, tile_us], 1.0
        if window.aggregate == "distinct":
            key = (self._input(window.column, window.where, is_key=True), window.max_distinct)
            return [kernels.DISTINCT, self._distinct.setdefault(key, len(self._distinct)), window_us, tile_us], 1.0
        column_input = self._input(window.column, window.where)
        scale = 1.0 if window.against_s is None else window.against_s / window.length_s
        against_us = 0 if window.against_s is None else window.against_s * 1_000_000
        if window.max_events:
            places = self._buffers.setdefault(window.max_events, {})
            place = places.setdefault(column_input, len(places))
            buffer = list(self._buffers).index(window.max_events)
            return [_EXACT[window.aggregate], buffer, place, window_us, against_us], scale

        def component(kind: int, length_s: int = window.length_s) -> int:
            return self._component(length_s, window.num_tiles, column_input, kind)

        read = _TILED[window.aggregate]
        if window.aggregate == "mean":
            return [read, component(kernels.SUM), component(kernels.COUNT)], 1.0
        if window.against_s is not None:
            kind = kernels.COUNT if window.column is None else kernels.SUM
            return [read, component(kind), component(kind, window.against_s)], scale
        return [read, component(_COMPONENT[window.aggregate])], 1.0

    def _program(self, rows: list[tuple[list[int], float]]) -> tuple[Program, int]:
        slot = HEADER
        decays, latest, distinct, buffers = [], [], [], []
        components: list[list[int]] = []
        for column, _ in self._decays:
            decays.append([column, slot])
            slot += 2
        for mask, value in self._latest:
            latest.append([mask, value, slot])
            slot += 4
        groups: list[list[int]] = []
        place_of: dict[int, int] = {}  # components in order of their group, as the loops visit them
        for g, (tile_us, num_tiles) in enumerate(self._groups):
            groups.append([tile_us, num_tiles, slot, len(components)])
            slot += 2
            for m, (group, column, kind) in enumerate(self._components):
                if group == g:
                    stride = _STRIDE.get(kind, 1)
                    place_of[m] = len(components)
                    components.append([column, kind, slot, stride])
                    slot += stride * (num_tiles + 1)
            groups[-1].append(len(components))
        for row, _ in rows:
            if row[0] <= kernels.TILE_RATE:
                row[1:] = [place_of[m] for m in row[1:]]
        for column, capacity in self._distinct:
            distinct.append([column, slot, capacity])
            slot += 3 * capacity
        for capacity, places in self._buffers.items():
            buffers.append([slot, capacity, 1 + len(places)])
            slot += 1 + capacity * (1 + len(places))
        widest = max((len(places) for places in self._buffers.values()), default=1)
        kept = [[*places, *[-1] * (widest - len(places))] for places in self._buffers.values()]
        program = Program(
            groups=_table(groups, 5),
            components=_table(components, 4),
            decays=_table(decays, 2),
            half_lives=np.array([half_life_s * 1e6 for _, half_life_s in self._decays]),
            latest=_table(latest, 3),
            distinct=_table(distinct, 3),
            buffers=_table(buffers, 3),
            buffer_inputs=_table(kept, widest),
            features=_table([row + [0] * (5 - len(row)) for row, _ in rows], 5),
            scale=np.array([scale for _, scale in rows]),
        )
        return program, slot

    # ------------------------------------------------------------------ events

    def inputs(self, events: Events) -> Floats:
        """(N, C) what the loops take of N events.

        Raises:
            DataError: the events lack a column that a feature needs.
        """
        out = np.empty((len(events), len(self._inputs)))
        passes = {where: _passes(where, events) for where in self._where}
        for given, i in self._inputs.items():
            if given.column is None:
                values: Floats | float = 1.0
            elif given.is_key:
                values = _numbered(key_column(events, given.column))
            else:
                values = number_column(events, given.column)
            out[:, i] = values if given.where is None else np.where(passes[given.where], values, np.nan)
        return out

    # ------------------------------------------------------------------ states

    def empty(self, num_rows: int = 1) -> Floats:
        """(N, S) states of entities never seen."""
        states = np.empty((num_rows, self.size))
        kernels.clear_all(self.program, states)
        return states

    def fold(self, states: Floats, rows: Index, time_us: Times, inputs: Floats, positions: Times | None = None) -> int:
        """Add events to the states of their rows, in place and in the order given; returns how many were new.

        Events may come out of order: a late one still counts in every decay, and in every window whose tiles still
        reach back to it. positions: ascending places in an event log; what a state has seen it skips.
        """
        places = np.full(len(rows), -1, dtype=np.int64) if positions is None else positions
        return kernels.fold_all(self.program, states, rows, time_us, places, inputs)

    def apply(self, states: Floats, time_us: Times) -> Floats:
        """Features (N, F) of N states, each read at its own time, from events strictly earlier."""
        out = np.empty((len(states), len(self.features)))
        kernels.read_all(self.program, states, time_us, out)
        return out

    def unpack(self, packed: list[bytes | None]) -> Floats:
        """(N, S) writable states; None stands for an entity never seen.

        Raises:
            DataError: the bytes are of another layout.
        """
        for content in packed:
            if content is not None and len(content) != 8 * self.size:
                raise DataError(
                    f"a stored state has {len(content)} bytes, this plan's have {8 * self.size}; it was written "
                    "by another version of Assay: publish the features again"
                )
        known = [content for content in packed if content is not None]
        found = np.frombuffer(bytearray(b"".join(known)), dtype="<f8").reshape(len(known), self.size)
        if len(known) == len(packed):
            return found
        states = self.empty(len(packed))
        states[[content is not None for content in packed]] = found
        return states


def last_times(states: Floats) -> Times:
    """(N,) newest event of every state, `kernels.NEVER` without one."""
    times: Times = states.view(np.int64)[:, LAST_TIME]
    return times


def positions(states: Floats) -> Times:
    """(N,) place in the event log up to which every state has seen, -1 without one."""
    found: Times = states.view(np.int64)[:, POSITION]
    return found


def entity_keys(entity: Entity, events: Events) -> Keys:
    """(N,) one key a row; None where any part of it is missing.

    Raises:
        DataError: a column is not there.
    """
    columns = [key_column(events, name) for name in entity_columns(entity)]
    if len(columns) == 1:
        return columns[0]
    out = np.empty(len(events), dtype=object)
    for i, parts in enumerate(zip(*columns, strict=True)):
        if None not in parts:
            out[i] = KEY_SEPARATOR.join(parts)
    return out


def number_column(events: Events, name: str) -> Floats:
    """A numeric column, or where the events lie in the day or the week."""
    if name in CALENDAR_COLUMNS:
        from assay_features.row_features import calendar_column

        return calendar_column(Calendar(part="hour" if name == CALENDAR_COLUMNS[0] else "weekday"), events.time_us)
    return _column(events.numbers, name, "numeric")


def _column(columns: Mapping[str, _Array], name: str, role: str) -> _Array:
    if name not in columns:
        raise DataError(f"the events have no {role} column {name!r}; they have {', '.join(sorted(columns)) or 'none'}")
    return columns[name]


def _table(rows: list[list[int]], width: int) -> Index:
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _passes(where: Where, events: Events) -> NDArray[np.bool_]:
    if where.values:
        keys = key_column(events, where.column)
        if len(keys) == 1:
            return np.array([keys[0] in where.values])
        return np.asarray(pd.Series(keys).isin(where.values))
    values = number_column(events, where.column)
    low = -np.inf if where.at_least is None else where.at_least
    high = np.inf if where.below is None else where.below
    return (values >= low) & (values < high) if low <= high else (values >= low) | (values < high)


def _numbered(keys: Keys) -> Floats:
    """A number for each key value, the same in every process: 52 bits of BLAKE2b. NaN where missing."""
    codes, values = pd.factorize(keys, use_na_sentinel=True) if len(keys) > 1 else ([0], keys)
    numbers = np.array([_number_of(value) for value in values] or [np.nan])
    return np.where(np.asarray(codes) >= 0, numbers[codes], np.nan)


def _number_of(value: str | None) -> float:
    if value is None:
        return np.nan
    return float(int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest()) >> 12)
