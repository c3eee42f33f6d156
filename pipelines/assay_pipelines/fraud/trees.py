"""Train the boosted trees of a fraud model, and blend them with the net.

LightGBM on numbers alone: categories as ranks by frequency, so that what is served needs no LightGBM. How many trees
is found on validation rows; a refit on more rows takes as many.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_platform.models.calibration import fit_platt
from assay_platform.models.encoding import EncodedRows
from assay_platform.models.fraud import Blend
from assay_platform.models.trees import TreeEnsemble
from numpy.typing import NDArray

from assay_pipelines.fraud.evaluate import auc, average_precision
from assay_pipelines.fraud.train import FORM_WEIGHT, Copies, FraudData

Floats = NDArray[np.floating]
Flags = NDArray[np.bool_]
# Trees → of each fraud the form that they take for the most harmless.
Search = Callable[[TreeEnsemble], EncodedRows]

# lambda_l2: without it a few frauds among many thousand events make trees that know nothing of the next ones.
PARAMETERS: dict[str, Any] = {
    "objective": "binary", "metric": "average_precision", "verbosity": -1, "learning_rate": 0.04, "lambda_l2": 5.0,
    "bagging_freq": 1, "bagging_fraction": 0.8, "max_bin": 127, "deterministic": True, "force_row_wise": True,
}  # fmt: skip
# Many rows carry large trees that see few columns each, few rows may not. Large tables are not asked: validation rows
# lie close in time and favour trees that see every column, which a month later are behind.
Shape = Mapping[str, Any]
LARGE: Shape = {"num_leaves": 96, "min_data_in_leaf": 60, "feature_fraction": 0.2}
SMALL: Shape = {"num_leaves": 31, "min_data_in_leaf": 30, "feature_fraction": 0.6}
_MAX_TREES, _PATIENCE = 1200, 80
_FEW_ROWS = 20_000
_SCOUT_TREES, _MORE_SCOUT_TREES, _SCOUT_RATE, _THINNED = 150, 50, 0.12, 4
_MANY_ROWS = 100_000
# More rows, a little more to learn from them.
_REFIT_FACTOR = 1.1
_WEIGHTS = np.linspace(0.0, 1.0, 21)
_MANY_FRAUDS = 50


class FittedTrees(NamedTuple):
    """validation_ap: NaN where there were no validation rows."""

    trees: TreeEnsemble
    validation_ap: float


class TreeRows(NamedTuple):
    """What trees are trained on."""

    numbers: NDArray[np.float32]  # (N, F)
    labels: Flags
    weights: NDArray[np.float32]

    def with_forms(self, forms: EncodedRows) -> "TreeRows":
        """Other forms of frauds as further frauds."""
        extra = forms.numbers()
        return TreeRows(
            np.concatenate([self.numbers, extra]),
            np.concatenate([self.labels, np.ones(len(extra), dtype=bool)]),
            np.concatenate([self.weights, np.full(len(extra), FORM_WEIGHT, dtype=np.float32)]),
        )

    def thinned(self) -> "TreeRows":
        """All frauds, and of many honest rows a part: enough to find forms against."""
        step = max(1, min(_THINNED, int((~self.labels).sum()) // _FEW_ROWS))
        kept = np.flatnonzero(self.labels | (np.arange(len(self.labels)) % step == 0))
        return TreeRows(self.numbers[kept], self.labels[kept], self.weights[kept])


def tree_rows(data: FraudData) -> TreeRows:
    """The training rows as trees take them."""
    labels = data.train.labels.numpy() > 0.5
    return TreeRows(data.train.rows.numbers(), labels, np.ones(len(labels), dtype=np.float32))


def choose_shape(rows: TreeRows, held: tuple[Floats, Flags], *, seed: int) -> Shape:
    """Of few rows the shape whose quickly grown trees rank the held rows best."""
    if len(rows.labels) >= _MANY_ROWS:
        return LARGE
    reached = [
        train_trees(rows, seed=seed, held=held, learning_rate=_SCOUT_RATE, shape=shape).validation_ap
        for shape in (LARGE, SMALL)
    ]
    return SMALL if reached[1] > reached[0] else LARGE


def with_worst_forms(rows: TreeRows, searches: Sequence[Search], *, seed: int, shape: Shape = LARGE) -> TreeRows:
    """The rows, and of each fraud the forms that every search finds most harmless to small trees: the first search to
    trees that saw no other forms, each later one to the same and some more that saw what was found before.
    """
    known, scout = rows.thinned(), None
    for search in searches:
        num_trees = _SCOUT_TREES if scout is None else _MORE_SCOUT_TREES
        more = train_trees(
            known, seed=seed, num_trees=num_trees, learning_rate=_SCOUT_RATE, shape=shape, after=scout
        ).trees
        scout = more if scout is None else scout.followed_by(more)
        found = search(scout)
        known, rows = known.with_forms(found), rows.with_forms(found)
    return rows


def worst_forms(copies: Copies, trees: TreeEnsemble) -> EncodedRows:
    """Of each fraud the form that these trees take for the most harmless."""
    num_frauds, num_forms = copies.rows.values_NF.shape[:2]
    flat = EncodedRows(copies.rows.values_NF.flatten(0, 1), copies.rows.codes_NC.flatten(0, 1))
    chosen = trees.logits(flat.numbers()).reshape(num_frauds, num_forms).argmin(axis=1)
    return flat.rows(torch.from_numpy(np.arange(num_frauds) * num_forms + chosen))


def train_trees(
    rows: TreeRows,
    *,
    seed: int,
    held: tuple[Floats, Flags] | None = None,
    num_trees: int | None = None,
    learning_rate: float = PARAMETERS["learning_rate"],
    shape: Shape = LARGE,
    after: TreeEnsemble | None = None,
    on_progress: Callable[[float, str], None] = lambda _done, _note: None,
) -> FittedTrees:
    """Give either `held`, rows that say when to stop, or `num_trees`. after: trees that these ones are to follow."""
    import lightgbm as lgb

    # Threads that wait for one another at every node cost more than they bring where there is little to do.
    threads = 1 if len(rows.labels) < _FEW_ROWS else len(os.sched_getaffinity(0))
    parameters = {**PARAMETERS, **shape, "learning_rate": learning_rate, "seed": seed, "num_threads": threads}
    most = num_trees or _MAX_TREES

    def progress(env: Any) -> None:
        if env.iteration % 20 == 0:
            reached = "" if held is None else f", validation AP {env.evaluation_result_list[0][2]:.3f}"
            on_progress(env.iteration / most, f"{env.iteration} trees{reached}")

    start = None if after is None else after.logits(rows.numbers)
    data = lgb.Dataset(rows.numbers, rows.labels, weight=rows.weights, init_score=start)
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
    """The weights that rank validation rows best, each part in calibrated log-odds first.

    net, trees: logits of the same rows. Of equal weights the one with less of the net is taken, since a part that
    does not help is not worth its time.
    """
    # Average precision of a handful of frauds is the luck of one of them.
    rank = average_precision if labels.sum() >= _MANY_FRAUDS else auc
    slopes = fit_platt(net, labels).slope, fit_platt(trees, labels).slope
    gained = [rank(labels, w * slopes[0] * net + (1 - w) * slopes[1] * trees) for w in _WEIGHTS]
    weight = float(_WEIGHTS[int(np.argmax(gained))])
    return Blend(net=weight * slopes[0], trees=(1 - weight) * slopes[1])
