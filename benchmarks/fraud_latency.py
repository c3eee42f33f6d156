"""One score with its reasons, from a parsed request to the answer, online features read; and batches of 256.

Ours: the champion of `assay run fraud --data ieee-cis` with its online features, as `POST /v1/fraud/score` calls it:
every column is checked, every state read, every answer has reasons in words. Peer: LightGBM on the table's own columns
with the Shapley values of its own C++ TreeSHAP (the algorithm of shap.TreeExplainer, which is measured too where `shap`
is installed), given ready rows of a frame: no parsing, no features, no words. In turn, on the same events; one thread
for one row, two for the trees of a batch on both sides; threads that are done sleep, as in `assay serve`.

    assay bench fraud_latency [--json] [--model NAME] [--calls N]
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before anything loads OpenMP

import numpy as np
import pandas as pd
import torch
from assay_pipelines.datasets.catalogue import EVENTS, get_dataset
from assay_pipelines.fraud.baseline import tree_frame
from assay_platform.config import load_config
from assay_platform.models.calibration import sigmoid
from assay_services.fraud import FraudScorer

sys.path.insert(0, str(Path(__file__).parent))
from _champion import champion
from _report import finish, row

TRAINED, ASKED, TREES = 100_000, 4_096, 400
SIZES = (1, 256)
LIMIT_MS = {1: 5.0, 256: 51.2}


def as_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as a JSON body brings them."""
    return [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.items()}
        for record in frame.astype(object).where(frame.notna(), None).to_dict("records")
    ]


def peers(frame: pd.DataFrame, scorer: FraudScorer) -> dict[str, Callable[[int, int], object]]:
    """(first row, number of rows) → scores and Shapley values."""
    import lightgbm as lgb

    schema, rows = scorer.schema, np.arange(len(frame))
    columns: dict[str, Any] = {name: frame[name].to_numpy(dtype=np.float64) for name in schema.numeric}
    for name in schema.categorical:
        texts = frame[name].astype(object).where(frame[name].notna(), None)
        columns[name] = np.array([None if v is None else str(v) for v in texts], dtype=object)
    table = tree_frame(columns, schema.numeric, schema.categorical, rows[:-ASKED])
    params = {"objective": "binary", "num_leaves": 127, "verbosity": -1, "num_threads": 2, "feature_fraction": 0.4}
    booster = lgb.train(
        params, lgb.Dataset(table.iloc[:-ASKED], frame[schema.label].to_numpy()[:-ASKED]), num_boost_round=TREES
    )
    asked = table.iloc[-ASKED:]

    def own(first: int, num: int) -> object:
        part = asked.iloc[first : first + num]
        threads = 1 if num == 1 else 2
        return booster.predict(part, pred_contrib=True, num_threads=threads)  # they add up to the score

    found: dict[str, Callable[[int, int], object]] = {"LightGBM + its TreeSHAP": own}
    try:
        import shap
    except ImportError:
        return found
    explainer = shap.TreeExplainer(booster)

    def library(first: int, num: int) -> object:
        part = asked.iloc[first : first + num]
        return explainer.shap_values(part)

    return {**found, "LightGBM + shap.TreeExplainer": library}


def main() -> None:
    """Measure in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fraud-ieee-cis")
    parser.add_argument("--calls", type=int, default=400)
    call, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    config = load_config()
    scorer = FraudScorer.load(*champion(call.model, "assay run fraud --data ieee-cis"))
    frame = pd.read_parquet(get_dataset("ieee-cis", config.paths.data) / EVENTS).iloc[-(TRAINED + ASKED) :]
    records = as_records(frame.iloc[-ASKED:])
    answers = scorer.score(records[:256], explain=True)
    plain = scorer.score(records[:256], explain=False)
    gaps = [
        abs(float(sigmoid(np.array((a.base or 0.0) + sum(r.contribution for r in a.reasons)))) - p.score)
        for a, p in zip(answers, plain, strict=True)
    ]
    sides: dict[str, Callable[[int, int], object]] = {
        "ours": lambda first, num: scorer.score(records[first : first + num], explain=True),
        **peers(frame, scorer),
    }
    rows = [row("additivity: largest |score - sigmoid(base + Σ)|", max(gaps), "", limit=1e-5, limit_name="target")]
    for size in SIZES:
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        num_calls = call.calls if size == 1 else max(20, call.calls // 10)
        for i in range(num_calls + 5):
            first = (i * size * 7) % (ASKED - size)
            for name, score in sides.items():
                if name.endswith("TreeExplainer") and i > 30:
                    continue
                began = time.perf_counter()
                score(first, size)
                seconds[name].append(1e3 * (time.perf_counter() - began))
        for name in sides:
            seconds[name] = seconds[name][5:]
        rows += [
            row(
                f"batch {size}, {shown}", measure(seconds["ours"]), "ms", peer=measure(seconds[name]), peer_name=name,
                limit=LIMIT_MS[size], limit_name="target", runs=len(seconds[name]),
            )
            for shown, measure in (("p50", statistics.median), ("p99", lambda v: float(np.quantile(v, 0.99))))
            for name in list(sides)[1:]
        ]  # fmt: skip
    finish("fraud_latency", rows)


if __name__ == "__main__":
    main()
