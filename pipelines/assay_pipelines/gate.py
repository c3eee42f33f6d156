"""The gate of promotion: what a candidate has to show before it may serve."""

from collections.abc import Mapping

from assay_platform.tracking import GateReport

MAX_ECE = 0.02
MIN_KEPT_RECALL = 0.75


def check_candidate(
    *,
    metric: str,
    candidate: float,
    champion: float | None,
    champion_version: int | None,
    baselines: Mapping[str, Mapping[str, float]],
    expected_baselines: tuple[str, ...],
    calibration_error: float | None = None,
    tolerated_error: float = 0.0,
    recall: float | None = None,
    robust_recall: float = 0.0,
    also_failed: tuple[str, ...] = (),
) -> GateReport:
    """Build the report.

    calibration_error: ECE on validation, for models that answer with probabilities. tolerated_error: what chance
    alone explains on so many rows; the limit is the larger of it and 0.02. recall: of the frauds of a sample of
    validation rows at the model's threshold; robust_recall: of their worst feasible forms; three quarters have to stay.
    """
    failed = [f"no {name} baseline was measured" for name in expected_baselines if not baselines.get(name)]
    failed += also_failed
    limit = max(MAX_ECE, tolerated_error)
    if calibration_error is not None and not calibration_error <= limit:
        failed.append(f"not calibrated: validation ECE {calibration_error:.4f} is above {limit:.4f}")
    if recall is not None and not robust_recall >= MIN_KEPT_RECALL * recall:
        failed.append(
            f"not robust: of a recall of {recall:.3f}, feasible attacks leave {robust_recall:.3f}; at least "
            f"{MIN_KEPT_RECALL:.0%} has to stay"
        )
    if not candidate > 0:
        failed.append(f"validation {metric} is {candidate:.4f}")
    return GateReport(
        metric=metric,
        candidate=candidate,
        champion=champion,
        champion_version=champion_version,
        failed=tuple(failed),
    )
