"""The baseline to beat: LightGBM on the table's own columns, tuned on the same validation rows.

It is refitted on train + validation as ours is, and its probabilities are calibrated the same way.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from assay_platform.models.calibration import fit_platt, threshold_at_fpr
from numpy.typing import NDArray

from assay_pipelines.fraud.evaluate import TARGET_FPR, average_precision, fraud_metrics

_MAX_NATIVE_CATEGORIES = 200
_SHARED = {"objective": "binary", "metric": "average_precision", "verbosity": -1, "learning_rate": 0.05,
           "bagging_freq": 1, "bagging_fraction": 0.8}  # fmt: skip
_SMALL = {"num_leaves": 31, "min_data_in_leaf": 50, "feature_fraction": 0.6}
_LARGE = {"num_leaves": 191, "min_data_in_leaf": 100, "feature_fraction": 0.4, "lambda_l2": 5.0}
_MAX_TREES, _PATIENCE = 1500, 60
_REFIT_FACTOR, _FEW_ROWS = 1.1, 20_000


class Baseline(NamedTuple):
    """The best configuration on validation, measured on the test rows. chosen: what it was."""

    metrics: dict[str, float]
    validation_ap: float
    chosen: dict[str, Any]


def tree_frame(
    columns: dict[str, Any], numeric: Sequence[str], categorical: Sequence[str], fitted_rows: NDArray[np.intp]
) -> pd.DataFrame:
    """Columns as LightGBM takes them: few categories natively, many as frequency ranks."""
    frame: dict[str, Any] = {name: np.asarray(columns[name], dtype=np.float32) for name in numeric}
    for name in categorical:
        values = pd.Series(columns[name], dtype=object)
        ranks = values.iloc[fitted_rows].value_counts()
        codes = values.map({value: i for i, value in enumerate(ranks.index)})
        if len(ranks) <= _MAX_NATIVE_CATEGORIES:
            frame[name] = pd.Categorical(codes, categories=range(len(ranks)))
        else:
            frame[name] = codes.astype(np.float32)
    return pd.DataFrame(frame)


def tuned_lightgbm(
    frame: pd.DataFrame,
    labels: NDArray[np.bool_],
    *,
    train: NDArray[np.intp],
    validation: NDArray[np.intp],
    test: NDArray[np.intp],
    seed: int,
    on_progress: Callable[[float, str], None],
) -> Baseline:
    """Fit both configurations, keep the better on validation, refit it on train + validation."""
    import lightgbm as lgb

    threads = 1 if len(train) < _FEW_ROWS else len(os.sched_getaffinity(0))

    def data(rows: NDArray[np.intp]) -> lgb.Dataset:
        return lgb.Dataset(frame.iloc[rows], labels[rows], free_raw_data=False)

    best: tuple[float, lgb.Booster, dict[str, Any]] | None = None
    for step, shape in enumerate((_SMALL, _LARGE)):
        params = {**_SHARED, **shape, "seed": seed, "num_threads": threads}
        fitted = lgb.train(
            params,
            data(train),
            num_boost_round=_MAX_TREES,
            valid_sets=[data(validation)],
            callbacks=[lgb.early_stopping(_PATIENCE, verbose=False)],
        )
        held_scores = np.asarray(fitted.predict(frame.iloc[validation], raw_score=True), dtype=np.float64)
        score = average_precision(labels[validation], held_scores)
        if best is None or score > best[0]:
            best = score, fitted, params
        on_progress((step + 1) / 3, f"validation AP {best[0]:.3f}")
    assert best is not None
    score, fitted, params = best
    held_scores = np.asarray(fitted.predict(frame.iloc[validation], raw_score=True), dtype=np.float64)
    calibration = fit_platt(held_scores, labels[validation])
    threshold = threshold_at_fpr(calibration.probability(held_scores), labels[validation], TARGET_FPR)
    num_trees = max(1, round(_REFIT_FACTOR * fitted.best_iteration))
    refitted = lgb.train(params, data(np.concatenate([train, validation])), num_boost_round=num_trees)
    scores = np.asarray(refitted.predict(frame.iloc[test], raw_score=True), dtype=np.float64)
    metrics = fraud_metrics(calibration.probability(scores), labels[test], threshold=threshold)
    on_progress(1.0, f"validation AP {score:.3f}")
    return Baseline(metrics, score, {"num_leaves": params["num_leaves"], "trees": num_trees})
