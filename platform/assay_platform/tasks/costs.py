"""How long a task will take, from how long those of its name took: a line over `size`, one a device.

The line is Theil and Sen's: medians of slopes and of intercepts, so that a first call that compiles, or a machine that
was busy for a moment, does not bend it. Never below zero and never falling.
"""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from assay_platform.storage.files import write_json
from assay_platform.tasks.task import Device

_KEPT = 32
_FORMAT = 1


@dataclass
class _Line:
    """The newest (size, seconds) and the line through them."""

    seen: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    since: int = 0  # seen after the line was drawn
    start: float = 0.0
    slope: float = 0.0

    def add(self, size: float, seconds: float) -> None:
        self.seen.append((size, seconds))
        self.since += 1
        # Few points move a line much, many hardly.
        if self.since * 4 >= len(self.seen):
            self._draw()

    def _draw(self) -> None:
        size, seconds = np.array(self.seen).T
        one, other = np.triu_indices(len(size), 1)
        apart = size[one] != size[other]
        one, other = one[apart], other[apart]
        slopes = (seconds[one] - seconds[other]) / (size[one] - size[other])
        self.slope = max(0.0, float(np.median(slopes))) if len(slopes) else 0.0
        self.start = float(np.median(seconds - self.slope * size))
        if self.start < 0:
            self.start, self.slope = 0.0, float(np.median(seconds / np.maximum(size, 1e-12)))
        self.since = 0


class Costs:
    """What was measured. Not for several threads at once."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, Device], _Line] = {}

    def add(self, name: str, device: Device, size: float, seconds: float) -> None:
        """One task took so long."""
        self._lines.setdefault((name, device), _Line()).add(size, seconds)

    def seconds(self, name: str, device: Device, size: float) -> float | None:
        """What the next one is expected to take; None: none was seen."""
        line = self._lines.get((name, device))
        return None if line is None else line.start + line.slope * size

    def save(self, path: Path) -> None:
        """Keep them for the next process."""
        lines = [[name, str(device), list(line.seen)] for (name, device), line in sorted(self._lines.items())]
        write_json(path, {"format": _FORMAT, "seen": lines})

    @classmethod
    def load(cls, path: Path) -> "Costs":
        """What an earlier process kept; nothing where there is no such file, or one that cannot be read: what it has
        is measured again soon.
        """
        costs = cls()
        try:
            document: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] == _FORMAT:
                for name, device, seen in document["seen"]:
                    for size, seconds in seen:
                        costs.add(str(name), Device(device), float(size), float(seconds))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()
        return costs
