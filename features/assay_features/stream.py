"""Events as they come: checked, logged, folded into the states from which the next score reads.

An accepted event is in the log before it is in any state, so `kill -9` loses nothing that was acknowledged: states in
memory are made again from the log, and every state knows the place in the log up to which it has seen, so nothing
counts twice. Duplicates by event id are ignored. Events may be late by `allowed_lateness_s` against the newest event
seen; for that long ids and log are kept.

One process writes a stream at a time; others read what it has written, within `checkpoint_s`. A new batch of states
(`load`) may be published while the stream runs: events later than the batch are then folded again on top of it.
"""

# N events, U entities among them, S slots of a state

import json
import struct
import threading
import time
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from assay_platform.errors import DataError, StorageError
from assay_platform.storage.log import EventLog, next_position_in
from assay_platform.storage.tiered import TieredStore
from numpy.typing import NDArray

from assay_features.batch import EntityStates, RecentValues
from assay_features.definitions import Entity, FeaturePlan, entity_columns, entity_name
from assay_features.events import KEY_SEPARATOR, Events, Keys, key_column
from assay_features.state import Floats, Index, StateLayout, Times, entity_keys, last_times, positions
from assay_features.vectors import NEVER_US, RecordKeys, ViewLayout

_STATE, _SEQUENCE = "state", "sequence"
# Ids of late times are forgotten when so many are held, or twice as many as were left the last time.
_MAX_IDS = 100_000
# Made keys of records that are kept, an entity.
_RECORD_KEYS = 16_384


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """allowed_lateness_s: how far behind the newest event one may be. max_ahead_s: how far ahead of the clock.

    checkpoint_s: how often states in memory are written to the disk.
    """

    allowed_lateness_s: float = 86_400.0
    max_ahead_s: float = 300.0
    checkpoint_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("allowed_lateness_s", "max_ahead_s", "checkpoint_s"):
            if getattr(self, name) < 0:
                raise DataError(f"{name} is {getattr(self, name)}; it must be 0 or more")


class PushReport(NamedTuple):
    """What became of the events of one push, by their place in it."""

    accepted: int
    duplicates: list[int]
    late: list[int]


class OnlineRows(NamedTuple):
    """What is known for N requests."""

    values: dict[str, Floats]  # feature name → (N,)
    sequences: dict[Entity, list[RecentValues]]  # entity → N of them, oldest value first


def state_view(plan: FeaturePlan, entity: Entity) -> str:
    """Name of the view that holds an entity's states: another plan is another view."""
    return f"{entity_name(entity)}_state_{plan.version}"


class _EntityStore:
    """States of one entity in the store."""

    def __init__(self, project: str, plan: FeaturePlan, entity: Entity) -> None:
        view = state_view(plan, entity)
        self.entity, self.sequence = entity, plan.sequence_of(entity)
        self.layout = StateLayout(plan.of_entity(entity))
        self.view = ViewLayout(view, ((_STATE, "bytes"), (_SEQUENCE, "bytes")))
        self._keys = RecordKeys(project, view, entity_columns(entity))
        self._is_composite = not isinstance(entity, str)
        # Who pays now has often paid a moment ago.
        self._record_key = lru_cache(_RECORD_KEYS)(self._make_record_key)
        # Where the state begins in a record: after header, status bytes and its own length.
        self._state_place = len(self.view.pack({_STATE: b"", _SEQUENCE: b""}, 0)) - 4
        # What goes around time and state in a record without a sequence.
        width = 8 * self.layout.size
        frame = self.view.pack({_STATE: bytes(width)}, 0)
        self._frame = (frame[:8], frame[16 : self._state_place], frame[self._state_place + width :])
        # Of entities of one kind, records are read alike. A sequence is read on its own.
        self.kind: Hashable = entity if self.sequence is not None else (self._state_place, self.layout.reads)

    def record_keys(self, keys: Sequence[str]) -> list[bytes]:
        return list(map(self._record_key, keys))

    def _make_record_key(self, key: str) -> bytes:
        return self._keys.of_parts(key.split(KEY_SEPARATOR)) if self._is_composite else self._keys.of(key)

    def unpack(self, records: Sequence[bytes | None]) -> tuple[Floats, list[RecentValues]]:
        """Writable states and sequences; None is an entity never seen."""
        # The one segment of such a record is always laid out alike, so it is cut without being parsed.
        first, end = self._state_place, self._state_place + 8 * self.layout.size
        states = self.layout.unpack([record and record[first:end] for record in records])
        if self.sequence is None:
            return states, []
        return states, [_sequence(record and record[end + 4 :]) for record in records]

    def pack(self, states: Floats, sequences: Sequence[RecentValues]) -> list[bytes]:
        content = states.astype("<f8", copy=False).tobytes()
        width = 8 * self.layout.size
        times = last_times(states).tolist()
        if self.sequence is None:
            head, middle, tail = self._frame
            return [
                b"".join((head, struct.pack("<q", moment), middle, content[i * width : (i + 1) * width], tail))
                for i, moment in enumerate(times)
            ]
        return [
            self.view.pack(
                {_STATE: content[i * width : (i + 1) * width], _SEQUENCE: json.dumps(sequences[i]).encode()}, moment
            )
            for i, moment in enumerate(times)
        ]


class EventStream:
    """The online side of one plan: states that events change and scores read. Thread-safe."""

    def __init__(
        self,
        project: str,
        plan: FeaturePlan,
        store: TieredStore,
        log_folder: Path,
        settings: StreamSettings = StreamSettings(),
        *,
        clock: Callable[[], float] = time.time,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        """Recovers what a process that was killed has left. may_write: false where another process is to write.

        Raises:
            StorageError: store or log cannot be read.
        """
        self.plan = plan
        self._store, self._settings, self._clock = store, settings, clock
        self._log_folder, self._may_write = log_folder, may_write
        self._entities = {entity: _EntityStore(project, plan, entity) for entity in plan.entities}
        # States of those that are read alike are read in one call, which costs as much as many states.
        kinds: dict[Hashable, list[Entity]] = {}
        for entity, held in self._entities.items():
            kinds.setdefault(held.kind, []).append(entity)
        self._alike = list(kinds.values())
        self._meta_key = f"\0stream\0{project}\0{plan.version}".encode()
        self._ids_key = f"\0ids\0{project}\0{plan.version}".encode()
        self._columns = _Columns(plan)
        self._lock = threading.RLock()
        self._log: EventLog | None = None
        self._batch: dict[str, Any] = {}
        self._watermark_us = NEVER_US
        self._ids: dict[str, int] = {}
        self._max_ids = _MAX_IDS
        self._newest_of: dict[int, int] = {}  # segment of the log → newest event time in it
        self._timer: threading.Timer | None = None
        self._refresh()

    @property
    def watermark_us(self) -> int:
        """Time of the newest event seen, the batch included."""
        return self._watermark_us

    # ------------------------------------------------------------------ reading

    def read(self, keys: Mapping[Entity, Sequence[str | None]], time_us: Sequence[int] | Times) -> OnlineRows:
        """Features of N rows, each at its own time; entities not in `keys` are left out. One look-up for all.

        Features of a missing key are missing; those of a key never seen are those of an empty history.
        """
        moments = np.asarray(time_us, dtype=np.int64)
        asked: list[bytes] = []
        places: dict[Entity, dict[str, int]] = {}  # each different key once, and where its record is among all
        for entity, values in keys.items():
            distinct = [value for value in dict.fromkeys(values) if value is not None]
            places[entity] = dict(zip(distinct, range(len(asked), len(asked) + len(distinct)), strict=True))
            asked += self._entities[entity].record_keys(distinct)
        records = self._store.get_many(asked)
        out: dict[str, Floats] = {}
        sequences: dict[Entity, list[RecentValues]] = {}
        for kind in self._alike:
            entities = [entity for entity in kind if entity in keys]
            if not entities:
                continue
            held = self._entities[entities[0]]
            rows_of: list[list[int]] = []
            found: list[bytes | None] = []
            for entity in entities:
                known = [(i, value) for i, value in enumerate(keys[entity]) if value is not None]
                rows_of.append([i for i, _ in known])
                found += [records[places[entity][value]] for _, value in known]
            states, recent = held.unpack(found)
            features = held.layout.apply(states, moments[[i for rows in rows_of for i in rows]])
            start = 0
            for entity, rows in zip(entities, rows_of, strict=True):
                of_rows = features[start : start + len(rows)]
                if len(rows) < len(moments):
                    of_rows = np.full((len(moments), features.shape[1]), np.nan)
                    of_rows[rows] = features[start : start + len(rows)]
                out.update(zip(self._entities[entity].layout.names, of_rows.T, strict=True))
                start += len(rows)
            if held.sequence is not None:
                told = dict(zip(rows_of[0], recent, strict=True))
                sequences[entities[0]] = [told.get(i, RecentValues()) for i in range(len(moments))]
        return OnlineRows(out, sequences)

    def states(self, entity: Entity, keys: Sequence[str]) -> Floats:
        """(N, S) states of N keys, for those who keep them at hand; empty states for unknown keys."""
        held = self._entities[entity]
        return held.unpack(self._store.get_many(held.record_keys(keys)))[0]

    def apply(self, entity: Entity, states: Floats, time_us: Times) -> dict[str, Floats]:
        """Features of states that `states` returned, by name."""
        layout = self._entities[entity].layout
        return dict(zip(layout.names, layout.apply(states, time_us).T, strict=True))

    # ------------------------------------------------------------------ writing

    def push(self, events: Events) -> PushReport:
        """Take in new events, in the order given. When it returns, they are safe and the next read shows them.

        Raises:
            DataError: an event is ahead of the clock, or a column is missing; nothing was taken in.
            StorageError: the log cannot be written, or another process writes this stream; nothing was taken in.
        """
        with self._lock:
            log = self._opened_log()
            self._refresh()
            self._columns.check(events)
            self._check_clock(events)
            fresh, duplicates, late = self._sorted_out(events)
            if len(fresh):
                taken = events.take(fresh)
                first = log.append(self._columns.encode(taken), len(taken))
                self._fold(taken, first + np.arange(len(taken)))
                self._remember(taken, log.segments()[-1][0])
                self._checkpoint_soon()
            return PushReport(len(fresh), duplicates, late)

    def forget(self, column: str, value: str) -> bool:
        """Let an entity be as if it had never been seen; events that come from now on count. False: features are kept
        under no such column. Of entities of several columns nothing is forgotten, since their keys cannot be listed.

        Raises:
            StorageError: the log cannot be opened, or another process writes this stream; nothing was forgotten.
        """
        with self._lock:
            log = self._opened_log()
            self._refresh()
            held = self._entities.get(column)
            if held is None:
                return False
            states, _ = held.unpack([None])
            # It has seen all of the log, so that nothing of it comes back when the log is read again.
            positions(states)[:] = log.next_position - 1
            self._store.put_many(dict(zip(held.record_keys([value]), held.pack(states, [RecentValues()]), strict=True)))
            return True

    def load(
        self, states: Mapping[Entity, EntityStates], *, until_us: int, ids: Mapping[str, int] | None = None
    ) -> None:
        """Publish a batch of states, made from all events up to `until_us`. Newer events that the log still has are
        folded in again; states of entities that the batch does not know stay.

        ids: event id → µs of the events in the batch, so that one pushed again is known; only those that could
        still come are kept. None leaves those of the batch before.
        """
        with self._lock:
            self.load_part(states)
            if ids is not None:
                oldest_us = int(until_us) - int(self._settings.allowed_lateness_s * 1e6)
                kept = {name: t for name, t in ids.items() if t >= oldest_us}
                self._store.put_many({self._ids_key: zlib.compress(json.dumps(kept).encode(), 1)})
            upto = self._log.next_position if self._log is not None else _next_position(self._log_folder)
            meta = {"until_us": int(until_us), "position": upto, "batch": time.time_ns()}
            self._store.put_many({self._meta_key: json.dumps(meta).encode()})
            self._refresh()

    def load_part(self, states: Mapping[Entity, EntityStates]) -> None:
        """Write a part of a batch that does not fit into memory; `load` of nothing, at its end, publishes it."""
        for entity, batch in states.items():
            held = self._entities[entity]
            for part in batch.parts():
                segments = held.pack(part.states, part.sequences)
                self._store.put_many(dict(zip(held.record_keys(part.keys.tolist()), segments, strict=True)))

    def take_over(self) -> None:
        """Recover what another process has left that wrote this stream, if it has gone and this one may write."""
        with self._lock:
            if self._log is None:
                self._refresh()

    def checkpoint(self) -> None:
        """Write states in memory to the disk, and drop what is no longer needed of the log."""
        with self._lock:
            self._stop_timer()
            self._store.flush()
            if self._log is None:
                return
            oldest_us = self._oldest_us()
            for first, _ in self._log.segments()[:-1]:
                if self._newest_of.get(first, NEVER_US) >= oldest_us:
                    self._log.drop(first)
                    break
            else:
                self._log.drop(self._log.segments()[-1][0])

    def close(self) -> None:
        """Write everything and let another process write. Safe to repeat."""
        with self._lock:
            self.checkpoint()
            if self._log is not None:
                self._log.close()
                self._log = None

    # ------------------------------------------------------------------ the parts

    def _opened_log(self) -> EventLog:
        if self._log is None:
            self._log = EventLog(self._log_folder)
            self._replay(self._log)
        return self._log

    def _refresh(self) -> None:
        """Notice a batch published since, and recover from the log if nobody else is writing it."""
        [content] = self._store.get_many([self._meta_key])
        batch = json.loads(content) if content else {}
        if self._log is None:
            self._batch = batch
            self._watermark_us = max(self._watermark_us, batch.get("until_us", NEVER_US))
            if self._log_folder.is_dir() and self._may_write():
                try:
                    self._opened_log()
                except StorageError:
                    return  # its writer is alive, and writes what it holds
        elif batch != self._batch:
            self._batch = batch
            self._store.discard_unwritten()
            self._replay(self._log)

    def _replay(self, log: EventLog) -> None:
        [known] = self._store.get_many([self._ids_key])
        if known is not None:
            self._ids.update(json.loads(zlib.decompress(known)))
        until_us, upto = self._batch.get("until_us", NEVER_US), self._batch.get("position", 0)
        self._watermark_us = max(self._watermark_us, until_us)
        segments = [first for first, _ in log.segments()]
        for frame in log.frames():
            events = self._columns.decode(frame.payload)
            place = frame.first + np.arange(frame.num_entries)
            # What the batch was made from is in it; what came in later is not, however old it is.
            wanted = np.flatnonzero((place >= upto) | (events.time_us > until_us))
            if len(wanted):
                self._fold(events.take(wanted), place[wanted])
            self._remember(events, max(first for first in segments if first <= frame.first))

    def _check_clock(self, events: Events) -> None:
        limit_us = int((self._clock() + self._settings.max_ahead_s) * 1e6)
        if events.time_us.max(initial=NEVER_US) > limit_us:
            i = int(np.argmax(events.time_us > limit_us))
            raise DataError(
                f"events[{i}]: its time {events.time_us[i] / 1e6:.6f} is "
                f"{events.time_us[i] / 1e6 - self._clock():.0f} s ahead of this machine's clock; at most "
                f"{self._settings.max_ahead_s:.0f} s are allowed"
            )

    def _sorted_out(self, events: Events) -> tuple[NDArray[np.intp], list[int], list[int]]:
        """Places of new events, of duplicates and of those that are too late."""
        newest = np.maximum(np.maximum.accumulate(events.time_us), self._watermark_us)
        too_late = events.time_us < newest - int(self._settings.allowed_lateness_s * 1e6)
        is_fresh = ~too_late
        duplicates: list[int] = []
        if events.ids is not None:
            here: set[str] = set()
            for i, name in enumerate(events.ids):
                if name is None or too_late[i]:
                    continue
                if name in self._ids or name in here:
                    duplicates.append(i)
                    is_fresh[i] = False
                here.add(name)
        return np.flatnonzero(is_fresh), duplicates, np.flatnonzero(too_late).tolist()

    def _fold(self, events: Events, place: Index) -> None:
        for entity, held in self._entities.items():
            keys = entity_keys(entity, events)
            rows, codes, values = _coded(keys)
            if not len(rows):
                continue
            mine = events if len(rows) == len(events) else events.take(rows)
            record_keys = held.record_keys(values)
            states, recent = held.unpack(self._store.get_many(record_keys))
            seen = positions(states).copy() if held.sequence is not None else None
            num_new = held.layout.fold(states, codes, mine.time_us, held.layout.inputs(mine), place[rows])
            if not num_new:
                continue
            if held.sequence is not None and seen is not None:
                followed = entity_keys(held.sequence.column, mine)
                for i, code in enumerate(codes):
                    if place[rows][i] > seen[code] and followed[i] is not None:
                        recent[code] = recent[code].with_event(int(mine.time_us[i]), followed[i], held.sequence.length)
            self._store.put_many(dict(zip(record_keys, held.pack(states, recent), strict=True)), durable=False)

    def _remember(self, events: Events, segment: int) -> None:
        newest = int(events.time_us.max())
        self._watermark_us = max(self._watermark_us, newest)
        self._newest_of[segment] = max(self._newest_of.get(segment, NEVER_US), newest)
        if events.ids is not None:
            self._ids.update(
                (name, int(t)) for name, t in zip(events.ids, events.time_us, strict=True) if name is not None
            )
            if len(self._ids) > self._max_ids:
                oldest_us = self._oldest_us()
                self._ids = {name: t for name, t in self._ids.items() if t >= oldest_us}
                self._max_ids = max(_MAX_IDS, 2 * len(self._ids))

    def _oldest_us(self) -> int:
        """What is earlier than this is refused as late, so nothing needs to be remembered of it."""
        if self._watermark_us == NEVER_US:
            return NEVER_US
        return self._watermark_us - int(self._settings.allowed_lateness_s * 1e6)

    def _checkpoint_soon(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(self._settings.checkpoint_s, self.checkpoint)
            self._timer.daemon = True
            self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Columns:
    """Events of a plan as bytes and back: only the columns that the plan needs."""

    def __init__(self, plan: FeaturePlan) -> None:
        self._keys, self._numbers = plan.key_columns(), plan.number_columns()

    def check(self, events: Events) -> None:
        for name in self._keys:
            if name not in events.keys and name not in events.numbers:
                raise DataError(f"the events have no key column {name!r}, which the feature plan needs")
        for name in self._numbers:
            if name not in events.numbers:
                raise DataError(f"the events have no numeric column {name!r}, which the feature plan needs")

    def encode(self, events: Events) -> bytes:
        texts = {name: key_column(events, name).tolist() for name in self._keys}
        document = json.dumps([texts, None if events.ids is None else events.ids.tolist()]).encode()
        numbers = [events.numbers[name].astype("<f8").tobytes() for name in self._numbers]
        return b"".join(
            (struct.pack("<II", len(events), len(document)), document, events.time_us.astype("<i8").tobytes(), *numbers)
        )

    def decode(self, payload: bytes) -> Events:
        num, length = struct.unpack_from("<II", payload)
        texts, ids = json.loads(payload[8 : 8 + length])
        offset = 8 + length
        times = np.frombuffer(payload, dtype="<i8", count=num, offset=offset).astype(np.int64)
        numbers = {}
        for name in self._numbers:
            offset += 8 * num
            numbers[name] = np.frombuffer(payload, dtype="<f8", count=num, offset=offset).astype(np.float64)
        return Events(
            time_us=times,
            keys={name: _object_array(values) for name, values in texts.items()},
            numbers=numbers,
            ids=None if ids is None else _object_array(ids),
        )


def _object_array(values: Sequence[Any]) -> Keys:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out


def _coded(keys: Keys) -> tuple[NDArray[np.intp], Index, list[str]]:
    """Rows that have a key, the number of the key of each, and the keys."""
    if len(keys) == 1:
        if keys[0] is None:
            return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.int64), []
        return np.zeros(1, dtype=np.intp), np.zeros(1, dtype=np.int64), [keys[0]]
    codes, values = pd.factorize(keys, use_na_sentinel=True)
    rows = np.flatnonzero(codes >= 0)
    return rows, codes[rows].astype(np.int64), list(values)


def _sequence(content: bytes | None) -> RecentValues:
    if content is None:
        return RecentValues()
    times, values = json.loads(content)
    return RecentValues(tuple(times), tuple(values))


def _next_position(folder: Path) -> int:
    """Where a log stands that this process does not write."""
    if not folder.is_dir():
        return 0
    try:
        log = EventLog(folder)
    except StorageError:
        # Its writer goes on while we look; what it adds from now on is later than the batch.
        return next_position_in(folder)
    try:
        return log.next_position
    finally:
        log.close()
