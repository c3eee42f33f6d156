"""An append-only log of numbered entries that survives a kill at any point.

A frame holds a batch of entries: magic, CRC-32, length, position of the first entry, how many, payload. Frames lie in
segment files named by the position of their first entry. A frame that was cut off is recognised by its checksum when
the log is opened, and removed; it was never acknowledged. One writer at a time, which a lock on the folder ensures.
"""

import fcntl
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from assay_platform.errors import StorageError

_FRAME = struct.Struct("<4sIIqI")  # magic, CRC-32 of what follows, payload bytes, first position, entries
_MAGIC = b"AsLg"
_REST = struct.Struct("<IqI")


class Frame(NamedTuple):
    """One batch: so many entries, the first of them at position `first`."""

    first: int
    num_entries: int
    payload: bytes


class EventLog:
    """Batches in order, each numbered by its first entry. Thread-safe."""

    def __init__(self, folder: Path, *, sync: bool = False, segment_bytes: int = 64 * 1024 * 1024) -> None:
        """sync: wait for the disk at every append, so that it survives a power cut too; without, an append survives
        the end of the process.

        Raises:
            StorageError: another process writes this log, or the folder cannot be used.
        """
        self.folder, self._sync, self._segment_bytes = folder, sync, segment_bytes
        self._mutex = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._owner = (folder / "writer.lock").open("w")
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._owner.close()
            raise StorageError(f"{folder}: another process writes this log; run one writer a store") from None
        except OSError as error:
            raise StorageError(f"{folder}: cannot be used as a log ({error.strerror})") from error
        self._segments = self._found()
        if not self._segments:
            self._segments = [(0, self._path(0))]
        self._next = self._recover()
        self._file = self._opened()

    @property
    def next_position(self) -> int:
        """What the next entry is numbered."""
        return self._next

    @property
    def size_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(path.stat().st_size for _, path in self._segments if path.is_file())

    def append(self, payload: bytes, count: int) -> int:
        """Add a batch of `count` entries and return the position of the first. It is safe when the call returns.

        Raises:
            StorageError: the disk is full or gone; nothing was added.
        """
        with self._mutex:
            first = self._next
            rest = _REST.pack(len(payload), first, count)
            frame = _MAGIC + struct.pack("<I", zlib.crc32(payload, zlib.crc32(rest))) + rest + payload
            before = os.fstat(self._file.fileno()).st_size
            try:
                rest_of_frame = memoryview(frame)
                while rest_of_frame:
                    rest_of_frame = rest_of_frame[self._file.write(rest_of_frame) :]
                if self._sync:
                    os.fsync(self._file.fileno())
            except OSError as error:
                os.truncate(self._segments[-1][1], before)
                raise StorageError(f"{self.folder}: cannot be written ({error.strerror}); nothing was added") from error
            self._next = first + count
            if before + len(frame) >= self._segment_bytes:
                self._file.close()
                self._segments.append((self._next, self._path(self._next)))
                self._file = self._opened()
            return first

    def frames(self, first: int = 0) -> Iterator[Frame]:
        """Batches, oldest first, from the one that holds a position on, or from the oldest that is kept."""
        segments = list(self._segments)
        begin = max(0, sum(start <= first for start, _ in segments) - 1)
        for _, path in segments[begin:]:
            yield from (frame for frame, _ in _read_frames(path) if frame.first + frame.num_entries > first)

    def segments(self) -> list[tuple[int, Path]]:
        """First position and file of every segment, oldest first; the last one is being written."""
        return list(self._segments)

    def drop(self, position: int) -> None:
        """Remove the segments in which every entry lies before a position."""
        with self._mutex:
            while len(self._segments) > 1 and self._segments[1][0] <= position:
                _, path = self._segments.pop(0)
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process write. Safe to repeat."""
        with self._mutex:
            self._file.close()
            self._owner.close()

    def _opened(self) -> io.FileIO:
        # Without a buffer: one that could not be written would be written again by whatever comes next.
        return io.FileIO(self._segments[-1][1], "ab")

    def _path(self, first: int) -> Path:
        return self.folder / f"{first:020d}.log"

    def _found(self) -> list[tuple[int, Path]]:
        return sorted((int(path.stem), path) for path in self.folder.glob("*.log") if path.stem.isdigit())

    def _recover(self) -> int:
        """Cut off what was not written whole; returns the position after the last entry."""
        first, path = self._segments[-1]
        path.touch()
        position, end = first, 0
        for frame, frame_end in _read_frames(path):
            position, end = frame.first + frame.num_entries, frame_end
        if end < path.stat().st_size:
            os.truncate(path, end)
        return position


def next_position_in(folder: Path) -> int:
    """Where a log stands that another process may be writing."""
    segments = sorted((int(path.stem), path) for path in folder.glob("*.log") if path.stem.isdigit())
    position = segments[-1][0] if segments else 0
    for _, path in segments[-1:]:
        for frame, _ in _read_frames(path):
            position = frame.first + frame.num_entries
    return position


def _read_frames(path: Path) -> Iterator[tuple[Frame, int]]:
    """Whole frames with the offset after each; stops at the first that is not whole."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        end = 0
        while True:
            header = file.read(_FRAME.size)
            if len(header) < _FRAME.size:
                return
            magic, checksum, length, first, count = _FRAME.unpack(header)
            payload = file.read(length) if magic == _MAGIC else b""
            if len(payload) < length or zlib.crc32(payload, zlib.crc32(header[8:])) != checksum:
                return
            end += len(header) + length
            yield Frame(first, count, payload), end
