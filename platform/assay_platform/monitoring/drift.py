"""Whether what a model says has moved."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Probabilities between these are alike for who decides by them; a model trained anew moves the smallest ones a lot.
_BANDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def bands_of(scores: Sequence[float]) -> NDArray[np.intp]:
    """(N,) the band of risk that a probability is in, from 0."""
    return np.searchsorted(np.array(_BANDS), np.asarray(scores, dtype=np.float64), side="right")


def band_distance(before: Sequence[float], after: Sequence[float]) -> float:
    """How much of the scores is in other bands of risk: total variation distance of both histograms, 0 to 1."""
    if not before or not after:
        return 0.0
    shares = [np.bincount(bands_of(scores), minlength=len(_BANDS) + 1) / len(scores) for scores in (before, after)]
    return float(0.5 * np.abs(shares[0] - shares[1]).sum())
