"""Which trials are worth no more epochs, and which are worth more cores.

Successive halving: of all trials that came as far, those below the median stop (ASHA, Li et al., arXiv:1810.05934).
Learning curves: a trial stops whose curve, continued, ends below what the best one reached (the power law of Domhan et
al., IJCAI 2015, alone, fitted in closed form).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# (epoch, metric), ascending epochs; higher is better.
Curve = list[tuple[int, float]]

# Gentler than ASHA's usual 1 and 3: a first epoch of the fraud net says nothing of its end (decision 18).
_FIRST_RUNG, _REDUCTION = 2, 2
_FEWEST_REPORTS, _FEWEST_EPOCHS = 4, 0.3
_POWERS = (0.3, 0.6, 1.0, 2.0)
_DOUBT = 2.0  # how many standard deviations a prediction may be wrong by


class Prediction(NamedTuple):
    """Of a trial's last epoch."""

    mean: float
    std: float


def predict(curve: Curve, at_epoch: int) -> Prediction:
    """Continue a curve as a - b · epoch^-c with b from 0: what still rises rises more slowly. Late epochs weigh more.

    A curve of one or two points is taken to end where it is, and nothing is known of how wrong that is.
    """
    epochs, values = (np.array(column, dtype=np.float64) for column in zip(*curve, strict=True))
    if len(curve) < 3:
        return Prediction(float(values[-1]), math.inf)
    weight = np.sqrt(np.arange(1, len(curve) + 1))
    best: tuple[float, float] = (math.inf, 0.0)
    for power in _POWERS:
        columns = np.stack([np.ones_like(epochs), -(epochs**-power)], axis=1)
        (level, slope), *_ = np.linalg.lstsq(columns * weight[:, None], values * weight, rcond=None)
        if slope < 0:
            level, slope = float(np.average(values, weights=weight)), 0.0
        error = float(np.average((columns @ [level, slope] - values) ** 2, weights=weight**2))
        best = min(best, (error, float(level - slope * at_epoch**-power)))
    error, mean = best
    # The further ahead, the less is known.
    ahead = max(1.0, at_epoch / epochs[-1])
    spread = math.sqrt(error * len(curve) / (len(curve) - 2)) + 0.1 * abs(mean - float(values[-1]))
    return Prediction(max(mean, float(values.max())), spread * math.sqrt(ahead))


def expected_end(curve: Curve, ended: Sequence[Curve], at_epoch: int) -> float:
    """What a trial that was stopped would have come to: as far from the best one's end as it was at the same epoch.

    ended: curves of all trials. The best is the one with the highest metric among those that came furthest.
    """
    reached = max(value for _, value in curve)
    furthest = max((other[-1][0] for other in ended), default=0)
    if curve[-1][0] >= min(furthest, at_epoch):
        return reached
    best = max((other for other in ended if other[-1][0] == furthest), key=lambda other: max(v for _, v in other))
    there = [value for epoch, value in best if epoch <= curve[-1][0]]
    end = max(value for _, value in best)
    return reached if not there else max(reached, min(end, end - (there[-1] - curve[-1][1])))


class Stopping:
    """Decides on reports as they come. Each trial reports ascending epochs."""

    def __init__(self, max_epochs: int, *, halving: bool, curves: bool) -> None:
        self._max_epochs, self._halving, self._curves = max_epochs, halving, curves
        self._rungs: dict[int, dict[int, float]] = {}  # epochs → trial → metric there
        rung = _FIRST_RUNG
        while rung < max_epochs:
            self._rungs[rung] = {}
            rung *= _REDUCTION
        self.of: dict[int, Curve] = {}

    def add(self, trial: int, epoch: int, metric: float) -> bool:
        """One report; whether the trial should stop."""
        curve = self.of.setdefault(trial, [])
        before = curve[-1][0] if curve else 0
        curve.append((epoch, metric))
        stop = False
        for rung, there in self._rungs.items():
            if before < rung <= epoch:
                there[trial] = metric
                ranked = sorted(there.values(), reverse=True)
                stop |= self._halving and metric < ranked[math.ceil(len(ranked) / _REDUCTION) - 1]
        return stop or (self._curves and self._ends_below(trial, epoch))

    def _ends_below(self, trial: int, epoch: int) -> bool:
        curve = self.of[trial]
        if len(curve) < _FEWEST_REPORTS or epoch < _FEWEST_EPOCHS * self._max_epochs or epoch >= self._max_epochs:
            return False
        others = [max(value for _, value in other) for number, other in self.of.items() if number != trial and other]
        if not others:
            return False
        found = predict(curve, self._max_epochs)
        return found.mean + _DOUBT * found.std < max(others)

    def promise(self, trial: int) -> float:
        """Where a trial is expected to end; -inf before its first report."""
        curve = self.of.get(trial)
        return predict(curve, self._max_epochs).mean if curve else -math.inf


def share_cores(num_cores: int, promise: Mapping[int, float]) -> dict[int, int]:
    """Cores of each running trial: one for each, what is left to those that promise most, half of them at most."""
    if not promise:
        return {}
    order: Sequence[int] = sorted(promise, key=lambda trial: (-promise[trial], trial))
    cores = dict.fromkeys(order, 1)
    spare, favoured = num_cores - len(order), order[: max(1, (len(order) + 1) // 2)]
    for place in range(max(0, spare)):
        cores[favoured[place % len(favoured)]] += 1
    return cores
