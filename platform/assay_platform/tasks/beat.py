"""What dispatchers do, for those who watch: a file a process, written once a second, read by whoever shows it."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from assay_platform.errors import StorageError
from assay_platform.storage.files import write_json
from assay_platform.tasks.task import Device, Kind

_FRESH_S, _KEPT_S = 15.0, 3600.0


class Doing(NamedTuple):
    """A task that runs."""

    name: str
    kind: Kind
    device: Device
    seconds: float
    attempt: int


class Done(NamedTuple):
    """What became of a task. outcome: done, failed, retried, cancelled or late."""

    name: str
    kind: Kind
    device: Device
    outcome: str


class Beat(NamedTuple):
    """One dispatcher at one moment. total, used: cores and GPUs. seconds: of tasks that ended, by name and device."""

    total: Mapping[Device, float]
    used: Mapping[Device, float]
    running: list[Doing]
    waiting: Mapping[Kind, int]
    done: Mapping[Done, int]
    seconds: Mapping[tuple[str, Device], float]


class BeatFile:
    """Writes them to a folder, under the number of this process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"{os.getpid()}.json"

    def __call__(self, beat: Beat) -> None:
        """Replace what was written before. A full disk does not stop the work."""
        document = {
            "at": time.time(),
            "total": beat.total,
            "used": beat.used,
            "running": beat.running,
            "waiting": beat.waiting,
            "done": [[*done, count] for done, count in beat.done.items()],
            "seconds": [[name, device, seconds] for (name, device), seconds in beat.seconds.items()],
        }
        with suppress(StorageError):
            write_json(self._path, document)

    def close(self) -> None:
        """Nothing runs any longer."""
        self._path.unlink(missing_ok=True)


def read_beats(folder: Path) -> Iterator[tuple[str, Beat]]:
    """Of the processes that wrote lately: number and what they do. What a dead one left is removed in time."""
    for path in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            document: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            age_s = time.time() - float(document["at"])
            if age_s > _KEPT_S:
                path.unlink(missing_ok=True)
            elif age_s <= _FRESH_S:
                yield path.stem, _beat(document)


def _beat(document: Mapping[str, Any]) -> Beat:
    total, used = ({Device(d): float(v) for d, v in document[name].items()} for name in ("total", "used"))
    running = [Doing(n, Kind(kind), Device(device), s, attempt) for n, kind, device, s, attempt in document["running"]]
    done = {Done(n, Kind(kind), Device(device), what): count for n, kind, device, what, count in document["done"]}
    seconds = {(name, Device(device)): float(s) for name, device, s in document["seconds"]}
    return Beat(total, used, running, {Kind(k): n for k, n in document["waiting"].items()}, done, seconds)
