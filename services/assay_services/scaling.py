"""How many replicas a load needs: a pure function of what is under way, for Ray Serve and for replayed days.

A replica answers in batches, one after the other: a call takes f + a · n seconds for n requests, and what comes in
meanwhile makes up the next call. At λ requests a second a call therefore takes T = f / (1 - a λ), a request half a call
and its own, and x = 1.5 f λ / (1 - a λ) are under way (Little's law). So what is under way says how many come,
λ = x / (1.5 f + a x), however full the replicas are. Dividing what is under way by a target, as autoscalers do, takes
it for proportional to the load: half the load has less than half of it under way, too many replicas go, and have to
come back.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from assay_platform.errors import ConfigError

_TREND_S = 20.0


class Load(NamedTuple):
    """What was seen at a moment. under_way: requests that run or wait. replicas: that share them."""

    at_s: float
    under_way: float
    replicas: int


@dataclass(frozen=True, kw_only=True)
class ScalingRule:
    """fixed_s, a_row_s: what a call takes, before its first request and for each. max_batch_s: what it may take, which
    says how many requests a second a replica answers. utilisation: of that, wanted. start_s: until a replica that is
    asked for answers. hold_s: one that was not needed for so long goes; the last one after zero_s, where
    min_replicas is 0.
    """

    fixed_s: float = 0.007
    a_row_s: float = 0.0004
    max_batch_s: float = 0.05
    utilisation: float = 0.9
    start_s: float = 15.0
    hold_s: float = 60.0
    zero_s: float = 600.0
    min_replicas: int = 1
    max_replicas: int = 1

    def __post_init__(self) -> None:
        for name in ("fixed_s", "a_row_s", "utilisation"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not self.fixed_s < self.max_batch_s or self.utilisation > 1:
            raise ConfigError("max_batch_s must be above fixed_s, utilisation at most 1")
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(f"min_replicas is {self.min_replicas}, max_replicas {self.max_replicas}")

    @property
    def capacity(self) -> float:
        """Requests a second that a replica answers in calls that take as long as they may."""
        rows = (self.max_batch_s - self.fixed_s) / self.a_row_s
        return rows / self.max_batch_s

    def rate_of(self, load: Load) -> float:
        """Requests a second that come, by what is under way."""
        replicas = max(1, load.replicas)
        each = load.under_way / replicas
        return replicas * each / (1.5 * self.fixed_s + self.a_row_s * each)

    def replicas_for(self, rate: float) -> int:
        """As many as so many requests a second need."""
        return math.ceil(rate / (self.utilisation * self.capacity) - 1e-9)

    def wanted(self, seen: Sequence[Load]) -> int:
        """How many replicas there should be, after what was seen, the newest last; what is older than `memory_s` says
        nothing. Needs grow with the trend until new replicas are there, and are given up slowly.
        """
        now = seen[-1]
        rates = [(load.at_s, self.rate_of(load)) for load in seen]
        needs = [
            (at, self.replicas_for(self._expected(rates[: i + 1]))) for i, (at, _) in enumerate(rates)
            if at >= now.at_s - self.hold_s
        ]  # fmt: skip
        needed = max(need for _, need in needs)
        is_quiet = all(load.under_way == 0 for load in seen if load.at_s >= now.at_s - self.zero_s)
        has_been_seen = seen[0].at_s <= now.at_s - self.zero_s
        least = 0 if self.min_replicas == 0 and is_quiet and has_been_seen else max(1, self.min_replicas)
        return min(self.max_replicas, max(least, needed))

    def _expected(self, rates: Sequence[tuple[float, float]]) -> float:
        """The rate when a replica that is asked for now answers: the line through what was seen lately, if it rises."""
        at, rate = rates[-1]
        recent = [pair for pair in rates if pair[0] >= at - _TREND_S]
        if len(recent) < 3:
            return rate
        mean_t = sum(t for t, _ in recent) / len(recent)
        mean_r = sum(r for _, r in recent) / len(recent)
        spread = sum((t - mean_t) ** 2 for t, _ in recent)
        slope = sum((t - mean_t) * (r - mean_r) for t, r in recent) / spread if spread else 0.0
        return max(mean_r, mean_r + slope * (at - mean_t + self.start_s)) if slope > 0 else max(rate, mean_r)

    @property
    def memory_s(self) -> float:
        """How far back `wanted` looks."""
        return max(self.hold_s, self.zero_s if self.min_replicas == 0 else 0.0) + _TREND_S


class ServePolicy:
    """The rule as Ray Serve asks for it."""

    def __init__(self, **rule: Any) -> None:
        """rule: fields of `ScalingRule`."""
        self._rule = ScalingRule(**rule)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """How many replicas, and what is to be remembered until it is asked again."""
        at_s = float(context.current_time or time.time())
        now = Load(at_s, float(context.total_num_requests), int(context.current_num_replicas))
        held = [Load(*load) for load in context.policy_state.get("seen", ())]
        seen = [*(load for load in held if load.at_s >= now.at_s - self._rule.memory_s), now]
        return self._rule.wanted(seen), {"seen": [tuple(load) for load in seen]}
