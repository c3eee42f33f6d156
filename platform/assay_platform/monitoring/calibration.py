"""Whether scores still mean what they say, from labels that came later.

G of positives and negatives in three cells of the score, where the expected ones are sums of the scores. As in `g_test`
it is compared with blocks of the rows it was fitted on, and has to hold in both halves of a window. Labels of fraud are
rare: windows have to be longer than those of features.
"""

# N rows, C cells of the score, H halves

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from assay_platform.errors import ConfigError, DataError
from assay_platform.monitoring.alarms import Finding, check_shares
from assay_platform.monitoring.g_test import HALVES, Floats, GTest

_TINY = 1e-9


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What scores came true as, on rows that the model was not trained on. edges: between the cells of the score."""

    window_rows: int
    edges: tuple[float, ...]
    test: GTest

    @staticmethod
    def of(score_N: Floats, label_N: NDArray[np.bool_], *, window_rows: int = 5000) -> "Calibration":
        """score_N, label_N: (N,) probabilities and what they came true as, in time order.

        Raises:
            ConfigError: `window_rows` is below 100.
            DataError: a score is no probability, lengths differ, no label is positive, or there is less than a window.
        """
        if window_rows < 100:
            raise ConfigError(f"window_rows is {window_rows}: need at least 100")
        score_N, label_N = _checked(score_N, label_N)
        num_blocks = len(score_N) // window_rows * HALVES
        if not num_blocks or not label_N.any():
            raise DataError(
                f"{len(score_N)} rows with {label_N.sum()} positives: need window_rows, {window_rows}, and a positive"
            )
        # Cells that hold equally many positives; more than three have too few each.
        edges = tuple(np.unique(np.quantile(score_N[label_N], (1 / 3, 2 / 3))).tolist())
        size = len(score_N) // num_blocks
        starts = range(len(score_N) - num_blocks * size, len(score_N), size)
        g_B = np.array([_g(_sums(score_N[i : i + size], label_N[i : i + size], edges)) for i in starts])
        positive_C = _sums(score_N, label_N, edges)[1].astype(np.int64)
        effect_C = np.ones(len(positive_C))
        return Calibration(
            window_rows=window_rows, edges=edges, test=GTest.fitted(positive_C, g_B, len(positive_C), effect_C)
        )

    def findings(
        self, score_N: Floats, label_N: NDArray[np.bool_], *, alarm_rate: float = 0.03, min_moved: float = 0.1
    ) -> list[Finding]:
        """At most one. min_moved: how far labels have to be from the scores, as a share of what was expected.

        Raises:
            ConfigError: a setting is not between 0 and 1.
            DataError: as in `of`, or there are more than `window_rows` rows.
        """
        check_shares(alarm_rate=alarm_rate, min_moved=min_moved)
        score_N, label_N = _checked(score_N, label_N)
        if len(score_N) > self.window_rows:
            raise DataError(f"{len(score_N)} labels: need at most window_rows, {self.window_rows}")
        if len(score_N) < HALVES:
            return []
        middle = len(score_N) // HALVES
        halves = [_sums(score_N[part], label_N[part], self.edges) for part in (slice(middle), slice(middle, None))]
        log_p = HALVES * max(self.test.log_p(_g(half)) for half in halves)
        sum_3C = halves[0] + halves[1]
        num_rows, positive_C, expected_C = float(sum_3C[0].sum()), sum_3C[1], sum_3C[2]
        share = float(np.abs(positive_C - expected_C).sum() / max(expected_C.sum(), _TINY))
        if log_p >= math.log(alarm_rate) or share < min_moved:
            return []
        text = f"score: {positive_C.sum():.0f} positives in {num_rows:.0f} events, {expected_C.sum():.0f} by the scores"
        return [Finding(column="score", kind="calibration", statistic=_g(sum_3C), log_p=log_p, moved=share, text=text)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "Calibration":
        """Read back from what `to_dict` gave, after JSON."""
        return Calibration(
            window_rows=document["window_rows"],
            edges=tuple(document["edges"]),
            test=GTest.from_dict(document["test"]),
        )


def _checked(score_N: Floats, label_N: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    score_N, label_N = np.asarray(score_N, np.float64), np.asarray(label_N, np.bool_)
    if score_N.ndim != 1 or score_N.shape != label_N.shape:
        raise DataError(f"scores have shape {score_N.shape} and labels {label_N.shape}: need (N,) both")
    odd_N = ~((score_N >= 0) & (score_N <= 1))
    if odd_N.any():
        row = int(np.argmax(odd_N))
        raise DataError(f"score, row {row}: {score_N[row]} is no probability")
    return score_N, label_N


def _sums(score_N: Floats, label_N: NDArray[np.bool_], edges: tuple[float, ...]) -> Floats:
    """(3, C) rows, positives, and positives expected."""
    cell_N = np.searchsorted(np.asarray(edges), score_N, side="right")
    weights: tuple[NDArray[Any], ...] = (np.ones(len(score_N)), label_N, score_N)
    return np.array([np.bincount(cell_N, weights=w, minlength=len(edges) + 1) for w in weights])


def _g(sum_3C: Floats) -> float:
    num_C, positive_C, expected_C = sum_3C
    # Scores of exactly 0 and 1 expect nothing; a label against them is as odd as floats can say.
    expected_C = np.clip(expected_C, _TINY, np.maximum(num_C - _TINY, _TINY))
    parts = xlogy(positive_C, positive_C / expected_C)
    parts += xlogy(num_C - positive_C, (num_C - positive_C) / np.maximum(num_C - expected_C, _TINY))
    return max(2.0 * float(parts.sum()), 0.0)
