"""Which experts are fenced off after a failure, and since when.

A fenced expert is chosen by nobody until it is restored by hand or, as in a circuit breaker, tried again after a while:
the next batch may then choose it, and if it fails again it is fenced for twice as long.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)
_LONGEST_S = 3600.0


class Fence(NamedTuple):
    """One expert that is out."""

    expert: int
    reason: str
    until_s: float  # of the clock
    wait_s: float


class Fences:
    """Thread-safe; of one layer."""

    def __init__(
        self,
        name: str,
        *,
        retry_after_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[str, int, str], None] | None = None,
    ) -> None:
        """name: of the layer, for reports. on_failure: called with (name, expert, reason) at every failure."""
        self._name, self._retry_after_s, self._clock, self._on_failure = name, retry_after_s, clock, on_failure
        self._fences: dict[int, Fence] = {}
        self._lock = threading.Lock()
        self.num_failures = 0

    def fenced(self) -> tuple[Fence, ...]:
        """Experts that failed and have not been restored."""
        return tuple(self._fences.values())

    def allowed(self, num_experts: int, device: torch.device) -> Tensor | None:
        """(E,) bool; None where all are."""
        if not self._fences:
            return None
        now = self._clock()
        out = [fence.expert for fence in self.fenced() if now < fence.until_s]
        if not out:
            return None
        allowed = torch.ones(num_experts, dtype=torch.bool)
        allowed[out] = False
        return allowed.to(device)

    def close(self, expert: int, reason: str) -> None:
        """Fence an expert off."""
        with self._lock:
            before = self._fences.get(expert)
            wait_s = self._retry_after_s if before is None else min(2 * before.wait_s, _LONGEST_S)
            self._fences[expert] = Fence(expert, reason, self._clock() + wait_s, wait_s)
            self.num_failures += 1
        _logger.error("%s: expert %d failed (%s); fenced off for %.0f s", self._name, expert, reason, wait_s)
        if self._on_failure is not None:
            self._on_failure(self._name, expert, reason)

    def open(self, expert: int) -> None:
        """The expert is well again."""
        with self._lock:
            if self._fences.pop(expert, None) is not None:
                _logger.warning("%s: expert %d is restored", self._name, expert)

    def settle(self) -> None:
        """A batch went well: experts whose time is over, and which could be chosen again, count as restored."""
        if self._fences:
            now = self._clock()
            for fence in self.fenced():
                if now >= fence.until_s:
                    self.open(fence.expert)
