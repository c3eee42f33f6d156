"""What discovered features are worth to LightGBM: raw columns, naive windows, and what discovery keeps.

Planted payments: fraud happens at night, to high amounts, of cards that used three devices or more within a day; no raw
column shows it. Discovery sees the first 80 % of time; average precision is of the last 20 %, the mean of three
training seeds, for two tables. Same parameters and rows for all.

    assay bench features_lift [--json]
"""

import sys
import time
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from assay_features.batch import features_at
from assay_features.definitions import DAY_S, HOUR_S, Calendar, Decay, Definition, FeaturePlan, Window
from assay_features.discovery import DiscoverySettings, discover
from assay_features.events import Events
from assay_features.row_features import model_columns
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

NUM_ROWS, NUM_CARDS, NUM_DAYS, DAY_US = 20_000, 100, 20, DAY_S * 1_000_000
TABLES, SEEDS, RESAMPLES = (0, 1), (0, 1, 2), 500
NAIVE: tuple[Definition, ...] = (
    *(Window(entity="card", aggregate="count", length_s=s) for s in (HOUR_S, DAY_S, 7 * DAY_S)),
    Window(entity="card", aggregate="mean", column="amount", length_s=7 * DAY_S),
    Decay(entity="card", half_life_s=DAY_S),
)


def payments(seed: int) -> Events:
    """Cards that pay with one device, or for a day now and then with many."""
    rng = np.random.default_rng(seed)
    card = rng.integers(0, NUM_CARDS, NUM_ROWS)
    times = np.sort(rng.integers(0, NUM_DAYS * DAY_US, NUM_ROWS))
    hops = (rng.random((NUM_CARDS, NUM_DAYS + 1)) < 0.15)[card, times // DAY_US]
    device = np.where(hops, rng.integers(0, 2000, NUM_ROWS), card)
    amount = rng.lognormal(3.0, 1.0, NUM_ROWS)
    recent = np.zeros(NUM_ROWS)
    for c in range(NUM_CARDS):
        rows = np.flatnonzero(card == c)
        for i, r in enumerate(rows):
            recent[r] = len(set(device[rows[:i][times[rows[:i]] >= times[r] - DAY_US]]))
    hour = times % DAY_US / 3_600_000_000
    chance = np.where(((hour >= 22) | (hour < 6)) & (amount > 20) & (recent >= 3), 0.7, 0.01)
    keys = {n: np.array([f"{n}{k}" for k in codes], dtype=object) for n, codes in (("card", card), ("device", device))}
    return Events(
        times, keys, {"amount": amount, "noise": rng.normal(size=NUM_ROWS)}, labels=rng.random(NUM_ROWS) < chance
    )


def matrix(events: Events, definitions: tuple[Definition, ...], train: slice) -> np.ndarray:
    """Raw columns and features; categories numbered by frequency in the training period."""
    plan = FeaturePlan(definitions)
    columns = model_columns(plan, events, features_at(plan, events, events))
    out = []
    for values in columns.values():
        column = np.asarray(values)
        if column.dtype == object:
            names, counts = np.unique(column[train].astype(str), return_counts=True)
            rank = {name: i for i, name in enumerate(names[np.argsort(-counts)])}
            column = np.array([rank.get(str(v), np.nan) for v in column], dtype=np.float64)
        out.append(column.astype(np.float64))
    return np.column_stack(out)


def scores(events: Events, definitions: tuple[Definition, ...]) -> list[np.ndarray]:
    """Scores of the last 20 %, one array a seed."""
    cut = int(len(events) * 0.8)
    columns = matrix(events, definitions, slice(0, cut))
    assert events.labels is not None
    out = []
    for seed in SEEDS:
        data = lgb.Dataset(columns[:cut], events.labels[:cut].astype(float))
        params = {"objective": "binary", "verbosity": -1, "learning_rate": 0.05, "num_leaves": 31, "seed": seed,
                  "feature_fraction": 0.7, "bagging_fraction": 0.8, "bagging_freq": 1}  # fmt: skip
        out.append(lgb.train(params, data, num_boost_round=150).predict(columns[cut:]))
    return out


def main() -> None:
    """Every table."""
    rows: list[dict[str, Any]] = []
    for table in TABLES:
        events = payments(table)
        cut = int(len(events) * 0.8)
        began = time.perf_counter()
        found = discover(
            events.take(slice(0, cut)), entities=["card"], numeric=["amount", "noise"], categorical=["device"],
            amount="amount", settings=DiscoverySettings(num_trees=100),
        )  # fmt: skip
        seconds = time.perf_counter() - began
        print(f"table {table}: kept in {seconds:.0f} s\n{found.as_code()}", file=sys.stderr)
        assert events.labels is not None
        labels = events.labels[cut:]
        kinds: dict[str, tuple[Definition, ...]] = {
            "raw": (), "raw + hour": (Calendar(part="hour"),), "raw + naive windows": NAIVE, "discovered": found.kept,
        }  # fmt: skip
        by_kind = {kind: scores(events, definitions) for kind, definitions in kinds.items()}
        precision = {k: float(np.mean([average_precision_score(labels, s) for s in v])) for k, v in by_kind.items()}
        rng = np.random.default_rng(0)
        mean = {k: np.mean(v, axis=0) for k, v in by_kind.items()}
        draws = []
        for _ in range(RESAMPLES):
            i = rng.integers(0, len(labels), len(labels))
            ours, raw = (average_precision_score(labels[i], mean[kind][i]) for kind in ("discovered", "raw"))
            draws.append(ours - raw)
        low, high = np.quantile(draws, [0.025, 0.975])
        for peer in ("raw", "raw + hour", "raw + naive windows"):
            rows.append(  # noqa: PERF401 - reads better as a loop
                row(f"planted table {table}, average precision", precision["discovered"], "", peer=precision[peer],
                    peer_name=f"LightGBM {peer}", higher_is_better=True, runs=len(SEEDS),
                    interval=[float(low), float(high)], kept=len(found.kept))
            )  # fmt: skip
        print(f"table {table}: difference to raw, 95 % of resamples: {low:.3f} to {high:.3f}")
    finish("features_lift", rows)


if __name__ == "__main__":
    main()
