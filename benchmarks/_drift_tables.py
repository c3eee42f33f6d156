"""Clean windows of two sources and 20 ways to spoil them; see `monitoring_drift.py`.

A table is a column each by name, (N,), numbers or text as objects, with 'score' and 'label' of a model among them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from assay_platform.monitoring.drift_reference import Reference
from numpy.typing import NDArray

Table = dict[str, NDArray[Any]]
LABEL_WINDOWS = 5  # that are joined for labels, which are rare
_IEEE_ROWS, _TRAINED = 400_000, 0.25


class Source(NamedTuple):
    """Rows to summarise, in time order, windows of other rows, and columns that play a part in `kinds`."""

    name: str
    reference: Table
    windows: list[Table]
    entity: str | None
    money: str
    number: str
    other: str
    category: str
    key: str
    age: str


class Kind(NamedTuple):
    """A fault. columns: of which one has to be named. inject: (window, generator) → the window with the fault."""

    columns: tuple[str, ...]
    inject: Callable[[Table, np.random.Generator], Table]
    of_labels: bool = False


def rows_of(table: Table, places: NDArray[np.int64]) -> Table:
    """Some rows."""
    return {name: values[places] for name, values in table.items()}


def joined(tables: list[Table]) -> Table:
    """One after the other."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def synthetic(window_rows: int, num_windows: int, seed: int) -> Source:
    """Independent rows of 56 columns: numbers of eight shapes, texts, ages; a third of them hang together."""
    model = np.random.default_rng(seed)
    weight_CF = model.normal(size=(44, 6)) * model.choice([0, 0, 0.3, 1.0], size=(44, 6))
    noise, absent = model.uniform(0.3, 1.5, 44), model.choice([0, 0, 0, 0.02, 0.2, 0.5], 44)
    sizes = (2, 4, 6, 12, 30, 80, 200, 300)
    text_weights = [model.normal(size=(6, size)) * 0.5 for size in sizes]
    risk_F = model.normal(size=6) * 0.6
    zipf = {n: (1 / np.arange(1, n + 1) ** power) for n, power in ((5000, 0.9), (500, 0.8))}
    shapes: list[Callable[[NDArray[Any], np.random.Generator], NDArray[Any]]] = [
        lambda x, g: x,
        lambda x, g: np.exp(x),
        lambda x, g: np.floor(np.exp(x)),
        lambda x, g: np.where(x < 0.5, 0.0, np.exp(x)),
        lambda x, g: 1 / (1 + np.exp(-x)),
        lambda x, g: x * np.sqrt(3 / g.chisquare(3, len(x))),
        lambda x, g: np.round(np.exp(x) * 30 + 5, 2),
        lambda x, g: g.poisson(np.exp(x.clip(-5, 3))).astype(float),
    ]

    def draw(generator: np.random.Generator, n: int) -> Table:
        factor_NF = generator.normal(size=(n, 6))
        signal_NC = factor_NF @ weight_CF.T + noise * generator.normal(size=(n, 44))
        feed_NF = generator.random((n, 6))  # columns of one feed are missing together
        table: Table = {}
        for c in range(44):
            values = shapes[c % 8](signal_NC[:, c], generator)
            table[f"x{c}"] = np.where(feed_NF[:, c % 6] < absent[c], np.nan, values)
        for i, size in enumerate(sizes):
            popularity = np.log(1 / np.arange(1, size + 1) ** 1.1)
            chosen = (factor_NF @ text_weights[i] + popularity + generator.gumbel(size=(n, size))).argmax(1)
            table[f"cat{i}"] = np.array([f"C{i}-{v}" for v in chosen], dtype=object)
            if i % 3 == 0:
                table[f"cat{i}"][feed_NF[:, i % 6] < 0.1] = None
        for name, num in (("card", 5000), ("shop", 500)):
            chosen = generator.choice(num, n, p=zipf[num] / zipf[num].sum())
            table[name] = np.array([f"{name}{v}" for v in chosen], dtype=object)
        table |= {"age_s": np.floor(generator.exponential(3600, n)), "latency_s": generator.exponential(1, n)}
        table["event_id"] = generator.permutation(10 * n)[:n].astype(float)
        table["score"] = 1 / (1 + np.exp(3.6 - factor_NF @ risk_F * 1.3 - 0.3 * signal_NC[:, 8]))
        table["label"] = generator.random(n) < table["score"]
        return table

    generator = np.random.default_rng([seed, 1])
    reference = draw(generator, 60_000)
    money = min((f"x{c}" for c in range(6, 44, 8)), key=lambda name: float(np.isnan(reference[name]).mean()))
    windows = [draw(generator, window_rows) for _ in range(num_windows)]
    return Source("independent rows", reference, windows, None, money, "x8", "x24", "cat3", "card", "age_s")


def ieee_cis(folder: Path, window_rows: int, seed: int) -> Source:
    """Payments in time order: two windows for the reference, then two to look at, and so on.

    A model is trained on a quarter, drawn by the seed and left out; its scores are a column. The seed also says whether
    the first two windows of each four are looked at or the last two.
    """
    import lightgbm as lgb
    import pandas as pd
    from assay_features.schema import FraudSchema
    from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS

    schema = CATALOGUE["ieee-cis"].schema(folder)
    assert isinstance(schema, FraudSchema)
    frame = pd.read_parquet(folder / EVENTS).sort_values(schema.timestamp, kind="stable")
    frame["age_s"] = frame.groupby("card1")[schema.timestamp].diff()
    numeric = [*schema.numeric, "age_s"]
    trained = np.random.default_rng(seed).random(len(frame)) < _TRAINED
    settings = {"objective": "binary", "num_leaves": 31, "verbosity": -1, "seed": seed, "num_threads": 1}
    train = lgb.Dataset(frame.loc[trained, numeric].to_numpy(np.float32), frame.loc[trained, schema.label])
    booster = lgb.train(settings, train, 60)
    frame = frame[~trained].tail(_IEEE_ROWS)
    table: Table = {name: frame[name].to_numpy(np.float64) for name in numeric}
    for name in schema.categorical:
        values = frame[name].tolist()
        texts = [None if v is None or pd.isna(v) else str(int(v)) if isinstance(v, float) else str(v) for v in values]
        table[name] = np.array(texts, dtype=object)
    account = zip(*(table[n].tolist() for n in ("card1", "card2", "card5", "addr1", "R_emaildomain")), strict=True)
    table["account"] = np.array(["|".join(map(str, one)) for one in account], dtype=object)
    table["event_id"] = frame[schema.id].to_numpy(np.float64)
    table["score"] = booster.predict(frame[numeric].to_numpy(np.float32))
    table["label"] = frame[schema.label].to_numpy() == 1
    places = np.arange(len(frame) // (4 * window_rows) * 4 * window_rows).reshape(-1, window_rows)
    looked_at = (np.arange(len(places)) % 4 < 2) == bool(seed % 2)
    windows = [rows_of(table, one) for one in places[looked_at]]
    reference = rows_of(table, places[~looked_at].ravel())
    return Source(
        "IEEE-CIS in time order", reference, windows, "account", "TransactionAmt", "C13",
        "V307", "ProductCD", "card1", "age_s",
    )  # fmt: skip


def kinds(source: Source, reference: Reference, strength: float) -> dict[str, Kind]:
    """20 faults of one column each, two at most. strength: 1, or less for a milder one."""
    money, number, other, category, key, age = source[4:]
    known = source.reference[money][~np.isnan(source.reference[money])]
    low, middle, clip = np.quantile(known, (0.05, 0.5, 1 - 0.1 * strength))
    deviation = float(np.std(np.clip(known, low, np.quantile(known, 0.95))))
    names = list(reference.columns[category].cells.known)
    related = [name for pair in reference.pairs for name in pair if name != "score"]
    numeric = sorted({name for name in related if reference.columns[name].cells.numeric})
    permuted = number if number in numeric else max(numeric, key=related.count)

    def of(name: str, how: Callable[[NDArray[Any], np.random.Generator], NDArray[Any]]) -> Kind:
        return Kind((name,), lambda table, generator: {**table, name: how(table[name], generator)})

    def some(name: str, share: float, how: Callable[[NDArray[Any]], Any]) -> Kind:
        def inject(values: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
            chosen = generator.random(len(values)) < share * strength
            values = values.copy()
            values[chosen] = how(values[chosen])
            return values

        return of(name, inject)

    def mixed(values: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
        chosen = generator.random(len(values)) < strength
        return np.where(chosen, generator.permutation(values), values)

    def replayed(table: Table, generator: np.random.Generator) -> Table:
        n = len(table["score"])
        again = int(0.06 * strength * n)
        return rows_of(table, np.r_[np.arange(n - again), generator.choice(n - again, again, replace=False)])

    def written_otherwise(values: NDArray[Any]) -> NDArray[Any]:
        return np.array([None if v is None else f" {v.lower()}" for v in values.tolist()], dtype=object)

    def to_second(values: NDArray[Any]) -> NDArray[Any]:
        return np.array([names[1] if v == names[0] else v for v in values.tolist()], dtype=object)

    def odds(table: Table, _: np.random.Generator) -> Table:
        moved = np.log(table["score"] / (1 - table["score"])) + 0.5 * strength
        return {**table, "score": 1 / (1 + np.exp(-moved))}

    def labels(table: Table, generator: np.random.Generator) -> Table:
        more = generator.random(len(table["score"])) < 1.5 * strength * table["score"]
        return {**table, "label": table["label"] | more}

    swap = Kind((number, other), lambda table, generator: {**table, number: table[other], other: table[number]})
    hot = source.reference[key][17]
    return {
        "mean + 0.5 sd": of(money, lambda x, g: np.round(x + 0.5 * strength * deviation, 2)),
        "units x100": of(money, lambda x, g: x * 100**strength),
        "spread x2": of(money, lambda x, g: np.round(np.maximum(middle + (x - middle) * (1 + strength), 0.01), 2)),
        "missing + 5 %": some(money, 0.05, lambda x: np.nan),
        "stuck at one value": of(money, lambda x, g: np.full(len(x), x[0])),
        "sign flipped": some(money, 1.0, lambda x: -x),
        "rounded to whole": some(money, 1.0, np.round),
        "clipped at the 90th percentile": of(money, lambda x, g: np.minimum(x, clip)),
        "2 % outliers x1000": some(money, 0.02, lambda x: x * 1000),
        "3 % filled in with -1": some(money, 0.03, lambda x: -1.0),
        "3 % of a new category": some(category, 0.03, lambda x: "NEW"),
        "35 % of a category in another": some(category, 0.35, to_second),
        "lower case and blanks": some(category, 1.0, written_otherwise),
        "two columns exchanged": swap,
        "column joined to the wrong rows": of(permuted, mixed),
        "40 % of a feature a day stale": some(age, 0.4, lambda x: x + 86_400),
        "6 % of events replayed": Kind(("events",), replayed),
        "one key in 6 % more": some(key, 0.06, lambda x: hot),
        "score + 0.5 log-odds": Kind(("score",), odds),
        "labels x2.5": Kind(("score",), labels, of_labels=True),
    }
