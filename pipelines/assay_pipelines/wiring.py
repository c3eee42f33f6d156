"""The composition root: what each `assay` command is made of. One function a command."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from assay_features.definitions import FeaturePlan
from assay_features.rules import Rule, read_rules
from assay_features.schema import (
    FraudSchema,
    RecommendSchema,
    Schema,
    TableSchema,
    read_labelled_schema,
    read_schema,
)
from assay_platform.config import Config, load_config
from assay_platform.errors import InputError
from assay_platform.storage import write_bytes, write_json

from assay_pipelines.console import Reporter, complain, say
from assay_pipelines.features import read_plan
from assay_pipelines.options import RunOptions, RunReport

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"


def dispatch(call: argparse.Namespace) -> int:
    """Run one parsed command; returns the exit code."""
    config = load_config()
    commands: dict[str, Callable[[argparse.Namespace, Config], int]] = {
        "demo": _demo,
        "data": _data,
        "run": _run,
        "tune": _tune,
        "automl": _automl,
        "serve": _serve,
        "gateway": _gateway,
        "keys": _keys,
        "promote": _promote,
        "rollback": _rollback,
        "audit": _audit,
        "replay": _replay,
        "models": _models,
        "ui": _ui,
        "doctor": _doctor,
        "bench": _bench,
        "features": _features,
        "jobs": _jobs,
    }
    return commands[call.command](call, config)


def _data(call: argparse.Namespace, config: Config) -> int:
    from assay_pipelines.datasets import CATALOGUE, get_dataset

    reporter = Reporter()
    if call.name in CATALOGUE:
        with reporter.stage("data", f"Get {call.name}"):
            folder = get_dataset(call.name, config.paths.data, source=call.source)
    else:
        folder = get_dataset(call.name, config.paths.data)  # raises: the name is unknown
    dataset = CATALOGUE[call.name]
    say(f"{call.name}: {dataset.summary}")
    say(f"licence: {dataset.licence}")
    say(f"files: {folder}")
    return 0


def make_options(
    config: Config,
    application: str,
    data: str,
    *,
    schema_file: Path | None = None,
    name: str | None = None,
    reporter: Reporter,
) -> RunOptions:
    """Resolve a data set's name, or a file with its schema.

    Raises:
        InputError: the name is unknown, or a file comes without a schema, or the schema is of the other kind.
    """
    from assay_pipelines.datasets import CATALOGUE, get_dataset

    read: Callable[[Path], Schema | TableSchema] = read_labelled_schema if application == "table" else read_schema
    if data in CATALOGUE:
        with reporter.stage("data", f"Get {data}"):
            folder = get_dataset(data, config.paths.data)
        reporter.line(f"licence: {CATALOGUE[data].licence}")
        table, schema_folder = folder / "events.parquet", folder
        schema: Schema | TableSchema = read(schema_file) if schema_file else CATALOGUE[data].schema(folder)
    else:
        table = Path(data)
        if not table.is_file():
            raise InputError(f"--data {data!r} is neither a file nor a data set; known are {', '.join(CATALOGUE)}")
        if schema_file is None:
            raise InputError(f"--data {data} is a file, so --schema FILE.toml is needed; the README shows one")
        schema, schema_folder = read(schema_file), schema_file.resolve().parent
    wanted = {"fraud": FraudSchema, "recommend": RecommendSchema, "table": TableSchema}[application]
    if not isinstance(schema, wanted):
        raise InputError(f"{schema_file or data}: kind = {schema.kind!r}, but the command is for {application!r}")
    stem = data if data in CATALOGUE else table.stem
    model_name = name or f"{application}-{_slug(stem)}"
    if not re.fullmatch(_NAME, model_name):
        raise InputError(f"--name {model_name!r}: use letters, digits, '-', '_' and '.', at most 100")
    return RunOptions(
        config=config,
        application=application,
        data=data,
        table=table,
        schema=schema,
        schema_folder=schema_folder,
        model_name=model_name,
    )


def _automl(call: argparse.Namespace, config: Config) -> int:
    from assay_pipelines.automl import run_automl

    reporter = Reporter()
    for flag, value in (("--rows", call.rows), ("--trials", call.trials)):
        if value is not None and value < 1:
            raise InputError(f"{flag} is {value}; it must be at least 1")
    _check_search(call)
    # A table's own schema says which kind of table it is.
    schema = None if call.schema is None else read_labelled_schema(call.schema)
    application = "fraud" if schema is None else schema.kind
    if call.plan is not None and application != "fraud":
        raise InputError(f"--plan {call.plan}: features are of events; a schema with kind = 'table' has none")
    options = replace(
        make_options(config, application, call.data, schema_file=call.schema, name=call.name, reporter=reporter),
        seed=call.seed, budget_s=call.budget, max_trials=call.trials, search_name=call.search, max_rows=call.rows,
        plan=None if call.plan is None else read_plan(call.plan),
    )  # fmt: skip
    report, card = run_automl(options, reporter)
    if call.card is not None:
        write_bytes(call.card, card.encode())
    show_report(report)
    if call.card is not None:
        say(f"model card: {call.card}")
    if call.json:
        say(json.dumps(report.to_dict()))
    return 0


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "table"


def _options(call: argparse.Namespace, config: Config, reporter: Reporter) -> RunOptions:
    if call.rows is not None and call.rows < 1:
        raise InputError(f"--rows is {call.rows}; it must be at least 1")
    options = make_options(
        config, call.application, call.data, schema_file=call.schema, name=call.name, reporter=reporter
    )
    update, recalibrate = getattr(call, "update", False), getattr(call, "recalibrate", False)
    if update and recalibrate:
        raise InputError("--update recalibrates too; give one of --update and --recalibrate")
    flag = "--update" if update else "--recalibrate"
    if (update or recalibrate) and call.application != "fraud":
        raise InputError(f"{flag} is for fraud: a recommender's run is short, so it is trained anew")
    if (update or recalibrate) and (call.plan or call.rules or call.rows):
        raise InputError(f"{flag} keeps the champion's features, rules and rows; leave --plan, --rules, --rows out")
    workers = getattr(call, "workers", 1)
    if (update or recalibrate) and workers != 1:
        raise InputError(f"{flag} trains in one process; leave --workers out")
    _check_search(call)
    return replace(
        options, seed=call.seed, search_name=call.search, budget_s=call.budget, max_rows=call.rows,
        plan=_plan(call), rules=_rules(call),
        update=update, recalibrate=recalibrate, update_on=getattr(call, "update_on", "device"), num_workers=workers,
    )  # fmt: skip


def _check_search(call: argparse.Namespace) -> None:
    if call.search is not None and not re.fullmatch(_NAME, call.search):
        raise InputError(f"--search {call.search!r}: use letters, digits, '-', '_' and '.', at most 100")


def _plan(call: argparse.Namespace) -> FeaturePlan | None:
    if call.plan is None:
        return None
    if call.application != "fraud":
        raise InputError(f"--plan {call.plan}: a recommender's features follow from its schema; --plan is for fraud")
    return read_plan(call.plan)


def _rules(call: argparse.Namespace) -> tuple[Rule, ...]:
    if call.rules is None:
        return ()
    if call.application != "fraud":
        raise InputError(f"--rules {call.rules}: rules decide on events; --rules is for fraud")
    return read_rules(call.rules)


def run_application(options: RunOptions, reporter: Reporter) -> RunReport:
    """The pipeline of an application."""
    if options.application == "fraud":
        from assay_pipelines.fraud.pipeline import run_fraud
        from assay_pipelines.fraud.update import recalibrate_fraud, update_fraud

        run = update_fraud if options.update else recalibrate_fraud if options.recalibrate else run_fraud
        return run(options, reporter)
    from assay_pipelines.recommend.pipeline import run_recommend

    return run_recommend(options, reporter)


def _run(call: argparse.Namespace, config: Config) -> int:
    if call.submit:
        return _submit(call, config)
    reporter = Reporter()
    report = run_application(_options(call, config, reporter), reporter)
    show_report(report)
    if call.json:
        say(json.dumps(report.to_dict()))
    return 0


def _tune(call: argparse.Namespace, config: Config) -> int:
    if call.submit:
        return _submit(call, config)
    reporter = Reporter()
    options = _options(call, config, reporter)
    if options.application == "fraud":
        from assay_pipelines.fraud.pipeline import tune_fraud as tune
    else:
        from assay_pipelines.recommend.pipeline import tune_recommend as tune
    result = tune(options, reporter)
    best = {name: value for name, value in result.best.items() if name not in ("seed", "num_epochs")}
    say(f"best of {len(result.trials)} trials: validation metric {result.metric:.4f}")
    for name, value in best.items():
        say(f"  {name} = {value}")
    if call.json:
        say(json.dumps({"application": options.application, "data": options.data, "metric": result.metric,
                        "trials": len(result.trials), "best": best}))  # fmt: skip
    return 0


def show_report(report: RunReport) -> None:
    """Metrics beside the baselines, as a table."""
    names = [n for n in report.metrics if all(n in b for b in report.baselines.values())]
    say()
    say(f"{report.model_name} version {report.version} is {report.alias}: {report.gate}")
    header = f"{'test metric':<26}{'ours':>10}" + "".join(f"{name:>14}" for name in report.baselines)
    say(header)
    for name in names:
        cells = "".join(f"{baseline[name]:>14.4f}" for baseline in report.baselines.values())
        say(f"{name:<26}{report.metrics[name]:>10.4f}{cells}")
    say()


def _jobs(call: argparse.Namespace, config: Config) -> int:  # noqa: ARG001 - of every command
    from assay_pipelines.jobs import run_action

    return run_action(call)


def _submit(call: argparse.Namespace, config: Config) -> int:
    """Send the same command as a Ray job. Files travel with it; state stays where ASSAY_HOME points."""
    from assay_platform.tasks.jobs import submit_and_follow

    from assay_pipelines.datasets import CATALOGUE

    command = [sys.executable, "-m", "assay_pipelines.cli", call.command, call.application,
               "--budget", str(call.budget), "--seed", str(call.seed)]  # fmt: skip
    command += ["--name", call.name] if call.name else []
    command += ["--rows", str(call.rows)] if call.rows else []
    # A job that is lost with its node goes on where it stopped when it is submitted again.
    command += ["--search", call.search or f"job-{uuid.uuid4().hex[:8]}"]
    command += ["--update-on", call.update_on, "--workers", str(call.workers)] if call.command == "run" else []
    command += ["--json"] if call.json else []
    command += [f"--{name}" for name in ("update", "recalibrate") if getattr(call, name, False)]
    with tempfile.TemporaryDirectory(prefix="assay-job-") as scratch:
        folder = Path(scratch)
        plan = _plan(call)
        if plan is not None:
            # Trained tables need not travel: they are in the feature repository, below ASSAY_HOME.
            write_json(folder / "assay-feature-plan.json", plan.to_dict())
            command += ["--plan", "assay-feature-plan.json"]
        if _rules(call):
            shutil.copyfile(call.rules, folder / "assay-rules.toml")
            command += ["--rules", "assay-rules.toml"]
        if call.data in CATALOGUE:
            command += ["--data", call.data]
        else:
            # Fails here, before anything is sent, if the file or its schema is wrong.
            options = _options(call, config, Reporter())
            shutil.copyfile(options.table, folder / options.table.name)
            shutil.copyfile(call.schema, folder / call.schema.name)
            command += ["--data", options.table.name, "--schema", call.schema.name]
            items = getattr(options.schema, "items", None)
            if items is not None and not Path(items.path).is_absolute():
                if ".." in Path(items.path).parts:
                    raise InputError(
                        f"[items] path = {items.path!r}: --submit sends files from the schema's folder down"
                    )
                (folder / items.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(options.schema_folder / items.path, folder / items.path)
        environment = {
            "ASSAY_HOME": str(config.paths.home.resolve()),
            "XDG_CACHE_HOME": str(config.paths.cache.parent),
        }
        job_id = submit_and_follow(
            call.submit,
            command,
            environment=environment,
            working_dir=folder if any(folder.iterdir()) else None,
            write=lambda lines: print(lines, end="", flush=True),  # noqa: T201 - the job's own output
        )
    complain(f"job {job_id} succeeded")
    return 0


def _serve(call: argparse.Namespace, config: Config) -> int:  # noqa: ARG001 - services read the settings themselves
    """Replace this process by the service, so that signals reach it directly."""
    arguments = [sys.executable, "-m", "assay_services"]
    for flag in ("host", "port", "fraud", "recommend", "workers", "new_key"):
        value = getattr(call, flag)
        if value is not None:
            arguments += [f"--{flag.replace('_', '-')}", str(value)]
    if call.ray:
        arguments.append("--ray")
    sys.stdout.flush()
    os.execv(sys.executable, arguments)  # noqa: S606 - our own interpreter and module


def _gateway(call: argparse.Namespace, config: Config) -> int:  # noqa: ARG001
    given = [*_option("--host", call.host), *_option("--port", call.port)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "assay_services.gateway", *given])  # noqa: S606 - as above


def _keys(call: argparse.Namespace, config: Config) -> int:  # noqa: ARG001
    """The service's own command: pipelines do not import services."""
    given: list[str] = []
    if call.keys_command == "new":
        given = [call.who, "--scopes", call.scopes, *_option("--rate", call.rate), *_option("--days", call.days)]
        given += _option("--models", call.models)
    elif call.keys_command == "revoke":
        given = [call.id]
    command = [sys.executable, "-m", "assay_services.keys", call.keys_command, *given]
    return subprocess.run(command, check=False).returncode


def _option(name: str, value: float | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def _promote(call: argparse.Namespace, config: Config) -> int:
    from assay_pipelines.tracking import open_registry

    gate = open_registry(config).promote(
        call.model, call.version, alias=call.alias, reason=call.reason, unchecked=call.unchecked
    )
    say(f"{call.model} version {call.version} is now {call.alias}")
    if gate.better_than_champion is False:
        complain(f"note: at its registration this version was {gate.summary}")
    return 0


def _replay(call: argparse.Namespace, config: Config) -> int:
    from assay_pipelines.fraud.replay import run_replay

    return run_replay(call, config)


def _rollback(call: argparse.Namespace, config: Config) -> int:
    from assay_pipelines.tracking import open_registry

    before, after = open_registry(config).rollback(call.model, reason=call.reason)
    say(f"{call.model}: champion went back from version {before} to version {after}")
    return 0


def _audit(call: argparse.Namespace, config: Config) -> int:
    """The log, its chain of hashes checked first."""
    from assay_platform.tracking.audit import AuditLog

    log = AuditLog(config.paths.audit_log)
    num_entries = log.verify()
    entries = [entry for entry in log.entries() if call.model in (None, entry.get("model"))]
    if call.last is not None:
        entries = entries[-call.last :] if call.last > 0 else []
    for entry in entries:
        say(json.dumps(entry) if call.json else _entry_line(entry))
    if not call.json:
        say(f"{len(entries)} of {num_entries} entries; none was changed or removed (hashes follow from one another)")
    return 0


def _entry_line(entry: dict[str, Any]) -> str:
    """Such as `2026-11-30 15:04:05  ann  promote  fraud-card champion 1 → 2: why (what was seen)`."""
    was = "" if entry.get("from_version") is None else f"{entry['from_version']} → "
    moment = str(entry["time"]).replace("T", " ").split(".")[0]
    about = f"{entry.get('model', '')} {entry.get('alias', '')} {was}{entry.get('version', '')}"
    evidence = entry.get("evidence") or {}
    seen = entry.get("gate") or ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in evidence.items()
        if value not in ("", [], None) and evidence.get("requests")  # the first version has nothing to be held against
    )
    why = f": {entry['reason']}" if entry.get("reason") else ""
    where = f" at {entry['service']}" if entry.get("service") else ""
    return f"{moment}  {entry['actor']:<10} {entry['action']:<10} {about}{where}{why}{f' ({seen})' if seen else ''}"


def _models(call: argparse.Namespace, config: Config) -> int:
    from assay_pipelines.tracking import open_registry

    rows = open_registry(config).versions()
    if call.json:
        say(json.dumps([row._asdict() for row in rows]))
        return 0
    if not rows:
        say("the registry is empty; `assay run` or `assay demo` fills it")
        return 0
    say(f"{'model':<32}{'version':>8}  {'alias':<20}{'application':<12}metric")
    for row in rows:
        key = "average_precision" if row.application == "fraud" else "ndcg_at_10"
        shown = f"{key} {row.metrics[key]:.4f}" if key in row.metrics else ""
        say(f"{row.name:<32}{row.version:>8}  {', '.join(row.aliases):<20}{row.application:<12}{shown}")
    return 0


def _ui(call: argparse.Namespace, config: Config) -> int:
    """Replace this process by MLflow's own server over our store, so that signals reach it directly."""
    import socket

    from assay_platform.tracking.client import configure_mlflow

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((call.host, call.port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {call.host}:{call.port} ({error.strerror}); choose another --port"
            ) from error
    configure_mlflow()
    config.paths.home.mkdir(parents=True, exist_ok=True)
    say(f"MLflow on http://{call.host}:{call.port}  (Ctrl-C stops it)")
    arguments = [sys.executable, "-m", "mlflow", "server", "--host", call.host, "--port", str(call.port),
                 "--backend-store-uri", config.tracking_uri,
                 "--default-artifact-root", (config.paths.home / "artifacts").as_uri(), "--workers", "1"]  # fmt: skip
    os.execv(sys.executable, arguments)  # noqa: S606 - our own interpreter and module


def _doctor(call: argparse.Namespace, config: Config) -> int:  # noqa: ARG001
    from assay_pipelines.doctor import examine

    return examine(config)


def _demo(call: argparse.Namespace, config: Config) -> int:
    from assay_pipelines.demo import run_demo

    return run_demo(config, keep=call.keep, port=call.port)


def _features(call: argparse.Namespace, config: Config) -> int:
    from assay_pipelines import features
    from assay_pipelines.skew import run_skew

    actions: dict[str, Callable[[argparse.Namespace, Config], int]] = {
        "list": features.list_features,
        "show": features.show_feature,
        "plan": features.show_plan,
        "materialize": features.run_materialize,
        "push": features.run_push,
    }
    if call.features_command in actions:
        return actions[call.features_command](call, config)
    reporter = Reporter()
    options = make_options(
        config, call.application, call.data, schema_file=call.schema, name=call.name, reporter=reporter
    )
    works = {
        "backfill": features.run_backfill,
        "verify": features.run_verify,
        "discover": features.run_discover,
        "embed": features.run_embed,
        "skew": run_skew,
    }
    return works[call.features_command](options, call, reporter)


def _bench(call: argparse.Namespace, config: Config) -> int:  # noqa: ARG001
    root = Path(__file__).resolve().parents[2] / "benchmarks"
    names = sorted(path.stem for path in root.glob("[!_]*.py"))
    if call.name not in names:
        known = ", ".join(names) or f"none: benchmarks belong to a checkout, and {root} is not there"
        raise InputError(f"unknown benchmark {call.name!r}; known are {known}")
    command = [sys.executable, str(root / f"{call.name}.py"), *(["--json"] if call.json else []), *call.options]
    return subprocess.run(command, check=False).returncode
