"""Whether what is scored still looks like what the model was measured on: windows of requests against its reference.

Requests leave their columns here, which costs the fast path an append; a window is looked at by another thread. What is
found in two windows running is an alarm.
"""

import json
import logging
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from assay_features.events import Events
from assay_platform.monitoring.alarms import Alarms, Finding
from assay_platform.monitoring.calibration import Calibration
from assay_platform.monitoring.drift_findings import findings
from assay_platform.monitoring.drift_reference import Reference
from assay_platform.monitoring.skew import heavy_keys
from numpy.typing import NDArray

SCORE = "score"
_Part = tuple[Events, Mapping[str, NDArray[np.float64]]]
# Looking shares the interpreter with scoring: a two-hundredth of the time, so that no percentile sees it.
_PAUSE = 200
# Windows that wait to be looked at; where requests come faster, the oldest are forgotten.
_MOST_WINDOWS = 2
# Keys are spread over so many partitions, as a sharded store or a shuffle would; a column with few values is not.
_PARTITIONS, _FEWEST_KEYS = 64, 256
# One partition with so many times its share: with 64 of them, a key that has an eighth of all events.
_HEAVY = 8.0
_log = logging.getLogger("assay.service")


class Seen(NamedTuple):
    """After so many windows: what the newest has that training had not, and what the one before had, too."""

    windows: int = 0
    findings: tuple[Finding, ...] = ()
    alarms: tuple[Finding, ...] = ()


class CalibrationWatch:
    """Windows of scores whose labels have come, in the order of the labels. Thread-safe."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration, self._alarms = calibration, Alarms()
        self._lock = threading.Lock()
        self._pairs: list[tuple[float, bool]] = []
        self.seen = Seen()

    @property
    def window_rows(self) -> int:
        """Labels that are looked at together."""
        return self._calibration.window_rows

    def add(self, pairs: Sequence[tuple[float, bool]]) -> bool:
        """Scores and whether they were frauds; whether there was a window to look at."""
        with self._lock:
            self._pairs += pairs
            if len(self._pairs) < self.window_rows:
                return False
            window, self._pairs = self._pairs[: self.window_rows], self._pairs[self.window_rows :]
        scores, labels = zip(*window, strict=True)
        found = self._calibration.findings(np.array(scores), np.array(labels, dtype=bool))
        self.seen = Seen(self.seen.windows + 1, tuple(found), tuple(self._alarms.after(found)))
        return True


class SkewWatch:
    """What `assay features skew` found last; read again when the file is another one. One thread looks."""

    def __init__(self, file: Path) -> None:
        self._file, self._seen_at = file, 0.0
        self.found: tuple[Finding, ...] = ()

    def look(self) -> bool:
        """Whether there was something new."""
        try:
            changed_at = self._file.stat().st_mtime
            if changed_at == self._seen_at:
                return False
            self.found = tuple(Finding(**one) for one in json.loads(self._file.read_text())["findings"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            _log.exception("%s cannot be read; what was found before stays", self._file)
            return False
        self._seen_at = changed_at
        return True


class DriftWatch:
    """Windows of one model's requests. Thread-safe; one thread looks."""

    def __init__(
        self, reference: Reference, *, entities: Sequence[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """entities: columns whose keys features are kept under; one key with much of the events is a finding."""
        self._reference, self._alarms, self._clock = reference, Alarms(), clock
        self._entities = tuple(entities)
        self._not_before = 0.0
        self._lock = threading.Lock()
        self._parts: deque[_Part] = deque()
        self._num_rows = 0
        self.seen = Seen()

    @property
    def window_rows(self) -> int:
        """Events that are looked at together."""
        return self._reference.window_rows

    def add(self, events: Events, others: Mapping[str, NDArray[np.float64]] | None = None) -> None:
        """Events in the order in which they came. others: columns that they do not bring along, such as scores."""
        with self._lock:
            self._parts.append((events, others or {}))
            self._num_rows += len(events)
            while self._num_rows - len(self._parts[0][0]) >= _MOST_WINDOWS * self.window_rows:
                self._num_rows -= len(self._parts.popleft()[0])

    def look(self) -> bool:
        """Look at a window if there is one and the last look was long enough ago; whether it did."""
        began = self._clock()
        with self._lock:
            if self._num_rows < self.window_rows or began < self._not_before:
                return False
            parts = list(self._parts)
            self._parts.clear()
            self._num_rows = 0
        columns = {name: self._column(name, parts)[-self.window_rows :] for name in self._reference.columns}
        found = findings(self._reference, columns)
        for name in self._entities:
            found += _heavy(name, self._column(name, parts)[-self.window_rows :].tolist())
        self.seen = Seen(self.seen.windows + 1, tuple(found), tuple(self._alarms.after(found)))
        now = self._clock()
        self._not_before = now + _PAUSE * (now - began)
        return True

    def _column(self, name: str, parts: list[_Part]) -> NDArray[Any]:
        return np.concatenate(
            [others[name] if name in others else events.keys.get(name, events.numbers.get(name))
             for events, others in parts]
        )  # fmt: skip


def _heavy(name: str, values: Sequence[str | None]) -> list[Finding]:
    keys = [key for key in values if key is not None]
    if len(set(keys)) < _FEWEST_KEYS:
        return []
    partition = np.array([zlib.crc32(key.encode()) % _PARTITIONS for key in keys], dtype=np.int64)
    return heavy_keys(name, keys, partition, _PARTITIONS, max_load=_HEAVY)
