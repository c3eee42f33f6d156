"""Learning on: a model takes in what was labelled since it was trained, at a fraction of what training costs.

Some trees follow those there are, the net makes one careful pass, both over the new rows and as many older ones, so
that what was learned stays. Calibration and thresholds move to where rows show them to be that the model had not seen.
Features of reported frauds need no update, they are new in every score; online features are left to the service.
"""

# N rows

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from assay_platform.tracking import CHAMPION

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


def calibrated(model: FraudModel, rows: LabelledRows, settings: DecisionSettings) -> FraudModel:
    """The model with calibration and thresholds of these rows, which it has not seen, if they hold enough frauds."""
    labels = rows.labels.numpy() > 0.5
    if labels.sum() < _MIN_FRAUDS or labels.all():
        return model
    logits = model.logits(rows.rows)
    calibration = fit_platt(logits, labels)
    policy = Policy.fit(settings, calibration.probability(logits), labels)
    return model.changed(calibration=calibration, policy=policy)


def update_fraud(options: RunOptions, reporter: Reporter) -> RunReport:
    """The champion learns on from the events of the table that it has not seen and whose labels are final.

    Three quarters of them are learned from; the rest decides, and says where calibration and thresholds belong. A
    candidate that ranks the rest no better than the champion is registered as a challenger. What is registered has
    learned from all.

    Raises:
        InputError: there is no champion, or too little is new, or the schema is another one.
        DataError: what is new is of one class.
    """
    registry = open_registry(options.config)
    number = registry.version_of(options.model_name, CHAMPION)
    if number is None:
        raise InputError(f"{options.model_name!r} has no champion to learn on; run once without --update")
    folder = registry.download(options.model_name, number)
    champion, companion = FraudModel.load(folder), read_json(folder, "features")
    schema, until_us = schema_from_dict(companion["schema"]), companion.get("learned_until_us")
    if until_us is None or not isinstance(schema, FraudSchema):
        raise InputError(
            f"{options.model_name} version {number} does not say what it has learned; run without --update"
        )
    schema, training = _same_schema(schema, options), read_json(folder, "training")
    rules = rules_from_dict(read_json(folder, "rules"))
    options = replace(options, schema=schema, plan=FeaturePlan.from_dict(companion["plan"]), rules=rules)
    # What the champion reads online is the service's to keep: it has events that no table has yet.
    prepared = Prepared(options, reporter, publish=False, encoder=champion.parts.encoder)
    old, learned, deciding = _new_rows(prepared, int(until_us), schema)
    new, labels = np.concatenate([learned, deciding]), prepared.labels

    def updated(rows: Rows) -> FraudModel:
        return update_model(
            champion, prepared.rows, new=rows, old=old, training=training, seed=options.seed,
            adversary=prepared.adversary(),
        )  # fmt: skip

    # Not that of a full run, which measures by other rows.
    fingerprint = f"{prepared.table.fingerprint}:{len(prepared.events)}:update"
    with tracked_run(options, reporter, fingerprint=fingerprint, plan_version=prepared.plan.version) as run:
        with reporter.stage("train", "Learn from the new events") as stage:
            unseen = prepared.rows.take(torch.from_numpy(deciding))
            candidate, held = calibrated(updated(learned), unseen, schema.decisions), unseen.rows
            sides = {}
            for name, model in (("candidate", candidate), ("champion", champion)):
                threshold = model.policy.decline_from
                sides[name] = fraud_metrics(model.score(held).probability, labels[deciding], threshold=threshold)
            reached = {name: metrics["average_precision"] for name, metrics in sides.items()}
            stage.update(1.0, f"AP {reached['candidate']:.4f}, the champion's {reached['champion']:.4f}")
        robustness = None
        adversary = prepared.adversary()
        if adversary is not None:
            with reporter.stage("attack", "Attack the new frauds") as stage:
                robustness = adversary.attack(candidate, deciding, np.random.default_rng(options.seed))
                stage.update(1.0, f"recall {robustness.recall:.3f}, attacked {robustness.robust_recall:.3f}")
        gate = check_candidate(
            metric="average_precision",
            candidate=reached["candidate"],
            champion=reached["champion"],
            champion_version=number,
            baselines={"champion": sides["champion"]},
            expected_baselines=("champion",),
            calibration_error=sides["candidate"]["ece"],
            tolerated_error=tolerated_calibration_error(candidate.score(held).probability, seed=0),
            recall=None if robustness is None else robustness.recall,
            robust_recall=0.0 if robustness is None else robustness.robust_recall,
        )
        with reporter.stage("refit", "Learn from all new events"):
            final = updated(new).changed(calibration=candidate.calibration, policy=candidate.policy)
        companions = companions_of(
            prepared, options, training=training, learned_until_us=int(prepared.events.time_us[new[-1]])
        )
        version, alias = register_version(
            options,
            reporter,
            run,
            registry,
            save=lambda target: final.save(target, companions),
            signature=signature_of(prepared),
            gate=gate,
            metrics=sides["candidate"],
            baselines={"champion": sides["champion"]},
        )
    return RunReport(
        application="fraud",
        data=options.data,
        rows=len(new),
        model_name=options.model_name,
        version=version,
        alias=alias,
        gate=gate.summary,
        metrics=sides["candidate"],
        baselines={"champion": sides["champion"]},
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
            raise InputError(f"the schema's {name} is not what the champion was trained with; run without --update")
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
