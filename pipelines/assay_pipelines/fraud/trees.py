"""Train the boosted trees of a fraud model, and blend them with the net.

LightGBM on numbers alone: categories as ranks by frequency, so that what is served needs no LightGBM. How many trees
is found on validation rows; a refit on more rows takes as many.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from assay_platform.models.calibration import fit_platt
from assay_platform.models.fraud import Blend
from assay_platform.models.trees import TreeEnsemble
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Flags = NDArray[np.bool_]

PARAMETERS: dict[str, Any] = {
    "objective": "binary", "metric": "average_precision", "verbosity": -1, "learning_rate": 0.04, "num_leaves": 96,
    "min_data_in_leaf": 60, "feature_fraction": 0.2, "bagging_freq": 1, "bagging_fraction": 0.8, "max_bin": 127,
    "deterministic": True, "force_row_wise": True,
}  # fmt: skip
_MAX_TREES, _PATIENCE = 1200, 80
# More rows, a little more to learn from them.
_REFIT_FACTOR = 1.1
_WEIGHTS = np.linspace(0.0, 1.0, 21)


class FittedTrees(NamedTuple):
    """validation_ap: NaN where there were no validation rows."""

    trees: TreeEnsemble
    validation_ap: float


def train_trees(
    rows: Floats,
    labels: Flags,
    *,
    seed: int,
    held: tuple[Floats, Flags] | None = None,
    num_trees: int | None = None,
    weight: Floats | None = None,
    on_progress: Callable[[float, str], None] = lambda _done, _note: None,
) -> FittedTrees:
    """Trees on rows (N, F). Give either `held`, rows that say when to stop, or `num_trees`."""
    import lightgbm as lgb

    threads = len(os.sched_getaffinity(0))
    parameters = {**PARAMETERS, "seed": seed, "num_threads": threads}
    most = num_trees or _MAX_TREES

    def progress(env: Any) -> None:
        if env.iteration % 20 == 0:
            reached = "" if held is None else f", validation AP {env.evaluation_result_list[0][2]:.3f}"
            on_progress(env.iteration / most, f"{env.iteration} trees{reached}")

    data = lgb.Dataset(rows, labels, weight=weight)
    callbacks: list[Any] = [progress]
    if held is not None:
        callbacks.append(lgb.early_stopping(_PATIENCE, verbose=False))
    booster = lgb.train(
        parameters,
        data,
        num_boost_round=most,
        valid_sets=None if held is None else [lgb.Dataset(held[0], held[1], reference=data)],
        callbacks=callbacks,
    )
    if held is None:
        return FittedTrees(TreeEnsemble.from_lightgbm(booster), float("nan"))
    trees = TreeEnsemble.from_lightgbm(booster, num_trees=booster.best_iteration)
    return FittedTrees(trees, float(booster.best_score["valid_0"]["average_precision"]))


def refit_size(trees: TreeEnsemble) -> int:
    """How many trees a refit on train + validation takes."""
    return max(1, round(_REFIT_FACTOR * len(trees)))


def fit_blend(net: NDArray[np.float64], trees: NDArray[np.float64], labels: Flags) -> Blend:
    """The weights with the highest average precision on validation rows, each part in calibrated log-odds first.

    net, trees: logits of the same rows. Of equal weights the one with less of the net is taken, since a part that
    does not help is not worth its time.
    """
    from sklearn.metrics import average_precision_score

    slopes = fit_platt(net, labels).slope, fit_platt(trees, labels).slope
    gained = [average_precision_score(labels, w * slopes[0] * net + (1 - w) * slopes[1] * trees) for w in _WEIGHTS]
    weight = float(_WEIGHTS[int(np.argmax(gained))])
    return Blend(net=weight * slopes[0], trees=(1 - weight) * slopes[1])
