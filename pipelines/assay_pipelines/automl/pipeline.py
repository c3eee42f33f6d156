"""AutoML: table → cleaned and typed → features → search over families → ensemble → one fast model → registry.

The budget is kept as a whole: reading counts, the search ends at a part of it, the last training takes what is left.
Nothing is chosen by the test part.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_features.schema import FraudSchema, TableSchema
from assay_platform.errors import InputError, WorkError
from assay_platform.models.calibration import fit_platt
from assay_platform.models.decisions import Policy
from assay_platform.models.encoding import typical_row
from assay_platform.models.fraud import Blend, FraudModel, FraudModelParts
from assay_platform.tracking import GateReport
from numpy.typing import NDArray

from assay_pipelines.automl.card import Card, model_card
from assay_pipelines.automl.ensemble import Ensemble, select
from assay_pipelines.automl.families import DEFAULT, FAMILIES, PORTFOLIO, Known, available, flags, space_of
from assay_pipelines.automl.prepare import Learnable, prepare
from assay_pipelines.automl.student import Studied, graduate, lightest_trees, plan, study, targets_of
from assay_pipelines.automl.trials import Candidate, TrialData, candidates, folds_of, objective
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.adversary import Robustness
from assay_pipelines.fraud.evaluate import (
    average_precision,
    expected_calibration_error,
    fraud_metrics,
    tolerated_calibration_error,
)
from assay_pipelines.fraud.pipeline import companions_of, signature_of, validation_ap
from assay_pipelines.gate import check_candidate
from assay_pipelines.options import RunOptions, RunReport
from assay_pipelines.tracking import champion_metric, open_registry, register_version, run_search, tracked_run

_METRIC = "average_precision"
# Parts of the budget at whose end the search, the study and the last training end.
_SEARCH_END, _STUDY_END, _TRAINING_END = 0.58, 0.72, 0.95
_MIN_S = 5.0
# A trial sees so many rows that eight trainings of boosted trees a core fit into the search; measured, rows times
# columns times trees a second and core.
_CELLS_A_SECOND, _TYPICAL_TREES, _TRIALS_A_CORE = 30e6, 150, 8
_MIN_FIT_ROWS = 5_000
# A trial that takes more of the search than this is ended with what it has.
_LONGEST_TRIAL = 0.25


class _Chosen(NamedTuple):
    """The model and all that it came from. studied: such trees on rows that they had not seen."""

    model: FraudModel
    found: list[Candidate]
    ensemble: Ensemble | None
    studied: Studied
    num_fit_rows: int


def run_automl(options: RunOptions, reporter: Reporter) -> tuple[RunReport, str]:
    """The whole way, through to a registered version. Returns the report and the model card."""
    began = time.monotonic()
    learnable = prepare(options, reporter)
    num_rows = len(learnable.rows)
    with tracked_run(
        options,
        reporter,
        fingerprint=learnable.fingerprint,
        plan_version="" if learnable.events is None else learnable.events.plan.version,
        num_rows=num_rows,
    ) as run:
        chosen = _search_and_train(options, reporter, run, learnable, began)
        model = chosen.model
        with reporter.stage("evaluate", "Score the test part") as stage:
            tested = learnable.rows.take(learnable.tested)
            model.score(tested.rows)  # the first call compiles
            scoring = time.perf_counter()
            probability = model.score(tested.rows).probability
            rows_a_second = len(probability) / (time.perf_counter() - scoring)
            metrics = fraud_metrics(probability, flags(tested), threshold=model.policy.decline_from)
            metrics["rows_a_second"] = rows_a_second
            stage.update(1.0, f"AUC {metrics['auc']:.4f}, {rows_a_second:,.0f} rows a second")
        robustness = _attacked(options, reporter, learnable, model)
        if robustness is not None:
            metrics |= {"robust_auc": robustness.robust_auc, "robust_recall": robustness.robust_recall}
        registry = open_registry(options.config)
        gate = _gate(options, reporter, learnable, chosen, robustness)
        card = Card(
            name=options.model_name, data=options.data, schema=options.schema, learnable=learnable,
            found=chosen.found, ensemble=chosen.ensemble, studied=chosen.studied, num_fit_rows=chosen.num_fit_rows,
            model=model, metrics=metrics, gate=gate, budget_s=options.budget_s,
            seed=options.seed,
        )  # fmt: skip
        text = model_card(card)
        run.log_text("model-card.md", text)
        run.log_json("leaderboard.json", {"trials": [_plain(one) for one in chosen.found]})
        companions = _companions(options, learnable, chosen)
        version, alias = register_version(
            options,
            reporter,
            run,
            registry,
            save=lambda folder: _save(model, folder, companions, text),
            signature=signature_of(learnable.encoder, as_written=learnable.events is None),
            gate=gate,
            metrics={**metrics, "num_parameters": model.num_parameters},
            baselines={},
        )
    report = RunReport(
        application=options.application,
        data=options.data,
        rows=num_rows,
        model_name=options.model_name,
        version=version,
        alias=alias,
        gate=gate.summary,
        metrics=metrics,
        baselines={},
        timings_s={**reporter.timings_s, "total": time.monotonic() - began},
        mlflow_run_id=run.run_id,
        notes=learnable.notes,
    )
    return report, text


def _search_and_train(options: RunOptions, reporter: Reporter, run: Any, learnable: Learnable, began: float) -> _Chosen:
    def left_s(share: float) -> float:
        return max(_MIN_S, share * options.budget_s - (time.monotonic() - began))

    dev = learnable.rows.take(learnable.learned)
    labels, threads = flags(dev), len(os.sched_getaffinity(0))
    search_s = left_s(_SEARCH_END)
    folds = folds_of(
        learnable.num_train, learnable.num_validation, in_time=learnable.in_time, starts=learnable.starts, labels=labels
    )
    num_fit_rows = _num_fit_rows(search_s / len(folds), len(learnable.encoder.names))
    folds = tuple(fold.at_most(num_fit_rows) for fold in folds)
    families = available()
    if families != FAMILIES:
        reporter.line("CatBoost is not installed, so it is not among the families: pip install 'assay[automl]'")
    space = space_of(families)
    known = Known(encoder=learnable.encoder, edges=learnable.edges)
    found: list[Candidate] = []
    with _answers(options, learnable.problem) as folder:
        fit_s = _LONGEST_TRIAL * search_s / len(folds)
        try:
            trials = run_search(
                replace(options, budget_s=search_s),
                reporter,
                run,
                objective=objective,
                data=TrialData(known=known, rows=dev, folds=folds, folder=folder, fit_s=fit_s, seed=options.seed),
                space=space,
                defaults=DEFAULT,
                max_epochs=1,
                portfolio=[{**DEFAULT, **point} for point in PORTFOLIO if point["family"] in families],
                num_parallel=threads,
                problem=learnable.problem,
            ).trials
            found = candidates(trials, space, folder, len(labels))
        except WorkError as error:
            reporter.line(f"no trial came to an end, the default trees are trained: {error}")
    ensemble = None
    if found:
        with reporter.stage("ensemble", "Select an ensemble") as stage:
            ensemble = select(found, labels, folds)
            stage.update(1.0, f"{len(ensemble.members)} of {len(found)} trials, AUC {ensemble.score:.4f}")
    best = lightest_trees(found)
    numbers = dev.rows.numbers()
    with reporter.stage("distil", "Trees on rows they have not seen") as stage:
        studied = study(
            best, numbers, labels, folds, seed=options.seed, threads=threads, seconds=left_s(_STUDY_END),
            on_progress=stage.update,
        )  # fmt: skip
        stage.update(1.0, f"AUC {studied.score:.4f}, {studied.num_trees} trees")
    with reporter.stage("distil", "Distil into one model") as stage:
        targets = labels.astype(np.float64) if ensemble is None else targets_of(labels, ensemble.logits)
        planned = plan(best, studied, targets, seconds=left_s(_TRAINING_END))
        if planned.is_cut:
            # What a hurried training gives is seen on rows that it has not seen, too; that takes a part of the time.
            share = len(targets) / (len(targets) + sum(len(fold.fit) for fold in folds))
            planned = plan(best, studied, targets, seconds=share * left_s(_TRAINING_END))
            studied = study(
                best, numbers, labels, folds, seed=options.seed, threads=threads, planned=planned,
                seconds=(1 - share) * left_s(_TRAINING_END),
            )  # fmt: skip
        trees = graduate(
            best, numbers, targets, planned, seed=options.seed, threads=threads, seconds=left_s(_TRAINING_END),
            on_progress=stage.update,
        )  # fmt: skip
        hurried = ", fewer and larger steps for want of time" if planned.is_cut else ""
        stage.update(1.0, f"{len(trees)} trees{hurried}")
    held = ~np.isnan(studied.logits)
    calibration = fit_platt(studied.logits[held], labels[held])
    schema = options.schema
    policy = Policy()
    if isinstance(schema, FraudSchema):
        policy = Policy.fit(schema.decisions, calibration.probability(studied.logits[held]), labels[held])
    parts = FraudModelParts(
        encoder=learnable.encoder,
        reference=typical_row(dev.rows.rows(torch.from_numpy(np.flatnonzero(~labels)))),
        trees=trees,
        blend=Blend(net=0.0, trees=1.0),
        calibration=calibration,
        policy=policy,
        amount=schema.amount if isinstance(schema, FraudSchema) else None,
    )
    return _Chosen(FraudModel(parts), found, ensemble, studied, min(num_fit_rows, len(folds[-1].fit)))


def _num_fit_rows(fold_s: float, num_columns: int) -> int:
    cells = fold_s / _TRIALS_A_CORE * _CELLS_A_SECOND
    return max(_MIN_FIT_ROWS, int(cells / (num_columns * _TYPICAL_TREES)))


@contextmanager
def _answers(options: RunOptions, problem: str) -> Iterator[Path]:
    """Where trials keep their answers: below ASSAY_HOME, which all nodes share; for good, if the search has a name."""
    folder = options.config.paths.searches
    if options.search_name is not None:
        yield folder / f"{options.model_name}-{options.search_name}-answers" / problem
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="answers-", dir=folder) as scratch:
        yield Path(scratch)


def _attacked(options: RunOptions, reporter: Reporter, learnable: Learnable, model: FraudModel) -> Robustness | None:
    """What feasible changes do to the validation frauds, if the schema says what senders can change."""
    events = learnable.events
    adversary = None if events is None else events.adversary()
    if events is None or adversary is None:
        return None
    with reporter.stage("attack", "Attack the validation frauds") as stage:
        found = adversary.attack(model, events.validation, np.random.default_rng(options.seed))
        stage.update(1.0, f"recall {found.recall:.3f}, attacked {found.robust_recall:.3f}")
    return found


def _gate(
    options: RunOptions, reporter: Reporter, learnable: Learnable, chosen: _Chosen, robustness: Robustness | None
) -> GateReport:
    """As every fraud model: better than the champion on rows that it was not trained on, calibrated, robust."""
    labels = flags(learnable.rows.take(learnable.learned))
    logits = chosen.studied.logits
    seen: NDArray[np.bool_] = ~np.isnan(logits)
    if learnable.events is not None:
        seen[: learnable.num_train] = False  # a champion is measured on the validation part
    probability = chosen.model.calibration.probability(logits[seen])
    already_learned: list[str] = []

    def measure(folder: Path) -> float:
        events = learnable.events
        if events is not None:
            return validation_ap(folder, options.feature_repository, events, already_learned)
        already_learned.append(
            "the champion comes from another table, schema or split, and may have learned from rows of this one, so a "
            "person has to decide"
        )
        raise InputError(already_learned[0])

    champion, champion_version = champion_metric(
        options, open_registry(options.config), fingerprint=learnable.fingerprint, measure=measure, reporter=reporter
    )
    return check_candidate(
        metric=_METRIC,
        candidate=average_precision(labels[seen], probability),
        champion=champion,
        champion_version=champion_version,
        baselines={},
        expected_baselines=(),
        calibration_error=expected_calibration_error(probability, labels[seen]),
        tolerated_error=tolerated_calibration_error(probability, seed=0),
        recall=None if robustness is None else robustness.recall,
        robust_recall=0.0 if robustness is None else robustness.robust_recall,
        also_failed=tuple(already_learned),
    )


def _companions(options: RunOptions, learnable: Learnable, chosen: _Chosen) -> dict[str, dict[str, Any]]:
    training = {**DEFAULT, **(chosen.found[0].params if chosen.found else {})}
    events = learnable.events
    if events is not None:
        learned_until_us = int(events.events.time_us[events.validation[-1]])
        return companions_of(events, options, chosen.model, training=training, learned_until_us=learned_until_us)
    assert isinstance(options.schema, TableSchema)
    return {"features": {"schema": asdict(options.schema)}, "training": training}


def _save(model: FraudModel, folder: Path, companions: dict[str, dict[str, Any]], card: str) -> None:
    model.save(folder, companions)
    (folder / "model-card.md").write_text(card, encoding="utf-8")


def _plain(one: Candidate) -> dict[str, Any]:
    return {"params": one.params, "auc": one.score, "seconds": one.seconds, "sizes": list(one.sizes)}
