"""What was decided of an event, kept so that an auditor can replay it: event, feature vector, version, decision.

One store a model name, on local disk. A record is readable at once and on disk within `flush_s`; one process writes a
store, and `close` writes what is left. A later decision on the same event takes the earlier one's place; what was
reported of it stays. An event without an id leaves no record.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from assay_platform.storage.disk import DiskTier

Record = dict[str, Any]
_PAGE, _SWEPT = 1000, 100


def _as_json(record: Record) -> bytes:
    try:
        return msgspec.json.encode(record)  # a fifth of the time, which scoring would wait for
    except OverflowError:  # whole numbers of more than 64 bits
        return json.dumps(record).encode()


def _newest_s(record: Record) -> float:
    """When something was last added to it; those of before this was noted count as new."""
    decided, label = record.get("decision") or {}, record.get("label") or {}
    times = (record.get("kept_at"), decided.get("decided_at"), label.get("reported_at"))
    return max((float(at) for at in times if at is not None), default=math.inf)


class DecisionRecords:
    """Records by event id. Thread-safe."""

    def __init__(self, folder: Path, *, flush_s: float = 0.5) -> None:
        self._disk = DiskTier(folder)
        self._flush_s = flush_s
        self._lock = threading.Lock()
        self._pending: dict[str, Record] = {}
        self._swept = b""  # the last name that `erase_old` has looked at
        self._timer: threading.Timer | None = None

    def get(self, event_id: str) -> Record | None:
        """What is known of an event: `event`, and as far as there is any `decision` and `label`."""
        with self._lock:
            on_disk = self._disk.get_many([event_id.encode()])[0]
            known: Record = {} if on_disk is None else json.loads(on_disk)
            return {**known, **self._pending.get(event_id, {})} or None

    def remember(self, records: Mapping[str, Record]) -> None:
        """Add fields to the records of events, or make them; fields of the same name are replaced."""
        with self._lock:
            for event_id, fields in records.items():
                self._pending[event_id] = {**self._pending.get(event_id, {}), **fields}
            if self._timer is None and self._pending:
                self._timer = threading.Timer(self._flush_s, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def items(self) -> Iterator[tuple[str, Record]]:
        """All that is on disk, by event id; what another process writes meanwhile may be among it."""
        last = b""
        while names := self._disk.keys_after(last, _PAGE):
            for name, record in zip(names, self._disk.get_many(names), strict=True):
                if record is not None:
                    yield name.decode(), json.loads(record)
            last = names[-1]

    def erase(self, matches: Callable[[Record], bool]) -> int:
        """Forget all that is kept of events of which this holds; how many there were. Reads every record."""
        self.flush()
        erased, last = 0, b""
        while names := self._disk.keys_after(last, _PAGE):
            erased += self._erase_of(names, matches)
            last = names[-1]
        return erased

    def erase_old(self, before_s: float) -> int:
        """Forget records that nothing was added to since. Looks at a hundred a call, from where the last call ended."""
        names = self._disk.keys_after(self._swept, _SWEPT)
        self._swept = names[-1] if names else b""
        return self._erase_of(names, lambda record: _newest_s(record) < before_s)

    def _erase_of(self, names: list[bytes], matches: Callable[[Record], bool]) -> int:
        with self._lock:
            found = zip(names, self._disk.get_many(names), strict=True)
            gone = [name for name, record in found if record is not None and matches(json.loads(record))]
            for name in gone:
                self._pending.pop(name.decode(), None)
            if gone:
                self._disk.delete_many(gone)
        return len(gone)

    def flush(self) -> None:
        """Write what is in memory."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            names = list(self._pending)
            known = self._disk.get_many([name.encode() for name in names])
            merged = {
                name.encode(): _as_json({**(json.loads(old) if old else {}), **self._pending[name]})
                for name, old in zip(names, known, strict=True)
            }
            if merged:
                self._disk.put_many(merged)
            self._pending.clear()

    def close(self) -> None:
        """Write everything and let another process write. Safe to repeat."""
        self.flush()
        self._disk.close()
