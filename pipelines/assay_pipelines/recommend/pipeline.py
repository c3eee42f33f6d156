"""The recommendation pipeline: table → features through Feast → search → graph encoder → MoE ranker → compare →
gate → registry.
"""

# U users, I items, M moments at which store features are read, F store features

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from assay_features.batch import features_at, final_states
from assay_features.events import Events
from assay_features.items import item_plan, ranker_columns
from assay_features.schema import RecommendSchema, schema_to_dict
from assay_platform.models.recommender import (
    GraphScorer,
    ItemFacts,
    ItemVectors,
    PairRanker,
    RankerConfig,
    Recommender,
    item_facts,
)
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.tuning.search import SearchResult
from numpy.typing import NDArray

from assay_pipelines.console import Reporter
from assay_pipelines.datasets.table import load_items, load_table
from assay_pipelines.gate import check_candidate
from assay_pipelines.options import RunOptions, RunReport
from assay_pipelines.recommend.baseline import measure_baselines
from assay_pipelines.recommend.evaluate import DEPTH, ranking_metrics
from assay_pipelines.recommend.split import Parts, split_interactions
from assay_pipelines.recommend.train import (
    DEFAULTS,
    SPACE,
    EncoderData,
    Holdout,
    RankerTraining,
    item_vectors,
    make_snapshots,
    objective,
    procrustes,
    train_encoder,
    train_ranker,
)
from assay_pipelines.tracking import (
    champion_metric,
    log_routing,
    open_registry,
    register_version,
    run_search,
    tracked_run,
)

MAX_ITEMS = 8000
_NUM_FOLDS, _NUM_SNAPSHOTS = 5, 4
_TEMPORAL_CUTS = (0.7, 0.85)
_DAY_US = 86_400_000_000
_METRIC = "ndcg_at_10"

Rows = NDArray[np.intp]


class _StoreFeatures(NamedTuple):
    """Item features as the store had them at each moment."""

    moments_us: NDArray[np.int64]  # (M,), ascending; the last is the end of the events
    values_MIF: NDArray[np.float32]


class Prepared:
    """Everything known before any model is trained."""

    def __init__(self, options: RunOptions, reporter: Reporter) -> None:
        assert isinstance(options.schema, RecommendSchema)
        self.schema = options.schema
        self._options, self._reporter = options, reporter
        with reporter.stage("load", "Read and check the table") as stage:
            self.table = load_table(options.table, self.schema)
            events = self.table.events
            if options.max_rows is not None:
                events = events.take(slice(max(0, len(events) - options.max_rows), None))
            self.num_rows = len(events)
            counts = pd.Series(events.keys[self.schema.item]).value_counts()
            if len(counts) > MAX_ITEMS:
                kept = set(counts.index[:MAX_ITEMS])
                events = events.take(np.flatnonzero([item in kept for item in events.keys[self.schema.item]]))
                reporter.line(f"{len(counts):,} items; the {MAX_ITEMS:,} most taken are kept")
            self.events = events
            self.user, users = pd.factorize(events.keys[self.schema.user])
            self.item, items = pd.factorize(events.keys[self.schema.item])
            self.users, self.items = [str(u) for u in users], [str(i) for i in items]
            stage.update(1.0, f"{len(events):,} rows, {len(users):,} users, {len(items):,} items")
        self.parts: Parts = split_interactions(self.user, self.schema.split, seed=options.seed)
        self.train_rows: Rows = np.sort(np.r_[self.parts.fit, self.parts.validation])
        self.fit = self.matrix(self.parts.fit)
        self.train = self.matrix(self.train_rows)
        self.validation = self._wanted(self.parts.validation, self.fit)
        self.test = self._wanted(self.parts.test, self.train)
        table = self.schema.items
        known = load_items(table, options.schema_folder) if table is not None else {}
        self.facts: ItemFacts = item_facts(
            self.items,
            known,
            text=table.text if table else (),
            categorical=table.categorical if table else (),
        )
        self.plan = item_plan(self.schema)

    def matrix(self, rows: Rows) -> sp.csr_matrix:
        """(U, I) 0/1 matrix of some interactions."""
        shape = (len(self.users), len(self.items))
        counts = sp.csr_matrix((np.ones(len(rows), dtype=np.float32), (self.user[rows], self.item[rows])), shape)
        counts.data[:] = 1.0
        counts.sort_indices()
        return counts

    def _wanted(self, rows: Rows, seen: sp.csr_matrix) -> sp.csr_matrix:
        """What a list should contain: interactions of a later part, without repeats unless they count."""
        wanted = self.matrix(rows)
        if self.schema.split.repeats:
            return wanted
        wanted = sp.csr_matrix(wanted - wanted.multiply(seen))
        wanted.eliminate_zeros()
        return wanted

    def holdouts(self, store: _StoreFeatures) -> list[Holdout]:
        """What the ranker learns from, out of the fitting part alone."""
        rows = self.parts.fit
        if self.schema.split.protocol != "random":
            return [self._cut(rows, fraction, store) for fraction in _TEMPORAL_CUTS]
        fold = np.random.default_rng(self._options.seed).integers(0, _NUM_FOLDS, len(rows))
        return [self._holdout(rows[fold != k], rows[fold == k], store) for k in range(_NUM_SNAPSHOTS)]

    def _cut(self, rows: Rows, fraction: float, store: _StoreFeatures) -> Holdout:
        cut = int(len(rows) * fraction)
        return self._holdout(rows[:cut], rows[cut : cut + max(1, len(rows) // 6)], store)

    def _holdout(self, seen: Rows, labels: Rows, store: _StoreFeatures) -> Holdout:
        """Store features of a user are read on the day of its first label, so no label is in them."""
        seen_matrix = self.matrix(seen)
        first = pd.Series(self.events.time_us[labels]).groupby(self.user[labels]).min()
        moment = np.full(len(self.users), len(store.moments_us) - 1, dtype=np.int64)
        at = np.searchsorted(store.moments_us, first.to_numpy() // _DAY_US * _DAY_US, side="right") - 1
        moment[first.index.to_numpy()] = np.maximum(at, 0)
        return Holdout(seen_matrix, self._wanted(labels, seen_matrix), moment)

    def store_features(self, rows: Rows, *, every_day: bool) -> _StoreFeatures:
        """Publish the features of these interactions, and read them back through Feast at each moment."""
        events = self.events.take(rows)
        with self._reporter.stage("features", "Compute, publish, retrieve") as stage:
            from assay_features.feast.repository import FeatureRepository, value_frames

            end_us = int(events.time_us.max()) + 1
            days = np.unique(events.time_us // _DAY_US) * _DAY_US if every_day else np.empty(0, dtype=np.int64)
            moments = np.r_[days, end_us].astype(np.int64)
            keys = np.tile(np.asarray(self.items, dtype=object), len(moments))
            spine = Events(time_us=np.repeat(moments, len(self.items)), keys={self.schema.item: keys})
            item_only = type(self.plan)(self.plan.of_entity(self.schema.item))
            values = features_at(item_only, events, spine)
            states = {entity: final_states(self.plan, entity, events) for entity in self.plan.entities}
            repository = FeatureRepository(self._options.feature_repository)
            frames = value_frames(item_only, spine, values)
            repository.publish(self.plan, frames, states, schema=schema_to_dict(self.schema))
            history = repository.training_features(self.plan, spine)
            repository.close()
            stage.update(1.0, f"{len(spine):,} item moments, plan {self.plan.version}")
        shape = (len(moments), len(self.items), len(self.plan.numeric_names))
        return _StoreFeatures(moments, ranker_columns(self.plan, history).reshape(shape))


def tune_recommend(options: RunOptions, reporter: Reporter) -> SearchResult:
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
        data=EncoderData(fit=prepared.fit, validation=prepared.validation, repeats=prepared.schema.split.repeats),
        space=SPACE,
        defaults={**DEFAULTS, "seed": options.seed},
        max_epochs=int(DEFAULTS["num_epochs"]),
    )


def run_recommend(options: RunOptions, reporter: Reporter) -> RunReport:
    """The whole pipeline, through to a registered version."""
    prepared = Prepared(options, reporter)
    repeats = prepared.schema.split.repeats
    # Rows are part of the identity: another limit or split is another validation part.
    fingerprint = f"{prepared.table.fingerprint}:{len(prepared.events)}:{options.seed}"
    with tracked_run(options, reporter, fingerprint=fingerprint, plan_version=prepared.plan.version) as run:
        found = _search(options, reporter, run, prepared)
        store = prepared.store_features(prepared.parts.fit, every_day=True)
        with reporter.stage("train", "Train the graph encoder") as stage:
            encoder = train_encoder(prepared.fit, found.best, seed=options.seed)
            main = item_vectors(encoder, prepared.fit)
        candidates = _train_rankers(prepared, found.best, main, store, options, reporter)
        with reporter.stage("evaluate", "Choose on validation") as stage:
            measured = {
                name: _measure(
                    _recommender(prepared, chosen, prepared.fit, main, store),
                    prepared,
                    prepared.fit,
                    prepared.validation,
                )[_METRIC]
                for name, chosen in candidates.items()
            }
            best = max(measured, key=lambda name: measured[name])
            stage.update(1.0, "NDCG@10 " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))
        run.log(
            params={"ranker": best},
            metrics={f"validation.ndcg_at_10.{name.replace(' ', '_')}": value for name, value in measured.items()},
        )
        chosen = candidates[best]
        if chosen.routing is not None:
            log_routing(run, chosen.routing)

        def refitted(graph: sp.csr_matrix, rows: Rows) -> Recommender:
            features = prepared.store_features(rows, every_day=False)
            with reporter.stage("train", "Refit the graph encoder"):
                again = train_encoder(graph, found.best, seed=options.seed)
                turn = procrustes(item_vectors(again, graph).item_ID, main.item_ID)
                return _recommender(prepared, chosen, graph, item_vectors(again, graph, turn), features)

        model = refitted(prepared.train, prepared.train_rows)
        with reporter.stage("evaluate", "Rank the test part"):
            metrics = _measure(model, prepared, prepared.train, prepared.test)
        with reporter.stage("baseline", "EASE and popularity") as stage:
            baselines = measure_baselines(
                prepared.fit,
                prepared.validation,
                prepared.train,
                prepared.test,
                repeats=repeats,
                on_progress=stage.update,
            )
        if options.refit_on_all:
            everything = np.arange(len(prepared.events))
            model = refitted(prepared.matrix(everything), everything)
        registry = open_registry(options.config)
        champion, champion_version = champion_metric(
            options,
            registry,
            fingerprint=fingerprint,
            measure=lambda folder: _champion_ndcg(folder, prepared),
            reporter=reporter,
        )
        gate = check_candidate(
            metric=_METRIC,
            candidate=measured[best],
            champion=champion,
            champion_version=champion_version,
            baselines=baselines,
            expected_baselines=("ease", "popularity"),
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
            signature=_signature(),
            gate=gate,
            metrics={**metrics, "num_parameters": model.num_parameters},
            baselines=baselines,
        )
    return RunReport(
        application="recommend",
        data=options.data,
        rows=prepared.num_rows,
        model_name=options.model_name,
        version=number,
        alias=alias,
        gate=gate.summary,
        metrics=metrics,
        baselines=baselines,
        timings_s=reporter.timings_s,
        mlflow_run_id=run.run_id,
    )


class _Ranking(NamedTuple):
    """One way to order candidates."""

    config: RankerConfig
    ranker: PairRanker
    routing: RoutingMonitor | None  # of its training; None if it is not used


def _train_rankers(
    prepared: Prepared,
    params: dict[str, Any],
    main: ItemVectors,
    store: _StoreFeatures,
    options: RunOptions,
    reporter: Reporter,
) -> dict[str, _Ranking]:
    """The graph alone, the MoE ranker, and the ranker with store features; validation decides between them."""
    plain = RankerConfig(vector_width=int(DEFAULTS["width"]))
    full = RankerConfig(vector_width=int(DEFAULTS["width"]), num_store_features=len(prepared.plan.numeric_names))
    with reporter.stage("train", "Encoders of the ranker's folds") as stage:
        snapshots = make_snapshots(
            main,
            prepared.holdouts(store),
            params,
            full,
            prepared.facts,
            store.values_MIF,
            repeats=prepared.schema.split.repeats,
            seed=options.seed,
            on_progress=stage.update,
        )
    rankings = {"graph": _Ranking(plain, PairRanker(plain), None)}
    for name, config in (("MoE", plain), ("MoE with store features", full)):
        with reporter.stage("train", f"Train the {name[:3]} ranker") as stage:
            stage.update(0.0, name)
            ranker, routing = train_ranker(
                snapshots, config, seed=options.seed, training=RankerTraining(), on_progress=stage.update
            )
        rankings[name] = _Ranking(config, ranker, routing)
    return rankings


def _recommender(
    prepared: Prepared, ranking: _Ranking, graph: sp.csr_matrix, vectors: ItemVectors, store: _StoreFeatures
) -> Recommender:
    return Recommender(
        ranker=ranking.ranker,
        config=ranking.config,
        users=prepared.users,
        items=prepared.items,
        scorer=GraphScorer(graph, vectors, prepared.facts),
        facts=prepared.facts,
        store_features_IF=np.ascontiguousarray(store.values_MIF[-1]),
        repeats=prepared.schema.split.repeats,
        use_ranker=ranking.routing is not None,
    )


def _measure(model: Recommender, prepared: Prepared, seen: sp.csr_matrix, wanted: sp.csr_matrix) -> dict[str, float]:
    excluded = None if model.repeats else seen
    num = min(DEPTH, len(prepared.items))
    top, _ = model.rank(seen, num=num, excluded=excluded)
    return ranking_metrics(top, wanted, seen)


def _champion_ndcg(folder: Path, prepared: Prepared) -> float:
    """A registered recommender on the current validation part; items that it does not know are missed."""
    model = Recommender.load(folder)
    place = np.array([model.item_index.get(item, -1) for item in prepared.items])
    known = np.flatnonzero(place >= 0)
    to_model = sp.csr_matrix(
        (np.ones(len(known), dtype=np.float32), (known, place[known])), (len(place), len(model.items))
    )
    seen = sp.csr_matrix(prepared.fit @ to_model)
    top, _ = model.rank(seen, num=min(DEPTH, len(model.items)), excluded=None if model.repeats else seen)
    back = np.full(len(model.items), -1, dtype=np.int64)
    back[place[known]] = known
    ours = back[top]
    # An item of the champion that is not in this table cannot be a hit; any never wanted column would do.
    wanted = sp.hstack([prepared.validation, sp.csr_matrix((len(prepared.users), 1))], format="csr")
    fit_wide = sp.hstack([prepared.fit, sp.csr_matrix((len(prepared.users), 1))], format="csr")
    return ranking_metrics(np.where(ours < 0, len(prepared.items), ours), wanted, fit_wide)[_METRIC]


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "user_id")]),
        outputs=Schema([ColSpec(Array(DataType.string), "items")]),
    )
