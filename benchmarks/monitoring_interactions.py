"""Drift of a recommender's events: alarms over what came later in two public data sets, and over faults put into it.

The reference is of the first interactions, as a training run keeps it; windows are of the rest, in time order. An alarm
is a finding in two windows running, as in the service. What came later is no ground truth: new products are a real
change, and rightly found where they are many. Faults are put into a fifth of the rows.

    assay bench monitoring_interactions [--json] [--data movielens-100k complete-journey] [--cut 0.8]
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

SHARE = 0.2
Columns = dict[str, Any]
Fault = Callable[[np.random.Generator, Columns], Columns]


def _changed(column: Any, chosen: Any, value: Callable[[Any], Any]) -> Any:
    out = column.copy()
    out[chosen] = [value(one) for one in column[chosen]]
    return out


def faults(item: str, weight: str | None) -> dict[str, Fault]:
    """What goes wrong between a shop and its recommender."""

    def some(rng: np.random.Generator, columns: Columns) -> Any:
        return rng.random(len(columns[item])) < SHARE

    found: dict[str, Fault] = {
        "ids of another system": lambda rng, c: {**c, item: _changed(c[item], some(rng, c), lambda i: f"sku-{i}")},
        "one item for many": lambda rng, c: {**c, item: _changed(c[item], some(rng, c), lambda _: c[item][0])},
    }
    if weight is not None:
        found["weights times ten"] = lambda rng, c: {**c, weight: np.where(some(rng, c), c[weight] * 10, c[weight])}
        found["weights missing"] = lambda rng, c: {**c, weight: np.where(some(rng, c), np.nan, c[weight])}
    return found


def main() -> None:
    """A data set after the other."""
    from assay_features.schema import RecommendSchema
    from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS, get_dataset
    from assay_pipelines.datasets.table import load_table
    from assay_pipelines.recommend.pipeline import events_reference
    from assay_platform.config import load_config
    from assay_platform.monitoring.alarms import Alarms
    from assay_platform.monitoring.drift_findings import findings
    from assay_platform.monitoring.drift_reference import Reference

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["movielens-100k", "complete-journey"])
    parser.add_argument("--cut", type=float, default=0.8, help="part of the events that the reference is of")
    parser.add_argument("--json", action="store_true")
    call = parser.parse_args()
    rows = []
    for name in call.data:
        folder = get_dataset(name, load_config().paths.data)
        schema = CATALOGUE[name].schema(folder)
        assert isinstance(schema, RecommendSchema)
        events = load_table(folder / EVENTS, schema).events
        cut = int(call.cut * len(events))
        reference = Reference.from_dict(events_reference(schema, events.take(slice(0, cut))))
        size = reference.window_rows
        windows: list[Columns] = [
            {c: later.keys[c] if c in later.keys else later.numbers[c] for c in reference.columns}
            for later in (events.take(slice(start, start + size)) for start in range(cut, len(events) - size + 1, size))
        ]
        alarms = Alarms()
        seen = [alarms.after(findings(reference, one)) for one in windows]
        total = len(windows)
        rows.append(row(f"{name}: windows with an alarm", sum(map(bool, seen)), f"of {total}", runs=total))
        for fault, put in faults(schema.item, schema.weight).items():
            rng, alarms = np.random.default_rng(0), Alarms()
            given = enumerate(put(rng, one) for one in windows)
            first = next((i + 1 for i, one in given if alarms.after(findings(reference, one))), total + 1)
            case = f"{name}: {fault}, windows until the alarm"
            rows.append(row(case, first, f"({total + 1}: never)", limit=2, limit_name="least"))
    finish("monitoring_interactions", rows)


if __name__ == "__main__":
    main()
