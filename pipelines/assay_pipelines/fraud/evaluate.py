"""How good fraud scores are: ranking, the operating point, and whether probabilities mean what they say."""

import numpy as np
from assay_platform.models.calibration import threshold_at_fpr
from numpy.typing import NDArray

TARGET_FPR = 0.003
_ECE_BINS = 20

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


def expected_calibration_error(probability: Floats, labels: Flags, num_bins: int = _ECE_BINS) -> float:
    """Mean |predicted - observed| over bins that hold equally many rows.

    Bins of equal width would put nearly all rows of a rare class into the first one.
    """
    order = np.argsort(probability, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if len(part)]
    gaps = [len(part) * abs(probability[part].mean() - labels[part].mean()) for part in parts]
    return float(np.sum(gaps) / max(1, len(order)))


def tolerated_calibration_error(probability: Floats, *, seed: int, num_draws: int = 200) -> float:
    """The 99th percentile of the calibration error that a perfectly calibrated model shows on so many rows.

    With few rows, bins are noisy: 300 rows and 20 bins give an error near 0.04 without any fault of the model.
    """
    generator = np.random.default_rng(seed)
    draws = [
        expected_calibration_error(probability, generator.random(len(probability)) < probability)
        for _ in range(num_draws)
    ]
    return float(np.quantile(draws, 0.99))


def auc(labels: Flags, scores: Floats) -> float:
    """Area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def average_precision(labels: Flags, scores: Floats) -> float:
    """Area under precision over recall, by steps."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(labels, scores))


def fraud_metrics(probability: Floats, labels: Flags, *, threshold: float | None = None) -> dict[str, float]:
    """The metrics of the contract.

    recall_at_fpr_0.003 and its precision are the point of these rows' own ROC curve. With `threshold`, chosen
    on other rows, what that threshold does on these is added, since it is what a bank would see.
    """
    from sklearn.metrics import brier_score_loss

    metrics = {
        "auc": auc(labels, probability),
        "average_precision": average_precision(labels, probability),
        "prevalence": float(labels.mean()),
        "brier": float(brier_score_loss(labels, np.clip(probability, 0.0, 1.0))),
        "ece": expected_calibration_error(probability, labels),
    }
    flagged = probability >= threshold_at_fpr(probability, labels, TARGET_FPR)
    metrics["recall_at_fpr_0.003"], metrics["precision_at_fpr_0.003"] = _recall_precision(flagged, labels)
    if threshold is not None:
        flagged = probability >= threshold
        metrics["recall_at_threshold"], metrics["precision_at_threshold"] = _recall_precision(flagged, labels)
        metrics["fpr_at_threshold"] = float(flagged[~labels].mean())
    return metrics


def _recall_precision(flagged: Flags, labels: Flags) -> tuple[float, float]:
    hits = float((flagged & labels).sum())
    return hits / max(1.0, float(labels.sum())), hits / max(1.0, float(flagged.sum()))


def entity_overlap(keys: NDArray[np.object_], seen: NDArray[np.intp], rows: NDArray[np.intp]) -> float:
    """The share of rows with a key whose key was among the rows `seen`; NaN if none has a key."""
    known = {key for key in keys[seen].tolist() if key is not None}
    asked = [key in known for key in keys[rows].tolist() if key is not None]
    return float(np.mean(asked)) if asked else float("nan")
