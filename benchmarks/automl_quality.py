"""AutoML on four real tables within one budget: `assay automl`, AutoGluon `best_quality`, FLAML, a tuned LightGBM.

All get the same rows to learn from and the same rows to score: IEEE-CIS and flights are cut by time, adult and
census-income by chance, rows that repeat another one kept together. Peers get the table's own columns, the timestamp
among them; ours gets the table and its schema, and works its features out within the budget. AutoGluon's folds are of
chance on every table, which is what `best_quality` does; FLAML is told where there is time. LightGBM is tuned on
validation rows without a budget and refitted on all. Scoring: the second time over the test rows in bulk, from columns
as they are read; not compared for tables of events, whose features ours takes from a store. `--peers PYTHON` names an
interpreter that has autogluon.tabular and flaml.

    taskset -c 0,1 assay bench automl_quality [--json] [--budget 600] [--tables adult …] [--peers PYTHON]
        [--against autogluon …]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from assay_features.schema import FraudSchema, Schema, TableSchema, read_labelled_schema
from assay_pipelines.automl import run_automl
from assay_pipelines.automl.table import read_table
from assay_pipelines.console import Reporter
from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS, get_dataset
from assay_pipelines.datasets.table import load_table
from assay_pipelines.fraud.baseline import tree_frame, tuned_lightgbm
from assay_pipelines.fraud.evaluate import auc
from assay_pipelines.fraud.prepare import time_split
from assay_pipelines.options import RunOptions
from assay_platform.config import Paths, load_config
from assay_platform.models.fraud import FraudModel
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _automl_tables import SOURCES, table
from _report import finish, row

SEED, PEERS = 0, ("autogluon", "flaml")
HERE = Path(__file__).parent


class Parts(NamedTuple):
    """The table's own columns in the order of the split."""

    columns: dict[str, NDArray[Any]]
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    labels: NDArray[np.bool_]
    num_train: int
    num_learned: int
    time_us: NDArray[np.int64] | None

    def write(self, folder: Path) -> None:
        """For a peer."""
        frame = pd.DataFrame({**self.columns, "label": self.labels.astype(int)})
        if self.time_us is not None:
            frame["timestamp"] = pd.to_datetime(self.time_us, unit="us")
        frame[: self.num_learned].to_parquet(folder / "train.parquet", index=False)
        frame[self.num_learned :].to_parquet(folder / "test.parquet", index=False)


def options_of(name: str, home: Path, budget_s: float) -> RunOptions:
    """A run of ours."""
    config = load_config()
    if name == "ieee-cis":
        folder = get_dataset(name, config.paths.data)
        path = folder / EVENTS
        schema: Schema | TableSchema = CATALOGUE[name].schema(folder)
    else:
        path, schema_file = table(name, config.paths.cache)
        schema = read_labelled_schema(schema_file)
    return RunOptions(
        config=replace(config, paths=Paths(home=home, cache=config.paths.cache)), application=schema.kind, data=name,
        table=path, schema=schema, schema_folder=path.parent, model_name=f"{schema.kind}-{name}", seed=SEED,
        budget_s=budget_s, max_trials=1000,
    )  # fmt: skip


def parts_of(options: RunOptions) -> Parts:
    """The rows as ours splits them, with no feature."""
    schema = options.schema
    if isinstance(schema, TableSchema):
        read = read_table(options.table, schema, seed=SEED)
        learned = read.num_train + read.num_validation
        return Parts(read.columns, read.numeric, read.categorical, read.labels, read.num_train, learned, None)
    assert isinstance(schema, FraudSchema)
    events = load_table(options.table, schema).events
    train, validation, _ = time_split(events, schema.split)
    words = tuple(dict.fromkeys((*schema.categorical, *schema.entities)))
    columns: dict[str, NDArray[Any]] = {**{n: events.numbers[n] for n in schema.numeric}}
    columns |= {n: events.keys[n] for n in words}
    assert events.labels is not None
    learned = len(train) + len(validation)
    return Parts(columns, schema.numeric, words, events.labels, len(train), learned, events.time_us)


def ours(options: RunOptions, parts: Parts) -> tuple[float, float, float]:
    """AUC on the test part, rows a second, seconds."""
    from assay_pipelines.tracking import open_registry

    report, _ = run_automl(options, Reporter())
    model = FraudModel.load(open_registry(options.config).download(report.model_name, report.version))
    # Of a table of events the registered model takes features, too: then what the run measured counts.
    if not set(model.feature_names) <= set(parts.columns):
        return report.metrics["auc"], float("nan"), report.timings_s["total"]
    tested = {name: parts.columns[name][parts.num_learned :] for name in model.feature_names}
    model.score(model.encode(tested))
    began = time.perf_counter()
    scores = model.score(model.encode(tested)).probability
    seconds = time.perf_counter() - began
    labels = parts.labels[parts.num_learned :]
    # The peers' rows are the run's.
    assert abs(auc(labels, scores) - report.metrics["auc"]) < 1e-9
    return report.metrics["auc"], len(scores) / seconds, report.timings_s["total"]


def lightgbm(parts: Parts) -> tuple[float, float]:
    """AUC of the tuned baseline, seconds."""
    began = time.perf_counter()
    rows = np.arange(len(parts.labels))
    train, held, test = np.split(rows, [parts.num_train, parts.num_learned])
    frame = tree_frame(parts.columns, parts.numeric, parts.categorical, train)
    found = tuned_lightgbm(
        frame, parts.labels, train=train, validation=held, test=test, seed=SEED, on_progress=lambda done, note: None
    )
    return found.metrics["auc"], time.perf_counter() - began


def peer(name: str, python: str, folder: Path, budget_s: float, parts: Parts) -> tuple[float, float, float]:
    """AUC, rows a second, seconds."""
    order = "chance" if parts.time_us is None else "time"
    done = subprocess.run([python, str(HERE / "_automl_peer.py"), name, str(folder), str(budget_s), order],
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode != 0:
        print(done.stderr[-2000:])
        return float("nan"), float("nan"), float("nan")
    told = json.loads(done.stdout.splitlines()[-1])
    scores, labels = np.load(folder / "scores.npy"), parts.labels[parts.num_learned :]
    return auc(labels, scores), len(labels) / told["scored_s"], told["trained_s"]


def main() -> None:
    """One table after the other, ours and its peers in turn."""
    names = ["ieee-cis", *SOURCES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds, for each")
    parser.add_argument("--tables", nargs="+", choices=names, default=names)
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has autogluon.tabular and flaml")
    parser.add_argument("--against", nargs="+", choices=PEERS, default=PEERS, help="which of them")
    parser.add_argument("--json", action="store_true")
    call = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in call.tables:
        with tempfile.TemporaryDirectory() as scratch:
            options = options_of(name, Path(scratch) / "home", call.budget)
            parts = parts_of(options)
            reached, rate, seconds = ours(options, parts)
            print(f"{name}: ours AUC {reached:.4f} in {seconds:.0f} s, {rate:,.0f} rows a second", flush=True)
            baseline, took = lightgbm(parts)
            print(f"{name}: tuned LightGBM AUC {baseline:.4f} in {took:.0f} s", flush=True)
            case = f"{name}: AUC"
            more: dict[str, Any] = {"seconds": seconds, "higher_is_better": True}
            rows.append(row(case, reached, "", peer=baseline, peer_name="LightGBM, tuned", **more))
            parts.write(Path(scratch))
            for other in call.against if call.peers else ():
                theirs, their_rate, took = peer(other, call.peers, Path(scratch), call.budget, parts)
                print(f"{name}: {other} AUC {theirs:.4f} in {took:.0f} s, {their_rate:,.0f} rows a second", flush=True)
                rows.append(row(case, reached, "", peer=theirs, peer_name=other, **more))
                if parts.time_us is None:
                    rows.append(row(f"{name}: scoring", rate, "rows/s", peer=their_rate, peer_name=other, **more))
    finish("automl_quality", rows)


if __name__ == "__main__":
    main()
