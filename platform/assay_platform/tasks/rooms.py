"""What is free: cores, and shares of each GPU."""

from collections.abc import Sequence
from typing import NamedTuple

from assay_platform.tasks.task import Needs

_LEAST = 1e-9


class Capacity(NamedTuple):
    """Of all machines, and the largest part of it that one machine has."""

    cores: float
    gpus: int
    cores_of_one: float
    gpus_of_one: int


class Taken(NamedTuple):
    """Rooms of some tasks. gpus: of each task, the numbers of its GPUs."""

    needs: tuple[Needs, ...]
    gpus: tuple[tuple[int, ...], ...]


class Rooms:
    """Free room. Not for several threads at once."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self.used_cores = 0.0
        self._used = [0.0] * capacity.gpus

    def resize(self, capacity: Capacity) -> None:
        """Machines came or went. What is taken stays taken."""
        self.capacity = capacity
        self._used += [0.0] * (capacity.gpus - len(self._used))

    @property
    def used_gpus(self) -> float:
        """Shares of GPUs that are taken."""
        return sum(self._used)

    def fits_at_all(self, needs: Sequence[Needs]) -> bool:
        """Whether it would fit if nothing ran."""
        alone = all(n.cores <= self.capacity.cores_of_one and n.gpus <= self.capacity.gpus_of_one for n in needs)
        return alone and Rooms(self.capacity).take(needs) is not None

    def take(self, needs: Sequence[Needs], *, ahead_cores: float = 0.0) -> Taken | None:
        """Room for all of them at once; None: there is none. ahead_cores: that many more than there are, fewer if
        below 0.
        """
        cores, with_gpus = sum(need.cores for need in needs), self._with_gpus(needs)
        if with_gpus is None or self.used_cores + cores > self.capacity.cores + ahead_cores + _LEAST:
            return None
        self._used, chosen = with_gpus
        self.used_cores += cores
        return Taken(tuple(needs), chosen)

    def has_gpus(self, needs: Sequence[Needs]) -> bool:
        """Whether GPUs are no reason to wait."""
        return self._with_gpus(needs) is not None

    def _with_gpus(self, needs: Sequence[Needs]) -> tuple[list[float], tuple[tuple[int, ...], ...]] | None:
        used, chosen = list(self._used), []
        for need in needs:
            gpus = _choose(used[: self.capacity.gpus], need.gpus)
            if gpus is None:
                return None
            for gpu in gpus:
                used[gpu] += min(1.0, need.gpus)
            chosen.append(gpus)
        return used, tuple(chosen)

    def give(self, taken: Taken) -> None:
        """Give it back."""
        self.used_cores = max(0.0, self.used_cores - sum(need.cores for need in taken.needs))
        for need, gpus in zip(taken.needs, taken.gpus, strict=True):
            for gpu in gpus:
                self._used[gpu] = max(0.0, self._used[gpu] - min(1.0, need.gpus))


def _choose(used: Sequence[float], gpus: float) -> tuple[int, ...] | None:
    """A share goes where the least is left that suffices, so that whole GPUs stay free."""
    if not gpus:
        return ()
    if gpus > 1:
        free = [number for number, share in enumerate(used) if share <= _LEAST]
        return tuple(free[: int(gpus)]) if len(free) >= gpus else None
    fitting = [number for number, share in enumerate(used) if share + gpus <= 1 + _LEAST]
    return (max(fitting, key=lambda number: used[number]),) if fitting else None
