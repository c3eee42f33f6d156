"""From prepared rows to a model: net and trees, their blend, calibration, thresholds, an attack; then the refit."""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_platform.models.calibration import fit_platt
from assay_platform.models.decisions import Policy
from assay_platform.models.encoding import EncodedRows
from assay_platform.models.fraud import FraudModel
from assay_platform.models.trees import TreeEnsemble
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.tasks.local import local_dispatcher
from assay_platform.tasks.task import Kind, Needs, Place, Task
from assay_platform.training import HERE, Checkpoint, StopTraining, Workers

from assay_pipelines.console import Reporter, Stage
from assay_pipelines.fraud.adversary import Adversary, Robustness
from assay_pipelines.fraud.evaluate import (
    average_precision,
    expected_calibration_error,
    tolerated_calibration_error,
)
from assay_pipelines.fraud.prepare import Prepared, Rows, as_slice
from assay_pipelines.fraud.train import FraudData, TrainedNet, as_model, net_logits, num_batches, train_net
from assay_pipelines.fraud.trees import (
    Search,
    Shape,
    TreeRows,
    choose_shape,
    fit_blend,
    refit_size,
    train_trees,
    tree_rows,
    with_worst_forms,
    worst_forms,
)

# Three passes over a large table; after more, what was learned of last month no longer holds in the next.
_FINAL_EPOCHS = 3
# A small table needs more passes for the same number of steps.
_MIN_STEPS, _MAX_EPOCHS = 600, 30
# Rounds in which the trees learn from what a search finds against them.
NUM_SEARCHES = 2
# On a machine without a GPU one is trained after the other.
_ALL_CORES = Needs(cores=float(os.cpu_count() or 1))


class FittedModels(NamedTuple):
    """A model that has not seen the validation rows, and how it did on them."""

    model: FraudModel
    validation_ap: float
    validation_ece: float
    tolerated_ece: float  # that much chance explains
    robustness: Robustness | None
    history: list[float]  # the net's validation metric of each epoch
    best_epoch: int
    routing: RoutingMonitor
    shape: Shape


def fit_models(
    params: Mapping[str, Any],
    prepared: Prepared,
    reporter: Reporter,
    *,
    seed: int,
    tasks: Path | None = None,
    checkpoint: Checkpoint | None = None,
    workers: Workers = HERE,
) -> FittedModels:
    """Net and trees on the training rows; blended, calibrated and thresholded on the validation rows.

    Where the schema says what senders can change, both are trained on other forms of the frauds too, and the validation
    frauds are attacked. Net and trees are trained at once where there is a GPU. tasks: see `local_dispatcher`.
    checkpoint, workers: of the net.
    """
    held = prepared.rows.take(as_slice(prepared.validation))
    labels = prepared.labels[prepared.validation]
    adversary = prepared.adversary()
    numbers = held.rows.numbers()
    with reporter.stage("train", "Shape of the trees") as stage:
        shape = choose_shape(tree_rows(prepared.data), (numbers, labels), seed=seed)
        stage.update(1.0, f"{shape['num_leaves']} leaves")
    with reporter.stage("train", "Other forms of frauds"):
        data, rows = _with_other_forms(prepared.data, prepared.train, adversary, shape, seed)
    num_epochs = num_final_epochs(params, len(data.train))
    with reporter.stage("train", "Train the MoE net and the trees") as stage:
        told = _Told(stage, 2)
        net_task = _net_task(params, data, num_epochs, seed, told, checkpoint, workers)
        trees_task = _trees_task(told, rows, seed=seed, held=(numbers, labels), shape=shape)
        (net, fitted, routing), trees = _results(tasks, net_task, trees_task)
    with reporter.stage("train", "Blend and calibrate") as stage:
        blend = fit_blend(net_logits(net, held.rows), trees.logits(numbers), labels)
        model = as_model(net, params, data, trees=trees, blend=blend)
        logits = model.logits(held.rows)
        calibration = fit_platt(logits, labels)
        probability = calibration.probability(logits)
        policy = Policy.fit(prepared.schema.decisions, probability, labels)
        model = model.changed(calibration=calibration, policy=policy, amount=prepared.schema.amount)
        reached = average_precision(labels, logits)
        stage.update(1.0, f"validation AP {reached:.3f}, net {blend.net:.2f}, trees {blend.trees:.2f}")
    robustness = None
    if adversary is not None:
        with reporter.stage("attack", "Attack the validation frauds") as stage:
            robustness = adversary.attack(model, prepared.validation, np.random.default_rng(seed))
            stage.update(1.0, f"recall {robustness.recall:.3f}, attacked {robustness.robust_recall:.3f}")
    return FittedModels(
        model, reached, expected_calibration_error(probability, labels),
        tolerated_calibration_error(probability, seed=0), robustness, fitted.history, fitted.best_epoch, routing, shape,
    )  # fmt: skip


def refit(
    fitted: FittedModels,
    params: Mapping[str, Any],
    prepared: Prepared,
    reporter: Reporter,
    *,
    seed: int,
    tasks: Path | None = None,
    checkpoint: Checkpoint | None = None,
    workers: Workers = HERE,
) -> FraudModel:
    """The same recipe on train and validation rows; blend, calibration and threshold stay as they were chosen.

    The net takes as many passes as were best before; a part that the blend does not use is not trained again.
    """
    both = np.concatenate([prepared.train, prepared.validation])
    with reporter.stage("refit", "Other forms of frauds"):
        data, rows = _with_other_forms(prepared.all_before_test(), both, prepared.adversary(), fitted.shape, seed)
    parts = fitted.model.parts
    net, trees = parts.net, parts.trees
    with reporter.stage("refit", "Refit on train + validation") as stage:
        told = _Told(stage, bool(parts.blend.net) + bool(parts.blend.trees))
        to_do: list[Task[Any]] = []
        if parts.blend.net:
            to_do.append(_net_task(params, data, fitted.best_epoch, seed, told, checkpoint, workers))
        if parts.blend.trees:
            assert trees is not None
            to_do.append(_trees_task(told, rows, seed=seed, num_trees=refit_size(trees), shape=fitted.shape))
        done = _results(tasks, *to_do)
        net = done[0].net if parts.blend.net else net
        trees = done[-1] if parts.blend.trees else trees
    return fitted.model.changed(net=net, trees=trees)


class _Told:
    """One bar of things that are trained at once."""

    def __init__(self, stage: Stage, num: int) -> None:
        self._stage, self._num = stage, num
        self._parts: dict[str, tuple[float, str]] = {}
        self._lock = threading.Lock()

    def update(self, part: str, done: float, note: str) -> None:
        with self._lock:
            self._parts[part] = (done, note)
            self._stage.update(
                sum(done for done, _ in self._parts.values()) / self._num,
                ", ".join(f"{part}: {note}" for part, (_, note) in self._parts.items()),
            )


def _results(folder: Path | None, *tasks: Task[Any]) -> list[Any]:
    """At once where there is a GPU. Without one, in turn and in this thread: OpenMP gives another thread a pool of its
    own, and with more threads than cores they wait for one another through the kernel: 1.5 times as long.
    """
    if not torch.cuda.is_available():
        return [task.work(Place("cpu", _ALL_CORES.cores, 1, task.key, lambda: False)) for task in tasks]
    with local_dispatcher(folder) as dispatcher:
        futures = [dispatcher.submit(task) for task in tasks]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()  # says so before the others are done
        return [future.result() for future in futures]


def _net_task(
    params: Mapping[str, Any],
    data: FraudData,
    num_epochs: int,
    seed: int,
    told: _Told,
    checkpoint: Checkpoint | None,
    workers: Workers,
) -> Task[TrainedNet]:
    def work(place: Place) -> TrainedNet:
        def on_epoch(epoch: int, metric: float) -> None:
            if place.ending():
                raise StopTraining
            reached = f"epoch {epoch}" if data.validation is None else f"validation AP {metric:.3f}"
            told.update("net", epoch / num_epochs, reached)

        device = torch.device(place.device) if here else None
        train = partial(train_net, params, num_epochs=num_epochs, seed=seed, device=device)
        trained = workers.train(train, {"data": data}, on_epoch=on_epoch, checkpoint=checkpoint)
        reached = "" if data.validation is None else f"validation AP {trained.fitted.best_metric:.3f} at "
        told.update("net", 1.0, f"{reached}epoch {trained.fitted.best_epoch}")
        return trained

    here = workers.num == 1  # elsewhere Ray chooses the place, and this process waits
    return Task(
        work=work, kind=Kind.MATRIX, name="fraud net" if here else "fraud net on workers",
        size=num_epochs * len(data.train), cpu=_ALL_CORES if here else Needs(cores=0),
        gpu=Needs(cores=0, gpus=1) if here else None,
    )  # fmt: skip


def _trees_task(told: _Told, rows: TreeRows, **how: Any) -> Task[TreeEnsemble]:
    def work(_: Place) -> TreeEnsemble:
        trees = train_trees(rows, on_progress=lambda done, note: told.update("trees", done, note), **how).trees
        told.update("trees", 1.0, f"{len(trees)} trees")
        return trees

    return Task(work=work, kind=Kind.UPDATE, name="fraud trees", size=len(rows.labels), cpu=_ALL_CORES)


def _with_other_forms(
    data: FraudData, rows: Rows, adversary: Adversary | None, shape: Shape, seed: int
) -> tuple[FraudData, TreeRows]:
    """What net and trees are trained on: with an adversary, forms that the frauds among `rows` could have had besides.

    Three rounds for the trees: forms in the clothes of honest payments, then twice what a search finds. The net picks
    the worst of them all at every step.
    """
    if adversary is None:
        return data, tree_rows(data)
    generator = np.random.default_rng(seed)
    copies = adversary.copies(rows, generator)
    found: list[EncodedRows] = []

    def search(trees: TreeEnsemble) -> EncodedRows:
        found.append(adversary.worst_forms(trees, rows, generator))
        return found[-1]

    searches: tuple[Search, ...] = (lambda trees: worst_forms(copies, trees), *[search] * NUM_SEARCHES)
    forms = with_worst_forms(tree_rows(data), searches, seed=seed, shape=shape)
    return replace(data, copies=copies.and_also(found)), forms


def num_final_epochs(params: Mapping[str, Any], num_rows: int) -> int:
    """A few passes over a large table, more over a small one."""
    return min(_MAX_EPOCHS, max(_FINAL_EPOCHS, -(-_MIN_STEPS // num_batches(params, num_rows))))
