"""What another way to choose would have earned, from lists that were shown with known propensities.

Inverse propensity scores weigh each reward by how much likelier the other way is to show what was shown; their
self-normalised form divides by the weights. The doubly robust estimate (Dudík, Langford and Li, 'Doubly Robust Policy
Evaluation and Learning', arXiv:1103.4601) starts from a model of the reward and corrects it by the weighed error: it is
right if either the propensities or the model are.
"""

# N lists shown

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from assay_platform.errors import DataError
from numpy.typing import NDArray

from assay_pipelines.recommend.evaluate import interval

Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """Mean reward a list, with 95 % of bootstraps, and as how many lists of the other way those shown count."""

    value: float
    low: float
    high: float
    effective: float


class Shown(NamedTuple):
    """The last place of each list, which chance may choose. reward, propensity (N,)."""

    list_id: list[str]
    item: list[str]
    propensity: Floats

    @staticmethod
    def of(records: Iterable[Mapping[str, Any]]) -> "Shown":
        """Of lines of `lists.jsonl`; lists without items are left out."""
        rows = [record for record in records if record["items"]]
        propensity = np.array([record["propensity"][-1] for record in rows], dtype=np.float64)
        return Shown([r["list_id"] for r in rows], [r["items"][-1] for r in rows], propensity)


def inverse_propensity(reward: Floats, propensity: Floats, target: Floats) -> Estimate:
    """target (N,): how likely the other way shows what was shown.

    Raises:
        DataError: a propensity is not above 0, or there are no lists.
    """
    weight = _weights(propensity, target)
    return _estimate(weight * reward, weight)


def self_normalised(reward: Floats, propensity: Floats, target: Floats) -> Estimate:
    """As `inverse_propensity`, with a little bias and much less spread."""
    weight = _weights(propensity, target)
    mean = max(float(weight.mean()), 1e-12)
    value = float((weight * reward).mean() / mean)
    spread = weight * (reward - value) / mean
    low, high = interval(spread)
    return Estimate(value, value + low, value + high, _effective(weight))


def doubly_robust(
    reward: Floats, propensity: Floats, target: Floats, *, modelled_shown: Floats, modelled_target: Floats
) -> Estimate:
    """modelled_shown (N,): a model's reward of what was shown; modelled_target (N,): of the other way."""
    weight = _weights(propensity, target)
    return _estimate(modelled_target + weight * (reward - modelled_shown), weight)


def _weights(propensity: Floats, target: Floats) -> Floats:
    if not len(propensity):
        raise DataError("no lists were shown, so there is nothing to estimate from")
    if not (propensity > 0).all():
        place = int(np.flatnonzero(~(propensity > 0))[0])
        raise DataError(f"propensity[{place}] = {propensity[place]}; what was shown has one above 0")
    return np.asarray(target / propensity, dtype=np.float64)


def _estimate(each: Floats, weight: Floats) -> Estimate:
    low, high = interval(each)
    return Estimate(float(each.mean()), low, high, _effective(weight))


def _effective(weight: Floats) -> float:
    squares = float(np.square(weight).sum())
    return float(weight.sum()) ** 2 / squares if squares else 0.0
