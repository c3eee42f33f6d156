"""Distillation: one set of boosted trees that learns what an ensemble thinks, and answers in microseconds.

Its targets are a mix of what happened and what the ensemble thought of rows that its members had not seen (Hinton et
al., arXiv:1503.02531). Rows that no member was held against keep their labels.

How many trees, how good, how they are calibrated is seen with labels alone: what the ensemble thinks of a row that a
student learns from comes from models that saw the rows it would be held against (on census data a student measured that
way seems 0.004 of AUC better than it is).
"""

# N rows

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from assay_platform.models.calibration import sigmoid
from assay_platform.models.trees import TreeEnsemble
from numpy.typing import NDArray

from assay_pipelines.automl.families import DEFAULT, BestRound, Params, lightgbm_params
from assay_pipelines.automl.trials import Candidate, Fold, score

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.float32]

# How much of a target is what the ensemble thought: on census data AUC 0.9317 with none, 0.9318 with 0.3 to 0.5, 0.9316
# with 0.7. Such targets are smoother and carry more trees.
_THOUGHT, _MORE_TREES = 0.4, 1.3
_MAX_TREES, _PATIENCE = 2000, 60
# Trials whose AUC on folds is no further apart than this are taken as equals.
_ALIKE = 0.0003
# More rows, more to learn from them.
_REFIT_FACTOR, _ROWS_POWER = 1.1, 0.3
_FEW_ROWS = 20_000
_LARGEST_RATE = 0.3
# A larger table takes longer a row than a small one, which fits into caches.
_SLOWER = 1.3


class Studied(NamedTuple):
    """How such trees do on rows that they have not seen. logits (N,): NaN for rows that no fold held.

    num_trees: that were best, of num_rows. tree_row_s: seconds that a tree took a row.
    """

    logits: Floats
    score: float
    num_trees: int
    num_rows: int
    tree_row_s: float


class Plan(NamedTuple):
    """Of the last training. is_cut: whether time allowed for fewer trees than were wanted, with larger steps."""

    num_trees: int
    rate: float
    is_cut: bool


def lightest_trees(found: Sequence[Candidate]) -> Params:
    """Of the trials of boosted trees that folds cannot tell from the best, the one with the fewest leaves.

    A row costs what its trees have of splits, so a third of the leaves is three times as fast. found: best first.
    """
    trees = [one for one in found if one.params["family"] == DEFAULT["family"]]
    if not trees:
        return DEFAULT
    alike = [one for one in trees if one.score >= trees[0].score - _ALIKE]
    return min(alike, key=lambda one: one.params["leaves"] * float(np.mean(one.sizes))).params


def targets_of(labels: Flags, thoughts: Floats, share: float = _THOUGHT) -> Floats:
    """(N,) from 0 to 1. thoughts: the ensemble's logits, NaN for rows that nobody was held against."""
    known = ~np.isnan(thoughts)
    targets = labels.astype(np.float64)
    targets[known] = share * sigmoid(thoughts[known]) + (1 - share) * targets[known]
    return targets


def study(
    params: Params,
    numbers: Numbers,
    labels: Flags,
    folds: Sequence[Fold],
    *,
    seed: int,
    threads: int,
    seconds: float,
    planned: Plan | None = None,
    on_progress: Callable[[float], None] = lambda _done: None,
) -> Studied:
    """Trees with these parameters on each fold, by the labels, within so many seconds.

    planned: given, so many trees with such steps, instead of as many as are best: what a hurried training will give.
    """
    import lightgbm as lgb

    most = _MAX_TREES if planned is None else planned.num_trees
    params = params if planned is None else {**params, "rate": planned.rate}
    boosters, sizes, spent_s, work = [], [], 0.0, 0
    for number, fold in enumerate(folds, 1):
        data = lgb.Dataset(numbers[fold.fit], labels[fold.fit].astype(np.float32))
        held = lgb.Dataset(numbers[fold.held], labels[fold.held].astype(np.float32), reference=data)
        began = time.perf_counter()
        best = BestRound(until=time.monotonic() + seconds / len(folds))
        booster = lgb.train(
            _parameters(params, len(fold.fit), threads, seed),
            data,
            num_boost_round=most,
            valid_sets=[held],
            callbacks=[best] if planned is not None else [lgb.early_stopping(_PATIENCE, verbose=False), best],
        )
        spent_s, work = spent_s + time.perf_counter() - began, work + booster.current_iteration() * len(fold.fit)
        boosters.append(booster)
        sizes.append(booster.current_iteration() if planned is not None else best.size)
        on_progress(number / len(folds))
    size = max(1, round(float(np.mean(sizes))))
    logits = np.full(len(labels), np.nan)
    # As many trees on each fold: logits of more trees are larger, and all are calibrated together.
    for booster, fold in zip(boosters, folds, strict=True):
        logits[fold.held] = booster.predict(numbers[fold.held], raw_score=True, num_iteration=size)
    num_rows = round(float(np.mean([len(fold.fit) for fold in folds])))
    return Studied(logits, score(labels, logits, folds), size, num_rows, spent_s / max(1, work))


def plan(params: Params, studied: Studied, targets: Floats, *, seconds: float) -> Plan:
    """How many trees: as many as were best, more of them for more rows; within so many seconds."""
    is_soft = bool(((targets > 0) & (targets < 1)).mean() > 0.5)
    more = _REFIT_FACTOR * (_MORE_TREES if is_soft else 1.0) * (len(targets) / studied.num_rows) ** _ROWS_POWER
    wanted = max(1, round(more * studied.num_trees))
    possible = int(seconds / max(1e-12, _SLOWER * studied.tree_row_s * len(targets)))
    num_trees = max(1, min(wanted, possible))
    return Plan(num_trees, min(_LARGEST_RATE, params["rate"] * wanted / num_trees), num_trees < wanted)


def graduate(
    params: Params,
    numbers: Numbers,
    targets: Floats,
    plan: Plan,
    *,
    seed: int,
    threads: int,
    seconds: float,
    on_progress: Callable[[float], None] = lambda _done: None,
) -> TreeEnsemble:
    """A student of all rows. seconds: after so many no tree is added, planned or not."""
    import lightgbm as lgb

    began = time.perf_counter()

    def watch(env: Any) -> None:
        on_progress(env.iteration / plan.num_trees)
        if time.perf_counter() - began > seconds:
            raise lgb.callback.EarlyStopException(env.iteration, [])

    booster = lgb.train(
        _parameters({**params, "rate": plan.rate}, len(targets), threads, seed),
        lgb.Dataset(numbers, targets),
        num_boost_round=plan.num_trees,
        callbacks=[watch],
    )
    return TreeEnsemble.from_lightgbm(booster)


def _parameters(params: Params, num_rows: int, threads: int, seed: int) -> dict[str, Any]:
    # Threads that share few rows mostly wait for each other.
    threads = threads if num_rows >= _FEW_ROWS else 1
    # Cross-entropy takes targets between 0 and 1. Trees that are stopped by AUC are too few to be calibrated.
    return lightgbm_params(params, threads=threads, seed=seed) | {
        "objective": "cross_entropy",
        "metric": "cross_entropy",
    }
