"""Writes that one region has taken and others have not been told of, on disk before the caller has an answer.

Each region has a place in the log up to which it knows all. What is sent again after a crash has its ids, by which a
region knows it again.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec
from assay_platform.errors import StorageError
from assay_platform.storage import write_json
from assay_platform.storage.log import EventLog

_SEGMENT_BYTES = 4 * 1024 * 1024
# Kept in memory, so that regions that are near are told without reading the disk.
_NEWEST = 10_000


class Write(msgspec.Struct, array_like=True, frozen=True):
    """A request that was taken. origin: the region that took it. accepted_at: Unix seconds."""

    path: str
    key: str
    body: bytes
    origin: str
    accepted_at: float


class Outbox:
    """Of one event loop, but for `save`."""

    def __init__(self, folder: Path, regions: Sequence[str], *, clock: Callable[[], float] = time.time) -> None:
        """A region that was not there before begins with the oldest write that is kept.

        Raises:
            StorageError: the folder is another gateway's, or cannot be used.
        """
        self.folder = folder
        self._log = EventLog(folder, segment_bytes=_SEGMENT_BYTES)
        self._file, self._clock = folder / "places.json", clock
        self._newest: deque[tuple[int, Write]] = deque(maxlen=_NEWEST)
        try:
            known = json.loads(self._file.read_text()) if self._file.is_file() else {}
        except (OSError, ValueError) as error:
            raise StorageError(f"{self._file}: cannot be read ({error})") from error
        oldest = self._log.segments()[0][0]
        self._places = {name: max(oldest, int(known.get(name, 0))) for name in regions}
        self._heads: dict[str, tuple[int, float]] = {}

    @property
    def next_place(self) -> int:
        """Of the next write."""
        return self._log.next_position

    def add(self, write: Write) -> int:
        """Keep a write for the regions that have not taken it; returns its place.

        Raises:
            StorageError: the disk is full or gone; nothing was kept.
        """
        place = self._log.append(msgspec.msgpack.encode(write), 1)
        self._newest.append((place, write))
        return place

    def place_of(self, region: str) -> int:
        """Of the first write that a region does not know."""
        return self._places[region]

    def waiting(self, region: str) -> int:
        """Writes that a region does not know."""
        return self.next_place - self._places[region]

    def lag_s(self, region: str) -> float:
        """Since when the oldest of them waits; 0 if there is none."""
        place = self._places[region]
        if place >= self.next_place:
            return 0.0
        held = self._heads.get(region)
        if held is None or held[0] != place:
            held = self._heads[region] = (place, next(self._from(place))[1].accepted_at)
        return max(0.0, self._clock() - held[1])

    def read(self, region: str, limit: int) -> list[tuple[int, Write]]:
        """The oldest writes that a region does not know, with their places."""
        return list(islice(self._from(self._places[region]), limit))

    def known(self, region: str, place: int) -> None:
        """A region knows all up to and including a place."""
        self._places[region] = place + 1

    def save(self) -> None:
        """Write the places of all regions, and forget what all of them know. From any thread.

        Raises:
            StorageError: the disk is full or gone; regions are told once more after a restart.
        """
        places = dict(self._places)
        write_json(self._file, places)
        self._log.drop(min(places.values(), default=0))

    def close(self) -> None:
        """Let another gateway use the folder."""
        self._log.close()

    def _from(self, place: int) -> Iterator[tuple[int, Write]]:
        if self._newest and self._newest[0][0] <= place:
            return islice(self._newest, place - self._newest[0][0], None)
        frames = self._log.frames(place)
        return ((frame.first, msgspec.msgpack.decode(frame.payload, type=Write)) for frame in frames)
