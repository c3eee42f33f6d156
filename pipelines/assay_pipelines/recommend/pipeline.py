"""The recommendation pipeline: table → search → sources → MoE ranker → compare → gate → registry."""

# U users, I items, S item features of the store

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from assay_features.batch import features_at, final_states
from assay_features.events import Events
from assay_features.items import item_plan, ranker_columns
from assay_features.schema import RecommendSchema, schema_to_dict
from assay_platform.models.content import ItemFacts
from assay_platform.models.histories import Again, Flags, Floats, Histories, Index
from assay_platform.models.item_regression import RegressionConfig
from assay_platform.models.recommender import PairRanker, RankerConfig, Recommender
from assay_platform.models.sources import Sources, Wanted, Weights
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.training import Checkpoint
from assay_platform.tuning.search import SearchResult
from numpy.typing import NDArray

from assay_pipelines.console import Reporter
from assay_pipelines.datasets.interactions import load_interactions
from assay_pipelines.datasets.table import count_rows, load_items, load_table
from assay_pipelines.gate import check_candidate
from assay_pipelines.options import RunOptions, RunReport
from assay_pipelines.recommend.baseline import measure_baselines
from assay_pipelines.recommend.evaluate import DEPTH, Lists, ndcg_at_10, of_some_users, ranking_metrics
from assay_pipelines.recommend.split import Parts, split_interactions
from assay_pipelines.recommend.train import (
    Earliest,
    Encoders,
    Holdout,
    RankerTraining,
    Recipe,
    choose_regression,
    fit_earliest,
    fit_holdouts,
    fit_sources,
    item_graph,
    make_lists,
    train_ranker,
)
from assay_pipelines.recommend.train_graph import DEFAULTS, SPACE, EncoderData, objective
from assay_pipelines.recommend.train_sequence import SequenceTraining
from assay_pipelines.references import MOST_REFERENCE_ROWS, drift_reference
from assay_pipelines.tracking import (
    champion_metric,
    log_routing,
    open_registry,
    register_version,
    run_search,
    tracked_run,
)

_NUM_FOLDS, _NUM_HOLDOUTS = 5, 3
# How many validation periods before the end of what is there the labels of a holdout begin.
_CUTS = (1.0, 1.5, 2.0, 2.5)
_MIN_SEEN = 0.4  # of the time must be before a cut
_MIN_DISLIKED = 0.1
# How much the logits of other tasks may count, beside 0.
_TASK_SHARES = (0.1, 0.3)
_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
_DIVERSITIES = (0.0, 0.03, 0.06, 0.09, 0.12, 0.16, 0.2, 0.25, 0.32, 0.4, 0.5, 0.65, 0.8, 1.2)
# Candidates that the ranker may order instead of all that it learned from, most first, and what that may cost.
_NUMS_RANKED, _LOST_BY_FEW = (100, 50, 30), 0.001
# Rows of a table that is read at once; of a larger one, chunks. Rows that models learn from, at most. Users that
# choices go by, which compare the same ones, and that metrics are means over.
MOST_AT_ONCE, MOST_LEARNED = 5_000_000, 10_000_000
MOST_CHOSEN_BY, MOST_MEASURED = 5_000, 20_000
_METRIC = "ndcg_at_10"

Rows = NDArray[np.intp]


class Prepared:
    """Everything known before any model is trained."""

    def __init__(self, options: RunOptions, reporter: Reporter) -> None:
        assert isinstance(options.schema, RecommendSchema)
        self.schema = options.schema
        self.options, self._reporter = options, reporter
        with reporter.stage("load", "Read and check the table") as stage:
            if count_rows(options.table) > MOST_AT_ONCE:
                self.table = load_interactions(options.table, self.schema, on_progress=stage.update)
            else:
                self.table = load_table(options.table, self.schema)
            events = self.table.events
            if options.max_rows is not None:
                events = events.take(slice(max(0, len(events) - options.max_rows), None))
            self.num_rows = len(events)
            self.all_events = events = self._most_taken(events)
            item, items = pd.factorize(events.keys[self.schema.item])
            self._learned = self._drawn(events)
            if len(self._learned) < len(events):
                events = events.take(self._learned)
            self.events, self.item = events, item[self._learned]
            self.user, users = pd.factorize(events.keys[self.schema.user])
            self.users, self.items = [str(u) for u in users], [str(i) for i in items]
            stage.update(1.0, f"{len(events):,} rows, {len(users):,} users, {len(items):,} items")
        self.parts: Parts = self._split(self.user, events)
        self.train_rows: Rows = np.sort(np.r_[self.parts.fit, self.parts.validation])
        self.strength, self.tasks = self._tasks(events)
        self.again = Again.ALL if self.schema.split.repeats else Again.NOTHING
        if self.schema.action is not None and not self.schema.split.repeats:
            self.again = Again.UNDONE
        self.fit = self.histories(self.parts.fit, self._asked_at(self.parts.validation))
        self.train = self.histories(self.train_rows, self._asked_at(self.parts.test))
        self.fit_matrix, self.train_matrix = self.fit.matrix(len(items)), self.train.matrix(len(items))
        self.validation, self.test = (
            of_some_users(self._wanted(part, seen)[0], most, seed=options.seed)
            for part, seen, most in (
                (self.parts.validation, self.fit, MOST_CHOSEN_BY),
                (self.parts.test, self.train, MOST_MEASURED),
            )
        )
        table = self.schema.items
        known = load_items(table, options.schema_folder) if table is not None else {}
        with reporter.stage("load", "Read what is known of items"):
            self.facts = ItemFacts.of(
                self.items,
                known,
                text=table.text if table else (),
                categorical=table.categorical if table else (),
                sentences=table is not None and table.sentences,
            )
        self.plan = item_plan(self.schema)
        self._item_only = type(self.plan)(self.plan.of_entity(self.schema.item))

    @property
    def ranker_config(self) -> RankerConfig:
        """The ranker's shape for these features."""
        return RankerConfig(num_store_features=len(self.plan.numeric_names), tasks=tuple(self.tasks))

    def checkpoint(self, part: str, rows: Rows, recipe: Recipe) -> Checkpoint | None:
        """How far the training of a part is that learns from these rows; see `RunOptions.checkpoint`."""
        data = (self.table.fingerprint, len(self.events), len(rows), self.options.seed)
        recipe_id = (sorted(recipe.graph.items()), recipe.regression, recipe.weights)
        return self.options.checkpoint(f"{part}-{len(rows)}", repr((data, recipe_id)))

    def _split(self, user: NDArray[np.int64], events: Events) -> Parts:
        return split_interactions(user, self.schema.split, seed=self.options.seed, time_us=events.time_us)

    def _most_taken(self, events: Events) -> Events:
        """Without the items beyond the schema's limit: those taken least; by time, of what is before the test part."""
        items = events.keys[self.schema.item]
        known = np.arange(len(events))
        if self.schema.split.protocol == "temporal":
            known = known[: self._split(pd.factorize(events.keys[self.schema.user])[0], events).test[0]]
        counts = pd.Series(items[known]).value_counts().sort_index().sort_values(ascending=False, kind="stable")
        if self.schema.split.max_items is None or len(counts) <= self.schema.split.max_items:
            return events
        most = int(self.schema.split.max_items)
        kept = set(counts.index[:most])
        self._reporter.line(f"{len(counts):,} items; the {most:,} most taken are kept")
        return events.take(np.flatnonzero([item in kept for item in items]))

    def _drawn(self, events: Events) -> Rows:
        """Rows that models learn from: all, or those of users drawn at random where there are more than they need."""
        if len(events) <= MOST_LEARNED:
            return np.arange(len(events))
        user, users = pd.factorize(events.keys[self.schema.user])
        order = np.random.default_rng(self.options.seed).permutation(len(users))
        count = np.cumsum(np.bincount(user)[order])
        chosen = np.zeros(len(users), dtype=bool)
        chosen[order[: max(1, int(np.searchsorted(count, MOST_LEARNED, side="right")))]] = True
        rows = np.flatnonzero(chosen[user])
        self._reporter.line(
            f"{len(events):,} rows; models learn from {len(rows):,}, of {int(chosen.sum()):,} users drawn out of "
            f"{len(users):,}; features are of all"
        )
        return rows

    def histories(self, rows: Rows, now_us: int | Index) -> Histories:
        """Some interactions, a row for each user."""
        return Histories.of(
            self.user[rows], self.item[rows], self.events.time_us[rows], num_users=len(self.users), now_us=now_us,
            strength=None if self.strength is None else self.strength[rows],
        )  # fmt: skip

    def _asked_at(self, part: Rows) -> int | Index:
        """The moment at which lists for a part are asked for: where it begins; a user's own event where only the last
        is left out; the end of time where the split knows none.
        """
        end_us = int(self.events.time_us[-1]) + 1
        if self.schema.split.protocol == "temporal":
            return int(self.events.time_us[part].min())
        if self.schema.split.protocol == "random":
            return end_us
        moments = np.full(len(self.users), end_us, dtype=np.int64)
        moments[self.user[part]] = self.events.time_us[part]
        return moments

    def matrix(self, rows: Rows) -> sp.csr_matrix:
        """(U, I) 0/1 matrix of some interactions."""
        return self.histories(rows, 0).matrix(len(self.items))

    def _tasks(self, events: Events) -> tuple[Floats | None, dict[str, Flags | None]]:
        """How strong events are, and which count for each task; None: all."""
        if self.schema.action is None:
            weight = None if self.schema.weight is None else events.numbers[self.schema.weight]
            liked = None if weight is None else _liked(weight, self.train_rows)
            return None if liked is None else liked.astype(np.float32), {"taken": None}
        names = list(self.schema.actions)
        level = pd.Categorical(events.keys[self.schema.action], names).codes
        # Whoever bought has looked, whether or not an event says so.
        by_task = {name: level >= place for place, name in enumerate(names)}
        strength = (level / (len(names) - 1)).astype(np.float32)
        return strength, dict(reversed(by_task.items()))

    def _wanted(self, rows: Rows, seen: Histories) -> list[sp.csr_matrix]:
        """What a list should contain, by task: interactions of a later part, without what lists leave out."""
        excluded, found = self.again.excluded(seen, len(self.items)), []
        for counts in self.tasks.values():
            wanted = self.matrix(rows if counts is None else rows[counts[rows]])
            if excluded is not None:
                wanted = sp.csr_matrix(wanted - wanted.multiply(excluded))
                wanted.eliminate_zeros()
            found.append(wanted)
        return found

    def holdouts(self, rows: Rows) -> list[Holdout]:
        """What the ranker learns from, out of these interactions alone."""
        protocol, time_us = self.schema.split.protocol, self.events.time_us
        if protocol == "random":
            fold = np.random.default_rng(self.options.seed).integers(0, _NUM_FOLDS, len(rows))
            return [self._holdout(rows[fold != k], rows[fold == k]) for k in range(_NUM_HOLDOUTS)]
        if protocol == "leave-last-out":
            order = rows[np.lexsort((time_us[rows], self.user[rows]))]
            user = self.user[order]
            from_last = np.searchsorted(user, user, side="right") - 1 - np.arange(len(user))
            return [self._holdout(order[from_last > k], order[from_last == k]) for k in range(_NUM_HOLDOUTS)]
        first, end = int(time_us[rows[0]]), int(time_us[rows[-1]]) + 1
        held = time_us[self.parts.validation]
        period = int(held[-1] - held[0]) + 1
        cuts = [end - round(back * period) for back in _CUTS]
        cuts = [cut for cut in cuts if cut - first > _MIN_SEEN * (end - first)]
        if not cuts:
            cuts = [int(time_us[rows[int(0.85 * len(rows))]])]
        places = [np.searchsorted(time_us[rows], (cut, cut + period)) for cut in cuts]
        return [self._holdout(rows[:begin], rows[begin:stop]) for begin, stop in places if 0 < begin < stop]

    def _holdout(self, seen: Rows, labels: Rows) -> Holdout:
        histories = self.histories(seen, self._asked_at(labels))
        wanted = self._wanted(labels, histories)
        of_nothing = features_at(self._item_only, self.all_events.take(seen[:0]), self._spine(0))
        new_S = ranker_columns(self.plan, of_nothing)[0]
        return Holdout(histories, wanted, self.item_features(seen, histories), new_S)

    def item_features(self, rows: Rows, histories: Histories) -> Floats:
        """(I, S) of some interactions, and of all of users that nothing is learned from, at the newest moment that the
        histories ask about.
        """
        known = np.ones(len(self.all_events), dtype=bool)
        known[self._learned] = False
        known[self._learned[rows]] = True
        spine = self._spine(int(histories.now_us.max()))
        seen = self.all_events.take(np.flatnonzero(known))
        return ranker_columns(self.plan, features_at(self._item_only, seen, spine))

    def _spine(self, moment_us: int) -> Events:
        keys = {self.schema.item: np.asarray(self.items, dtype=object)}
        return Events(time_us=np.full(len(self.items), moment_us, dtype=np.int64), keys=keys)

    def publish_features(self) -> Floats:
        """Features of all interactions into the store; (I, S) of items, read back from there."""
        from assay_features.feast.repository import FeatureRepository, value_frames

        with self._reporter.stage("features", "Compute, publish, retrieve") as stage:
            spine = self._spine(int(self.all_events.time_us[-1]) + 1)
            values = features_at(self._item_only, self.all_events, spine)
            states = {entity: final_states(self.plan, entity, self.all_events) for entity in self.plan.entities}
            repository = FeatureRepository(self.options.feature_repository)
            frames = value_frames(self._item_only, spine, values)
            repository.publish(self.plan, frames, states, schema=schema_to_dict(self.schema))
            retrieved = repository.training_features(self.plan, spine)
            repository.close()
            stage.update(1.0, f"{len(spine):,} items, plan {self.plan.version}")
        return ranker_columns(self.plan, retrieved)


def _liked(weight: NDArray[np.float64], known: Rows) -> NDArray[np.bool_] | None:
    """Events of at least the median weight, if that tells some from others: ratings do, most quantities do not.

    known: events before the test part; what is in it says nothing of the median.
    """
    if not np.isfinite(weight[known]).any():
        return None
    liked = ~(weight < np.nanmedian(weight[known]))
    return liked if liked[known].mean() < 1 - _MIN_DISLIKED else None


def tune_recommend(options: RunOptions, reporter: Reporter) -> SearchResult:
    """Search only."""
    prepared = Prepared(options, reporter)
    with tracked_run(
        options,
        reporter,
        fingerprint=prepared.table.fingerprint,
        plan_version=prepared.plan.version,
        num_rows=prepared.num_rows,
    ) as run:
        return _search(options, reporter, run, prepared)


def _search(options: RunOptions, reporter: Reporter, run: Any, prepared: Prepared) -> SearchResult:
    graph = item_graph(prepared.fit, prepared.facts, RegressionConfig())
    excluded = prepared.again.excluded(prepared.fit, len(prepared.items))
    return run_search(
        options,
        reporter,
        run,
        objective=objective,
        data=EncoderData(fit=graph, validation=prepared.validation, excluded=excluded),
        space=SPACE,
        defaults={**DEFAULTS, "seed": options.seed},
        max_epochs=int(DEFAULTS["num_epochs"]),
    )


class Ranking(NamedTuple):
    """A trained ranker. routing: of its training; None where the sources' own order is better."""

    ranker: PairRanker
    routing: RoutingMonitor | None


def run_recommend(options: RunOptions, reporter: Reporter) -> RunReport:
    """The whole pipeline, through to a registered version."""
    prepared = Prepared(options, reporter)
    # Rows are part of the identity: another limit or split is another validation part.
    fingerprint = f"{prepared.table.fingerprint}:{len(prepared.events)}:{options.seed}"
    with tracked_run(
        options, reporter, fingerprint=fingerprint, plan_version=prepared.plan.version, num_rows=prepared.num_rows
    ) as run:
        best_graph = options.searched(fingerprint, lambda: _search(options, reporter, run, prepared).best)
        chosen = choose_recipe(prepared, best_graph, reporter, seed=options.seed)
        recipe = chosen.recipe
        fitted = trained(prepared, prepared.parts.fit, prepared.fit, recipe, reporter, chosen)
        with reporter.stage("evaluate", "Choose on validation") as stage:
            measured = {
                name: _ndcg(
                    _recommender(prepared, prepared.fit, fitted.sources, fitted.store_IF, ranking),
                    prepared.fit,
                    prepared.validation,
                )
                for name, ranking in fitted.rankings.items()
            }
            best = max(measured, key=lambda name: measured[name])
            stage.update(1.0, "NDCG@10 " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))
        run.log(
            params={"ranker": best, "regression.penalty": recipe.regression.penalty,
                    "regression.closeness_s": recipe.regression.closeness_s, "weights.graph": recipe.weights.graph,
                    "weights.sequence": recipe.weights.sequence},
            metrics={f"validation.ndcg_at_10.{name}": value for name, value in measured.items()},
        )  # fmt: skip
        num_ranked = choose_num_ranked(prepared, fitted, fitted.rankings[best], reporter)
        run.log(params={"num_ranked": num_ranked})
        diversity = choose_diversity(prepared, fitted, fitted.rankings[best], reporter)
        refitted = trained(prepared, prepared.train_rows, prepared.train, recipe, reporter)
        ranking = refitted.rankings[best]
        if ranking.routing is not None:
            log_routing(run, ranking.routing)
        model = _recommender(
            prepared, prepared.train, refitted.sources, refitted.store_IF, ranking, diversity, num_ranked
        )
        with reporter.stage("evaluate", "Rank the test part"):
            metrics = ranking_metrics(*_ranked(model, prepared.train, prepared.test), prepared.train_matrix)
        with reporter.stage(
            "baseline", "EASE, popularity" + (", own frequency" if prepared.again.own_past else "")
        ) as stage:
            baselines, _ = measure_baselines(
                prepared.fit,
                prepared.validation,
                prepared.train,
                prepared.test,
                again=prepared.again,
                on_progress=stage.update,
            )
        store_IF = prepared.publish_features()
        if options.refit_on_all:
            everything = np.arange(len(prepared.events))
            histories = prepared.histories(everything, int(prepared.events.time_us[-1]) + 1)
            with reporter.stage("train", "Refit the sources on everything"):
                sources = fit_sources(histories, recipe, seed=options.seed, shared=refitted.encoders)
            model = _recommender(prepared, histories, sources, store_IF, ranking, diversity, num_ranked)
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
            },
            "drift": events_reference(prepared.schema, prepared.all_events),
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
    options.forget_checkpoints()
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


class Chosen(NamedTuple):
    """What validation chose, and what was made for that: the sources of the fitting part with their items' features,
    its holdouts, and the sources of the earliest.
    """

    recipe: Recipe
    sources: Sources
    store_IF: Floats
    holdouts: list[Holdout]
    earliest: Earliest


def events_reference(schema: RecommendSchema, events: Events) -> dict[str, Any]:
    """What the newest interactions look like, which those that come while the model serves are compared with. Users are
    left out: new ones are no drift.
    """
    newest = events.take(slice(-MOST_REFERENCE_ROWS, None))
    columns: dict[str, Any] = {name: newest.keys[name] for name in schema.keys if name != schema.user}
    columns |= {name: newest.numbers[name] for name in schema.numbers}
    return drift_reference(columns)


def choose_recipe(prepared: Prepared, graph: Mapping[str, Any], reporter: Reporter, *, seed: int) -> Chosen:
    """The regression, and how much of graph and sequence beside it, that rank the validation part best.

    graph: parameters. A split at random has no use for the order of events: what is left out lies between what is seen.
    """
    split = prepared.schema.split
    with reporter.stage("train", "Choose the regression") as stage:
        regression = choose_regression(
            prepared.fit, prepared.validation, again=prepared.again, on_progress=stage.update
        )
    sequence = None if split.protocol == "random" else SequenceTraining()
    recipe = Recipe(graph=graph, regression=regression, facts=prepared.facts, again=prepared.again, sequence=sequence)
    with reporter.stage("train", "Fit the sequence encoder" if sequence else "Fit the first holdout"):
        holdouts = prepared.holdouts(prepared.parts.fit)
        checkpoint = prepared.checkpoint("sequence", prepared.parts.fit, recipe)
        earliest = fit_earliest(holdouts, recipe, seed=seed, checkpoint=checkpoint, workers=prepared.options.workers)
    with reporter.stage("train", "Weigh the sources") as stage:
        sources = fit_sources(prepared.fit, recipe, seed=seed, shared=earliest.encoders)
        store_IF = prepared.item_features(prepared.parts.fit, prepared.fit)
        plain = Ranking(PairRanker(prepared.ranker_config), None)
        names = ["graph"] if sources.sequence is None else ["graph", "sequence"]
        for done, name in enumerate(names):
            reached: dict[Weights, float] = {}
            for weight in _WEIGHTS:
                weights = replace(recipe.weights, **{name: weight})
                model = _recommender(prepared, prepared.fit, replace(sources, weights=weights), store_IF, plain)
                reached[weights] = _ndcg(model, prepared.fit, prepared.validation)
                part = (done + len(reached) / len(_WEIGHTS)) / len(names)
                stage.update(part, f"NDCG@10 {max(reached.values()):.3f}")
            recipe = replace(recipe, weights=max(reached, key=lambda weights: reached[weights]))
        sources = replace(sources, weights=recipe.weights)
    return Chosen(recipe, sources, store_IF, holdouts, earliest)


class Trained(NamedTuple):
    """Sources and rankers of some interactions. rankings: 'sources' is their own order, 'MoE' the ranker's."""

    sources: Sources
    encoders: Encoders
    store_IF: Floats
    rankings: dict[str, Ranking]


def trained(
    prepared: Prepared,
    rows: Rows,
    histories: Histories,
    recipe: Recipe,
    reporter: Reporter,
    chosen: Chosen | None = None,
) -> Trained:
    """Sources of these interactions, and a ranker that learned from holdouts of them.

    histories: of these rows. chosen: what was fitted to the same rows already.
    """
    config, seed, workers = prepared.ranker_config, prepared.options.seed, prepared.options.workers
    if chosen is None:
        with reporter.stage("train", "Fit the sources"):
            holdouts = prepared.holdouts(rows)
            checkpoint = prepared.checkpoint("sequence", rows, recipe)
            earliest = fit_earliest(holdouts, recipe, seed=seed, checkpoint=checkpoint, workers=workers)
            sources = fit_sources(histories, recipe, seed=seed, shared=earliest.encoders)
            store_IF = prepared.item_features(rows, histories)
    else:
        _, sources, store_IF, holdouts, earliest = chosen
    with reporter.stage("train", "Fit them without the holdouts") as stage:
        of_holdouts = fit_holdouts(holdouts, recipe, earliest, seed=seed, on_progress=stage.update)
        lists = make_lists(holdouts, of_holdouts, recipe, config, seed=seed)
    with reporter.stage("train", "Train the MoE ranker") as stage:
        training = RankerTraining(update_on=prepared.options.update_on)
        train = partial(train_ranker, config=config, seed=seed, training=training)
        ranker, routing = workers.train(
            train,
            {"lists": lists},
            on_epoch=lambda epoch, _: stage.update(epoch / training.num_epochs),
            checkpoint=prepared.checkpoint("ranker", rows, recipe),
        )
    rankings = {"sources": Ranking(ranker, None), "MoE": Ranking(ranker, routing)}
    for share in _TASK_SHARES if len(config.tasks) > 1 else ():
        rankings[f"MoE and {share:g} of other tasks"] = Ranking(ranker.mixed(share), routing)
    return Trained(sources, earliest.encoders, store_IF, rankings)


def choose_num_ranked(prepared: Prepared, fitted: Trained, ranking: Ranking, reporter: Reporter) -> int:
    """As few candidates as lose next to nothing of the validation part's NDCG@10: a list costs what ranking them costs.

    All of them where lists are to vary.
    """
    most = prepared.ranker_config.num_candidates
    if ranking.routing is None or prepared.schema.diversity_loss > 0:
        return most
    with reporter.stage("evaluate", "Choose how many to rank") as stage:
        reached: dict[int, float] = {}
        for num in (most, *_NUMS_RANKED):
            model = _recommender(prepared, prepared.fit, fitted.sources, fitted.store_IF, ranking, num_ranked=num)
            reached[num] = _ndcg(model, prepared.fit, prepared.validation)
            if reached[num] < (1 - _LOST_BY_FEW) * reached[most]:
                del reached[num]
                break
        chosen = min(reached)
        stage.update(1.0, f"{chosen} of {most}: NDCG@10 {reached[chosen]:.4f} of {reached[most]:.4f}")
    return chosen


def choose_diversity(prepared: Prepared, fitted: Trained, ranking: Ranking, reporter: Reporter) -> float:
    """As much as costs no more of the validation part's NDCG@10 than the schema allows."""
    allowed, chosen = prepared.schema.diversity_loss, 0.0
    if allowed == 0:
        return chosen
    with reporter.stage("evaluate", "Choose how diverse lists are") as stage:
        reached = []
        for weight in _DIVERSITIES:
            model = _recommender(prepared, prepared.fit, fitted.sources, fitted.store_IF, ranking, weight)
            reached.append(_ndcg(model, prepared.fit, prepared.validation))
            if reached[-1] >= (1 - allowed) * reached[0]:
                chosen = weight
            elif reached[-1] < (1 - 3 * allowed) * reached[0]:
                break
        stage.update(1.0, f"weight {chosen:g}: NDCG@10 {reached[_DIVERSITIES.index(chosen)]:.3f} of {reached[0]:.3f}")
    return chosen


def _recommender(
    prepared: Prepared,
    histories: Histories,
    sources: Sources,
    store_IF: Floats,
    ranking: Ranking,
    diversity: float = 0.0,
    num_ranked: int | None = None,
) -> Recommender:
    return Recommender(
        ranker=ranking.ranker,
        config=prepared.ranker_config,
        users=prepared.users,
        items=prepared.items,
        histories=histories,
        sources=sources,
        store_features_IF=store_IF,
        again=prepared.again,
        use_ranker=ranking.routing is not None,
        diversity=diversity,
        num_ranked=num_ranked,
    )


def _ranked(model: Recommender, histories: Histories, wanted: sp.csr_matrix) -> tuple[Lists, sp.csr_matrix]:
    """Lists of the users who want something, and what these want."""
    num_items, users = wanted.shape[1], np.flatnonzero(np.diff(wanted.indptr))
    asked = histories.of_users(users)
    top, _ = model.rank(asked, num=min(DEPTH, num_items), wanted=Wanted(model.again.excluded(asked, num_items)))
    return top, wanted[users]


def _ndcg(model: Recommender, histories: Histories, wanted: sp.csr_matrix) -> float:
    return ndcg_at_10(*_ranked(model, histories, wanted))


def _champion_ndcg(folder: Path, prepared: Prepared) -> float:
    """A registered recommender on the current validation part; items that it does not know are missed."""
    model = Recommender.load(folder)
    place = np.array([model.item_index.get(item, -1) for item in prepared.items])
    known = np.flatnonzero(place >= 0)
    seen = prepared.fit
    kept = place[seen.item] >= 0
    user = seen.users()[kept]
    histories = Histories.of(
        user, place[seen.item[kept]], seen.time_us[kept], num_users=seen.num_users, now_us=seen.now_us,
        strength=seen.strength[kept],
    )  # fmt: skip
    excluded = model.again.excluded(histories, len(model.items))
    top, _ = model.rank(histories, num=min(DEPTH, len(model.items)), wanted=Wanted(excluded))
    back = np.full(len(model.items), -1, dtype=np.int64)
    back[place[known]] = known
    ours = back[top]
    # An item of the champion that is not in this table cannot be a hit; any never wanted column would do.
    wanted = sp.hstack([prepared.validation, sp.csr_matrix((len(prepared.users), 1))], format="csr")
    return ndcg_at_10(np.where(ours < 0, len(prepared.items), ours), wanted)


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "user_id")]),
        outputs=Schema([ColSpec(Array(DataType.string), "items")]),
    )
