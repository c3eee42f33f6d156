"""From a probability to approve, review or decline: thresholds, or the least expected cost.

With costs, of an event with fraud probability p, amount a and L = missed_fraud · a (or missed_fraud, without amounts):

    approve  p · L
    review   review + p · (1 - review_finds) · L
    decline  (1 - p) · declined_good
"""

# N events

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from assay_platform.errors import ConfigError
from assay_platform.models.calibration import threshold_at_fpr

Decision = Literal["approve", "review", "decline"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
TARGET_FPR = 0.003


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What each mistake costs, in the amount's currency.

    missed_fraud: of a fraud that is approved, as a multiple of its amount where there is one. declined_good: of a good
    event that is declined. review: of looking at one. review_finds: the share of frauds that a review finds.
    """

    missed_fraud: float = 1.0
    declined_good: float
    review: float
    review_finds: float = 1.0

    def __post_init__(self) -> None:
        for name in ("missed_fraud", "declined_good", "review"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"costs.{name} = {getattr(self, name)}; allowed is 0 or more")
        if not 0 <= self.review_finds <= 1:
            raise ConfigError(f"costs.review_finds = {self.review_finds}; allowed is 0 to 1")


@dataclass(frozen=True, kw_only=True)
class DecisionSettings:
    """How to decide. target_fpr: part of the good events that may be declined. review_fpr: part that may be declined or
    reviewed; without it nothing is reviewed. costs: given, the least expected cost decides instead.
    """

    target_fpr: float = TARGET_FPR
    review_fpr: float | None = None
    costs: Costs | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.target_fpr < 1:
            raise ConfigError(f"target_fpr = {self.target_fpr}; allowed is 0 to below 1")
        if self.review_fpr is not None and not self.target_fpr <= self.review_fpr < 1:
            raise ConfigError(f"review_fpr = {self.review_fpr}; allowed is target_fpr ({self.target_fpr}) to below 1")


class Decided(NamedTuple):
    """Decisions of N events, and from which probability on each would have been declined."""

    decision: NDArray[np.int8]  # (N,) place in DECISIONS
    threshold: NDArray[np.float64]  # (N,)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Decline from one probability on, review from another; or by costs."""

    decline_from: float = 0.5
    review_from: float = 0.5
    costs: Costs | None = None

    @staticmethod
    def fit(settings: DecisionSettings, probability: NDArray[np.float64], labels: NDArray[np.bool_]) -> "Policy":
        """Thresholds that keep to the false positive rates on these rows."""
        decline = threshold_at_fpr(probability, labels, settings.target_fpr)
        review = decline
        if settings.review_fpr is not None:
            review = min(decline, threshold_at_fpr(probability, labels, settings.review_fpr))
        return Policy(decline_from=decline, review_from=review, costs=settings.costs)

    def decide(self, probability: NDArray[np.float64], amount: NDArray[np.float64] | None = None) -> Decided:
        """amount (N,): needed for costs of tables that have one; a missing or negative amount counts as 0."""
        if self.costs is None:
            decision = (probability >= self.review_from).astype(np.int8) + (probability >= self.decline_from)
            return Decided(decision.astype(np.int8), np.full(len(probability), self.decline_from))
        costs = self.costs
        scale = np.ones(len(probability)) if amount is None else np.maximum(np.nan_to_num(amount), 0.0)
        loss = costs.missed_fraud * scale
        missed_in_review = (1 - costs.review_finds) * loss
        expected = np.stack([
            probability * loss, costs.review + probability * missed_in_review, (1 - probability) * costs.declined_good
        ])  # fmt: skip
        # Where declining costs no more than either of the others.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            over_approve = np.nan_to_num(costs.declined_good / (costs.declined_good + loss), nan=1.0)
            over_review = (costs.declined_good - costs.review) / (costs.declined_good + missed_in_review)
        threshold = np.clip(np.maximum(over_approve, np.nan_to_num(over_review)), 0.0, 1.0)
        return Decided(expected.argmin(axis=0).astype(np.int8), threshold)
