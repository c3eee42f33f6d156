"""What a call of a model spends its time on, for traces: laps of one thread, taken where somebody asked for them."""

import threading
import time

Stages = list[tuple[str, float]]
_asked = threading.local()


def begin() -> None:
    """Laps of this thread are kept from now on."""
    _asked.laps = []


def taken() -> Stages:
    """Names and seconds since `begin`, in order."""
    laps: Stages = getattr(_asked, "laps", [])
    _asked.laps = []
    return laps


class Laps:
    """Between calls of this: one stage."""

    def __init__(self) -> None:
        self._kept: Stages | None = getattr(_asked, "laps", None)
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        """A stage has ended, and the next one begins."""
        now = time.perf_counter()
        if self._kept is not None:
            self._kept.append((name, now - self._last))
        self._last = now
