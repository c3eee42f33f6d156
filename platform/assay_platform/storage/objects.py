"""The cold tier: immutable Parquet objects on any file system that fsspec knows: local folders, S3, GCS, Azure.

Every batch becomes one object `<number>.parquet` with columns key and value, sorted by key; a null value means
deleted; of two objects the one with the higher number holds. An index of all keys is kept in memory, about 150 bytes a
key, read from the objects when the tier is opened. When there are many objects, the older half is merged into one. A
single writer; not covered: several writers at once.
"""

import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from assay_platform.errors import StorageError

_SCHEMA = pa.schema({"key": pa.binary(), "value": pa.binary()})
# Small row groups: one look-up reads one of them.
_ROWS_A_GROUP = 64
_MAX_OBJECTS = 64


class _Place(NamedTuple):
    number: int  # of the object
    row: int
    size_bytes: int


class ObjectTier:
    """Values in objects. See `Tier` for the contract."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        """url: such as file:///data/cold or s3://bucket/prefix. options: for the file system, such as endpoint_url."""
        self.url = url
        with self._reported("cannot be opened"):
            self._files, self._root = fsspec.core.url_to_fs(url, **(options or {}))
            self._is_local = "file" in _protocols(self._files)
            if self._is_local:
                self._files.makedirs(self._root, exist_ok=True)
        self._lock = threading.RLock()
        self._place: dict[bytes, _Place] = {}
        self._size_bytes = 0
        self._readers: dict[int, pq.ParquetFile] = {}
        self._objects = sorted(self._numbers())
        for number in self._objects:
            self._index(number, self._rows(number))
            self._close(number)

    @property
    def size_bytes(self) -> int:
        """Keys and values that are valid."""
        return self._size_bytes

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Tier`. Each object and row group is read once."""
        with self._lock:
            wanted: dict[tuple[int, int], list[int]] = {}
            for i, key in enumerate(keys):
                place = self._place.get(key)
                if place is not None:
                    wanted.setdefault((place.number, place.row // _ROWS_A_GROUP), []).append(i)
            out: list[bytes | None] = [None] * len(keys)
            for (number, group), places in wanted.items():
                values = self._group(number, group)
                for i in places:
                    out[i] = values[self._place[keys[i]].row % _ROWS_A_GROUP].as_py()
            return out

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        """See `Tier`. One object a batch."""
        if not items:
            return
        with self._lock:
            self._write(self._next_number(), dict(items))
            if len(self._objects) > _MAX_OBJECTS:
                self._compact()

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        with self._lock:
            present = [key for key in keys if key in self._place]
            if present:
                self._write(self._next_number(), dict.fromkeys(present))

    def keys(self, prefix: bytes = b"") -> Iterator[bytes]:
        """See `Tier`."""
        with self._lock:
            return iter([key for key in self._place if key.startswith(prefix)])

    def close(self) -> None:
        """See `Tier`."""
        with self._lock:
            for number in list(self._readers):
                self._close(number)

    def _next_number(self) -> int:
        return max(self._objects, default=0) + 1

    # ------------------------------------------------------------------ objects

    def _path(self, number: int) -> str:
        return f"{self._root}/{number:012d}.parquet"

    def _numbers(self) -> list[int]:
        with self._reported("cannot be listed"):
            self._files.invalidate_cache()
            try:
                names = [str(path).rsplit("/", 1)[-1] for path in self._files.ls(self._root, detail=False)]
            except FileNotFoundError:
                return []
        return [int(name.removesuffix(".parquet")) for name in names if name.removesuffix(".parquet").isdigit()]

    def _open(self, number: int) -> pq.ParquetFile:
        if number not in self._readers:
            self._readers[number] = pq.ParquetFile(self._files.open(self._path(number), "rb"))
        return self._readers[number]

    def _group(self, number: int, group: int) -> pa.ChunkedArray:
        with self._reported(f"object {number} cannot be read"):
            return self._open(number).read_row_group(group, columns=["value"])["value"]

    def _rows(self, number: int) -> list[tuple[bytes, bytes | None]]:
        with self._reported(f"object {number} cannot be read"):
            table = self._open(number).read()
        return list(zip(table["key"].to_pylist(), table["value"].to_pylist(), strict=True))

    def _index(self, number: int, rows: list[tuple[bytes, bytes | None]]) -> None:
        for row, (key, value) in enumerate(rows):
            old = self._place.pop(key, None)
            if old is not None:
                self._size_bytes -= old.size_bytes
            if value is not None:
                self._place[key] = _Place(number, row, len(key) + len(value))
                self._size_bytes += len(key) + len(value)

    def _write(self, number: int, items: Mapping[bytes, bytes | None]) -> None:
        ordered = sorted(items.items())
        table = pa.table({"key": [key for key, _ in ordered], "value": [value for _, value in ordered]}, schema=_SCHEMA)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=_ROWS_A_GROUP, compression="zstd")
        path = self._path(number)
        with self._reported(f"object {number} cannot be written"):
            if self._is_local:  # an object store shows an object when it is whole; a folder does not
                self._files.pipe_file(f"{path}.part", buffer.getvalue())
                self._files.mv(f"{path}.part", path)
            else:
                self._files.pipe_file(path, buffer.getvalue())
        self._close(number)
        if number not in self._objects:
            self._objects.append(number)
        self._index(number, ordered)

    def _compact(self) -> None:
        """Merge the older half of the objects under the number of its newest, then remove the others.

        A kill in between leaves some of the others, which the merged object hides. For that it keeps their deletions,
        but not those of the oldest object, which hide nothing.
        """
        older = self._objects[: len(self._objects) // 2]
        merged: dict[bytes, bytes | None] = {}
        for number in older:
            for row, (key, value) in enumerate(self._rows(number)):
                place = self._place.get(key)
                if place is not None and (place.number, place.row) == (number, row):
                    merged[key] = value
                elif place is None and value is None and number != older[0]:
                    merged[key] = None
        self._write(older[-1], merged)
        for number in older[:-1]:
            with self._reported(f"object {number} cannot be removed"):
                self._close(number)
                self._files.rm_file(self._path(number))
            self._objects.remove(number)

    def _close(self, number: int) -> None:
        reader = self._readers.pop(number, None)
        if reader is not None:
            reader.close(force=True)

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every file system brings exceptions of its own
            raise StorageError(f"{self.url}: {what} ({error})") from error


def _protocols(files: Any) -> tuple[str, ...]:
    protocol = files.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
