"""Whether counts of a window come from where the counts of training came from.

G = 2 Σ observed · ln(observed / expected) (Sokal & Rohlf, *Biometry*, ch. 17). Its tail is right where cells are rare
(P ≤ exp(-G/2), Chernoff), which Pearson's X² is not.

Rows are not independent: a card pays five times in a row, nights differ from days. Then G is larger than χ² says, and
every window would alarm. So training rows, in time order, are cut into blocks and each is tested against all others.
The mean G of a cell over blocks is its design effect (Rao & Scott 1981): G is divided by it, so that one restless cell
does not hide the others. Mean and variance of the sum give the scaled χ² that has both (Satterthwaite 1946). What was
seen in a block of training is no finding, whatever the fit says.
"""

# B blocks of the training rows, C cells; a window is two halves, each as long as a block

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy
from scipy.stats import chi2

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

HALVES = 2
MIN_BLOCKS = 20  # below that, their mean and variance say too little, and rows are taken as independent


def g_statistic(window_C: NDArray[Any], reference_C: NDArray[Any]) -> Floats:
    """(...) G that both counts, (..., C) each, are of one distribution; 0 where one of them is empty."""
    window, reference = np.asarray(window_C, np.float64), np.asarray(reference_C, np.float64)
    n, m = window.sum(-1, keepdims=True), reference.sum(-1, keepdims=True)
    share = (window + reference) / np.maximum(n + m, 1)
    # A cell that both lack gives 0 · ln(0 / 0), which is 0.
    share = np.where(share > 0, share, 1.0)
    parts = xlogy(window, window / np.maximum(n, 1) / share) + xlogy(reference, reference / np.maximum(m, 1) / share)
    return np.asarray(np.maximum(2.0 * parts.sum(-1), 0.0), np.float64)


def each_against_rest(window_C: Ints, reference_C: Ints) -> Floats:
    """(..., C) G of each cell against all others together."""
    totals = window_C.sum(-1, keepdims=True), reference_C.sum(-1, keepdims=True)
    return g_statistic(
        np.stack([window_C, totals[0] - window_C], -1), np.stack([reference_C, totals[1] - reference_C], -1)
    )


def block_counts(code_N: Ints, num_cells: int, num_blocks: int) -> Ints:
    """(B, C) rows in each cell. code_N: the cell of each row, below 0 for none; blocks are equally long."""
    code_BW = code_N.reshape(num_blocks, -1)
    flat = (code_BW + num_cells * np.arange(num_blocks)[:, None])[code_BW >= 0]
    return np.bincount(flat, minlength=num_blocks * num_cells).reshape(num_blocks, num_cells)


def moved(window_C: Ints, reference_C: Ints) -> float:
    """Share of rows that would have to change cell for both to be alike, 0 to 1: total variation distance."""
    window, reference = window_C / max(window_C.sum(), 1), reference_C / max(reference_C.sum(), 1)
    return 0.5 * float(np.abs(window - reference).sum())


@dataclass(frozen=True, kw_only=True)
class GTest:
    """Counts of cells in training, (C,), and how far its blocks were from them: as scale · χ²(freedom), `most` at most.

    effects: (C,) by which the G of each cell is divided.
    """

    counts: tuple[int, ...]
    effects: tuple[float, ...]
    scale: float
    freedom: float
    most: float

    @staticmethod
    def of(counts_BC: Ints) -> "GTest":
        """Fitted to the blocks of training."""
        total_C = counts_BC.sum(0)
        g_BC = _mirrored_once(each_against_rest(counts_BC, total_C - counts_BC))[counts_BC.sum(1) > 0]
        # Never below 1: a cell that was quiet by luck would alarm later.
        effect_C = np.maximum(g_BC.mean(0), 1.0) if len(g_BC) >= MIN_BLOCKS else np.ones(g_BC.shape[1])
        freedom = max(int((total_C > 0).sum()) - 1, 1)
        return GTest.fitted(total_C, (g_BC / effect_C).sum(1), freedom, effect_C)

    @staticmethod
    def fitted(counts_C: Ints, g_B: Floats, freedom: int, effect_C: Floats) -> "GTest":
        """To the distances of blocks, (B,). freedom: that of χ² if rows were independent."""
        mean, variance, most = float(freedom), 2.0 * freedom, 0.0
        if len(g_B) >= MIN_BLOCKS:
            mean, most = max(float(g_B.mean()), mean), float(g_B.max())
            variance = max(float(g_B.var(ddof=1)), 2.0 * mean**2 / freedom)
        return GTest(
            counts=tuple(counts_C.tolist()),
            effects=tuple(np.round(effect_C, 4).tolist()),
            scale=variance / (2.0 * mean),
            freedom=2.0 * mean**2 / variance,
            most=most,
        )

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "GTest":
        """Read back from what `dataclasses.asdict` gave, after JSON."""
        read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in document.items()}
        return GTest(**read)

    def distance(self, counts_C: Ints) -> Floats:
        """(...) how far counts, (..., C), are from training: G of the cells over their design effects."""
        g_C = _mirrored_once(each_against_rest(counts_C, np.asarray(self.counts)))
        return np.asarray((g_C / np.asarray(self.effects)).sum(-1), np.float64)

    def log_p(self, distance: float) -> float:
        """Natural logarithm of the probability that a block is as far from training."""
        return 0.0 if distance <= self.most else float(chi2.logsf(distance / self.scale, self.freedom))

    def log_p_of_halves(self, counts_HC: Ints) -> float:
        """… that both halves of a window are as far as the nearer one; what only one half has was a burst."""
        return HALVES * max(self.log_p(float(g)) for g in self.distance(counts_HC))


def _mirrored_once(g_C: Floats) -> Floats:
    """Of two cells, which mirror each other, only the second."""
    return g_C[..., 1:] if g_C.shape[-1] == 2 else g_C
