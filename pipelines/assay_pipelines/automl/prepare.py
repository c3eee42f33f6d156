"""What AutoML learns from, of either kind of table: events with their features, or columns as they are."""

# N rows, in the order that the table is split in

import hashlib
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from assay_features.definitions import FeaturePlan
from assay_features.reports import reports_of
from assay_features.schema import FraudSchema, TableSchema
from assay_platform.models.encoding import TabularEncoder, fit_encoder
from numpy.typing import NDArray

from assay_pipelines.automl.table import read_table
from assay_pipelines.console import Reporter
from assay_pipelines.datasets.table import load_table
from assay_pipelines.fraud.features import default_plan, discover_features
from assay_pipelines.fraud.prepare import Prepared
from assay_pipelines.fraud.train import DEFAULTS, LabelledRows
from assay_pipelines.options import RunOptions

_MAX_CATEGORIES = 20_000
# Searching for features takes minutes, which a short budget does not have: this part of one that is long enough.
_DISCOVERY_SHARE, _ENOUGH_S = 0.2, 900.0


@dataclass(frozen=True, kw_only=True)
class Learnable:
    """Encoded rows and where they are split: train, validation, then test.

    fingerprint: of the table, as the registry compares it. problem: a digest of all that makes trials comparable.
    edges: quantiles of the numeric columns. starts (N,): where groups begin, if rows are grouped. events: the prepared
    run of a table of events. notes: what was done to the table, and seen.
    """

    encoder: TabularEncoder
    edges: torch.Tensor
    rows: LabelledRows
    num_train: int
    num_validation: int
    in_time: bool
    starts: NDArray[np.bool_] | None
    fingerprint: str
    problem: str
    notes: tuple[str, ...]
    events: Prepared | None = None

    @property
    def learned(self) -> slice:
        """Rows that may be learned from."""
        return slice(0, self.num_train + self.num_validation)

    @property
    def tested(self) -> slice:
        """Rows that nothing is chosen by."""
        return slice(self.num_train + self.num_validation, len(self.rows))


class _OutOfTime(Exception):  # noqa: N818 - a signal
    """Raised in the middle of a search for features."""


def prepare(options: RunOptions, reporter: Reporter) -> Learnable:
    """Read the table, search for features if there are events and time, encode."""
    if isinstance(options.schema, TableSchema):
        return _of_columns(options, options.schema, reporter)
    notes: list[str] = []
    if options.plan is None and options.budget_s >= _ENOUGH_S:
        options = replace(options, plan=_discovered(options, reporter, notes))
    prepared = Prepared(options, reporter)
    notes.append(f"features: {len(prepared.plan.definitions)} of plan {prepared.plan.version}")
    return Learnable(
        encoder=prepared.data.encoder,
        edges=prepared.data.edges,
        rows=prepared.rows,
        num_train=len(prepared.train),
        num_validation=len(prepared.validation),
        in_time=True,
        starts=None,
        # As a run of `assay run fraud` says it, so that champions of either are compared by what was recorded.
        fingerprint=f"{prepared.table.fingerprint}:{len(prepared.events)}",
        problem=_digest(options, prepared.table.fingerprint, prepared.plan.version, len(prepared.events)),
        notes=tuple(notes),
        events=prepared,
    )


def _discovered(options: RunOptions, reporter: Reporter, notes: list[str]) -> FeaturePlan:
    """The schema's own features, and those that lift later periods for sure. The test period is not looked at."""
    from assay_features.discovery import DiscoverySettings

    schema = options.schema
    assert isinstance(schema, FraudSchema)
    plan = default_plan(schema)
    until = time.monotonic() + _DISCOVERY_SHARE * options.budget_s
    with reporter.stage("discover", "Search for features") as stage:

        def progress(done: float, note: str) -> None:
            stage.update(done, note)
            if time.monotonic() >= until:
                raise _OutOfTime

        events = load_table(options.table, schema).events
        try:
            found = discover_features(
                events,
                schema,
                reports=reports_of(schema),
                settings=DiscoverySettings(seed=options.seed),
                on_progress=progress,
            )
        except _OutOfTime:
            notes.append("the search for features did not end within its part of the budget; the schema's own are used")
            return plan
        stage.update(1.0, f"{len(found.trials)} candidates, {len(found.kept)} kept")
    notes.append(f"features found: {', '.join(d.name for d in found.kept) or 'none that lifts every later period'}")
    return FeaturePlan(tuple(dict.fromkeys((*plan.definitions, *found.kept))))


def _of_columns(options: RunOptions, schema: TableSchema, reporter: Reporter) -> Learnable:
    with reporter.stage("load", "Read, clean and type the table") as stage:
        table = read_table(options.table, schema, seed=options.seed, max_rows=options.max_rows)
        stage.update(
            1.0, f"{len(table.labels):,} rows, {len(table.numeric)} numbers, {len(table.categorical)} categories"
        )
    for note in table.notes:
        reporter.line(f"  {note}")
    with reporter.stage("features", "Encode"):
        early = slice(0, table.num_train)
        encoder, edges = fit_encoder(
            {name: column[early] for name, column in table.columns.items()},
            numeric=table.numeric,
            categorical=table.categorical,
            num_bins=int(DEFAULTS["num_bins"]),
            max_categories=_MAX_CATEGORIES,
        )
        rows = LabelledRows(encoder.apply(table.columns), torch.from_numpy(table.labels.astype(np.float32)))
    problem = _digest(options, table.fingerprint, encoder.names, len(table.labels))
    return Learnable(
        encoder=encoder,
        edges=edges,
        rows=rows,
        num_train=table.num_train,
        num_validation=table.num_validation,
        in_time=table.in_time,
        starts=table.starts,
        fingerprint=f"{table.fingerprint}:{problem}",
        problem=problem,
        notes=table.notes,
    )


def _digest(options: RunOptions, *parts: object) -> str:
    """What of a search may be compared with another: the same table, schema, split and inputs."""
    return hashlib.sha256(repr((options.schema, options.seed, *parts)).encode()).hexdigest()[:12]
