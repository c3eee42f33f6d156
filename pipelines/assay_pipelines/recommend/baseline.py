"""The baselines to beat: EASE, tuned on validation, and popularity.

EASE: the closed-form item-item regression of Steck, 'Embarrassingly Shallow Autoencoders for Sparse Data',
arXiv:1905.03375.
"""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from assay_platform.models.recommender import top_candidates
from numpy.typing import NDArray

from assay_pipelines.recommend.evaluate import DEPTH, ranking_metrics

PENALTIES = (100.0, 200.0, 300.0, 500.0, 1000.0)


def ease_scores(train: sp.csr_matrix, penalty: float) -> NDArray[np.float32]:
    """(U, I) scores."""
    gram = (train.T @ train).toarray().astype(np.float64)
    gram[np.diag_indices_from(gram)] += penalty
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return np.asarray(train @ weights, dtype=np.float32)


def measure_baselines(
    fit: sp.csr_matrix,
    validation: sp.csr_matrix,
    train: sp.csr_matrix,
    test: sp.csr_matrix,
    *,
    repeats: bool,
    on_progress: Callable[[float, str], None],
) -> dict[str, dict[str, float]]:
    """EASE with the penalty that is best on validation, refitted on train (fit + validation); popularity."""

    def metrics(scores: NDArray[np.float32], seen: sp.csr_matrix, wanted: sp.csr_matrix) -> dict[str, float]:
        top = top_candidates(scores, None if repeats else seen, DEPTH)
        return ranking_metrics(top, wanted, seen)

    def popularity(seen: sp.csr_matrix) -> NDArray[np.float32]:
        counts = np.asarray(seen.sum(0), dtype=np.float32).ravel()
        return np.broadcast_to(counts, seen.shape).copy()

    chosen, best = PENALTIES[0], -1.0
    for step, penalty in enumerate(PENALTIES):
        score = metrics(ease_scores(fit, penalty), fit, validation)["ndcg_at_10"]
        if score > best:
            chosen, best = penalty, score
        on_progress((step + 1) / (len(PENALTIES) + 1), f"EASE validation NDCG@10 {best:.3f}")
    ease = metrics(ease_scores(train, chosen), train, test)
    return {
        "ease": {**ease, "penalty": chosen, "validation_ndcg_at_10": best},
        "popularity": metrics(popularity(train), train, test),
    }
