"""Which trials to listen to, and how much: greedy selection with replacement (Caruana et al., ICML 2004).

Every trial's logits are calibrated on the rows that it had not seen; the ensemble is their weighted mean.
"""

# N rows

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from assay_platform.models.calibration import fit_platt
from numpy.typing import NDArray

from assay_pipelines.automl.trials import Candidate, Fold, score

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_ROUNDS, _ASKED = 24, 16
# What gains less is noise. A trial so far behind the best is not asked: it would change nothing but the weights.
_GAIN, _FAR = 1e-4, 0.1


class Ensemble(NamedTuple):
    """weights: of candidates, above 0, in their order. logits (N,): NaN for rows that nobody held."""

    members: tuple[Candidate, ...]
    weights: tuple[float, ...]
    logits: Floats
    score: float


def select(candidates: Sequence[Candidate], labels: Flags, folds: Sequence[Fold]) -> Ensemble:
    """The ensemble whose mean AUC over folds is highest; of those that are as good the one with fewer votes.

    candidates: best first; the first few and the best of each family are asked.
    """
    best_of = {one.params["family"]: one for one in reversed(candidates)}
    asked = list(candidates[:_ASKED])
    asked += [one for one in best_of.values() if all(one is not other for other in asked)]
    asked = [one for one in asked if one.score >= candidates[0].score - _FAR]
    held = ~np.isnan(asked[0].logits)
    logits = [np.full(len(labels), np.nan) for _ in asked]
    for place, one in enumerate(asked):
        calibration = fit_platt(one.logits[held], labels[held])
        logits[place][held] = calibration.logit(one.logits[held])
    chosen: list[int] = []
    total = np.zeros(len(labels))
    reached: list[float] = []
    for _ in range(_ROUNDS):
        scores = [score(labels, (total + one) / (len(chosen) + 1), folds) for one in logits]
        best = int(np.argmax(scores))
        chosen.append(best)
        total = total + logits[best]
        reached.append(scores[best])
    size = int(np.argmax(np.array(reached) >= max(reached) - _GAIN)) + 1
    counts = {place: chosen[:size].count(place) for place in sorted(set(chosen[:size]))}
    mean = np.sum([count * logits[place] for place, count in counts.items()], axis=0) / size
    return Ensemble(
        tuple(asked[place] for place in counts),
        tuple(count / size for count in counts.values()),
        mean,
        reached[size - 1],
    )
