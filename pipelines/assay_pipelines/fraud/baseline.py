"""The baseline to beat: LightGBM, tuned over a few configurations on the same validation rows.

It sees what our model sees, or the raw columns alone, whichever is better on validation: history features do
not always help trees. Its probabilities are calibrated the same way as ours.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from assay_platform.models.calibration import fit_platt, threshold_at_fpr
from numpy.typing import NDArray

from assay_pipelines.fraud.evaluate import TARGET_FPR, fraud_metrics

_MAX_NATIVE_CATEGORIES = 200
_SHARED = {"objective": "binary", "metric": "average_precision", "verbosity": -1, "learning_rate": 0.05,
           "bagging_freq": 1, "bagging_fraction": 0.8}  # fmt: skip
_SMALL = {"num_leaves": 31, "min_data_in_leaf": 50, "feature_fraction": 0.6}
_LARGE = {"num_leaves": 191, "min_data_in_leaf": 100, "feature_fraction": 0.4, "lambda_l2": 5.0}
_MAX_TREES, _PATIENCE = 1500, 60


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
    raw_names: Sequence[str],
    labels: NDArray[np.bool_],
    *,
    train: NDArray[np.intp],
    validation: NDArray[np.intp],
    test: NDArray[np.intp],
    seed: int,
    on_progress: Callable[[float, str], None],
) -> Baseline:
    """Fit the small configuration on raw and on all columns, the large one on the better set; keep the best."""
    import lightgbm as lgb
    from sklearn.metrics import average_precision_score

    threads = len(os.sched_getaffinity(0))
    best: tuple[float, Any, list[str], dict[str, Any]] | None = None
    raw, everything = list(raw_names), list(frame.columns)
    for step in range(3):
        names = (raw, everything, best[2] if best else raw)[step]
        params = {**_SHARED, **(_LARGE if step == 2 else _SMALL), "seed": seed, "num_threads": threads}
        held = lgb.Dataset(frame.iloc[validation][names], labels[validation], free_raw_data=False)
        fitted = lgb.train(
            params,
            lgb.Dataset(frame.iloc[train][names], labels[train], free_raw_data=False),
            num_boost_round=_MAX_TREES,
            valid_sets=[held],
            callbacks=[lgb.early_stopping(_PATIENCE, verbose=False)],
        )
        scores = fitted.predict(frame.iloc[validation][names], raw_score=True)
        score = float(average_precision_score(labels[validation], scores))
        columns = "raw columns" if names is raw else "all features"
        chosen = {"columns": columns, "num_leaves": params["num_leaves"], "trees": fitted.best_iteration}
        if best is None or score > best[0]:
            best = (score, fitted, names, chosen)
        on_progress((step + 1) / 3, f"validation AP {best[0]:.3f}")
    assert best is not None
    score, fitted, names, chosen = best

    def raw_scores(rows: NDArray[np.intp]) -> NDArray[np.float64]:
        return np.asarray(fitted.predict(frame.iloc[rows][names], raw_score=True), dtype=np.float64)

    held_scores = raw_scores(validation)
    calibration = fit_platt(held_scores, labels[validation])
    threshold = threshold_at_fpr(calibration.probability(held_scores), labels[validation], TARGET_FPR)
    metrics = fraud_metrics(calibration.probability(raw_scores(test)), labels[test], threshold=threshold)
    return Baseline(metrics, score, chosen)
