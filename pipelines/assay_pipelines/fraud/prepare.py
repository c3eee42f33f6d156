"""What a fraud run knows before any model is trained: table, split, features, encoded rows."""

from copy import copy
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from assay_features.accounts import links_of
from assay_features.batch import features_at, final_states
from assay_features.definitions import FeaturePlan, as_code
from assay_features.embeddings import EmbeddingTable, load_tables, table_path
from assay_features.events import Events
from assay_features.reports import plan_parts
from assay_features.row_features import model_columns
from assay_features.rules import check_rules
from assay_features.schema import FraudSchema, Split, schema_to_dict
from assay_platform.errors import DataError, InputError
from assay_platform.models.encoding import TabularEncoder, fit_encoder
from numpy.typing import NDArray

from assay_pipelines.console import Reporter
from assay_pipelines.datasets.table import LoadedTable, count_rows, load_newest, load_table
from assay_pipelines.fraud.adversary import Adversary, is_declared
from assay_pipelines.fraud.features import check_plan, default_plan, model_inputs
from assay_pipelines.fraud.train import DEFAULTS, FraudData, LabelledRows
from assay_pipelines.options import RunOptions

_MAX_CATEGORIES = 20_000
# What is held of a table at once, rows times columns of the model: about 10 GB while trees are trained.
_MAX_CELLS, _MIN_ROWS = 200_000_000, 100_000
# A trial sees the newest rows, as many as let a few trials finish within the budget.
_SEARCH_ROWS_A_SECOND, _MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS = 300, 10_000, 60_000
_SEARCH_VALIDATION_ROWS = 20_000

Rows = NDArray[np.intp]


class Prepared:
    """Everything known before any model is trained."""

    def __init__(
        self, options: RunOptions, reporter: Reporter, *, publish: bool = True, encoder: TabularEncoder | None = None
    ) -> None:
        """publish: features go to the model's Feast repository and are retrieved from there; without it they come
        straight from the engine, which gives the same numbers and leaves nothing behind. encoder: of a model that
        there is already, instead of one fitted on the training rows.
        """
        assert isinstance(options.schema, FraudSchema)
        self.schema = options.schema
        self._adversary: Adversary | None = None
        self.plan = options.plan or default_plan(self.schema)
        check_plan(self.plan, self.schema)
        self.tables = _trained_tables(self.plan, options)
        columns = _try_without_rows(self.plan, self.schema, self.tables)
        check_rules(options.rules, columns)
        with reporter.stage("load", "Read and check the table") as stage:
            self.table, num_rows = self._read(options)
            # With fewer rows to learn from, each of them keeps its whole history.
            self.history_events, self.events = (
                events.take(slice(0, len(events) - options.num_held_back))
                for events in (self.table.history, self.table.events)
            )
            if num_rows is not None:
                self.events = self.events.take(slice(max(0, len(self.events) - num_rows), None))
            stage.update(1.0, f"{len(self.events):,} rows")
        if len(self.events) < len(self.history_events) and options.max_rows is None:
            reporter.line(
                f"the newest {len(self.events):,} of {len(self.history_events):,} rows are learned from, so that "
                "about 10 GB of memory suffice; all of them count in the features. --rows N takes another number"
            )
        events = self.events
        self.train, self.validation, self.test = time_split(events, self.schema.split)
        if encoder is None:
            _check_classes((self.train, self.validation, self.test), events, self.table)
        self._check_tables()
        self.columns = self._columns(options, reporter, publish=publish)
        self.numeric, self.categorical = model_inputs(self.schema, self.plan)
        assert events.labels is not None
        self.labels: NDArray[np.bool_] = events.labels
        with reporter.stage("features", "Encode"):
            self._encode(encoder)

    def _read(self, options: RunOptions) -> tuple[LoadedTable, int | None]:
        """The table, and how many of its rows the model is to see, if not all."""
        num_columns = sum(map(len, model_inputs(self.schema, self.plan)))
        limit = max(_MIN_ROWS, _MAX_CELLS // num_columns)
        num_there = count_rows(options.table)
        num_rows = options.max_rows or (limit if num_there > limit else None)
        if num_there <= limit or num_rows is None:
            return load_table(options.table, self.schema), num_rows
        return load_newest(options.table, self.schema, self.plan, num_rows + options.num_held_back), num_rows

    def _encode(self, encoder: TabularEncoder | None) -> None:
        edges = torch.empty(0)
        if encoder is None:
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

    def split_at(self, train: int, validation: int, test: int) -> "Prepared":
        """The same table split elsewhere: rows before `train`, then before `validation`, then before `test`."""
        other = copy(self)
        other.train, other.validation = np.arange(train), np.arange(train, validation)
        other.test = np.arange(validation, test)
        other._adversary = None
        other._encode(None)
        return other

    def until(self, num_rows: int) -> "Prepared":
        """The same rows encoded alike, of which only the first are there to learn from."""
        if num_rows >= len(self.train) + len(self.validation):
            return self
        other = copy(self)
        other.train, other.validation = self.train[:num_rows], self.validation[: max(0, num_rows - len(self.train))]
        other._adversary = None
        return other

    def _columns(self, options: RunOptions, reporter: Reporter, *, publish: bool) -> dict[str, Any]:
        with reporter.stage("features", "Compute features") as stage:
            sources = self.sources()
            values = [features_at(plan, source, self.events) for plan, source in sources]
            if not publish:
                history = {name: column for part in values for name, column in part.items()}
                return model_columns(self.plan, self.events, history, self.tables)
            states = [{e: final_states(plan, e, source) for e in plan.entities} for plan, source in sources]
            stage.update(1.0, f"{sum(map(len, values))} features, plan {self.plan.version}")
        with reporter.stage("features", "Publish to Feast, retrieve") as stage:
            # Feast takes seconds to import, so it is imported where it is used.
            from assay_features.feast.repository import FeatureRepository, value_frames

            repository = FeatureRepository(options.feature_repository)
            history = {}
            for (plan, source), computed, final in zip(sources, values, states, strict=True):
                ids = (
                    None if source.ids is None else dict(zip(source.ids.tolist(), source.time_us.tolist(), strict=True))
                )
                frames = value_frames(plan, self.events, computed)
                repository.publish(plan, frames, final, schema=schema_to_dict(self.schema), tables=self.tables, ids=ids)
                history |= repository.training_features(plan, self.events)
            links = links_of(self.schema)
            if links is not None:
                left, known = links.of(self.history_events), None
                if left.ids is not None:
                    known = dict(zip(left.ids.tolist(), left.time_us.tolist(), strict=True))
                repository.publish_links(links.plan, left, schema=schema_to_dict(self.schema), ids=known)
            repository.close()
            num_keys = sum(len(s.keys) for final in states for s in final.values())
            stage.update(1.0, f"{num_keys:,} keys online")
        return model_columns(self.plan, self.events, history, self.tables)

    def sources(self) -> list[tuple[FeaturePlan, Events]]:
        """Each part of the plan with the events that its features are of."""
        return sources_of(self.plan, self.schema, self.history_events)

    def _check_tables(self) -> None:
        """No vector may have learned from labels that this run measures with."""
        for embedding in self.plan.embeddings:
            learned_us = self.tables[embedding.table].learned_until_us
            newest_us = int(self.events.time_us[self.train[-1]])
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
        both = self.rows.take(slice(0, len(self.train) + len(self.validation)))
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
        keys={name: np.empty(0, dtype=object) for name in (*schema.keys, *schema.worked_out)},
        numbers={name: np.empty(0) for name in schema.numbers},
    )
    return model_columns(plan, nothing, {name: np.empty(0) for name in plan.numeric_names}, tables)


def time_split(events: Events, split: Split) -> tuple[Rows, Rows, Rows]:
    """Row numbers of the three parts in order of time."""
    num_rows = len(events)
    bounds = [0, int(num_rows * split.train), int(num_rows * (split.train + split.validation)), num_rows]
    train, validation, test = (np.arange(a, b) for a, b in pairwise(bounds))
    return train, validation, test


def _check_classes(parts: tuple[Rows, Rows, Rows], events: Events, table: LoadedTable) -> None:
    assert events.labels is not None
    for name, rows in zip(("train", "validation", "test"), parts, strict=True):
        positives = int(events.labels[rows].sum())
        if positives == 0 or positives == len(rows):
            raise DataError(
                f"{table.path}: split by time, the {name} part has {len(rows)} rows of which {positives} are "
                "positive; every part needs both classes. Bring more rows or change [split]."
            )


def as_slice(rows: Rows) -> slice:
    """Row numbers of one part of a split as a slice."""
    return slice(int(rows[0]), int(rows[-1]) + 1)
