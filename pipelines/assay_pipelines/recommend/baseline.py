"""The baselines to beat, tuned on validation: EASE, own frequency where items are taken again, and popularity.

EASE: the closed-form item-item regression of Steck, 'Embarrassingly Shallow Autoencoders for Sparse Data',
arXiv:1905.03375.
"""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from assay_platform.models.histories import DAY_US, Again, Floats, Histories, Index
from numpy.typing import NDArray

from assay_pipelines.recommend.evaluate import Lists, best_items, ndcg_at_10, ranking_metrics

PENALTIES = (200.0, 350.0, 500.0, 800.0, 1500.0)
_MOST_OF_EASE = 8000
HALF_LIVES_D = (20.0, 45.0, 60.0, 90.0, 150.0)


def ease_weights(taken: sp.csr_matrix, penalty: float) -> Floats:
    """(I, I): of an item taken (row) for an item to score (column)."""
    gram = (taken.T @ taken).toarray().astype(np.float64)
    gram[np.diag_indices_from(gram)] += penalty
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return np.asarray(weights, dtype=np.float32)


def frequencies(histories: Histories, num_items: int, half_life_d: float) -> sp.csr_matrix:
    """(U, I): how often each user took each item, old events for less."""
    user = histories.users()
    age_d = (histories.now_us[user] - histories.time_us) / DAY_US
    weights = (0.5 ** (age_d / half_life_d)).astype(np.float32)
    return sp.csr_matrix((weights, (user, histories.item)), (histories.num_users, num_items))


def measure_baselines(
    fit: Histories,
    validation: sp.csr_matrix,
    train: Histories,
    test: sp.csr_matrix,
    *,
    again: Again,
    on_progress: Callable[[float, str], None],
) -> tuple[dict[str, dict[str, float]], dict[str, NDArray[np.int64]]]:
    """Each with what is best on validation, refitted on train (fit + validation); and its lists of the test part."""
    num_items = test.shape[1]
    seen = {"fit": fit.matrix(num_items), "train": train.matrix(num_items)}
    wanted = {"fit": validation, "train": test}
    excluded = {"fit": again.excluded(fit, num_items), "train": again.excluded(train, num_items)}

    def ease(part: str, penalty: float) -> Lists:
        # A matrix of all pairs of items is for those taken most; the others have no score.
        head = np.sort(np.argsort(-np.asarray(seen[part].sum(0)).ravel(), kind="stable")[:_MOST_OF_EASE])
        taken = seen[part][:, head]
        weights = ease_weights(taken, penalty)

        def scores(users: Index) -> Floats:
            found = np.zeros((len(users), num_items), dtype=np.float32)
            found[:, head] = taken[users] @ weights
            return found

        return best_items(scores, wanted[part], excluded[part])

    def frequency(part: str, half_life_d: float) -> Lists:
        weights = frequencies(fit if part == "fit" else train, num_items, half_life_d)
        return best_items(lambda users: weights[users].toarray(), wanted[part], excluded[part])

    rivals: dict[str, tuple[str, tuple[float, ...], Callable[[str, float], Lists]]]
    rivals = {"ease": ("penalty", PENALTIES, ease)}
    if again.own_past:
        rivals["frequency"] = ("half_life_days", HALF_LIVES_D, frequency)
    steps = sum(len(values) for _, values, _ in rivals.values()) + 1
    done = 0
    found, tops = {}, {}
    for name, (knob, values, lists) in rivals.items():
        reached = []
        for value in values:
            reached.append(ndcg_at_10(lists("fit", value), validation))
            done += 1
            on_progress(done / steps, f"{name} validation NDCG@10 {max(reached):.3f}")
        chosen = values[int(np.argmax(reached))]
        tops[name] = lists("train", chosen)
        found[name] = {
            **ranking_metrics(tops[name], test, seen["train"]),
            knob: chosen,
            "validation_ndcg_at_10": max(reached),
        }
    counts = np.asarray(seen["train"].sum(0), dtype=np.float32).ravel()
    tops["popularity"] = best_items(lambda users: np.tile(counts, (len(users), 1)), test, excluded["train"])
    found["popularity"] = ranking_metrics(tops["popularity"], test, seen["train"])
    return found, tops
