"""The baselines to beat, tuned on validation: EASE, own frequency where items are taken again, and popularity.

EASE: the closed-form item-item regression of Steck, 'Embarrassingly Shallow Autoencoders for Sparse Data',
arXiv:1905.03375.
"""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from assay_platform.models.histories import DAY_US, Floats, Histories
from assay_platform.models.recommender import top_candidates
from numpy.typing import NDArray

from assay_pipelines.recommend.evaluate import DEPTH, ranking_metrics

PENALTIES = (200.0, 350.0, 500.0, 800.0, 1500.0)
HALF_LIVES_D = (20.0, 45.0, 60.0, 90.0, 150.0)


def ease_scores(train: sp.csr_matrix, penalty: float) -> NDArray[np.float32]:
    """(U, I) scores."""
    gram = (train.T @ train).toarray().astype(np.float64)
    gram[np.diag_indices_from(gram)] += penalty
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return np.asarray(train @ weights, dtype=np.float32)


def frequency_scores(histories: Histories, num_items: int, half_life_d: float) -> NDArray[np.float32]:
    """(U, I): how often each user took each item, old events for less."""
    user = histories.users()
    age_d = (histories.now_us[user] - histories.time_us) / DAY_US
    weights = 0.5 ** (age_d / half_life_d)
    shape = (histories.num_users, num_items)
    return np.asarray(sp.csr_matrix((weights, (user, histories.item)), shape).toarray(), dtype=np.float32)


def measure_baselines(
    fit: Histories,
    validation: sp.csr_matrix,
    train: Histories,
    test: sp.csr_matrix,
    *,
    repeats: bool,
    on_progress: Callable[[float, str], None],
) -> tuple[dict[str, dict[str, float]], dict[str, NDArray[np.int64]]]:
    """Each with what is best on validation, refitted on train (fit + validation); and its lists of the test part."""
    num_items = test.shape[1]
    seen = {"fit": fit.matrix(num_items), "train": train.matrix(num_items)}

    def ease(part: str, penalty: float) -> Floats:
        return ease_scores(seen[part], penalty)

    def frequency(part: str, half_life_d: float) -> Floats:
        return frequency_scores(fit if part == "fit" else train, num_items, half_life_d)

    def lists(scores: Floats, part: str) -> NDArray[np.int64]:
        if not repeats:
            scores[seen[part].nonzero()] = -np.inf
        return top_candidates(scores, DEPTH)

    rivals: dict[str, tuple[str, tuple[float, ...], Callable[[str, float], Floats]]]
    rivals = {"ease": ("penalty", PENALTIES, ease)}
    if repeats:
        rivals["frequency"] = ("half_life_days", HALF_LIVES_D, frequency)
    steps = sum(len(values) for _, values, _ in rivals.values()) + 1
    done = 0
    found, tops = {}, {}
    for name, (knob, values, scores) in rivals.items():
        reached = []
        for value in values:
            reached.append(ranking_metrics(lists(scores("fit", value), "fit"), validation, seen["fit"])["ndcg_at_10"])
            done += 1
            on_progress(done / steps, f"{name} validation NDCG@10 {max(reached):.3f}")
        chosen = values[int(np.argmax(reached))]
        tops[name] = lists(scores("train", chosen), "train")
        found[name] = {
            **ranking_metrics(tops[name], test, seen["train"]),
            knob: chosen,
            "validation_ndcg_at_10": max(reached),
        }
    counts = np.asarray(seen["train"].sum(0), dtype=np.float32).ravel()
    tops["popularity"] = lists(np.broadcast_to(counts, test.shape).copy(), "train")
    found["popularity"] = ranking_metrics(tops["popularity"], test, seen["train"])
    return found, tops
