"""The fraud pipeline: table → features through Feast → search → train → calibrate → compare → gate → registry."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_features.batch import features_at, final_states
from assay_features.definitions import FeaturePlan, as_code
from assay_features.embeddings import EmbeddingTable, load_tables, table_path
from assay_features.events import Events
from assay_features.reports import plan_parts, reports_of
from assay_features.row_features import model_columns
from assay_features.rules import check_rules, rules_to_dict
from assay_features.schema import FraudSchema, Split, schema_to_dict
from assay_platform.errors import DataError, InputError
from assay_platform.models.artifact import read_json
from assay_platform.models.calibration import fit_platt
from assay_platform.models.decisions import Policy
from assay_platform.models.encoding import fit_encoder
from assay_platform.models.fraud import FraudModel
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.tuning.search import SearchResult
from numpy.typing import NDArray

from assay_pipelines.console import Reporter
from assay_pipelines.datasets.table import LoadedTable, load_table
from assay_pipelines.fraud.adversary import Adversary, Robustness, is_declared, possible_choices
from assay_pipelines.fraud.baseline import tree_frame, tuned_lightgbm
from assay_pipelines.fraud.evaluate import (
    average_precision,
    entity_overlap,
    expected_calibration_error,
    fraud_metrics,
    tolerated_calibration_error,
)
from assay_pipelines.fraud.features import check_plan, default_plan, model_inputs
from assay_pipelines.fraud.train import (
    DEFAULTS,
    SPACE,
    FraudData,
    LabelledRows,
    as_model,
    net_logits,
    num_batches,
    objective,
    train_net,
)
from assay_pipelines.fraud.trees import fit_blend, refit_size, train_trees, tree_rows, with_worst_forms
from assay_pipelines.gate import check_candidate
from assay_pipelines.options import RunOptions, RunReport
from assay_pipelines.tracking import (
    champion_metric,
    log_routing,
    open_registry,
    register_version,
    run_search,
    tracked_run,
)

_MAX_CATEGORIES = 20_000
# A trial sees the newest rows, as many as let a few trials finish within the budget.
_SEARCH_ROWS_A_SECOND, _MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS = 300, 10_000, 60_000
_SEARCH_VALIDATION_ROWS = 20_000
# Three passes over a large table; after more, what was learned of last month no longer holds in the next.
_SEARCH_EPOCHS, _FINAL_EPOCHS = 3, 3
# A small table needs more passes for the same number of steps.
_MIN_STEPS, _MAX_EPOCHS = 600, 30
_METRIC = "average_precision"

Rows = NDArray[np.intp]


class Prepared:
    """Everything known before any model is trained."""

    def __init__(self, options: RunOptions, reporter: Reporter) -> None:
        assert isinstance(options.schema, FraudSchema)
        self.schema = options.schema
        self._adversary: Adversary | None = None
        self.plan = options.plan or default_plan(self.schema)
        check_plan(self.plan, self.schema)
        self.tables = _trained_tables(self.plan, options)
        columns = _try_without_rows(self.plan, self.schema, self.tables)
        check_rules(options.rules, columns)
        with reporter.stage("load", "Read and check the table") as stage:
            self.table = load_table(options.table, self.schema)
            events = self.table.events
            events = events.take(slice(0, len(events) - options.num_held_back))
            # With --rows the model sees fewer rows, but each of them keeps its whole history.
            self.history_events = events
            if options.max_rows is not None:
                events = events.take(slice(max(0, len(events) - options.max_rows), None))
            self.events = events
            stage.update(1.0, f"{len(events):,} rows")
        self.train, self.validation, self.test = time_split(events, self.schema.split, self.table)
        self._check_tables()
        self.columns = self._columns(options, reporter)
        self.numeric, self.categorical = model_inputs(self.schema, self.plan)
        with reporter.stage("features", "Encode"):
            assert events.labels is not None
            self.labels: NDArray[np.bool_] = events.labels
            encoder, edges = fit_encoder(
                {name: np.asarray(column)[self.train] for name, column in self.columns.items()},
                numeric=self.numeric,
                categorical=self.categorical,
                num_bins=int(DEFAULTS["num_bins"]),
                max_categories=_MAX_CATEGORIES,
            )
            self.rows = LabelledRows(encoder.apply(self.columns), torch.from_numpy(self.labels.astype(np.float32)))
            self.data = FraudData(
                encoder=encoder,
                edges=edges,
                train=self.rows.take(torch.from_numpy(self.train)),
                validation=self.rows.take(torch.from_numpy(self.validation)),
            )

    def _columns(self, options: RunOptions, reporter: Reporter) -> dict[str, Any]:
        with reporter.stage("features", "Compute features") as stage:
            sources = self.sources()
            values = [features_at(plan, source, self.events) for plan, source in sources]
            states = [{e: final_states(plan, e, source) for e in plan.entities} for plan, source in sources]
            stage.update(1.0, f"{sum(map(len, values))} features, plan {self.plan.version}")
        with reporter.stage("features", "Publish to Feast, retrieve") as stage:
            # Feast takes seconds to import, so it is imported where it is used.
            from assay_features.feast.repository import FeatureRepository, value_frames

            repository = FeatureRepository(options.feature_repository)
            history: dict[str, Any] = {}
            for (plan, source), computed, final in zip(sources, values, states, strict=True):
                ids = (
                    None if source.ids is None else dict(zip(source.ids.tolist(), source.time_us.tolist(), strict=True))
                )
                frames = value_frames(plan, self.events, computed)
                repository.publish(plan, frames, final, schema=schema_to_dict(self.schema), tables=self.tables, ids=ids)
                history |= repository.training_features(plan, self.events)
            repository.close()
            num_keys = sum(len(s.keys) for final in states for s in final.values())
            stage.update(1.0, f"{num_keys:,} keys online")
        return model_columns(self.plan, self.events, history, self.tables)

    def sources(self) -> list[tuple[FeaturePlan, Events]]:
        """Each part of the plan with the events that its features are of."""
        return sources_of(self.plan, self.schema, self.history_events)

    def _check_tables(self) -> None:
        """No vector may have learned from labels that this run measures with."""
        newest_us = int(self.events.time_us[self.train[-1]])
        for embedding in self.plan.embeddings:
            learned_us = self.tables[embedding.table].learned_until_us
            if learned_us > newest_us:
                raise InputError(
                    f"feature plan: {as_code(embedding)} was learned from events up to {_moment(learned_us)}, but the "
                    f"training period of this run ends at {_moment(newest_us)}; `assay features embed` with this "
                    "table and schema trains one that fits"
                )

    def adversary(self) -> Adversary | None:
        """Who attacks this table, if its schema says what senders can change."""
        if self._adversary is None and is_declared(self.schema.constraints):
            self._adversary = Adversary(self)
        return self._adversary

    def all_before_test(self) -> FraudData:
        """Train and validation rows together, for the last fit."""
        both = self.rows.take(slice(0, int(self.test[0])))
        return FraudData(encoder=self.data.encoder, edges=self.data.edges, train=both, validation=None)

    def search_data(self, budget_s: float) -> FraudData:
        """A sample for trials: the newest training rows, the newest validation rows."""
        train, validation = self.data.train, self.data.validation
        assert validation is not None
        wanted = int(np.clip(_SEARCH_ROWS_A_SECOND * budget_s, _MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS))
        newest = slice(max(0, len(train) - wanted), None)
        newest_held = slice(max(0, len(validation) - _SEARCH_VALIDATION_ROWS), None)
        return FraudData(
            encoder=self.data.encoder,
            edges=self.data.edges,
            train=LabelledRows(train.rows.rows(newest), train.labels[newest]),
            validation=LabelledRows(validation.rows.rows(newest_held), validation.labels[newest_held]),
        )


def sources_of(plan: FeaturePlan, schema: FraudSchema, past: Events) -> list[tuple[FeaturePlan, Events]]:
    """Each part of a plan with the events that its features are of, as known at the end of a table."""
    sources = []
    for part, reports in plan_parts(plan, schema):
        known = past if reports is None else reports.of(past)
        # What would be reported after the table ends has not been yet; it comes through the service.
        sources.append((part, known.take(known.time_us <= past.time_us[-1])))
    return sources


def _moment(time_us: int) -> str:
    return str(np.datetime64(int(time_us), "us").astype("datetime64[s]"))


def _trained_tables(plan: FeaturePlan, options: RunOptions) -> dict[str, EmbeddingTable]:
    """The tables of a plan's embeddings.

    Raises:
        InputError: the model's feature repository lacks one, or it is not of the column and width that the plan says.
        ArtifactError: one is damaged.
    """
    for embedding in plan.embeddings:
        path = table_path(options.feature_repository, embedding.table)
        if not path.is_file():
            raise InputError(
                f"feature plan: {as_code(embedding)}: {options.model_name} has no such table ({path}); "
                "`assay features embed` trains one, for the model that its --name says"
            )
    tables = load_tables(options.feature_repository, plan)
    for embedding in plan.embeddings:
        if tables[embedding.table].definition != embedding:
            raise InputError(
                f"feature plan: {as_code(embedding)}: its table is {as_code(tables[embedding.table].definition)}"
            )
    return tables


def _try_without_rows(plan: FeaturePlan, schema: FraudSchema, tables: dict[str, EmbeddingTable]) -> dict[str, Any]:
    """The columns of no rows. Whatever a cross or a ratio names has to be there; better said now than after all has
    been computed.

    Raises:
        DataError: it is not.
    """
    nothing = Events(
        time_us=np.empty(0, dtype=np.int64),
        keys={name: np.empty(0, dtype=object) for name in schema.keys},
        numbers={name: np.empty(0) for name in schema.numbers},
    )
    return model_columns(plan, nothing, {name: np.empty(0) for name in plan.numeric_names}, tables)


def time_split(events: Events, split: Split, table: LoadedTable) -> tuple[Rows, Rows, Rows]:
    """Row numbers of the three parts in order of time.

    Raises:
        DataError: a part has no rows of one class.
    """
    num_rows = len(events)
    bounds = [0, int(num_rows * split.train), int(num_rows * (split.train + split.validation)), num_rows]
    parts = [np.arange(a, b) for a, b in pairwise(bounds)]
    assert events.labels is not None
    for name, rows in zip(("train", "validation", "test"), parts, strict=True):
        positives = int(events.labels[rows].sum())
        if positives == 0 or positives == len(rows):
            raise DataError(
                f"{table.path}: split by time, the {name} part has {len(rows)} rows of which {positives} are "
                "positive; every part needs both classes. Bring more rows or change [split]."
            )
    return parts[0], parts[1], parts[2]


def tune_fraud(options: RunOptions, reporter: Reporter) -> SearchResult:
    """Search only."""
    prepared = Prepared(options, reporter)
    with tracked_run(
        options, reporter, fingerprint=prepared.table.fingerprint, plan_version=prepared.plan.version
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
    with tracked_run(options, reporter, fingerprint=fingerprint, plan_version=prepared.plan.version) as run:
        found = _search(options, reporter, run, prepared)
        fitted = fit_models(found.best, prepared, reporter, seed=options.seed)
        run.log_steps("validation.average_precision", fitted.history)
        log_routing(run, fitted.routing)
        run.log(params={"blend.net": fitted.model.parts.blend.net, "blend.trees": fitted.model.parts.blend.trees})
        model = fitted.model
        if options.refit_on_all:
            model = refit(fitted, found.best, prepared, reporter, seed=options.seed)
        with reporter.stage("evaluate", "Score the test period"):
            probability = model.score(prepared.rows.rows.rows(_slice(prepared.test))).probability
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
        champion, champion_version = champion_metric(
            options,
            registry,
            fingerprint=fingerprint,
            measure=lambda folder: _validation_ap(folder, options.feature_repository, prepared),
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
        )
        companions = {
            "features": {
                "schema": schema_to_dict(prepared.schema),
                "plan": prepared.plan.to_dict(),
                "repository": options.model_name,
            },
            "rules": rules_to_dict(options.rules),
            "choices": possible_choices(prepared).to_dict(),
        }
        number, alias = register_version(
            options,
            reporter,
            run,
            registry,
            save=lambda folder: model.save(folder, companions),
            signature=_signature(prepared),
            gate=gate,
            metrics={**metrics, "validation_ece": fitted.validation_ece, "num_parameters": model.num_parameters},
            baselines=baselines,
        )
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


def _slice(rows: Rows) -> slice:
    return slice(int(rows[0]), int(rows[-1]) + 1)


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


def fit_models(params: Mapping[str, Any], prepared: Prepared, reporter: Reporter, *, seed: int) -> FittedModels:
    """Net and trees on the training rows; blended, calibrated and thresholded on the validation rows.

    Where the schema says what senders can change, both are trained on other forms of the frauds too, and the validation
    frauds are attacked.
    """
    held = prepared.rows.take(_slice(prepared.validation))
    labels = prepared.labels[prepared.validation]
    generator = np.random.default_rng(seed)
    data, adversary = prepared.data, prepared.adversary()
    if adversary is not None:
        with reporter.stage("train", "Other forms of frauds"):
            data = replace(data, copies=adversary.copies(prepared.train, generator))
    with reporter.stage("train", "Train the MoE net") as stage:
        num_epochs = num_final_epochs(params, len(data.train))
        net, fitted, routing = train_net(
            params, data, num_epochs=num_epochs, seed=seed,
            on_epoch=lambda epoch, metric: stage.update(epoch / num_epochs, f"validation AP {metric:.3f}"),
        )  # fmt: skip
        stage.update(1.0, f"validation AP {fitted.best_metric:.3f} at epoch {fitted.best_epoch}")
    numbers = held.rows.numbers()
    with reporter.stage("train", "Train the trees") as stage:
        rows = tree_rows(data)
        if data.copies is not None:
            rows = with_worst_forms(rows, data.copies, seed=seed)
        trees = train_trees(rows, seed=seed, held=(numbers, labels), on_progress=stage.update).trees
        stage.update(1.0, f"{len(trees)} trees")
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
            robustness = adversary.attack(model, prepared.validation, generator)
            stage.update(1.0, f"recall {robustness.recall:.3f}, attacked {robustness.robust_recall:.3f}")
    return FittedModels(
        model, reached, expected_calibration_error(probability, labels),
        tolerated_calibration_error(probability, seed=0), robustness, fitted.history, fitted.best_epoch, routing,
    )  # fmt: skip


def refit(
    fitted: FittedModels, params: Mapping[str, Any], prepared: Prepared, reporter: Reporter, *, seed: int
) -> FraudModel:
    """The same recipe on train and validation rows; blend, calibration and threshold stay as they were chosen.

    The net takes as many passes as were best before; a part that the blend does not use is not trained again.
    """
    data, adversary = prepared.all_before_test(), prepared.adversary()
    parts = fitted.model.parts
    if adversary is not None:
        both = np.concatenate([prepared.train, prepared.validation])
        data = replace(data, copies=adversary.copies(both, np.random.default_rng(seed)))
    net, trees = parts.net, parts.trees
    if parts.blend.net:
        with reporter.stage("refit", "Refit the net on train + validation") as stage:
            num_epochs = fitted.best_epoch
            net = train_net(
                params, data, num_epochs=num_epochs, seed=seed,
                on_epoch=lambda epoch, _: stage.update(epoch / num_epochs, f"epoch {epoch} of {num_epochs}"),
            ).net  # fmt: skip
    if parts.blend.trees:
        with reporter.stage("refit", "Refit the trees on train + validation") as stage:
            assert trees is not None
            rows = tree_rows(data)
            if data.copies is not None:
                rows = with_worst_forms(rows, data.copies, seed=seed)
            trees = train_trees(rows, seed=seed, num_trees=refit_size(trees), on_progress=stage.update).trees
    return fitted.model.changed(net=net, trees=trees)


def num_final_epochs(params: Mapping[str, Any], num_rows: int) -> int:
    """A few passes over a large table, more over a small one."""
    return min(_MAX_EPOCHS, max(_FINAL_EPOCHS, -(-_MIN_STEPS // num_batches(params, num_rows))))


def _validation_ap(folder: Path, repository: Path, prepared: Prepared) -> float:
    """A registered model on the current validation rows, with the features that it was trained on."""
    model = FraudModel.load(folder)
    plan = FeaturePlan.from_dict(read_json(folder, "features")["plan"])
    if plan == prepared.plan:
        columns = prepared.columns
    else:
        check_plan(plan, prepared.schema)
        history = features_at(plan, prepared.history_events, prepared.events, reports=reports_of(prepared.schema))
        columns = model_columns(plan, prepared.events, history, load_tables(repository, plan))
    held = {name: np.asarray(columns[name])[prepared.validation] for name in model.feature_names if name in columns}
    return average_precision(prepared.labels[prepared.validation], model.logits(model.encode(held)))


def _signature(prepared: Prepared) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    inputs: list[ColSpec | TensorSpec] = [ColSpec(DataType.double, name, required=False) for name in prepared.numeric]
    inputs += [ColSpec(DataType.string, name, required=False) for name in prepared.categorical]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec(DataType.double, "probability")]))
