"""The `assay` command.

Only the standard library is imported until a command needs more, so that `assay --help` answers at once.
Exit codes: 0 done, 1 the work failed, 2 the call or its input is wrong, 130 stopped by Ctrl-C.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from assay_pipelines.console import complain, heeding_ctrl_c

_EPILOG = """examples:
  assay demo                                             the whole platform on public data, about five minutes
  assay data get ieee-cis                                fetch a public data set
  assay run fraud --data ieee-cis                        features, search, training, gate, registry
  assay run fraud --data card.csv --schema card.toml     the same on your own table
  assay automl table.csv --schema table.toml             the best model of any table, within ten minutes
  assay features embed --help                            vectors of columns with many values
  assay models                                           what the registry holds
  assay serve                                            REST on http://127.0.0.1:8000, docs at /docs
  assay gateway                                          one address in front of several regions
  assay promote fraud-card 2                             make version 2 the one that answers

Settings are read from assay.toml or the file that ASSAY_CONFIG names; ASSAY_HOME says where state lives.
"""


_EMBED = """Learns a vector for every value of a column with many values, from the training
period alone ([split] train of the schema). The vectors are kept in the model's
feature repository under a digest of their content, and a plan that names the
digest uses them: in training, in serving, in retraining. Rare, unseen and
missing values share one vector."""
_EMBED_EPILOG = """examples:
  assay features embed fraud --data card.csv --schema card.toml --column store_id --out plan.json
  assay features embed fraud --data card.csv --schema card.toml --column card_id --plan plan.json --out plan.json
  assay run fraud --data card.csv --schema card.toml --plan plan.json      train and serve with both
"""


_GATEWAY = """Sends every request to the nearest region that is up, by measured latency, and brings
every event, label, new item and erasure to all of them. A region that stops
answering is left within a second; when it is back it is told what it missed first.
Whoever has written reads from the region that took it until others know it
(header X-Assay-Session says who that is; else the API key, else the address)."""
_GATEWAY_EPILOG = """assay.toml of the gateway:
  [gateway]
  regions = { north = "http://10.0.1.2:8000", south = "http://10.0.2.2:8000" }

ASSAY_GATEWAY_KEY is an API key of the regions that may write and administrate.

  curl http://127.0.0.1:8080/v1/gateway                            regions, latency, lag
  curl -X POST http://127.0.0.1:8080/v1/admin/gateway/south/drain  no more requests to one; /resume ends it
"""


_AUTOML = """Cleans and types a table, searches features and families of models (boosted trees,
CatBoost, nets on the MoE backbone, TabM, linear), and registers one fast model
that learned from the best of them, with a model card. Splits go by time or by
group wherever the schema says so; nothing is chosen by the test part."""
_AUTOML_EPILOG = """the schema: kind = "fraud" for events, as `assay run fraud` takes it, or

  kind = "table"
  [columns]
  label = "income"          what to predict
  positive = ">50K"         optional: the value that means yes, if it is not 1 or true
  timestamp = "visited_at"  optional: split by time
  group = "patient"         optional: rows of one value stay together
  ignore = ["outcome_code"] optional: what is known only afterwards
  numeric = ["age"]         optional, as is categorical: other columns are looked at

examples:
  assay automl adult.csv --schema adult.toml --card card.md
  assay automl payments.parquet --schema payments.toml --budget 3600 --search night
"""


class _Parser(argparse.ArgumentParser):
    """One clear line on stderr and exit code 2 for a wrong call."""

    def error(self, message: str) -> NoReturn:
        complain(f"{self.prog}: {message} (see `{self.prog} --help`)")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="assay",
        description="Scores what to recommend and whom to trust: features, models, registry, REST.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", dest="show_version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    demo = commands.add_parser("demo", help="the main job on real data, both applications")
    demo.add_argument("--keep", action="store_true", help="leave the service running at the end")
    demo.add_argument("--port", type=int, default=0, help="port of the demo's service; 0 takes any free one")

    data = commands.add_parser("data", help="public data sets")
    data_commands = data.add_subparsers(dest="data_command", metavar="ACTION", required=True, parser_class=_Parser)
    get = data_commands.add_parser("get", help="fetch one, verify its checksum, show its licence")
    get.add_argument("name", metavar="NAME", help="movielens-100k, ieee-cis or complete-journey")
    get.add_argument("--from", dest="source", type=Path, metavar="FOLDER",
                     help="read the publisher's own CSV files from here (ieee-cis)")  # fmt: skip

    for name, text in (
        ("run", "the whole pipeline, through to a registered version"),
        ("tune", "search only"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("application", choices=("fraud", "recommend"), metavar="APP", help="fraud or recommend")
        command.add_argument("--data", required=True, metavar="NAME|FILE",
                             help="a data set's name, or a CSV or Parquet file")  # fmt: skip
        command.add_argument("--schema", type=Path, metavar="FILE.toml",
                             help="what the columns of FILE mean; see the README")  # fmt: skip
        command.add_argument("--name", metavar="MODEL", help="name in the registry (default: APP-DATA)")
        command.add_argument("--budget", type=float, default=120.0, metavar="SECONDS",
                             help="seconds for the search (default: 120)")  # fmt: skip
        command.add_argument("--search", metavar="NAME",
                             help="remember the search under this name; a search of that name that was cut off goes on "
                                  "where it stopped")  # fmt: skip
        command.add_argument("--seed", type=int, default=42, metavar="N", help="same seed, same result (default: 42)")
        command.add_argument("--rows", type=int, metavar="N", help="only the newest N rows")
        command.add_argument("--plan", type=Path, metavar="FILE.json",
                             help="these features instead of those that the schema gives (fraud); "
                                  "`assay features plan`, `discover` and `embed` write such files")  # fmt: skip
        command.add_argument("--rules", type=Path, metavar="FILE.toml",
                             help="allow and block lists and limits that decide before the model (fraud)")  # fmt: skip
        if name == "run":
            command.add_argument("--update", action="store_true",
                                 help="the champion learns on from what the table has since, at a fraction "
                                      "of the cost, and has to do better than before (fraud)")  # fmt: skip
            command.add_argument("--recalibrate", action="store_true",
                                 help="the champion stays as it is; its probabilities and thresholds move to what "
                                      "was reported since, if they have drifted (fraud)")  # fmt: skip
            command.add_argument("--update-on", choices=("device", "cpu", "cpu-late"), default="device",
                                 help="where weights of nets on the MoE backbone are updated: on the device that "
                                      "computes, on the CPU so that more of them fit on a GPU, or there a step late "
                                      "so that the GPU does not wait (default: device)")  # fmt: skip
            command.add_argument("--workers", type=int, default=1, metavar="N",
                                 help="train nets on N workers of the Ray cluster, which share every batch and learn "
                                      "what one would (default: 1, this process)")  # fmt: skip
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        command.add_argument("--submit", metavar="RAY_ADDRESS",
                             help="run as a job on a Ray cluster, such as http://127.0.0.1:8265")  # fmt: skip

    _add_automl(commands)

    serve = commands.add_parser("serve", help="REST scoring that follows the registry's champion alias")
    serve.add_argument("--host", metavar="HOST", help="default 127.0.0.1; any other needs an API key")
    serve.add_argument("--port", type=int, metavar="PORT", help="default 8000; 0 takes any free one")
    serve.add_argument("--fraud", metavar="MODEL", help="which fraud model (default: the newest champion)")
    serve.add_argument("--recommend", metavar="MODEL", help="which recommender (default: the newest champion)")
    serve.add_argument("--workers", type=int, metavar="N",
                       help="processes that answer on the port (default: 1); one that ends starts again")  # fmt: skip
    serve.add_argument("--ray", action="store_true", help="scale out on Ray Serve")
    serve.add_argument("--new-key", metavar="WHO", help="create an API key for WHO, print it once, and exit")

    gateway = commands.add_parser(
        "gateway", help="one address in front of several regions", description=_GATEWAY, epilog=_GATEWAY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    gateway.add_argument("--host", metavar="HOST", help="default 127.0.0.1; any other needs an API key")
    gateway.add_argument("--port", type=int, metavar="PORT", help="default 8080; 0 takes any free one")

    keys = commands.add_parser("keys", help="API keys of the service; a running one notices changes within a second")
    key_commands = keys.add_subparsers(dest="keys_command", metavar="ACTION", required=True, parser_class=_Parser)
    new_key = key_commands.add_parser("new", help="make a key, print it once")
    new_key.add_argument("who", metavar="WHO")
    new_key.add_argument("--scopes", default="score,write,read", metavar="A,B",
                         help="what it may do: score, write (events, labels, items), read (decisions, models), admin "
                              "(promote, roll back, erase); default: all but admin")  # fmt: skip
    new_key.add_argument("--rate", type=float, metavar="N", help="requests a second (default: no limit of its own)")
    new_key.add_argument("--days", type=float, metavar="N", help="after which it ends (default: never)")
    new_key.add_argument(
        "--models", metavar="A,B", help="models that it may ask, by their names, /models/NAME/v1/… (default: all)"
    )
    key_commands.add_parser("list", help="whose keys there are, and what they may do")
    revoke = key_commands.add_parser("revoke", help="end a key")
    revoke.add_argument("id", metavar="ID", help="as `assay keys list` shows it")

    promote = commands.add_parser("promote", help="point an alias at a version; services follow within seconds")
    promote.add_argument("model", metavar="MODEL")
    promote.add_argument("version", type=int, metavar="VERSION")
    promote.add_argument("--alias", default="champion", help="default: champion")
    promote.add_argument("--reason", default="promoted by hand", help="kept in the audit log")

    promote.add_argument("--unchecked", action="store_true",
                         help="services take it without letting it answer recent requests aside first")  # fmt: skip

    audit = commands.add_parser("audit", help="who changed what answers, when, why, and what was seen")
    audit.add_argument("model", nargs="?", metavar="MODEL", help="of this model alone")
    audit.add_argument("--last", type=int, metavar="N", help="the newest N entries (default: all)")
    audit.add_argument("--json", action="store_true", help="one JSON object a line, with all evidence")

    replay = commands.add_parser("replay", help="make a kept decision again from its stored features, and explain it")
    replay.add_argument("model", metavar="MODEL")
    replay.add_argument("event", metavar="EVENT_ID")
    replay.add_argument("--json", action="store_true", help="print the whole record as one JSON object")

    rollback = commands.add_parser("rollback", help="point champion back at the version before")
    rollback.add_argument("model", metavar="MODEL")
    rollback.add_argument("--reason", default="rolled back by hand", help="kept in the audit log")

    models = commands.add_parser("models", help="list models, versions and aliases")
    models.add_argument("--json", action="store_true", help="as JSON")

    _add_features(commands)
    _add_jobs(commands)

    interface = commands.add_parser("ui", help="the MLflow page, loopback by default")
    interface.add_argument("--host", default="127.0.0.1")
    interface.add_argument("--port", type=int, default=5000)

    commands.add_parser("doctor", help="check versions, ports, disk, GPU, Ray, store and registry")

    bench = commands.add_parser("bench", help="run benchmarks/NAME.py of a checkout")
    bench.add_argument("name", metavar="NAME")
    bench.add_argument("--json", action="store_true", help="end with one JSON line")
    bench.add_argument("options", nargs=argparse.REMAINDER, metavar="...",
                       help="options of the benchmark itself; its file says which")  # fmt: skip
    return parser


def _add_automl(commands: "argparse._SubParsersAction[_Parser]") -> None:
    automl = commands.add_parser(
        "automl",
        help="the best model of any table with labels, within a budget",
        description=_AUTOML,
        epilog=_AUTOML_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    automl.add_argument("data", metavar="NAME|FILE", help="a CSV or Parquet file, or the name of a data set")
    automl.add_argument("--schema", type=Path, metavar="FILE.toml", help="what its columns mean")
    automl.add_argument("--name", metavar="MODEL", help="name in the registry (default: fraud-DATA or table-DATA)")
    automl.add_argument("--budget", type=float, default=600.0, metavar="SECONDS",
                        help="for all of it, reading and the last training included (default: 600)")  # fmt: skip
    automl.add_argument("--trials", type=int, default=200, metavar="N", help="at most so many (default: 200)")
    automl.add_argument("--search", metavar="NAME",
                        help="remember the trials under this name; the same command goes on with them")  # fmt: skip
    automl.add_argument("--seed", type=int, default=42, metavar="N", help="of the search and the split (default: 42)")
    automl.add_argument("--rows", type=int, metavar="N", help="only the newest N rows; without time, N by chance")
    automl.add_argument("--plan", type=Path, metavar="FILE.json", help="these features, for tables of events")
    automl.add_argument("--card", type=Path, metavar="FILE.md", help="write the model card here too")
    automl.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def _add_jobs(commands: "argparse._SubParsersAction[_Parser]") -> None:
    jobs = commands.add_parser("jobs", help="commands that run on a Ray cluster")
    jobs.add_argument("--address", metavar="URL",
                      help="of the cluster's job server (default: RAY_API_SERVER_ADDRESS, or "
                           "http://127.0.0.1:8265)")  # fmt: skip
    actions = jobs.add_subparsers(dest="jobs_command", metavar="ACTION", required=True, parser_class=_Parser)
    submit = actions.add_parser("submit", help="run a command there and print the job's id")
    submit.add_argument("--working-dir", type=Path, metavar="FOLDER", help="sent along; the command runs inside of it")
    submit.add_argument("--follow", action="store_true", help="show what it writes until it ends; Ctrl-C stops it")
    submit.add_argument("entrypoint", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
    listing = actions.add_parser("list", help="all jobs, newest first")
    listing.add_argument("--json", action="store_true", help="as JSON")
    for name, text in (("status", "the state of one job"), ("logs", "what it has written"), ("cancel", "stop it")):
        action = actions.add_parser(name, help=text)
        action.add_argument("job", metavar="ID")
        if name == "logs":
            action.add_argument("--follow", action="store_true", help="until it ends; Ctrl-C leaves it running")


def _labelled(application: str) -> str:
    if application != "fraud":
        raise argparse.ArgumentTypeError(f"{application!r}: vectors are learned from labels, which only fraud has")
    return application


def _add_features(commands: "argparse._SubParsersAction[_Parser]") -> None:
    features = commands.add_parser("features", help="what features there are, and how they get into the store")
    actions = features.add_subparsers(dest="features_command", metavar="ACTION", required=True, parser_class=_Parser)

    listing = actions.add_parser("list", help="every feature of every model")
    listing.add_argument("--json", action="store_true", help="as JSON")

    show = actions.add_parser("show", help="one feature: its definition as code, and which plans have it")
    show.add_argument("name", metavar="NAME", help="such as card__amount__mean__7d")

    plan = actions.add_parser("plan", help="what features a schema gives, before anything is computed")
    plan.add_argument("--schema", type=Path, required=True, metavar="FILE.toml")
    plan.add_argument("--plan", type=Path, metavar="FILE.json", help="show this plan instead of the default one")
    plan.add_argument("--out", type=Path, metavar="FILE.json", help="write it, to be edited")

    for name, text in (
        ("backfill", "compute the features of a table of any size, register them, load the online store"),
        ("verify", "replay history through the stream and compare with batch, cell by cell"),
    ):
        command = actions.add_parser(name, help=text)
        command.add_argument("application", choices=("fraud", "recommend"), metavar="APP", help="fraud or recommend")
        command.add_argument("--data", required=True, metavar="NAME|FILE")
        command.add_argument("--schema", type=Path, metavar="FILE.toml")
        command.add_argument("--name", metavar="MODEL", help="name of the repository (default: APP-DATA)")
        command.add_argument("--plan", type=Path, metavar="FILE.json", help="instead of the schema's default plan")
        if name == "backfill":
            command.add_argument("--partitions", type=int, metavar="N", help="default: 500,000 events each")
        else:
            command.add_argument("--rows", type=int, default=10_000, metavar="N",
                                 help="the newest N events (default: 10000)")  # fmt: skip

    skew = actions.add_parser(
        "skew", help="compare features that decisions were made from with batch, cell by cell; the service shows it",
    )  # fmt: skip
    skew.add_argument("application", choices=("fraud",), metavar="APP", help="fraud")
    skew.add_argument("--data", required=True, metavar="NAME|FILE", help="events with all that happened before them")
    skew.add_argument("--schema", type=Path, metavar="FILE.toml")
    skew.add_argument("--name", metavar="MODEL", help="whose champion decided (default: APP-DATA)")
    skew.add_argument("--rows", type=int, default=2000, metavar="N", help="the newest N decisions (default: 2000)")
    skew.add_argument("--tolerance", type=float, default=1e-9, metavar="X",
                      help="relative, of numbers (default: 1e-9, what rounding does to sums)")  # fmt: skip

    discover = actions.add_parser("discover", help="search for features that lift later periods; prints them as code")
    discover.add_argument("application", choices=("fraud",), metavar="APP", help="fraud")
    discover.add_argument("--data", required=True, metavar="NAME|FILE")
    discover.add_argument("--schema", type=Path, metavar="FILE.toml")
    discover.add_argument("--name", metavar="MODEL", help=argparse.SUPPRESS)
    discover.add_argument("--rows", type=int, metavar="N", help="labelled rows looked at (default: 60000)")
    discover.add_argument("--label-delay", type=float, metavar="DAYS",
                          help="labels are reported so long after their event: also search what was reported by then "
                               "(default: past labels are not looked at)")  # fmt: skip
    discover.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same result (default: 0)")
    discover.add_argument("--out", type=Path, metavar="FILE.json", help="write the plan, for `backfill --plan`")

    embed = actions.add_parser(
        "embed",
        help="learn vectors of a column with many values, and put them into a plan",
        description=_EMBED,
        epilog=_EMBED_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    embed.add_argument("application", type=_labelled, metavar="APP", help="fraud")
    embed.add_argument("--data", required=True, metavar="NAME|FILE",
                       help="a data set's name, or a CSV or Parquet file")  # fmt: skip
    embed.add_argument("--schema", type=Path, metavar="FILE.toml", help="what the columns of FILE mean")
    embed.add_argument("--name", metavar="MODEL", help="the model that it is for (default: APP-DATA)")
    embed.add_argument("--column", required=True, metavar="NAME", help="an entity or categorical column of the schema")
    embed.add_argument("--width", type=int, default=8, metavar="N", help="numbers a vector (default: 8)")
    embed.add_argument("--min-count", type=int, default=10, metavar="N",
                       help="values seen less often share one vector (default: 10)")  # fmt: skip
    embed.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same vectors (default: 0)")
    embed.add_argument("--plan", type=Path, metavar="FILE.json", help="add to this plan, not to the default one")
    embed.add_argument("--out", type=Path, metavar="FILE.json", help="write the plan with the embedding in it")

    materialize = actions.add_parser("materialize", help="load the states of a backfill into the online store again")
    materialize.add_argument("model", metavar="MODEL")
    materialize.add_argument("--plan", metavar="VERSION", help="default: the newest")

    push = actions.add_parser("push", help="send a file of events through the stream")
    push.add_argument("model", metavar="MODEL")
    push.add_argument("file", type=Path, metavar="FILE", help="CSV or Parquet with the schema's columns")
    push.add_argument("--plan", metavar="VERSION", help="default: the newest")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `assay` command."""
    parser = _parser()
    call = parser.parse_args(arguments)
    if call.show_version:
        from importlib.metadata import version

        print(f"assay {version('assay')}")  # noqa: T201
        raise SystemExit(0)
    if call.command is None:
        parser.print_help()
        raise SystemExit(2)
    raise SystemExit(_guarded(call))


def _guarded(call: argparse.Namespace) -> int:
    from assay_platform.errors import AssayError, InputError

    try:
        from assay_pipelines import wiring

        with heeding_ctrl_c():
            return wiring.dispatch(call)
    except KeyboardInterrupt:
        return _stopped()
    except Exception as error:
        # A library that cleans up on the way out of a Ctrl-C may fail at it and hide what it cleaned up for.
        if _is_behind(KeyboardInterrupt, error):
            return _stopped()
        if isinstance(error, AssayError):
            complain(f"assay: {error}")
            return 2 if isinstance(error, InputError) else 1
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone; point stdout elsewhere so that its flush at exit stays silent.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        raise


def _stopped() -> NoReturn:
    """Every block has cleaned up on the way here.

    Ray's native threads, cut off in the middle of starting or stopping, can crash a regular interpreter shutdown, so
    the process ends at once.
    """
    complain("assay: stopped")
    sys.stdout.flush()
    os._exit(130)


def _is_behind(kind: type[BaseException], error: BaseException) -> bool:
    """Whether an error was raised while one of this kind was handled."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, kind):
        behind = behind.__cause__ or behind.__context__
    return behind is not None


def print_json(value: object) -> None:
    """One JSON object as the last line of stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
