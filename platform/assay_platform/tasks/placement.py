"""Which of the waiting tasks a device that has room takes next.

`StaticRule`: matrices go to the GPU, all else to the CPU. `ByCost`: a GPU takes the task that it speeds up most, a CPU
the one that loses least there, and neither takes one that would be done sooner by waiting for the other (HeteroPrio:
Agullo et al. 2016, "Task-based FMM for heterogeneous architectures"). What was never measured on a device is foretold
from the other one by a ratio of its kind, so a device is tried when it idles for long enough to be worth it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from assay_platform.tasks.costs import Costs
from assay_platform.tasks.task import Device, Kind, Needs

# How much longer a core takes than a GPU, until it was measured.
_RATIO = {Kind.UPDATE: 1.0, Kind.MATRIX: 10.0, Kind.FEATURE: 1.0, Kind.IO: 0.1}
_OTHER = {Device.CPU: Device.GPU, Device.GPU: Device.CPU}


class Work(NamedTuple):
    """A waiting task, or several that start together. needs: of each device that can run it, of each task."""

    number: int  # in the order of submission
    name: str
    kind: Kind
    size: float
    priority: int
    submitted_s: float
    needs: Mapping[Device, tuple[Needs, ...]]

    def share(self, device: Device, width: float) -> float:
        """Of a device that has so many cores or GPUs."""
        taken = sum(need.gpus if device is Device.GPU else need.cores for need in self.needs[device])
        return taken / width


class Load(NamedTuple):
    """Of a device. width: cores or GPUs; free_in_s: seconds until what runs there is over, spread over all of it."""

    width: float
    free_in_s: float


Loads = Mapping[Device, Load]


class Queue(NamedTuple):
    """Tasks alike in name, needs and priority, and nearly in size, in the order of submission."""

    head: Work
    length: int


class Placement(Protocol):
    """Chooses. Called by one thread."""

    def pick(self, device: Device, queues: Sequence[Queue], now_s: float, loads: Loads) -> Work | None:
        """The head that starts next on this device, or is waited for if it does not fit yet; None: none of them.

        loads: of the devices that there are.
        """

    def seconds(self, work: Work, device: Device) -> float | None:
        """What it is expected to take there; None: unknown."""

    def ended(self, work: Work, device: Device, seconds: float) -> None:
        """A task that came to a result took so long."""


class StaticRule:
    """One device a kind, in the order of priority and submission. only: the one for all that can run there."""

    def __init__(self, only: Device | None = None) -> None:
        self._only = only

    def _device(self, work: Work, devices: Loads) -> Device | None:
        wanted = self._only or usual_device(work.kind)
        able = [device for device in (wanted, *work.needs) if device in work.needs and device in devices]
        return able[0] if able else None

    def pick(self, device: Device, queues: Sequence[Queue], now_s: float, loads: Loads) -> Work | None:
        """See `Placement`."""
        del now_s
        own = (queue.head for queue in queues if self._device(queue.head, loads) is device)
        return max(own, key=lambda work: (work.priority, -work.number), default=None)

    def seconds(self, work: Work, device: Device) -> float | None:
        """See `Placement`."""
        del work, device
        return None

    def ended(self, work: Work, device: Device, seconds: float) -> None:
        """See `Placement`."""


def usual_device(kind: Kind) -> Device:
    """The static rule."""
    return Device.GPU if kind is Kind.MATRIX else Device.CPU


class ByCost:
    """By measured cost. patience_s: what waited for longer goes first, so that nothing waits for ever."""

    def __init__(self, costs: Costs | None = None, *, patience_s: float = 60.0) -> None:
        self.costs = costs or Costs()
        self._patience_s = patience_s

    def seconds(self, work: Work, device: Device) -> float | None:
        """See `Placement`."""
        known = self.costs.seconds(work.name, device, work.size)
        if known is not None:
            return known
        other = self.costs.seconds(work.name, _OTHER[device], work.size)
        if other is None:
            return None
        return other * _RATIO[work.kind] if device is Device.CPU else other / _RATIO[work.kind]

    def ended(self, work: Work, device: Device, seconds: float) -> None:
        """See `Placement`."""
        self.costs.add(work.name, device, work.size, seconds)

    def pick(self, device: Device, queues: Sequence[Queue], now_s: float, loads: Loads) -> Work | None:
        """See `Placement`."""
        own = [queue for queue in queues if device in queue.head.needs]
        if not own:
            return None
        if len(loads) == 1:
            return min(own, key=lambda queue: (-queue.head.priority, queue.head.number)).head

        def rank(queue: Queue) -> tuple[float, float, float, int]:
            work = queue.head
            late_s = now_s - work.submitted_s
            # What nobody else can run has an endless gain, so it comes first.
            gain = math.inf if late_s > self._patience_s else self._gain(work, device)
            return -work.priority, -gain, -max(0.0, late_s - self._patience_s), work.number

        accepted = (self._unless_better_elsewhere(device, queue, queues, loads) for queue in sorted(own, key=rank))
        return next((work for work in accepted if work is not None), None)

    def _gain(self, work: Work, device: Device) -> float:
        """How many times longer the other device takes."""
        if _OTHER[device] not in work.needs:
            return math.inf
        here, there = self.seconds(work, device), self.seconds(work, _OTHER[device])
        if here is None or there is None:
            ratio = _RATIO[work.kind]
            return 1.0 / ratio if device is Device.CPU else ratio
        return there / max(here, 1e-9)

    def _unless_better_elsewhere(
        self, device: Device, chosen: Queue, queues: Sequence[Queue], loads: Loads
    ) -> Work | None:
        work, other = chosen.head, _OTHER[device]
        if other not in work.needs:
            return work
        here, there = self.seconds(work, device), self.seconds(work, other)
        if here is None or there is None:
            return work if usual_device(work.kind) is device else None
        if here <= there:
            return work
        # All that the other device would rather do, or as gladly, comes before it there.
        width, ahead_s = loads[other]
        gain = self._gain(work, other)
        for queue in queues:
            if other in queue.head.needs and queue.head.priority >= work.priority:
                before = queue.length - (queue is chosen) if self._gain(queue.head, other) >= gain else 0
                ahead_s += before * (self.seconds(queue.head, other) or 0.0) * queue.head.share(other, width)
        return work if here <= ahead_s + there else None
