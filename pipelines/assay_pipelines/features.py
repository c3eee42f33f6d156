"""`assay features …`: what features there are, what they mean, and how they get into the store."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from assay_features.definitions import FeaturePlan, as_code, entity_name
from assay_features.schema import ACCOUNT, FraudSchema, Schema, schema_from_dict, schema_to_dict
from assay_platform.config import Config
from assay_platform.errors import InputError, WorkError
from assay_platform.storage import write_json

from assay_pipelines.console import Reporter, say
from assay_pipelines.options import RunOptions

if TYPE_CHECKING:
    from assay_features.events import Events
    from assay_features.feast.repository import FeatureRepository

_PUSH_BATCH = 5000
# Two ways to add up the same numbers; the engine's are the same code, so this is only for what a peer might do.
_TOLERANCE = 1e-9
_MAX_DELAY_DAYS = 365


def default_plan_of(schema: Schema) -> FeaturePlan:
    """The features that a model of this schema gets."""
    if isinstance(schema, FraudSchema):
        from assay_pipelines.fraud.features import default_plan

        return default_plan(schema)
    from assay_features.items import item_plan

    return item_plan(schema)


def read_plan(path: Path) -> FeaturePlan:
    """A plan from the JSON file that `assay features plan --out` writes.

    Raises:
        InputError: the file is not one, or a definition is wrong.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a feature plan ({error})") from error
    if not isinstance(document, dict) or not isinstance(document.get("definitions"), list):
        raise InputError(f'{path}: is not a feature plan; expected {{"definitions": […]}}')
    return FeaturePlan.from_dict(document)


def list_features(call: argparse.Namespace, config: Config) -> int:
    """Every feature of every plan in every repository."""
    rows = [
        {"model": model, "plan": version, "entity": _entity_of(definition), "kind": type(definition).__name__,
         "name": definition.name, "code": as_code(definition)}
        for model, version, plan, _ in _registered(config)
        for definition in plan.definitions
    ]  # fmt: skip
    if call.json:
        say(json.dumps(rows))
        return 0
    if not rows:
        say("no features yet; `assay run`, `assay demo` or `assay features backfill` makes some")
    widths = {key: max((len(row[key]) for row in rows), default=0) for key in ("model", "entity", "kind")}
    for row in rows:
        say(f"{row['model']:<{widths['model']}}  {row['plan']}  {row['entity']:<{widths['entity']}}  "
            f"{row['kind']:<{widths['kind']}}  {row['name']}")  # fmt: skip
    return 0


def show_feature(call: argparse.Namespace, config: Config) -> int:
    """One feature: its definition as code, and which plans have it."""
    found: dict[str, list[str]] = {}
    names: set[str] = set()
    for model, version, plan, _ in _registered(config):
        for definition in plan.definitions:
            names.add(definition.name)
            if definition.name == call.name:
                found.setdefault(as_code(definition), []).append(f"{model}, plan {version}")
    if not found:
        near = sorted(name for name in names if call.name in name)[:5]
        hint = f"; near it are {', '.join(near)}" if near else "; `assay features list` shows all"
        raise InputError(f"there is no feature {call.name!r}{hint}")
    for code, places in found.items():
        say(code)
        for place in places:
            say(f"    in {place}")
    return 0


def show_plan(call: argparse.Namespace, config: Config) -> int:  # noqa: ARG001 - one form for all commands
    """What features a schema gives, before anything is computed."""
    from assay_features.schema import read_schema
    from assay_features.state import StateLayout

    schema = read_schema(call.schema)
    plan = read_plan(call.plan) if call.plan else default_plan_of(schema)
    say(f"plan {plan.version}: {len(plan.definitions)} definitions")
    for definition in plan.definitions:
        say(f"    {as_code(definition)}")
    for entity in plan.entities:
        size = 8 * StateLayout(plan.of_entity(entity)).size
        say(f"online state of one {entity_name(entity)}: {size:,} bytes")
    if call.out:
        write_json(call.out, plan.to_dict())
        say(f"written to {call.out}; edit it and give it to `assay features backfill --plan` or `assay run --plan`")
    return 0


def run_backfill(options: RunOptions, call: argparse.Namespace, reporter: Reporter) -> int:
    """Compute features of a table of any size, register them, load the online states."""
    from assay_features.accounts import links_of
    from assay_features.backfill import backfill
    from assay_features.feast.repository import FeatureRepository
    from assay_features.reports import plan_parts
    from assay_features.stream import StreamSettings
    from assay_platform.tasks.cluster import ray_cluster

    from assay_pipelines.datasets.table import chunked_source, read_accounts, recent_ids

    whole = read_plan(call.plan) if call.plan else default_plan_of(options.event_schema)
    ids = recent_ids(options.table, options.event_schema, StreamSettings().allowed_lateness_s)
    scratch = options.feature_repository / "backfill"
    links, accounts = links_of(options.event_schema), None
    if links is not None:
        assert isinstance(options.event_schema, FraudSchema)
        accounts = scratch / "accounts.npy"
        with reporter.stage("accounts", "Join payments to accounts"):
            left = read_accounts(options.table, options.event_schema, accounts)
            repository = FeatureRepository(options.feature_repository)
            repository.publish_links(links.plan, left, schema=schema_to_dict(options.event_schema), ids=ids)
            repository.close()
    for plan, reports in plan_parts(whole, options.event_schema):
        needed = accounts if ACCOUNT in plan.key_columns() else None
        source = chunked_source(options.table, options.event_schema, plan, scratch, reports=reports, accounts=needed)
        what = "Compute features" if reports is None else "Compute features of reports"
        with ray_cluster(), reporter.stage("backfill", what) as stage:
            result = backfill(
                plan, source, scratch / plan.version, num_partitions=call.partitions, on_progress=stage.update
            )
        with reporter.stage("register", "Register in Feast"):
            repository = FeatureRepository(options.feature_repository)
            repository.register(
                plan,
                {entity: result.features(entity) for entity in plan.entities if plan.of_entity(entity)},
                {entity: result.states_folder(entity) for entity in plan.entities},
                schema=schema_to_dict(options.event_schema),
            )
        num_keys = _materialize(repository, plan, reporter, ids if reports is None else None)
        repository.close()
        say(f"{options.model_name}: plan {plan.version}, {source.num_rows:,} events, {num_keys:,} keys online")
    return 0


def run_materialize(call: argparse.Namespace, config: Config) -> int:
    """Load the states of a backfill into the online store again."""
    repository, version, plan, _ = _repository(config, call.model, call.plan)
    num_keys = _materialize(repository, plan, Reporter())
    repository.close()
    say(f"{call.model}: plan {version}, {num_keys:,} keys online")
    return 0


def _materialize(
    repository: "FeatureRepository", plan: FeaturePlan, reporter: Reporter, ids: dict[str, int] | None = None
) -> int:
    from assay_features.backfill import Backfilled

    folder = repository.folder / "backfill" / plan.version
    if not (folder / "manifest.json").is_file():
        raise InputError(f"plan {plan.version} has no backfill; `assay features backfill` makes one")
    done = Backfilled(folder, 0, 0)
    stream = repository.online(plan)
    num_keys, newest = 0, 0
    with reporter.stage("materialize", "Load the online store") as stage:
        for entity in plan.entities:
            for states in done.states(entity):
                stream.load_part({entity: states})
                num_keys += len(states.keys)
                newest = max(newest, int(states.time_us.max()))
                stage.update(0.0, f"{num_keys:,} keys")
        # Only now do readers of the log count from this batch, so a kill before changes nothing that matters.
        stream.load({}, until_us=newest, ids=ids)
    return num_keys


def run_push(call: argparse.Namespace, config: Config) -> int:
    """Send a file of events through the stream, as `POST /v1/events` would."""
    from assay_features.accounts import AccountStream

    repository, version, plan, document = _repository(config, call.model, call.plan)
    schema = _schema(document, call.model)
    accounts = AccountStream.open(repository, schema, plan)
    accepted, duplicates, late = 0, 0, 0
    reporter = Reporter()
    with reporter.stage("push", f"Push {call.file.name}") as stage:
        stream = repository.online(plan)
        total, batches = _batches(call.file, schema, plan)
        for first, events in batches:
            try:
                report = stream.push(events if accounts is None else accounts.push(events))
            except WorkError as error:
                raise WorkError(f"{error}; the first {accepted:,} events are safe") from error
            accepted += report.accepted
            duplicates += len(report.duplicates)
            late += len(report.late)
            stage.update((first + len(events)) / total, f"{accepted:,} accepted")
        repository.close()
    say(f"{call.model}, plan {version}: {accepted:,} accepted, {duplicates:,} known already, {late:,} too late")
    return 0


def run_verify(options: RunOptions, call: argparse.Namespace, reporter: Reporter) -> int:
    """Replay the newest rows one at a time through the stream, and compare with batch, cell by cell.

    Raises:
        WorkError: a cell differs.
    """
    import tempfile

    from assay_features.batch import features_at
    from assay_features.feast.repository import FeatureRepository
    from assay_features.reports import plan_parts
    from assay_features.state import entity_keys

    from assay_pipelines.datasets.table import load_table

    whole = read_plan(call.plan) if call.plan else default_plan_of(options.event_schema)
    with reporter.stage("load", "Read and check the table"):
        events = load_table(options.table, options.event_schema).events
        events = events.take(slice(max(0, len(events) - call.rows), None))
    num_cells, worst = 0, 0.0
    for plan, reports in plan_parts(whole, options.event_schema):
        source = events if reports is None else reports.of(events)
        with reporter.stage("batch", "Compute in batch"):
            batch = features_at(plan, source, events)
        with (
            tempfile.TemporaryDirectory(prefix="assay-verify-") as folder,
            reporter.stage("stream", "Replay") as stage,
        ):
            stream = FeatureRepository(Path(folder) / "verify").online(plan)
            keys = {entity: entity_keys(entity, events) for entity in plan.entities if plan.of_entity(entity)}
            # An event sees what is strictly earlier, so all up to its own moment goes first.
            come_first = np.searchsorted(source.time_us, events.time_us, side="left")
            pushed = 0
            for i in range(len(events)):
                if come_first[i] > pushed:
                    stream.push(source.take(slice(pushed, int(come_first[i]))))
                    pushed = int(come_first[i])
                read = stream.read({e: [column[i]] for e, column in keys.items()}, events.time_us[i : i + 1])
                for name, value in read.values.items():
                    expected, got = float(batch[name][i]), float(value[0])
                    if not _same(expected, got):
                        raise WorkError(
                            f"{options.table}: event {i + 1} of the newest {len(events)}: {name} is {got!r} in the "
                            f"stream and {expected!r} in batch"
                        )
                    worst = max(worst, 0.0 if np.isnan(expected) else abs(expected - got))
                    num_cells += 1
                if i % 500 == 0:
                    stage.update(i / len(events), f"{num_cells:,} cells")
            stream.close()
    say(f"{len(events):,} events, {num_cells:,} cells: stream and batch agree, the largest difference is {worst:g}")
    return 0


def _same(expected: float, got: float) -> bool:
    both_missing = bool(np.isnan(expected) and np.isnan(got))
    return both_missing or abs(expected - got) <= _TOLERANCE * max(1.0, abs(expected))


def run_discover(options: RunOptions, call: argparse.Namespace, reporter: Reporter) -> int:
    """Search for features on all but the test period of a labelled table."""
    from assay_features.discovery import DiscoverySettings
    from assay_features.events import Reports
    from assay_features.reports import reports_of

    from assay_pipelines.datasets.table import load_table
    from assay_pipelines.fraud.features import discover_features

    schema = options.event_schema
    assert isinstance(schema, FraudSchema)
    with reporter.stage("load", "Read and check the table"):
        events = load_table(options.table, schema).events
    reports = reports_of(schema)
    if call.label_delay is not None:
        if not 0 <= call.label_delay <= _MAX_DELAY_DAYS:
            raise InputError(f"--label-delay {call.label_delay:g}: expected 0 to {_MAX_DELAY_DAYS} days")
        reports = Reports(schema.label, call.label_delay * 86_400)
    settings = DiscoverySettings(seed=call.seed)
    if call.rows is not None:
        settings = replace(settings, max_rows=call.rows)
    with reporter.stage("discover", "Search for features") as stage:
        found = discover_features(events, schema, reports=reports, settings=settings, on_progress=stage.update)
    say(f"{len(found.trials)} candidates, {sum(t.q <= settings.fdr for t in found.trials)} passed the screen")
    for confirmation in found.confirmations:
        lifts = ", ".join(f"{lift:+.4f}" for lift in confirmation.lifts)
        say(f"the best {confirmation.size}: average precision {lifts} on later periods (p {confirmation.p:.2f})")
    if not found.kept:
        say("nothing lifts every later period for sure, so nothing is kept")
        return 0
    say(found.as_code())
    if reports is not None and FeaturePlan(found.kept).split(reports.column)[0].definitions:
        days = reports.delay_s / 86_400
        if schema.label_delay_days != days:
            say(f"{reports.column!r} is read {days:g} days after its event; with `delay_days = {days:g}` under "
                "[labels] in the schema, `assay run --plan` takes these features")  # fmt: skip
    if call.out:
        write_json(call.out, FeaturePlan(found.kept).to_dict())
        say(f"written to {call.out}")
    return 0


def run_embed(options: RunOptions, call: argparse.Namespace, reporter: Reporter) -> int:
    """Train vectors of one column on the training period, keep them in the repository, put them into a plan."""
    from assay_features.embedding_training import EmbeddingTraining, train_embedding

    from assay_pipelines.datasets.table import load_table
    from assay_pipelines.fraud.features import check_plan

    schema = options.event_schema
    assert isinstance(schema, FraudSchema)
    if call.column not in schema.keys:
        raise InputError(
            f"--column {call.column!r} is no entity or categorical column of the schema; "
            f"allowed are {', '.join(schema.keys)}"
        )
    training = EmbeddingTraining(width=call.width, min_count=call.min_count, seed=call.seed)
    plan = read_plan(call.plan) if call.plan else default_plan_of(schema)
    check_plan(plan, schema)
    with reporter.stage("load", "Read and check the table"):
        events = load_table(options.table, schema).events
        events = events.take(slice(0, int(len(events) * schema.split.train)))
    assert events.labels is not None
    with reporter.stage("embed", f"Learn vectors of {call.column}") as stage:
        table = train_embedding(
            call.column,
            events.keys[call.column],
            events.time_us,
            np.column_stack([np.empty((len(events), 0)), *(events.numbers[name] for name in schema.numeric)]),
            events.labels,
            training,
            stage.update,
        )
    table.save(options.feature_repository)
    num_distinct = len({value for value in events.keys[call.column] if value is not None})
    say(as_code(table.definition))
    say(f"{len(table.values):,} of {num_distinct:,} values have a vector of their own, learned from {len(events):,} "
        f"rows; kept for {options.model_name}")  # fmt: skip
    if call.out:
        # Vectors of the column that were trained before give way to these.
        others = tuple(d for d in plan.definitions if d.name != table.definition.name)
        write_json(call.out, FeaturePlan((*others, table.definition)).to_dict())
        say(f"written to {call.out}; `assay run fraud … --plan {call.out}` trains with it")
    return 0


def _batches(path: Path, schema: Schema, plan: FeaturePlan) -> tuple[int, Iterator[tuple[int, "Events"]]]:
    from assay_pipelines.datasets.table import read_events

    events = read_events(path, schema, plan)
    firsts = range(0, len(events), _PUSH_BATCH)
    return len(events), ((first, events.take(slice(first, first + _PUSH_BATCH))) for first in firsts)


def _registered(config: Config) -> Iterator[tuple[str, str, FeaturePlan, object]]:
    """Model, version, plan, schema document; read from the plan files alone, so that nothing heavy is imported."""
    root = config.paths.feature_repositories
    for path in sorted(root.glob("*/plans/*.json")):
        document = json.loads(path.read_text())
        yield path.parent.parent.name, path.stem, FeaturePlan.from_dict(document["plan"]), document["schema"]


def _repository(
    config: Config, model: str, version: str | None
) -> tuple["FeatureRepository", str, FeaturePlan, object]:
    from assay_features.feast.repository import FeatureRepository

    folder = config.paths.feature_repositories / model
    known = sorted(path.parent.name for path in config.paths.feature_repositories.glob("*/plans"))
    if model not in known:
        raise InputError(f"{model!r} has no features; known are {', '.join(known) or 'none'}")
    repository = FeatureRepository(folder)
    plans = repository.plans()
    # Features of reports are fed by `POST /v1/labels` and links of accounts come along with events, so the plan to
    # work on is the newest of the others.
    of_events = [v for v, (plan, document) in plans.items() if not _comes_along(plan, document)]
    chosen = version or of_events[-1]
    if chosen not in plans:
        raise InputError(f"--plan {chosen!r}: {model} has the plans {', '.join(plans)}")
    return repository, chosen, *plans[chosen]


def _comes_along(plan: FeaturePlan, document: object) -> bool:
    label = document.get("columns", {}).get("label") if isinstance(document, dict) else None
    return not {label, ACCOUNT}.isdisjoint(plan.number_columns())


def _schema(document: object, model: str) -> Schema:
    if not isinstance(document, dict):
        raise InputError(f"the plan of {model!r} was registered without a schema; backfill it again")
    return schema_from_dict(document)


def _entity_of(definition: object) -> str:
    entity = getattr(definition, "entity", None)
    return "" if entity is None else entity_name(entity)
