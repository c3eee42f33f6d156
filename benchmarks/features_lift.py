"""What discovered features are worth to LightGBM: raw columns, naive windows, and what discovery keeps.

Planted payments: fraud happens at night, to high amounts, of cards that used three devices or more within a day; no raw
column shows it. IEEE-CIS: its labels are taken to be reported 14 or 30 days after the payment, in training as in the
test period, and discovery may look at what was reported by then. Discovery sees the first 80 % of time; average
precision is of the last 20 %, the mean of three training seeds. Same parameters and rows for all. Intervals are of the
difference to the raw columns under resampled rows, or for IEEE-CIS resampled cards.

    assay bench features_lift [--json]
"""

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightgbm as lgb
import numpy as np
from assay_features.batch import features_at
from assay_features.definitions import DAY_S, HOUR_S, Calendar, Decay, Definition, FeaturePlan, Window
from assay_features.discovery import DiscoverySettings, discover
from assay_features.events import Events, Reports
from assay_features.row_features import model_columns
from assay_features.schema import FraudSchema
from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS, get_dataset
from assay_pipelines.datasets.table import load_table
from assay_platform.config import load_config
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

NUM_ROWS, NUM_CARDS, NUM_DAYS, DAY_US = 20_000, 100, 20, DAY_S * 1_000_000
SEEDS, RESAMPLES, TRAIN_SHARE = (0, 1, 2), 300, 0.8


class Case(NamedTuple):
    """A labelled table and how to search and train on it."""

    name: str
    events: Events
    entities: tuple[str, ...]
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    amount: str
    reports: Reports | None
    settings: DiscoverySettings
    parameters: dict[str, Any]
    num_trees: int
    resampled: np.ndarray  # what is drawn as one


def naive(entities: tuple[str, ...], amount: str) -> tuple[Definition, ...]:
    """The windows that everyone adds."""
    return tuple(
        definition
        for entity in entities
        for definition in (
            *(Window(entity=entity, aggregate="count", length_s=s) for s in (HOUR_S, DAY_S, 7 * DAY_S)),
            Window(entity=entity, aggregate="mean", column=amount, length_s=7 * DAY_S),
            Decay(entity=entity, half_life_s=DAY_S),
        )
    )


def planted(seed: int) -> Case:
    """A small table with one interaction."""
    return Case(
        name=f"planted table {seed}", events=payments(seed), entities=("card",), numeric=("amount", "noise"),
        categorical=("device",), amount="amount", reports=None, settings=DiscoverySettings(num_trees=100),
        parameters={"learning_rate": 0.05, "num_leaves": 31, "feature_fraction": 0.7}, num_trees=150,
        resampled=np.arange(NUM_ROWS),
    )  # fmt: skip


def ieee(delay_days: int) -> Case:
    """All of IEEE-CIS."""
    folder = get_dataset("ieee-cis", load_config().paths.data)
    schema = CATALOGUE["ieee-cis"].schema(folder)
    assert isinstance(schema, FraudSchema)
    assert schema.amount is not None
    events = load_table(folder / EVENTS, schema).events
    _, card = np.unique(events.keys["card1"].astype(str), return_inverse=True)
    return Case(
        name=f"IEEE-CIS, reports after {delay_days} days", events=events, entities=schema.entities,
        numeric=schema.numeric, categorical=schema.categorical, amount=schema.amount,
        reports=Reports(schema.label, delay_days * DAY_S), settings=DiscoverySettings(),
        parameters={"learning_rate": 0.1, "num_leaves": 63, "feature_fraction": 0.5, "min_data_in_leaf": 50},
        num_trees=300, resampled=card,
    )  # fmt: skip


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


def matrix(case: Case, definitions: tuple[Definition, ...], train: slice) -> np.ndarray:
    """Raw columns and features; categories numbered by frequency in the training period."""
    plan = FeaturePlan(definitions)
    history = features_at(plan, case.events, case.events, reports=case.reports)
    columns = model_columns(plan, case.events, history)
    out = []
    for values in columns.values():
        column = np.asarray(values)
        if column.dtype == object:
            names, codes = np.unique(column.astype(str), return_inverse=True)
            counts = np.bincount(codes[train], minlength=len(names))
            rank = np.empty(len(names))
            rank[np.argsort(-counts, kind="stable")] = np.arange(len(names))
            column = np.where(counts[codes] > 0, rank[codes], np.nan)
        out.append(column.astype(np.float32))
    return np.column_stack(out)


def scores(case: Case, definitions: tuple[Definition, ...], cut: int) -> list[np.ndarray]:
    """Scores of the rows after the cut, one array a seed."""
    columns = matrix(case, definitions, slice(0, cut))
    assert case.events.labels is not None
    out = []
    for seed in SEEDS:
        data = lgb.Dataset(columns[:cut], case.events.labels[:cut].astype(float))
        parameters = {
            "objective": "binary", "verbosity": -1, "seed": seed, "bagging_fraction": 0.8, "bagging_freq": 1
        } | case.parameters  # fmt: skip
        out.append(lgb.train(parameters, data, num_boost_round=case.num_trees).predict(columns[cut:]))
    return out


def interval(case: Case, cut: int, ours: np.ndarray, raw: np.ndarray) -> tuple[float, float]:
    """95 % of the differences in average precision under resampling."""
    assert case.events.labels is not None
    rng = np.random.default_rng(0)
    labels, group = case.events.labels[cut:], case.resampled[cut:]
    draws = []
    for _ in range(RESAMPLES):
        weight = rng.poisson(1.0, int(case.resampled.max()) + 1)[group]
        better, before = (average_precision_score(labels, score, sample_weight=weight) for score in (ours, raw))
        draws.append(better - before)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def measure(case: Case) -> list[dict[str, Any]]:
    """Search, train, compare."""
    cut = int(len(case.events) * TRAIN_SHARE)
    began = time.perf_counter()
    found = discover(
        case.events.take(slice(0, cut)), entities=case.entities, numeric=case.numeric, categorical=case.categorical,
        amount=case.amount, reports=case.reports, settings=case.settings,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    print(f"{case.name}: searched {seconds:.0f} s, kept\n{found.as_code()}", file=sys.stderr)
    assert case.events.labels is not None
    labels = case.events.labels[cut:]
    peers: dict[str, tuple[Definition, ...]] = {
        "raw": (), "raw + hour": (Calendar(part="hour"),), "raw + naive windows": naive(case.entities, case.amount),
    }  # fmt: skip
    by_kind = {kind: scores(case, definitions, cut) for kind, definitions in peers.items()}
    ours = scores(case, found.kept, cut)
    low, high = interval(case, cut, np.mean(ours, axis=0), np.mean(by_kind["raw"], axis=0))
    print(f"{case.name}: difference to raw, 95 % of resamples: {low:.3f} to {high:.3f}")
    precision = [average_precision_score(labels, s) for s in ours]
    return [
        row(f"{case.name}, average precision", float(np.mean(precision)), "",
            peer=float(np.mean([average_precision_score(labels, s) for s in by_kind[peer]])),
            peer_name=f"LightGBM {peer}", higher_is_better=True, runs=len(SEEDS), interval=[low, high],
            spread=(max(precision) - min(precision)) / float(np.mean(precision)), kept=len(found.kept))
        for peer in peers
    ]  # fmt: skip


def main() -> None:
    """Every table."""
    cases = (lambda: planted(0), lambda: planted(1), lambda: ieee(14), lambda: ieee(30))
    finish("features_lift", [line for case in cases for line in measure(case())])


if __name__ == "__main__":
    main()
