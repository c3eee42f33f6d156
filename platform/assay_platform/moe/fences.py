"""Which experts are fenced off after a failure, and since when.

A fenced expert is chosen by nobody until it is restored by hand or, as in a circuit breaker, tried again after a while:
the next batch may then choose it, and if it fails again it is fenced for twice as long.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from assay_platform.errors import ConfigError

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
        if not retry_after_s > 0:
            raise ConfigError(f"retry_after_s is {retry_after_s}; it must be above 0")
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
        out = [fence.expert for fence in self.fenced() if now < fence.until_s and fence.expert < num_experts]
        if not out:
            return None
        allowed = torch.ones(num_experts, dtype=torch.bool)
        allowed[out] = False
        return allowed.to(device)

    def close(self, expert: int, reason: str) -> None:
        """Fence an expert off."""
        with self._lock:
            before, now = self._fences.get(expert), self._clock()
            if before is not None and now < before.until_s:
                return  # another thread met the same failure
            wait_s = self._retry_after_s if before is None else min(2 * before.wait_s, _LONGEST_S)
            self._fences[expert] = Fence(expert, reason, now + wait_s, wait_s)
            self.num_failures += 1
        _logger.error("%s: expert %d failed (%s); fenced off for %.0f s", self._name, expert, reason, wait_s)
        if self._on_failure is not None:
            self._on_failure(self._name, expert, reason)

    def open(self, expert: int) -> None:
        """The expert is well again."""
        with self._lock:
            if self._fences.pop(expert, None) is not None:
                _logger.warning("%s: expert %d is restored", self._name, expert)

    def settle(self, expert_NK: Tensor) -> None:
        """A batch went well with these choices: experts that were tried again in it are restored."""
        if not self._fences:
            return
        tried = set(expert_NK.reshape(-1).tolist())
        for fence in self.fenced():
            if fence.expert in tried and self._fences.get(fence.expert) is fence:
                self.open(fence.expert)

    def rearrange(self, old: Sequence[int]) -> None:
        """Experts are now these old ones, in this order."""
        with self._lock:
            before = self._fences
            self._fences = {new: before[e]._replace(expert=new) for new, e in enumerate(old) if e in before}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
