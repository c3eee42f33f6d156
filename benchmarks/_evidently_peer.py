"""Evidently's default test of each column, in an interpreter that has it; see `monitoring_drift.py`.

python _evidently_peer.py FOLDER REFERENCE_ROWS        # prints one JSON object

The tests are those that its DataDriftPreset chooses, called without its report, which takes seconds a window. A column
without values in the window counts as drifted.
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd


def tables(path: Path, num_rows: int) -> list[pd.DataFrame]:
    """Windows of so many rows. '' is a missing text: files hold no objects."""
    with np.load(path) as file:
        columns: dict[str, Any] = {}
        for name in file.files:
            values = file[name]
            is_text = values.dtype.kind == "U"
            columns[name] = np.where(values == "", None, values.astype(object)) if is_text else values
    frame = pd.DataFrame({name: pd.Series(values, dtype=values.dtype) for name, values in columns.items()})
    return [frame.iloc[i : i + num_rows] for i in range(0, len(frame), num_rows)]


def main() -> None:
    """All windows of the folder."""
    from evidently.legacy.calculations.stattests import get_stattest
    from evidently.legacy.core import ColumnType

    warnings.filterwarnings("ignore")
    folder, num_reference = Path(sys.argv[1]), int(sys.argv[2])
    plan = json.loads((folder / "plan.json").read_text())
    (reference,) = tables(folder / "reference.npz", 10**9)
    places = np.linspace(0, len(reference) - 1, min(num_reference, len(reference))).astype(int)
    reference = reference.iloc[places].replace([np.inf, -np.inf], np.nan)
    before = {name: reference[name].dropna() for name in reference.columns}

    def drifted(window: pd.DataFrame, name: str) -> bool:
        is_number = reference[name].dtype != object and name != "label"
        kind = ColumnType.Numerical if is_number else ColumnType.Categorical
        now = window[name].replace([np.inf, -np.inf], np.nan).dropna()
        if not len(now) or not len(before[name]):
            return not len(now)
        return bool(get_stattest(before[name], now, kind, None)(before[name], now, kind, None).drifted)

    flags, spent = [], []
    clean = tables(folder / "clean.npz", plan["window_rows"])
    for window in clean:
        began = time.process_time()
        flags.append({name: drifted(window, name) for name in reference.columns})
        spent.append(time.process_time() - began)
    found = {}
    for number, (name, (num_rows, columns, windows)) in enumerate(plan["kinds"].items()):
        names = [column for column in columns if column in reference.columns] or list(reference.columns)
        spoilt = tables(folder / f"{number}.npz", num_rows)
        hits = [any(drifted(window, column) for column in names) for window in spoilt]
        sound = [any(flags[w][column] for column in names) for w in windows]
        found[name] = [sum(hits), sum(sound)]
    share = [sum(one.values()) / len(one) for one in flags]
    report = {
        "found": found, "any": sum(s > 0 for s in share), "half": sum(s >= 0.5 for s in share),
        "columns": float(np.mean(share)) * len(reference.columns), "cpu_ms": 1000 * float(np.median(spent)),
    }  # fmt: skip
    print(json.dumps(report))


if __name__ == "__main__":
    main()
