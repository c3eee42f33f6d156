"""A made-up table of ten million payments, read in chunks, through training and the test period.

Two entities, an amount, four numbers, a category; one payment in five thousand is a fraud: cards that were taken over
pay several times within days, more than usual and at stores that draw frauds. The newest tenth is the test period.
Beside ours LightGBM on the table's own columns, with the defaults that the pipeline's baseline starts from. Memory is
the peak of the whole process.

    assay bench fraud_large [--json] [--rows N] [--keep FOLDER]
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from assay_features.schema import schema_from_dict
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.baseline import tree_frame, tuned_lightgbm
from assay_pipelines.fraud.evaluate import average_precision, fraud_metrics
from assay_pipelines.fraud.fit import fit_models, refit
from assay_pipelines.fraud.prepare import Prepared
from assay_pipelines.fraud.train import DEFAULTS
from assay_pipelines.options import RunOptions
from assay_platform.config import load_config

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

NUMBERS, KINDS, DAYS = 4, 20, 180
SCHEMA = {
    "kind": "fraud",
    "columns": {
        "timestamp": "time", "label": "fraud", "amount": "amount", "entities": ["card", "store"],
        "numeric": ["amount", *(f"n{i}" for i in range(NUMBERS))], "categorical": ["kind"],
    },
    "labels": {"delay_days": 7},
    "split": {"train": 0.8, "validation": 0.1},
}  # fmt: skip


def write_table(path: Path, num_rows: int, seed: int = 0) -> None:
    """Payments in order of time, a row group each 250,000."""
    generator = np.random.default_rng(seed)
    cards, stores, burst = num_rows // 50, num_rows // 2000, 4
    columns: dict[str, Any] = {
        "time": np.sort(generator.integers(0, DAYS * 86_400, num_rows)) + 1_700_000_000,
        "card": (cards * generator.random(num_rows) ** 2).astype(np.int64),
        "store": (stores * generator.random(num_rows) ** 2).astype(np.int64),
        "amount": np.round(np.exp(generator.normal(3.5, 1.0, num_rows)), 2),
        "kind": generator.integers(0, KINDS, num_rows),
        "fraud": np.zeros(num_rows, dtype=np.int8),
    }
    numbers = generator.normal(size=(NUMBERS, num_rows))
    # A card that was taken over pays four times, on average three days apart.
    taken = generator.choice(cards, num_rows // 5000 // burst, replace=False)
    gaps = generator.exponential(3 / DAYS * num_rows, (len(taken), burst - 1)).astype(np.int64)
    first = generator.integers(0, num_rows, (len(taken), 1))
    at = np.concatenate([first, first + np.cumsum(gaps, axis=1)], axis=1)
    inside = at < num_rows
    at, who = at[inside], np.repeat(taken, burst).reshape(at.shape)[inside]
    columns["fraud"][at], columns["card"][at] = 1, who
    columns["amount"][at] = np.round(columns["amount"][at] * np.exp(generator.normal(0.8, 0.5, len(at))), 2)
    drawn = generator.random(len(at)) < 0.5
    columns["store"][at[drawn]] = generator.integers(0, max(1, stores // 50), int(drawn.sum())) + stores // 3
    numbers[0, at] += 0.7
    numbers[1, at] *= 1.6
    table = pa.table(columns | {f"n{i}": numbers[i] for i in range(NUMBERS)})
    pq.write_table(table, path, row_group_size=250_000)


def main() -> None:
    """The table, then each step of a training with its seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--keep", type=Path, help="where the table stays")
    call, _ = parser.parse_known_args()
    seconds: dict[str, float] = {}

    def lap(step: str, began: float) -> None:
        seconds[step] = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"  {step}: {seconds[step]:.0f} s, peak {peak:.1f} GiB", flush=True)

    with tempfile.TemporaryDirectory(prefix="assay-large-") as scratch:
        folder = call.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"payments-{call.rows}.parquet"
        if not path.is_file():
            write_table(path, call.rows)
        options = RunOptions(
            config=load_config(), application="fraud", data=str(path), table=path, schema=schema_from_dict(SCHEMA),
            schema_folder=folder, model_name="fraud-large",
        )  # fmt: skip
        began = time.perf_counter()
        prepared = Prepared(options, Reporter(), publish=False)
        lap("read, features, encoded", began)
    began = time.perf_counter()
    fitted = fit_models(DEFAULTS, prepared, Reporter(), seed=0)
    lap("training", began)
    began = time.perf_counter()
    model = refit(fitted, DEFAULTS, prepared, Reporter(), seed=0)
    lap("last fit, of train and validation", began)
    began = time.perf_counter()
    probability = model.score(prepared.rows.rows.rows(slice(prepared.test[0], prepared.test[-1] + 1))).probability
    y = prepared.labels[prepared.test]
    ours = fraud_metrics(probability, y, threshold=model.policy.decline_from)
    lap("test period scored", began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began = time.perf_counter()
    names = (list(prepared.schema.numeric), list(prepared.schema.categorical))
    frame = tree_frame(prepared.columns, *names, prepared.train)
    peer = tuned_lightgbm(
        frame, prepared.labels, train=prepared.train, validation=prepared.validation, test=prepared.test, seed=0,
        on_progress=lambda share, text: None,
    )  # fmt: skip
    lap("LightGBM, own columns", began)
    learned = f"{len(prepared.events):,} of {call.rows:,} rows learned from"
    print(f"  {learned}; {int(y.sum())} frauds among {len(y):,} tested")
    assert abs(average_precision(y, probability) - ours["average_precision"]) < 1e-9
    peers = {"peer_name": "LightGBM, own columns", "runs": 1}
    rows = [
        row(f"{call.rows:,} rows: {name}", ours[name], "", peer=peer.metrics[name], higher_is_better=better, **peers)
        for name, better in (("auc", True), ("average_precision", True), ("recall_at_fpr_0.003", True), ("ece", False))
    ]
    total = sum(taken for step, taken in seconds.items() if not step.startswith("LightGBM"))
    rows += [
        row(f"{call.rows:,} rows: everything", total, "s"),
        row(f"{call.rows:,} rows: peak memory", peak, "GiB", limit=10.0, limit_name="what is promised"),
    ]
    finish("fraud_large", rows, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")


if __name__ == "__main__":
    main()
