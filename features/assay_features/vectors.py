"""Feature rows as packed vectors: one record an entity key holds the rows of all its feature views.

So a request is one look-up a key, however many views it names, and a batch of keys is decoded in columns. A record is
a series of segments, one a view:

    layout id (8 bytes: 4 of the view's name, 4 of its fields) · event time µs · created time µs · length of the rest
    one status byte a field, padded to 8 · 8 bytes a number · for every other field its length and bytes

Keys are those of Feast's entity key serialisation, version 3, so the store behind Feast and ours are one. No Feast is
imported here: services read states without it.
"""

# N records, F fields of a view

import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from assay_platform.errors import DataError
from numpy.typing import NDArray

Kind = Literal["float", "int", "bool", "time", "str", "bytes", "proto"]
NEVER_US = np.iinfo(np.int64).min
_FIXED = ("float", "int", "bool", "time")
# All parts are multiples of 8 bytes, so records of numbers are rows of a matrix as they are.
_HEADER = struct.Struct("<QqqI4x")
_LENGTH = struct.Struct("<I")
_NUMBER = {"float": struct.Struct("<d"), "int": struct.Struct("<q"), "bool": struct.Struct("<q"),
           "time": struct.Struct("<q")}  # fmt: skip

# What a value is, in the bytes of a segment and in what readers get.
PRESENT, NULL, NOT_FOUND, EXPIRED = 1, 0, 2, 3
STRING_TYPE, INT32_TYPE, INT64_TYPE = 2, 3, 4  # numbers of Feast's ValueType


@dataclass(frozen=True)
class ViewLayout:
    """The fields of one feature view, as they are packed."""

    view: str
    fields: tuple[tuple[str, Kind], ...]

    @cached_property
    def id(self) -> int:
        """View in the upper half, fields in the lower."""
        return view_hash(self.view) << 32 | _hash32(json.dumps(self.fields))

    @cached_property
    def fixed(self) -> tuple[str, ...]:
        """Fields that take 8 bytes."""
        return tuple(name for name, kind in self.fields if kind in _FIXED)

    @cached_property
    def variable(self) -> tuple[str, ...]:
        """Fields of any length."""
        return tuple(name for name, kind in self.fields if kind not in _FIXED)

    @cached_property
    def status_bytes(self) -> int:
        """Status bytes with their padding."""
        return -(-len(self.fields) // 8) * 8

    @cached_property
    def order(self) -> dict[str, int]:
        """Field → its place."""
        return {name: i for i, (name, _) in enumerate(self.fields)}

    @cached_property
    def place_of(self) -> dict[str, int]:
        """Field of 8 bytes → its place among those."""
        return {name: i for i, name in enumerate(self.fixed)}

    def to_json(self) -> bytes:
        """For keeping beside the records, so that rows of an older layout can still be read."""
        return json.dumps({"view": self.view, "fields": self.fields}).encode()

    @staticmethod
    def from_json(content: bytes) -> "ViewLayout":
        """Read back what `to_json` wrote."""
        document = json.loads(content)
        return ViewLayout(document["view"], tuple((name, kind) for name, kind in document["fields"]))

    def pack(self, values: Mapping[str, Any], event_us: int, created_us: int = NEVER_US) -> bytes:
        """One segment. values: numbers for fixed fields, bytes for others; None or absent is null."""
        statuses = bytearray(self.status_bytes)
        numbers, rest = [], []
        for i, (name, kind) in enumerate(self.fields):
            value = values.get(name)
            statuses[i] = NULL if value is None else PRESENT
            if kind in _FIXED:
                numbers.append(_NUMBER[kind].pack(0 if value is None else value))
            else:
                content = b"" if value is None else value
                rest += [_LENGTH.pack(len(content)), content]
        body = b"".join((bytes(statuses), *numbers, *rest))
        return _HEADER.pack(self.id, event_us, created_us, len(body)) + body

    def pack_columns(
        self,
        columns: Mapping[str, NDArray[Any] | Sequence[Any]],
        event_us: NDArray[np.int64],
        created_us: NDArray[np.int64],
    ) -> list[bytes]:
        """N segments. columns: NaN and None are null; integers with nulls come as objects."""
        num_rows = len(event_us)
        if self.variable:
            rows = zip(*(_objects(columns[name]) for name, _ in self.fields), strict=True)
            names = [name for name, _ in self.fields]
            times = zip(event_us.tolist(), created_us.tolist(), strict=True)
            return [
                self.pack(dict(zip(names, row, strict=True)), event, created)
                for row, (event, created) in zip(rows, times, strict=True)
            ]
        length = self.status_bytes + 8 * len(self.fields)
        out = np.zeros((num_rows, _HEADER.size + length), dtype=np.uint8)
        out[:, :8] = np.frombuffer(struct.pack("<Q", self.id), dtype=np.uint8)
        out[:, 8:16] = event_us.astype("<i8")[:, None].view(np.uint8)
        out[:, 16:24] = created_us.astype("<i8")[:, None].view(np.uint8)
        out[:, 24:28] = np.frombuffer(_LENGTH.pack(length), dtype=np.uint8)
        first = _HEADER.size + self.status_bytes
        for i, (name, kind) in enumerate(self.fields):
            numbers, present = _numbers(columns[name], kind)
            out[:, _HEADER.size + i] = np.where(present, PRESENT, NULL)
            out[:, first + 8 * i : first + 8 * i + 8] = numbers[:, None].view(np.uint8)
        width = out.shape[1]
        packed = out.tobytes()
        return [packed[i * width : (i + 1) * width] for i in range(num_rows)]


class ViewRows(NamedTuple):
    """The rows of one view for N keys."""

    status: NDArray[np.uint8]  # (N, F) of the fields asked for
    columns: dict[str, NDArray[Any]]  # field → (N,) numbers, 0 where not present; or objects: bytes or None
    event_us: NDArray[np.int64]  # (N,) NEVER_US where not found


class Vectors(NamedTuple):
    """Numbers of several views for N keys, in the order of the reader's fields."""

    status: NDArray[np.uint8]  # (N, F)
    slots: NDArray[np.int64]  # (N, F) the 8 bytes of every number, 0 where not present
    event_us: NDArray[np.int64]  # (N, V) of every view

    def column(self, field: int, kind: Kind) -> NDArray[Any]:
        """(N,) typed values of one field."""
        slots = self.slots[:, field]
        return slots.view("<f8") if kind == "float" else slots.astype(bool) if kind == "bool" else slots


class _Template(NamedTuple):
    """Where everything lies in records that begin like a certain one."""

    length: int
    ids: NDArray[np.int64]  # (G,) layout ids of its segments
    id_slots: NDArray[np.int64]  # (G,) where they are
    status_bytes: NDArray[np.int64]  # (F,)
    value_slots: NDArray[np.int64]  # (F,)
    time_slots: NDArray[np.int64]  # (V,)


class VectorReader:
    """Decodes the numbers of several views at once: what a feature service asks for, resolved beforehand.

    Records that are laid out alike, the usual case, become one matrix; the others are read one view at a time.
    """

    def __init__(self, wanted: Sequence[tuple[ViewLayout, Sequence[str]]]) -> None:
        """wanted: views with their fields; all fields must be of 8 bytes.

        Raises:
            DataError: a field is not of its view, or is not a number.
        """
        self._wanted = [(layout, tuple(fields)) for layout, fields in wanted]
        for layout, fields in self._wanted:
            for name in fields:
                if name not in layout.place_of:
                    raise DataError(
                        f"feature view {layout.view!r} has no number {name!r}; it has {', '.join(layout.fixed)}"
                    )
        self.num_fields = sum(len(fields) for _, fields in self._wanted)
        self._templates: dict[bytes, _Template | None] = {}

    def read(
        self, records: Sequence[bytes | None], older: Callable[[int], ViewLayout | None] = lambda _: None
    ) -> Vectors:
        """All numbers of N records."""
        first = next((record for record in records if record), None)
        template = None if first is None else self._template(first)
        if template is None:
            return self._read_slowly(records, older)
        blank = bytes(template.length)
        alike = [record if record is not None and len(record) == template.length else blank for record in records]
        content = b"".join(alike)
        matrix = np.frombuffer(content, dtype="<i8").reshape(len(records), -1)
        fits = (matrix[:, template.id_slots] == template.ids).all(axis=1)
        status = np.frombuffer(content, dtype=np.uint8).reshape(len(records), -1)[:, template.status_bytes]
        found = Vectors(status, matrix[:, template.value_slots], matrix[:, template.time_slots])
        if not fits.all():
            others = np.flatnonzero(~fits).tolist()
            slow = self._read_slowly([records[i] for i in others], older)
            found.status[others], found.slots[others] = slow.status, slow.slots
            found.event_us[others] = slow.event_us
        return found

    def _template(self, record: bytes) -> _Template | None:
        segments: dict[int, int] = {}
        offset = 0
        while offset < len(record):
            layout_id, _, _, length = _HEADER.unpack_from(record, offset)
            segments[layout_id] = offset
            offset += _HEADER.size + length
        shape = struct.pack(f"<{2 * len(segments) + 1}Q", len(record), *segments, *segments.values())
        if shape not in self._templates:
            self._templates[shape] = self._made(segments, len(record))
        return self._templates[shape]

    def _made(self, segments: Mapping[int, int], length: int) -> _Template | None:
        if length % 8 or any(layout.id not in segments or layout.variable for layout, _ in self._wanted):
            return None
        status, values, times = [], [], []
        for layout, fields in self._wanted:
            offset = segments[layout.id]
            body = offset + _HEADER.size
            times.append(offset // 8 + 1)
            for name in fields:
                status.append(body + layout.order[name])
                values.append((body + layout.status_bytes) // 8 + layout.place_of[name])
        return _Template(
            length,
            np.array(list(segments), dtype=np.uint64).view(np.int64),
            np.array(list(segments.values()), dtype=np.int64) // 8,
            np.array(status, dtype=np.int64),
            np.array(values, dtype=np.int64),
            np.array(times, dtype=np.int64),
        )

    def _read_slowly(self, records: Sequence[bytes | None], older: Callable[[int], ViewLayout | None]) -> Vectors:
        num_rows = len(records)
        status = np.empty((num_rows, self.num_fields), dtype=np.uint8)
        slots = np.empty((num_rows, self.num_fields), dtype=np.int64)
        event_us = np.empty((num_rows, len(self._wanted)), dtype=np.int64)
        first = 0
        for v, (layout, fields) in enumerate(self._wanted):
            rows = read_rows(records, layout, fields, older)
            status[:, first : first + len(fields)] = rows.status
            for f, name in enumerate(fields):
                column = rows.columns[name]
                slots[:, first + f] = column.view(np.int64) if column.dtype.kind == "f" else column
            event_us[:, v] = rows.event_us
            first += len(fields)
        return Vectors(status, slots, event_us)


def view_hash(view: str) -> int:
    """The half of a layout's id that its view gives."""
    return _hash32(view)


def with_segment(record: bytes | None, segment: bytes) -> bytes:
    """The record with one view's row replaced or added."""
    if not record:
        return segment
    (segment_id,) = struct.unpack_from("<Q", segment)
    kept, offset = [segment], 0
    while offset < len(record):
        layout_id, _, _, length = _HEADER.unpack_from(record, offset)
        end = offset + _HEADER.size + length
        if layout_id >> 32 != segment_id >> 32:
            kept.append(record[offset:end])
        offset = end
    return segment if len(kept) == 1 else b"".join(kept)


def without_view(record: bytes, view: str) -> bytes:
    """The record without one view's row; empty if there is no other."""
    hidden, kept, offset = view_hash(view), [], 0
    while offset < len(record):
        layout_id, _, _, length = _HEADER.unpack_from(record, offset)
        end = offset + _HEADER.size + length
        if layout_id >> 32 != hidden:
            kept.append(record[offset:end])
        offset = end
    return b"".join(kept)


def segment_times(record: bytes | None, view: str) -> tuple[int, int]:
    """Event and created time of one view's row, NEVER_US where there is none."""
    place = -1 if record is None else _find(record, view_hash(view))
    if record is None or place < 0:
        return NEVER_US, NEVER_US
    _, event_us, created_us, _ = _HEADER.unpack_from(record, place)
    return event_us, created_us


def read_rows(
    records: Sequence[bytes | None],
    layout: ViewLayout,
    fields: Sequence[str],
    older: Callable[[int], ViewLayout | None] = lambda _: None,
) -> ViewRows:
    """One view's rows out of N records.

    older: finds layouts that the view had before, by id; rows of one that is not known count as not found.

    Raises:
        DataError: a field is not of the view.
    """
    kinds = dict(layout.fields)
    for name in fields:
        if name not in kinds:
            raise DataError(f"feature view {layout.view!r} has no field {name!r}; it has {', '.join(kinds)}")
    hidden, own_id = view_hash(layout.view), layout.id
    places = [-1 if not record else _find(record, hidden) for record in records]
    num_rows, fixed_bytes = len(records), layout.status_bytes + 8 * len(layout.fixed)
    absent = bytes([NOT_FOUND]) * layout.status_bytes + bytes(8 * len(layout.fixed))
    event_us = np.full(num_rows, NEVER_US)
    parts: list[bytes] = []
    current: list[bytes | None] = []
    for i, (record, place) in enumerate(zip(records, places, strict=True)):
        segment = None
        if place >= 0:
            assert record is not None
            layout_id, event_us[i], _, length = _HEADER.unpack_from(record, place)
            segment = record[place : place + _HEADER.size + length]
            if layout_id != own_id:
                segment = _converted(segment, layout, older(layout_id))
        if segment is None:
            event_us[i] = NEVER_US
        parts.append(absent if segment is None else segment[_HEADER.size : _HEADER.size + fixed_bytes])
        current.append(segment)
    matrix = np.frombuffer(b"".join(parts), dtype=np.uint8).reshape(num_rows, fixed_bytes)
    order = layout.order
    status = matrix[:, [order[name] for name in fields]] if fields else np.empty((num_rows, 0), dtype=np.uint8)
    numbers = np.ascontiguousarray(matrix[:, layout.status_bytes :])
    as_float, as_int = numbers.view("<f8"), numbers.view("<i8")
    place_of = layout.place_of
    columns: dict[str, NDArray[Any]] = {}
    others = [name for name in fields if kinds[name] not in _FIXED]
    texts = _variable(layout, current, fixed_bytes, others) if others else {}
    for name in fields:
        kind = kinds[name]
        if kind in _FIXED:
            source = as_float if kind == "float" else as_int
            column = np.ascontiguousarray(source[:, place_of[name]])
            columns[name] = column.astype(bool) if kind == "bool" else column
        else:
            columns[name] = texts[name]
    return ViewRows(status, columns, event_us)


def _variable(
    layout: ViewLayout, segments: Sequence[bytes | None], fixed_bytes: int, names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    out = {name: np.full(len(segments), None, dtype=object) for name in names}
    order = layout.order
    for row, segment in enumerate(segments):
        if segment is None:
            continue
        offset = _HEADER.size + fixed_bytes
        for name in layout.variable:
            (length,) = _LENGTH.unpack_from(segment, offset)
            offset += _LENGTH.size
            if name in out and segment[_HEADER.size + order[name]] == PRESENT:
                out[name][row] = segment[offset : offset + length]
            offset += length
    return out


def _converted(segment: bytes, layout: ViewLayout, older: ViewLayout | None) -> bytes | None:
    """A row of an older layout of the view, in today's: fields go by name and kind, new ones are null."""
    if older is None:
        return None
    shared = [name for name, kind in older.fields if (name, kind) in layout.fields]
    rows = read_rows([segment], older, shared)
    values = {name: rows.columns[name][0] for i, name in enumerate(shared) if rows.status[0, i] == PRESENT}
    _, event_us, created_us, _ = _HEADER.unpack_from(segment)
    return layout.pack(values, event_us, created_us)


def _find(record: bytes, hidden: int) -> int:
    """Offset of a view's segment, or -1."""
    offset, end = 0, len(record)
    while offset < end:
        layout_id, _, _, length = _HEADER.unpack_from(record, offset)
        if layout_id >> 32 == hidden:
            return offset
        offset += _HEADER.size + length
    return -1


def _hash32(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest())


def _objects(column: NDArray[Any] | Sequence[Any]) -> list[Any]:
    values = column.tolist() if isinstance(column, np.ndarray) else list(column)
    return [None if isinstance(value, float) and value != value else value for value in values]  # noqa: PLR0124 - NaN


def _numbers(column: NDArray[Any] | Sequence[Any], kind: Kind) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    values = np.asarray(column)
    dtype = "<f8" if kind == "float" else "<i8"
    if values.dtype == object:
        present = np.array([value is not None and value == value for value in values], dtype=bool)  # noqa: PLR0124
        values = np.where(present, values, 0)
    else:
        present = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(len(values), dtype=bool)
        values = np.where(present, values, 0)
    return values.astype(dtype), present


# ---------------------------------------------------------------------- keys


class RecordKeys:
    """Makes the keys of one kind of record: those of a project, of a family of views, of certain join keys.

    Views of one family share records; '' is the family of plain feature views.
    """

    def __init__(self, project: str, family: str, join_keys: Sequence[str]) -> None:
        """join_keys: of string entities, in any order."""
        self._order = sorted(range(len(join_keys)), key=lambda i: join_keys[i])
        names = [join_keys[i].encode() for i in self._order]
        self.prefix = record_prefix(project, family)
        head = struct.pack("<I", len(names))
        head += b"".join(struct.pack("<II", STRING_TYPE, len(name)) + name for name in names)
        self._head = self.prefix + head

    def of(self, value: str) -> bytes:
        """The key of a record with one join key."""
        text = value.encode()
        return self._head + struct.pack("<II", STRING_TYPE, len(text)) + text

    def of_parts(self, parts: Sequence[str]) -> bytes:
        """The key of a record with several join keys, given in the order of the constructor's."""
        if len(parts) == 1:
            return self.of(parts[0])
        texts = [parts[i].encode() for i in self._order]
        return self._head + b"".join(struct.pack("<II", STRING_TYPE, len(text)) + text for text in texts)


def record_prefix(project: str, family: str) -> bytes:
    """What the keys of a family's records begin with."""
    return f"{project}\0{family}\0".encode()
