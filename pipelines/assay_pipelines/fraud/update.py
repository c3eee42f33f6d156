"""Learning on: a model takes in what was labelled since it was trained, at a fraction of what training costs; or its
probabilities alone move to what was reported since.

Some trees follow those there are, the net makes one careful pass, both over the new rows and as many older ones, so
that what was learned stays. Calibration and thresholds move to where rows show them to be that the model had not seen.
Features of reported frauds need no update, they are new in every score; online features are left to the service.
"""

# N rows

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_features.definitions import FeaturePlan
from assay_features.rules import rules_from_dict
from assay_features.schema import FraudSchema, schema_from_dict, schema_to_dict
from assay_platform.errors import DataError, InputError
from assay_platform.models.artifact import read_json
from assay_platform.models.calibration import fit_platt
from assay_platform.models.decisions import DecisionSettings, Policy
from assay_platform.models.fraud import FraudModel
from assay_platform.tracking import CHAMPION, GateReport
from numpy.typing import NDArray

from assay_pipelines.console import Reporter
from assay_pipelines.fraud.adversary import Adversary
from assay_pipelines.fraud.evaluate import fraud_metrics, tolerated_calibration_error
from assay_pipelines.fraud.fit import NUM_SEARCHES
from assay_pipelines.fraud.pipeline import companions_of, signature_of
from assay_pipelines.fraud.prepare import Prepared, Rows
from assay_pipelines.fraud.train import FraudData, LabelledRows, train_net
from assay_pipelines.fraud.trees import LARGE, SMALL, TreeRows, train_trees, tree_rows, worst_forms
from assay_pipelines.gate import check_candidate
from assay_pipelines.options import RunOptions, RunReport
from assay_pipelines.tracking import open_registry, register_version, tracked_run

# Fewer frauds say too little of where scores belong; still fewer say nothing of which model is better.
_MIN_FRAUDS, _MIN_DECIDING = 50, 10


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """num_trees: that follow in one update. replay: older rows a new one. net_rate: of the net's learning rate."""

    num_trees: int = 30
    tree_rate: float = 0.04
    replay: float = 1.0
    net_rate: float = 0.2


def update_model(
    model: FraudModel,
    data: LabelledRows,
    *,
    new: Rows,
    old: Rows,
    training: Mapping[str, Any],
    seed: int,
    adversary: Adversary | None = None,
    config: UpdateConfig = UpdateConfig(),
) -> FraudModel:
    """A model that has seen the `new` rows of the data too; calibration and policy are left as they are.

    data: encoded by the model's own encoder, in order of time. old: rows that it was trained on, the newest of which
    are seen again. training: the hyperparameters that the net was trained with. adversary: given, forms that the frauds
    could have had are learned from too, as many as in training, so that fraud does not become rarer than it was then.

    Raises:
        DataError: the new rows are of one class.
    """
    labels = data.labels.numpy() > 0.5
    if labels[new].all() or not labels[new].any():
        raise DataError(
            f"{len(new)} new rows, of which {int(labels[new].sum())} are fraud: learning on needs both kinds"
        )
    parts = model.parts
    rows = np.sort(np.concatenate([new, old[max(0, len(old) - round(config.replay * len(new))) :]]))
    learned = FraudData(
        encoder=parts.encoder,
        edges=torch.empty(0),
        train=data.take(torch.from_numpy(rows)),
        validation=None,
    )
    forms: TreeRows = tree_rows(learned)
    if adversary is not None and labels[rows].any():
        generator = np.random.default_rng(seed)
        copies = adversary.copies(rows, generator)
        learned = replace(learned, copies=copies)
        if parts.trees is not None:
            forms = forms.with_forms(worst_forms(copies, parts.trees))
            for _ in range(NUM_SEARCHES):
                forms = forms.with_forms(adversary.worst_forms(parts.trees, rows, generator))
    net, trees = parts.net, parts.trees
    if parts.blend.net:
        params = {**training, "learning_rate": config.net_rate * training["learning_rate"]}
        net = train_net(params, learned, num_epochs=1, seed=seed, start=parts.net).net
    if parts.blend.trees and trees is not None:
        num_leaves = int((trees.column < 0).sum()) / len(trees)
        more = train_trees(
            forms, seed=seed, num_trees=config.num_trees, learning_rate=config.tree_rate, after=trees,
            shape=SMALL if num_leaves <= SMALL["num_leaves"] else LARGE,
        )  # fmt: skip
        trees = trees.followed_by(more.trees)
    return model.changed(net=net, trees=trees)


def calibrated(
    model: FraudModel, rows: LabelledRows, settings: DecisionSettings, *, min_frauds: int = _MIN_FRAUDS
) -> FraudModel:
    """The model with calibration and thresholds of these rows, which it has not seen, if they hold enough frauds."""
    labels = rows.labels.numpy() > 0.5
    if labels.sum() < min_frauds or labels.all():
        return model
    logits = model.logits(rows.rows)
    calibration = fit_platt(logits, labels)
    policy = Policy.fit(settings, calibration.probability(logits), labels)
    return model.changed(calibration=calibration, policy=policy)


class _Champion(NamedTuple):
    """The model that serves, and what came since it learned."""

    model: FraudModel
    number: int
    companion: dict[str, Any]
    training: dict[str, Any]
    options: RunOptions  # with its schema, plan and rules
    prepared: Prepared
    old: Rows
    first: Rows  # three quarters of what is new and whose labels are final
    rest: Rows


def _champion(options: RunOptions, reporter: Reporter) -> _Champion:
    """Load it, and the table by its encoder.

    Raises:
        InputError: there is no champion, or too little is new, or the schema is another one.
    """
    registry = open_registry(options.config)
    number = registry.version_of(options.model_name, CHAMPION)
    if number is None:
        raise InputError(f"{options.model_name!r} has no champion to learn on; run in full first")
    folder = registry.download(options.model_name, number)
    model, companion = FraudModel.load(folder), read_json(folder, "features")
    schema, until_us = schema_from_dict(companion["schema"]), companion.get("learned_until_us")
    if until_us is None or not isinstance(schema, FraudSchema):
        raise InputError(f"{options.model_name} version {number} does not say what it has learned; run in full")
    schema, training = _same_schema(schema, options), read_json(folder, "training")
    rules = rules_from_dict(read_json(folder, "rules"))
    options = replace(options, schema=schema, plan=FeaturePlan.from_dict(companion["plan"]), rules=rules)
    # What the champion reads online is the service's to keep: it has events that no table has yet.
    prepared = Prepared(options, reporter, publish=False, encoder=model.parts.encoder)
    return _Champion(model, number, companion, training, options, prepared, *_new_rows(prepared, int(until_us), schema))


def update_fraud(options: RunOptions, reporter: Reporter) -> RunReport:
    """The champion learns on from the events of the table that it has not seen and whose labels are final.

    Three quarters of them are learned from; the rest decides, and says where calibration and thresholds belong. A
    candidate that ranks the rest no better than the champion is registered as a challenger. What is registered has
    learned from all.

    Raises:
        InputError: there is no champion, or too little is new, or the schema is another one.
        DataError: what is new is of one class.
    """
    held = _champion(options, reporter)
    prepared, adversary, deciding = held.prepared, held.prepared.adversary(), held.rest
    new = np.concatenate([held.first, deciding])

    def updated(rows: Rows) -> FraudModel:
        return update_model(
            held.model, prepared.rows, new=rows, old=held.old, training=held.training, seed=options.seed,
            adversary=adversary,
        )  # fmt: skip

    with _tracked(held, reporter, "update") as run:
        with reporter.stage("train", "Learn from the new events") as stage:
            unseen = prepared.rows.take(torch.from_numpy(deciding))
            candidate = calibrated(updated(held.first), unseen, _decisions(held))
            sides = _sides(held, candidate)
            reached = {name: metrics["average_precision"] for name, metrics in sides.items()}
            stage.update(1.0, f"AP {reached['candidate']:.4f}, the champion's {reached['champion']:.4f}")
        robustness = None
        if adversary is not None:
            with reporter.stage("attack", "Attack the new frauds") as stage:
                robustness = adversary.attack(candidate, deciding, np.random.default_rng(options.seed))
                stage.update(1.0, f"recall {robustness.recall:.3f}, attacked {robustness.robust_recall:.3f}")
        gate = check_candidate(
            metric="average_precision",
            candidate=reached["candidate"],
            champion=reached["champion"],
            champion_version=held.number,
            baselines={"champion": sides["champion"]},
            expected_baselines=("champion",),
            calibration_error=sides["candidate"]["ece"],
            tolerated_error=tolerated_calibration_error(candidate.score(unseen.rows).probability, seed=0),
            recall=None if robustness is None else robustness.recall,
            robust_recall=0.0 if robustness is None else robustness.robust_recall,
        )
        with reporter.stage("refit", "Learn from all new events"):
            final = updated(new).changed(calibration=candidate.calibration, policy=candidate.policy)
        until_us = int(prepared.events.time_us[new[-1]])
        return _registered(held, reporter, run, final, gate, sides, learned_until_us=until_us, updated=True)


def recalibrate_fraud(options: RunOptions, reporter: Reporter) -> RunReport:
    """The champion as it is, with calibration and thresholds of what was reported since it learned.

    Fitted on three quarters of the new events, judged by the likelihood of the rest. Where the gain is within chance,
    probabilities have not drifted, and the new version stays a challenger. What is registered is fitted on all.

    Raises:
        InputError: there is no champion, or too little is new, or the schema is another one.
    """
    held = _champion(options, reporter)
    prepared = held.prepared
    first, rest, both = (
        prepared.rows.take(torch.from_numpy(rows))
        for rows in (held.first, held.rest, np.concatenate([held.first, held.rest]))
    )
    if both.labels.sum() < _MIN_FRAUDS:
        raise InputError(
            f"{options.table}: {int(both.labels.sum())} frauds were reported since the champion learned; {_MIN_FRAUDS} "
            "are needed to say where its probabilities belong"
        )
    with _tracked(held, reporter, "recalibrate") as run:
        with reporter.stage("train", "Calibrate on the new events") as stage:
            candidate = calibrated(held.model, first, _decisions(held), min_frauds=_MIN_DECIDING)
            labels = rest.labels.numpy() > 0.5
            rate = float(np.clip(labels.mean(), 1e-9, 1 - 1e-9))
            base = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
            losses = {
                name: _log_losses(model.score(rest.rows).probability, labels)
                for name, model in (("candidate", candidate), ("champion", held.model))
            }
            sides = _sides(held, candidate)
            gained = {name: 1.0 - float(loss.mean()) / base for name, loss in losses.items()}
            for name, value in gained.items():
                sides[name]["relative_information_gain"] = value
            stage.update(1.0, f"ECE {sides['candidate']['ece']:.4f}, the champion's {sides['champion']['ece']:.4f}")
        better = losses["champion"] - losses["candidate"]
        chance = 2.0 * float(better.std()) / len(better) ** 0.5
        gate = check_candidate(
            metric="relative_information_gain",
            candidate=gained["candidate"],
            champion=gained["champion"],
            champion_version=held.number,
            baselines={"champion": sides["champion"]},
            expected_baselines=("champion",),
            calibration_error=sides["candidate"]["ece"],
            tolerated_error=tolerated_calibration_error(candidate.score(rest.rows).probability, seed=0),
            also_failed=()
            if better.mean() > chance
            else (f"no drift: log loss falls by {better.mean():.2e} a row, within chance ({chance:.1e})",),
        )
        final = calibrated(held.model, both, _decisions(held))
        return _registered(
            held, reporter, run, final, gate, sides,
            learned_until_us=int(held.companion["learned_until_us"]), updated=bool(held.companion.get("updated")),
        )  # fmt: skip


def _decisions(held: _Champion) -> DecisionSettings:
    assert isinstance(held.options.schema, FraudSchema)
    return held.options.schema.decisions


def _log_losses(probability: NDArray[np.float64], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(N,) what each row's label costs."""
    told = np.clip(np.where(labels, probability, 1 - probability), 1e-12, 1.0)
    return np.asarray(-np.log(told))


def _sides(held: _Champion, candidate: FraudModel) -> dict[str, dict[str, float]]:
    """What candidate and champion come to on the deciding rows."""
    rows, labels = held.prepared.rows.rows.rows(torch.from_numpy(held.rest)), held.prepared.labels[held.rest]
    return {
        name: fraud_metrics(model.score(rows).probability, labels, threshold=model.policy.decline_from)
        for name, model in (("candidate", candidate), ("champion", held.model))
    }


def _tracked(held: _Champion, reporter: Reporter, kind: str) -> AbstractContextManager[Any]:
    """A run of its own: a full one measures by other rows."""
    prepared = held.prepared
    fingerprint = f"{prepared.table.fingerprint}:{len(prepared.events)}:{kind}"
    return tracked_run(
        held.options,
        reporter,
        fingerprint=fingerprint,
        plan_version=prepared.plan.version,
        num_rows=len(prepared.events),
    )


def _registered(
    held: _Champion,
    reporter: Reporter,
    run: Any,
    final: FraudModel,
    gate: GateReport,
    sides: dict[str, dict[str, float]],
    *,
    learned_until_us: int,
    updated: bool,
) -> RunReport:
    options, prepared = held.options, held.prepared
    companions = companions_of(
        prepared, options, final, training=held.training, learned_until_us=learned_until_us, updated=updated
    )
    baselines = {"champion": sides["champion"]}
    version, alias = register_version(
        options,
        reporter,
        run,
        open_registry(options.config),
        save=lambda target: final.save(target, companions),
        signature=signature_of(prepared.data.encoder),
        gate=gate,
        metrics=sides["candidate"],
        baselines=baselines,
    )
    return RunReport(
        application="fraud",
        data=options.data,
        rows=len(held.first) + len(held.rest),
        model_name=options.model_name,
        version=version,
        alias=alias,
        gate=gate.summary,
        metrics=sides["candidate"],
        baselines=baselines,
        timings_s=reporter.timings_s,
        mlflow_run_id=run.run_id,
    )


def _same_schema(known: FraudSchema, options: RunOptions) -> FraudSchema:
    """The champion's schema with the decisions that are asked for now.

    Raises:
        InputError: anything else of it has changed, or labels have no delay that says when they are final.
    """
    asked = options.schema
    assert isinstance(asked, FraudSchema)
    for name, value in schema_to_dict(replace(known, decisions=asked.decisions, split=asked.split)).items():
        if schema_to_dict(asked).get(name) != value:
            raise InputError(f"the schema's {name} is not what the champion was trained with; run in full")
    if known.label_delay_days is None:
        raise InputError("the schema has no [labels] delay_days, so nobody knows which labels are final; 0 is allowed")
    return replace(known, decisions=asked.decisions)


def _new_rows(prepared: Prepared, until_us: int, schema: FraudSchema) -> tuple[Rows, Rows, Rows]:
    """Rows that the champion has seen, new ones to learn from, new ones that decide."""
    time_us = prepared.events.time_us
    delay_us = round((schema.label_delay_days or 0.0) * 86_400_000_000)
    first = int(np.searchsorted(time_us, until_us, side="right"))
    end = int(np.searchsorted(time_us, time_us[-1] - delay_us, side="right"))
    middle = first + (3 * max(0, end - first)) // 4
    parts = np.arange(first), np.arange(first, middle), np.arange(middle, end)
    for rows in parts[1:]:
        frauds = int(prepared.labels[rows].sum())
        if frauds < _MIN_DECIDING or frauds == len(rows):
            moment = np.datetime64(until_us, "us").astype("datetime64[s]")
            raise InputError(
                f"{prepared.table.path}: the champion has learned until {moment}. Since then {max(0, end - first)} "
                f"events have labels that are final; the {len(rows)} of one part have {frauds} frauds, and each of two "
                f"parts needs at least {_MIN_DECIDING}"
            )
    return parts
