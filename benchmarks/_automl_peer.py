"""AutoGluon or FLAML on one table, in an interpreter that has them; see `automl_quality.py`.

python _automl_peer.py autogluon|flaml FOLDER BUDGET_S time|chance   # FOLDER: train.parquet, test.parquet with `label`

Writes scores.npy, the test rows' scores, into the folder; prints seconds of training and of scoring as JSON.
"""

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd


def main() -> None:
    """Train on one part, score the other."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    name, folder, budget_s, order = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    train, test = (pd.read_parquet(folder / f"{part}.parquet") for part in ("train", "test"))
    inputs = test.drop(columns=["label"])
    began = time.perf_counter()
    if name == "autogluon":
        from autogluon.tabular import TabularPredictor

        # More, and its trees wait for each other.
        cores = len(os.sched_getaffinity(0))
        with tempfile.TemporaryDirectory() as scratch:
            model = TabularPredictor("label", eval_metric="roc_auc", path=scratch, verbosity=0)
            model.fit(train, presets="best_quality", time_limit=budget_s, num_cpus=cores)
            trained_s = time.perf_counter() - began
            model.predict_proba(inputs)
            began = time.perf_counter()
            scores = model.predict_proba(inputs)[1].to_numpy()
            scored_s = time.perf_counter() - began
    else:
        from flaml import AutoML

        found = AutoML()
        inputs = inputs.copy()
        for word in inputs.select_dtypes("object").columns:
            # The same codes in both parts.
            kind = pd.CategoricalDtype(pd.concat([train[word], inputs[word]]).dropna().unique())
            train[word], inputs[word] = train[word].astype(kind), inputs[word].astype(kind)
        found.fit(
            dataframe=train, label="label", task="classification", metric="roc_auc", time_budget=budget_s,
            split_type="time" if order == "time" else "auto", n_jobs=-1, verbose=0, seed=0,
        )  # fmt: skip
        trained_s = time.perf_counter() - began
        found.predict_proba(inputs)
        began = time.perf_counter()
        scores = found.predict_proba(inputs)[:, 1]
        scored_s = time.perf_counter() - began
    np.save(folder / "scores.npy", np.asarray(scores, dtype=np.float64))
    print(json.dumps({"trained_s": trained_s, "scored_s": scored_s}))


if __name__ == "__main__":
    main()
