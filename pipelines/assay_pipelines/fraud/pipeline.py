"""The fraud pipeline: table → features through Feast → search → train → calibrate → compare → gate → registry."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assay_features.batch import features_at, final_states
from assay_features.definitions import FeaturePlan, as_code
from assay_features.embeddings import EmbeddingTable, load_tables, table_path
from assay_features.events import Events
from assay_features.row_features import model_columns
from assay_features.schema import FraudSchema, Split, schema_to_dict
from assay_platform.errors import DataError, InputError
from assay_platform.models.artifact import read_json
from assay_platform.models.calibration import fit_platt, threshold_at_fpr
from assay_platform.models.fraud import FraudModel, fit_encoder
from assay_platform.tuning.search import SearchResult
from numpy.typing import NDArray

from assay_pipelines.console import Reporter
from assay_pipelines.datasets.table import LoadedTable, load_table
from assay_pipelines.fraud.baseline import tree_frame, tuned_lightgbm
from assay_pipelines.fraud.evaluate import (
    TARGET_FPR,
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
    num_batches,
    objective,
    train_net,
)
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

_MAX_CATEGORIES = 2000
# A trial sees the newest rows, as many as let a few trials finish within the budget.
_SEARCH_ROWS_A_SECOND, _MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS = 300, 10_000, 60_000
_SEARCH_VALIDATION_ROWS = 20_000
_SEARCH_EPOCHS, _FINAL_EPOCHS = 3, 6
# A small table needs more passes for the same number of steps.
_MIN_STEPS, _MAX_EPOCHS = 600, 30
_METRIC = "average_precision"

Rows = NDArray[np.intp]


class Prepared:
    """Everything known before any model is trained."""

    def __init__(self, options: RunOptions, reporter: Reporter) -> None:
        assert isinstance(options.schema, FraudSchema)
        self.schema = options.schema
        self.plan = options.plan or default_plan(self.schema)
        check_plan(self.plan, self.schema)
        self.tables = _trained_tables(self.plan, options)
        _try_without_rows(self.plan, self.schema, self.tables)
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
        # Feast takes seconds to import, so it is imported where it is used.
        with reporter.stage("features", "Compute features") as stage:
            values = features_at(self.plan, self.history_events, self.events)
            states = {entity: final_states(self.plan, entity, self.history_events) for entity in self.plan.entities}
            stage.update(1.0, f"{len(values)} features, plan {self.plan.version}")
        with reporter.stage("features", "Publish to Feast, retrieve") as stage:
            from assay_features.feast.repository import FeatureRepository, value_frames

            repository = FeatureRepository(options.feature_repository)
            past = self.history_events
            ids = None if past.ids is None else dict(zip(past.ids.tolist(), past.time_us.tolist(), strict=True))
            frames = value_frames(self.plan, self.events, values)
            repository.publish(
                self.plan, frames, states, schema=schema_to_dict(self.schema), tables=self.tables, ids=ids
            )
            history = repository.training_features(self.plan, self.events)
            repository.close()
            num_keys = sum(len(s.keys) for s in states.values())
            stage.update(1.0, f"{num_keys:,} keys online")
        return model_columns(self.plan, self.events, history, self.tables)

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

    def search_data(self, budget_s: float) -> FraudData:
        """A sample for trials: the newest training rows, the newest validation rows."""
        train, validation = self.data.train, self.data.validation
        wanted = int(np.clip(_SEARCH_ROWS_A_SECOND * budget_s, _MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS))
        newest = slice(max(0, len(train) - wanted), None)
        newest_held = slice(max(0, len(validation) - _SEARCH_VALIDATION_ROWS), None)
        return FraudData(
            encoder=self.data.encoder,
            edges=self.data.edges,
            train=LabelledRows(train.rows.rows(newest), train.labels[newest]),
            validation=LabelledRows(validation.rows.rows(newest_held), validation.labels[newest_held]),
        )


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


def _try_without_rows(plan: FeaturePlan, schema: FraudSchema, tables: dict[str, EmbeddingTable]) -> None:
    """Whatever a cross or a ratio names has to be there; better said now than after all has been computed.

    Raises:
        DataError: it is not.
    """
    nothing = Events(
        time_us=np.empty(0, dtype=np.int64),
        keys={name: np.empty(0, dtype=object) for name in schema.keys},
        numbers={name: np.empty(0) for name in schema.numbers},
    )
    model_columns(plan, nothing, {name: np.empty(0) for name in plan.numeric_names}, tables)


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
        with reporter.stage("train", "Train the MoE model") as stage:
            steps = num_batches(found.best, len(prepared.data.train))
            num_epochs = min(_MAX_EPOCHS, max(_FINAL_EPOCHS, -(-_MIN_STEPS // steps)))
            net, fitted, routing = train_net(
                found.best,
                prepared.data,
                num_epochs=num_epochs,
                seed=options.seed,
                on_epoch=lambda epoch, metric: stage.update(epoch / num_epochs, f"validation AP {metric:.3f}"),
            )
            stage.update(1.0, f"validation AP {fitted.best_metric:.3f} at epoch {fitted.best_epoch}")
        run.log_steps("validation.average_precision", fitted.history)
        log_routing(run, routing)
        model, validation_ece, tolerated_ece = _calibrated(as_model(net, found.best, prepared.data), prepared)
        with reporter.stage("evaluate", "Score the test period"):
            probability = model.score(prepared.rows.rows.rows(_slice(prepared.test))).probability
            metrics = fraud_metrics(probability, prepared.labels[prepared.test], threshold=model.threshold)
        with reporter.stage("baseline", "Tune and train LightGBM") as stage:
            baseline = tuned_lightgbm(
                tree_frame(prepared.columns, prepared.numeric, prepared.categorical, prepared.train),
                (*prepared.schema.numeric, *prepared.schema.categorical),
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
            candidate=fitted.best_metric,
            champion=champion,
            champion_version=champion_version,
            baselines=baselines,
            expected_baselines=("lightgbm",),
            calibration_error=validation_ece,
            tolerated_error=tolerated_ece,
        )
        companions = {
            "features": {
                "schema": schema_to_dict(prepared.schema),
                "plan": prepared.plan.to_dict(),
                "repository": options.model_name,
            }
        }
        number, alias = register_version(
            options,
            reporter,
            run,
            registry,
            save=lambda folder: model.save(folder, companions),
            signature=_signature(prepared),
            gate=gate,
            metrics={**metrics, "validation_ece": validation_ece, "num_parameters": model.num_parameters},
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


def _calibrated(model: FraudModel, prepared: Prepared) -> tuple[FraudModel, float, float]:
    """Calibrate on validation and put the threshold where it flags 0.3 % of its legitimate rows.

    Also returns the calibration error and how much of it chance explains.
    """
    logits = model.logits(prepared.rows.rows.rows(_slice(prepared.validation)))
    labels = prepared.labels[prepared.validation]
    calibration = fit_platt(logits, labels)
    probability = calibration.probability(logits)
    threshold = threshold_at_fpr(probability, labels, TARGET_FPR)
    error = expected_calibration_error(probability, labels)
    tolerated = tolerated_calibration_error(probability, seed=0)
    return model.calibrated(calibration, threshold, TARGET_FPR), error, tolerated


def _validation_ap(folder: Path, repository: Path, prepared: Prepared) -> float:
    """A registered model on the current validation rows, with the features that it was trained on."""
    from sklearn.metrics import average_precision_score

    model = FraudModel.load(folder)
    plan = FeaturePlan.from_dict(read_json(folder, "features")["plan"])
    if plan == prepared.plan:
        columns = prepared.columns
    else:
        check_plan(plan, prepared.schema)
        history = features_at(plan, prepared.history_events, prepared.events)
        columns = model_columns(plan, prepared.events, history, load_tables(repository, plan))
    held = {name: np.asarray(columns[name])[prepared.validation] for name in model.feature_names if name in columns}
    return float(average_precision_score(prepared.labels[prepared.validation], model.logits(model.encode(held))))


def _signature(prepared: Prepared) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    inputs: list[ColSpec | TensorSpec] = [ColSpec(DataType.double, name, required=False) for name in prepared.numeric]
    inputs += [ColSpec(DataType.string, name, required=False) for name in prepared.categorical]
    return ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec(DataType.double, "probability")]))
