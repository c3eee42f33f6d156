"""The fraud pipeline: table → features through Feast → search → train → calibrate → compare → gate → registry."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from assay_features.batch import features_at
from assay_features.definitions import FeaturePlan
from assay_features.embeddings import load_tables
from assay_features.reports import reports_of
from assay_features.row_features import model_columns
from assay_features.rules import rules_to_dict
from assay_features.schema import schema_to_dict
from assay_platform.errors import InputError
from assay_platform.models.artifact import read_json
from assay_platform.models.encoding import TabularEncoder
from assay_platform.models.fraud import FraudModel
from assay_platform.monitoring.calibration import Calibration
from assay_platform.tuning.search import SearchResult

from assay_pipelines.console import Reporter
from assay_pipelines.fraud.adversary import possible_choices
from assay_pipelines.fraud.baseline import tree_frame, tuned_lightgbm
from assay_pipelines.fraud.evaluate import (
    average_precision,
    entity_overlap,
    fraud_metrics,
)
from assay_pipelines.fraud.features import check_plan
from assay_pipelines.fraud.fit import fit_models, refit
from assay_pipelines.fraud.prepare import Prepared, as_slice
from assay_pipelines.fraud.report import fraud_report
from assay_pipelines.fraud.train import (
    DEFAULTS,
    SPACE,
    objective,
)
from assay_pipelines.gate import check_candidate
from assay_pipelines.options import RunOptions, RunReport
from assay_pipelines.references import MOST_REFERENCE_ROWS, drift_reference
from assay_pipelines.tracking import (
    champion_metric,
    log_routing,
    open_registry,
    register_version,
    run_search,
    tracked_run,
)

_SEARCH_EPOCHS = 3
_METRIC = "average_precision"
# Of the reference for labels: labels of a window at most and at least, and windows that are wanted.
_LABEL_ROWS, _FEWEST_LABEL_ROWS, _LABEL_WINDOWS = 5000, 100, 4


def tune_fraud(options: RunOptions, reporter: Reporter) -> SearchResult:
    """Search only."""
    prepared = Prepared(options, reporter)
    with tracked_run(
        options,
        reporter,
        fingerprint=prepared.table.fingerprint,
        plan_version=prepared.plan.version,
        num_rows=len(prepared.events),
    ) as run:
        return _search(options, reporter, run, prepared)


def _search(options: RunOptions, reporter: Reporter, run: Any, prepared: Prepared) -> SearchResult:
    return run_search(
        options,
        reporter,
        run,
        objective=objective,
        data=prepared.search_data(options.budget_s),
        space=SPACE,
        defaults={**DEFAULTS, "num_epochs": _SEARCH_EPOCHS, "seed": options.seed},
        max_epochs=_SEARCH_EPOCHS,
    )


def run_fraud(options: RunOptions, reporter: Reporter) -> RunReport:
    """The whole pipeline, through to a registered version."""
    prepared = Prepared(options, reporter)
    fingerprint = f"{prepared.table.fingerprint}:{len(prepared.events)}"
    with tracked_run(
        options, reporter, fingerprint=fingerprint, plan_version=prepared.plan.version, num_rows=len(prepared.events)
    ) as run:
        identity = f"{fingerprint}:{prepared.plan.version}:{options.seed}"
        best = options.searched(identity, lambda: _search(options, reporter, run, prepared).best)
        params = {**best, "update_on": options.update_on}
        identity = f"{identity}:{sorted(params.items())}"
        seed, tasks = options.seed, options.config.paths.tasks
        checkpoint = options.checkpoint("train", identity)
        workers = options.workers
        fitted = fit_models(params, prepared, reporter, seed=seed, tasks=tasks, checkpoint=checkpoint, workers=workers)
        run.log_steps("validation.average_precision", fitted.history)
        log_routing(run, fitted.routing)
        run.log(params={"blend.net": fitted.model.parts.blend.net, "blend.trees": fitted.model.parts.blend.trees})
        model = fitted.model
        if options.refit_on_all:
            checkpoint = options.checkpoint("refit", identity)
            model = refit(
                fitted, params, prepared, reporter, seed=seed, tasks=tasks, checkpoint=checkpoint, workers=workers
            )
        with reporter.stage("evaluate", "Score the test period"):
            probability = model.score(prepared.rows.rows.rows(as_slice(prepared.test))).probability
            metrics = fraud_metrics(probability, prepared.labels[prepared.test], threshold=model.policy.decline_from)
        before = np.arange(prepared.test[0])
        for entity in prepared.schema.entities:
            overlap = entity_overlap(prepared.events.keys[entity], before, prepared.test)
            reporter.line(f"{overlap:.1%} of the test events have a {entity} that was there before the test period")
        adversary = prepared.adversary()
        if adversary is not None:
            with reporter.stage("attack", "Attack the test frauds") as stage:
                attacked = adversary.attack(model, prepared.test, np.random.default_rng(options.seed))
                metrics |= {"robust_auc": attacked.robust_auc, "robust_recall": attacked.robust_recall}
                metrics |= {"attacked_recall_before": attacked.recall, "num_attacked": float(attacked.num_attacked)}
                stage.update(1.0, f"recall {attacked.recall:.3f}, attacked {attacked.robust_recall:.3f}")
        with reporter.stage("report", "Features, segments, weeks, tests of the reasons") as stage:
            report = fraud_report(model, prepared, seed=options.seed)
            run.log_json("report.json", report.to_dict())
            run.log_text("report.md", report.to_markdown())
            metrics |= {"reason_deletion": report.reasons.deletion, "reason_stability": report.reasons.stability}
            stage.update(1.0, f"reasons true for {report.reasons.deletion:.1%}, stable {report.reasons.stability:.1%}")
        with reporter.stage("baseline", "Tune and train LightGBM") as stage:
            baseline = tuned_lightgbm(
                tree_frame(prepared.columns, prepared.schema.numeric, prepared.schema.categorical, prepared.train),
                prepared.labels,
                train=prepared.train,
                validation=prepared.validation,
                test=prepared.test,
                seed=options.seed,
                on_progress=stage.update,
            )
        run.log(params={f"lightgbm.{name}": value for name, value in baseline.chosen.items()})
        registry = open_registry(options.config)
        already_learned: list[str] = []
        champion, champion_version = champion_metric(
            options,
            registry,
            fingerprint=fingerprint,
            measure=lambda folder: validation_ap(folder, options.feature_repository, prepared, already_learned),
            reporter=reporter,
        )
        baselines = {"lightgbm": baseline.metrics}
        gate = check_candidate(
            metric=_METRIC,
            candidate=fitted.validation_ap,
            champion=champion,
            champion_version=champion_version,
            baselines=baselines,
            expected_baselines=("lightgbm",),
            calibration_error=fitted.validation_ece,
            tolerated_error=fitted.tolerated_ece,
            recall=None if fitted.robustness is None else fitted.robustness.recall,
            robust_recall=0.0 if fitted.robustness is None else fitted.robustness.robust_recall,
            also_failed=tuple(already_learned),
        )
        learned = prepared.validation if options.refit_on_all else prepared.train
        companions = companions_of(
            prepared, options, model, training=params, learned_until_us=int(prepared.events.time_us[learned[-1]])
        )
        number, alias = register_version(
            options,
            reporter,
            run,
            registry,
            save=lambda folder: model.save(folder, companions),
            signature=signature_of(prepared.data.encoder),
            gate=gate,
            metrics={**metrics, "validation_ece": fitted.validation_ece, "num_parameters": model.num_parameters},
            baselines=baselines,
        )
    options.forget_checkpoints()
    return RunReport(
        application="fraud",
        data=options.data,
        rows=len(prepared.events),
        model_name=options.model_name,
        version=number,
        alias=alias,
        gate=gate.summary,
        metrics=metrics,
        baselines=baselines,
        timings_s=reporter.timings_s,
        mlflow_run_id=run.run_id,
    )


def validation_ap(folder: Path, repository: Path, prepared: Prepared, already_learned: list[str]) -> float:
    """A registered model on the current validation rows, with the features that it was trained on.

    already_learned: takes the reason if the model has learned on from these rows: it cannot be measured by them then.

    Raises:
        InputError: it has.
    """
    model, features = FraudModel.load(folder), read_json(folder, "features")
    # A champion of a full run may have seen some of them too, in its refit: that only makes it harder to beat.
    if features.get("updated") and features["learned_until_us"] > prepared.events.time_us[prepared.validation[0]]:
        already_learned.append("the champion has learned from validation rows of this run, so a person has to decide")
        raise InputError(already_learned[0])
    plan = FeaturePlan.from_dict(features["plan"])
    if plan == prepared.plan:
        columns = prepared.columns
    else:
        check_plan(plan, prepared.schema)
        history = features_at(plan, prepared.history_events, prepared.events, reports=reports_of(prepared.schema))
        columns = model_columns(plan, prepared.events, history, load_tables(repository, plan))
    held = {name: np.asarray(columns[name])[prepared.validation] for name in model.feature_names if name in columns}
    return average_precision(prepared.labels[prepared.validation], model.logits(model.encode(held)))


def scored_reference(prepared: Prepared, model: FraudModel, learned_until_us: int) -> dict[str, Any]:
    """What requests are compared with while the model serves: events that it has not learned from, their columns as
    they come and their scores. Empty where they are too few for windows.
    """
    rows = np.flatnonzero(prepared.events.time_us > learned_until_us)[-MOST_REFERENCE_ROWS:]
    events, schema = prepared.events.take(as_slice(rows)), prepared.schema
    columns: dict[str, Any] = {name: events.numbers[name] for name in schema.numeric}
    columns |= {name: events.keys[name] for name in dict.fromkeys((*schema.categorical, *schema.entities))}
    columns["score"] = model.score(prepared.rows.rows.rows(as_slice(rows))).probability
    return drift_reference(columns)


def calibration_reference(prepared: Prepared, model: FraudModel, learned_until_us: int) -> dict[str, Any]:
    """What scores came true as on events that the model has not learned from, which labels that come later are held
    against. Empty where there are too few, or no fraud among them.
    """
    rows = as_slice(np.flatnonzero(prepared.events.time_us > learned_until_us))
    labels = prepared.labels[rows].astype(bool)
    window_rows = min(_LABEL_ROWS, len(labels) // _LABEL_WINDOWS)
    if window_rows < _FEWEST_LABEL_ROWS or not labels.any():
        return {}
    scores = model.score(prepared.rows.rows.rows(rows)).probability
    return Calibration.of(scores, labels, window_rows=window_rows).to_dict()


def companions_of(
    prepared: Prepared,
    options: RunOptions,
    model: FraudModel,
    *,
    training: Mapping[str, Any],
    learned_until_us: int,
    updated: bool = False,
) -> dict[str, dict[str, Any]]:
    """What travels with a model. training: hyperparameters. learned_until_us: time of the newest event learned from.
    updated: whether it learned on after its training.
    """
    features = {
        "schema": schema_to_dict(prepared.schema),
        "plan": prepared.plan.to_dict(),
        "repository": options.model_name,
        "learned_until_us": learned_until_us,
        "updated": updated,
    }
    return {
        "features": features,
        "rules": rules_to_dict(options.rules),
        "choices": possible_choices(prepared).to_dict(),
        "drift": scored_reference(prepared, model, learned_until_us),
        "calibration": calibration_reference(prepared, model, learned_until_us),
        "training": dict(training),
    }


def signature_of(encoder: TabularEncoder, *, as_written: bool = False) -> Any:
    """The model's columns, for the registry. as_written: of whatever type a table has them, which the model reads."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import AnyType

    any_type: Callable[[], Any] = AnyType
    number, word = (any_type(), any_type()) if as_written else (DataType.double, DataType.string)
    inputs: list[ColSpec | TensorSpec] = [ColSpec(number, name, required=False) for name in encoder.numeric]
    inputs += [ColSpec(word, name, required=False) for name in encoder.categorical]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec(DataType.double, "probability")]))
