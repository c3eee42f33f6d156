"""Which regions are asked, in which order: the nearest first that is up, knows all writes and is not being drained.

Pure: no clock, no connections. How near a region is, is the fastest of its newest probes: a probe that met a busy
process says nothing of the way, and one that was as fast as it can be does.
"""

from collections import deque
from collections.abc import Sequence

_PROBES = 20
# A region that has gone is there again after so many good probes, and gone after so many bad ones.
_RETURNS, _GONE = 5, 2
# Another region is nearer if it is so much nearer; else two that are alike would take turns.
_NEARER, _NEARER_S = 0.8, 0.0005


class Region:
    """What is known of one. lag_s: since when the oldest write waits that it has not been told of. drained: by hand."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lag_s, self.drained = 0.0, False
        self.is_up = False
        self._times: deque[float] = deque(maxlen=_PROBES)
        self._good, self._bad, self._was_up = 0, 0, False

    @property
    def latency_s(self) -> float:
        """Of a probe, there and back."""
        return min(self._times, default=float("inf"))

    def answered(self, seconds: float) -> bool:
        """A probe was answered; True if the region is up from now on and was not."""
        self._times.append(seconds)
        self._good, self._bad = self._good + 1, 0
        # The first time there is nothing to be careful of.
        if self.is_up or (self._was_up and self._good < _RETURNS):
            return False
        self.is_up = self._was_up = True
        return True

    def failed(self) -> bool:
        """A probe was not answered, or badly; True if the region is gone from now on."""
        self._good, self._bad = 0, self._bad + 1
        if not self.is_up or self._bad < _GONE:
            return False
        self.is_up = False
        self._times.clear()
        return True


class Choice:
    """Of one gateway."""

    def __init__(self, regions: Sequence[Region], *, max_lag_s: float) -> None:
        self._regions, self._max_lag_s = tuple(regions), max_lag_s
        self._nearest: Region | None = None

    def order(self, first: str | None = None) -> list[Region]:
        """Regions to ask, one after the other. first: the one that has what the caller has written, if others lack it.

        One that lacks writes of others answers if there is no other; a drained one only who is bound to it.
        """
        up = [region for region in self._regions if region.is_up and (not region.drained or region.name == first)]
        behind = [region for region in up if region.lag_s > self._max_lag_s]
        near = sorted((region for region in up if region not in behind), key=lambda region: region.latency_s)
        if near:
            held = self._nearest
            if held not in near or near[0].latency_s < _NEARER * held.latency_s - _NEARER_S:
                self._nearest = held = near[0]
            near.remove(held)
            near.insert(0, held)
        found = [*near, *sorted(behind, key=lambda region: region.lag_s)]
        return sorted(found, key=lambda region: region.name != first)
