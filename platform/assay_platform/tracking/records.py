"""What was decided of an event, kept so that an auditor can replay it: event, feature vector, version, decision.

One store a model name, on local disk. A record is readable at once and on disk within `flush_s`; one process writes a
store, and `close` writes what is left. A later decision on the same event takes the earlier one's place; what was
reported of it stays. An event without an id leaves no record.
"""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from assay_platform.storage.disk import DiskTier

Record = dict[str, Any]


class DecisionRecords:
    """Records by event id. Thread-safe."""

    def __init__(self, folder: Path, *, flush_s: float = 0.5) -> None:
        self._disk = DiskTier(folder)
        self._flush_s = flush_s
        self._lock = threading.Lock()
        self._pending: dict[str, Record] = {}
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

    def flush(self) -> None:
        """Write what is in memory."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            names = list(self._pending)
            known = self._disk.get_many([name.encode() for name in names])
            merged = {
                name.encode(): json.dumps({**(json.loads(old) if old else {}), **self._pending[name]}).encode()
                for name, old in zip(names, known, strict=True)
            }
            if merged:
                self._disk.put_many(merged)
            self._pending.clear()

    def close(self) -> None:
        """Write everything and let another process write. Safe to repeat."""
        self.flush()
        self._disk.close()
