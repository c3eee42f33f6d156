"""From logits to probabilities that mean what they say.

Platt scaling: p = sigmoid(slope · logit + intercept), fitted on validation rows (Platt 1999). It is linear in
the logit, so contributions that add up to the logit still add up after calibration.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from assay_platform.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PlattCalibration:
    """slope is above 0, so calibration never changes the order of scores."""

    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        if not (np.isfinite([self.slope, self.intercept]).all() and self.slope > 0):
            raise InputError(f"calibration slope {self.slope}, intercept {self.intercept}: need finite, slope > 0")

    def logit(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Calibrated log-odds."""
        return self.slope * np.asarray(logits, dtype=np.float64) + self.intercept

    def probability(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Calibrated probability."""
        return sigmoid(self.logit(logits))


def sigmoid(logit: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(logit, dtype=np.float64))))


def fit_platt(logits: NDArray[np.floating], labels: NDArray[np.bool_]) -> PlattCalibration:
    """Maximum likelihood fit.

    A fitted slope that is not above 0 (the model orders these rows no better than chance) is replaced by a
    small one: the result is then close to the base rate for every row, which is the honest answer.
    """
    from sklearn.linear_model import LogisticRegression

    if labels.all() or not labels.any():
        raise InputError("calibration needs rows of both classes in the validation period")
    fitted = LogisticRegression(C=1e6, max_iter=1000).fit(np.asarray(logits).reshape(-1, 1), labels)
    slope = float(fitted.coef_[0, 0])
    if slope > 1e-3:
        return PlattCalibration(slope=slope, intercept=float(fitted.intercept_[0]))
    rate = float(np.mean(labels))
    slope = 1e-3
    return PlattCalibration(slope=slope, intercept=float(np.log(rate / (1 - rate)) - slope * np.mean(logits)))


def threshold_at_fpr(scores: NDArray[np.floating], labels: NDArray[np.bool_], fpr: float) -> float:
    """The lowest threshold t such that `score >= t` flags at most `fpr` of the negatives."""
    negatives = np.sort(np.asarray(scores, dtype=np.float64)[~labels])[::-1]
    allowed = int(np.floor(fpr * len(negatives)))
    if len(negatives) == 0:
        return 1.0
    # Just above the first negative that may not be flagged; ties with it are not flagged either.
    return float(np.nextafter(negatives[min(allowed, len(negatives) - 1)], np.inf))
