"""Surfaces to search on: two formulas, and four recorded once from trainings on real tables.

A recorded surface is a few hundred trainings at random points (benchmarks/surfaces/NAME.csv: parameters, then the
metric of every epoch), between which a forest of trees interpolates; its optimum is searched by brute force.
Tables: IEEE-CIS, 30,000 payments to learn from and the 15,000 after them (boosted trees; a net with dropout),
MovieLens-100K (the item regression), the digits that come with scikit-learn (a net).

    python benchmarks/_surfaces.py record NAME [NUM]     # NAME: one of RECORDED; goes on where it stopped
"""

import csv
import sys
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from assay_platform.tuning.space import OneOf, Real, Space, Whole, from_unit

FOLDER = Path(__file__).parent / "surfaces"
NUM_EPOCHS = 9
Params = dict[str, Any]

NET_SPACE: Space = {
    "learning_rate": Real(low=1e-4, high=3e-2, log=True), "width": Whole(low=16, high=256, log=True),
    "depth": Whole(low=1, high=4), "dropout": Real(low=0.0, high=0.6),
    "weight_decay": Real(low=1e-5, high=1.0, log=True), "batch": Whole(low=64, high=1024, log=True),
}  # fmt: skip
NET_DEFAULTS: Params = {
    "learning_rate": 1e-3, "width": 64, "depth": 2, "dropout": 0.1, "weight_decay": 1e-2, "batch": 256,
}  # fmt: skip
RECORDED: dict[str, tuple[Space, Params]] = {
    "fraud-trees": (
        {
            "learning_rate": Real(low=0.01, high=0.3, log=True), "num_leaves": Whole(low=7, high=255, log=True),
            "min_child": Whole(low=5, high=300, log=True), "columns": Real(low=0.2, high=1.0),
            "rows": Real(low=0.4, high=1.0), "l2": Real(low=0.01, high=100.0, log=True),
            "num_rounds": Whole(low=30, high=300, log=True),
        },
        {"learning_rate": 0.1, "num_leaves": 31, "min_child": 20, "columns": 1.0, "rows": 1.0, "l2": 0.01,
         "num_rounds": 100},
    ),
    "fraud-net": (NET_SPACE, NET_DEFAULTS),
    "digits-net": (NET_SPACE, NET_DEFAULTS),
    "films-regression": (
        {
            "penalty": Real(low=1.0, high=20_000.0, log=True), "closeness_s": Real(low=1.0, high=1e6, log=True),
            "power": Real(low=-1.0, high=0.5), "share": Real(low=0.0, high=1.0),
        },
        {"penalty": 250.0, "closeness_s": 100.0, "power": 0.0, "share": 0.0},
    ),
}  # fmt: skip


def draw(space: Space, generator: np.random.Generator) -> Params:
    """A point of a space without conditions."""
    return {name: from_unit(dimension, generator.random()) for name, dimension in space.items()}


class Recorded:
    """A surface from a file. `curve` is as long as the trainings were: 9 epochs of nets, 1 of others."""

    def __init__(self, name: str) -> None:
        from sklearn.ensemble import ExtraTreesRegressor

        self.space, self.defaults = RECORDED[name]
        with (FOLDER / f"{name}.csv").open() as file:
            rows = [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]
        points, curves = (
            np.array([row[: len(self.space)] for row in rows]),
            np.array([row[len(self.space) :] for row in rows]),
        )
        self._log = np.array([not isinstance(d, OneOf) and d.log for d in self.space.values()])
        self._forest = ExtraTreesRegressor(64, min_samples_leaf=2, random_state=0, n_jobs=1)
        self._forest.fit(self._scaled(points), curves)

    def _scaled(self, points: np.ndarray) -> np.ndarray:
        return np.where(self._log, np.log(np.where(self._log, points, 1.0)), points)

    def curves(self, points: np.ndarray) -> np.ndarray:
        """(n, epochs) of points (n, dimensions)."""
        return self._forest.predict(self._scaled(points)).reshape(len(points), -1)

    def curve(self, params: Params) -> list[float]:
        """Metric of each epoch."""
        return self.curves(np.array([[float(params[name]) for name in self.space]]))[0].tolist()

    @cached_property
    def optimum(self) -> float:
        """The best of 20,000 random points, and of crosses among the best 100 of those again and again."""
        generator = np.random.default_rng(0)
        points = np.array([[float(v) for v in draw(self.space, generator).values()] for _ in range(20_000)])
        for _ in range(5):
            values = self.curves(points)[:, -1]
            best = points[np.argsort(-values)[:100]]
            mixed = np.stack([column[generator.integers(0, 100, 4_000)] for column in best.T], axis=1)
            points = np.concatenate([best, mixed])
        return float(self.curves(points)[:, -1].max())


class Formula:
    """A surface that is known exactly."""

    def __init__(self, space: Space, defaults: Params, value: Callable[[Params], float], optimum: float) -> None:
        self.space, self.defaults, self._value, self.optimum = space, defaults, value, optimum

    def curve(self, params: Params) -> list[float]:
        """One epoch."""
        return [self._value(params)]


def hartmann() -> Formula:
    """Hartmann's function of six numbers, negated."""
    alpha = np.array([1.0, 1.2, 3.0, 3.2])
    a = np.array(
        [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
    )
    p = 1e-4 * np.array([[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
                         [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]])  # fmt: skip

    def value(params: Params) -> float:
        x = np.array([params[f"x{i}"] for i in range(6)])
        return float(alpha @ np.exp(-(a * (x - p) ** 2).sum(1)))

    space: Space = {f"x{i}": Real(low=0.0, high=1.0) for i in range(6)}
    return Formula(space, dict.fromkeys(space, 0.5), value, 3.32237)


def mixed() -> Formula:
    """Branin's function of two numbers, with a choice of four kinds that moves and lowers it, and two idle numbers."""
    shift = {"a": (0.0, 0.0), "b": (2.0, 10.0), "c": (-1.5, 4.0), "d": (4.0, 25.0)}

    def value(params: Params) -> float:
        move, less = shift[params["kind"]]
        x, y = params["x"] + move, params["y"]
        found = (y - 5.1 / (4 * np.pi**2) * x**2 + 5 / np.pi * x - 6) ** 2 + 10 * (1 - 1 / (8 * np.pi)) * np.cos(x) + 10
        return -float(found) - less - 0.01 * params["idle"]

    space: Space = {
        "kind": OneOf(("a", "b", "c", "d")), "x": Real(low=-5.0, high=10.0), "y": Real(low=0.0, high=15.0),
        "idle": Real(low=0.0, high=1.0), "idle2": Real(low=0.0, high=1.0),
    }  # fmt: skip
    return Formula(space, {"kind": "d", "x": 2.5, "y": 7.5, "idle": 0.5, "idle2": 0.5}, value, -0.397887)


def surfaces(*names: str) -> dict[str, Recorded | Formula]:
    """All six, or some."""
    made: dict[str, Callable[[], Recorded | Formula]] = {"hartmann": hartmann, "mixed": mixed}
    made |= {name: partial(Recorded, name) for name in RECORDED}
    return {name: make() for name, make in made.items() if not names or name in names}


@cache
def _payments() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    import pandas as pd
    from assay_pipelines.datasets.catalogue import EVENTS, get_dataset
    from assay_platform.config import load_config

    frame = pd.read_parquet(get_dataset("ieee-cis", load_config().paths.data) / EVENTS)
    frame = frame.sort_values("TransactionDT").iloc[300_000:345_000]
    y = frame.pop("isFraud").to_numpy()
    columns = [frame[c] if pd.api.types.is_numeric_dtype(frame[c]) else pd.Series(pd.factorize(frame[c])[0]) for c in
               frame.columns if c not in ("TransactionID", "TransactionDT")]  # fmt: skip
    x = np.stack([np.asarray(column, dtype=np.float32) for column in columns], axis=1)
    return x[:30_000], y[:30_000], x[30_000:], y[30_000:]


def fraud_trees(params: Params, seed: int) -> list[float]:
    """Average precision of boosted trees."""
    import lightgbm
    from sklearn.metrics import average_precision_score

    x, y, x_later, y_later = _payments()
    settings = {
        "objective": "binary", "learning_rate": params["learning_rate"], "num_leaves": params["num_leaves"],
        "min_child_samples": params["min_child"], "feature_fraction": params["columns"],
        "bagging_fraction": params["rows"], "bagging_freq": 1, "lambda_l2": params["l2"], "verbosity": -1,
        "num_threads": 1, "seed": seed,
    }  # fmt: skip
    booster = lightgbm.train(settings, lightgbm.Dataset(x, y), params["num_rounds"])
    return [float(average_precision_score(y_later, booster.predict(x_later)))]


def _net(
    params: Params, parts: tuple[np.ndarray, ...], classes: int, metric: Callable[..., float], seed: int
) -> list[float]:
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    x, y, x_later, y_later = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    layers: list[nn.Module] = []
    width = x.shape[1]
    for _ in range(params["depth"]):
        layers += [nn.Linear(width, params["width"]), nn.ReLU(), nn.Dropout(params["dropout"])]
        width = params["width"]
    net = nn.Sequential(*layers, nn.Linear(width, classes))
    optimiser = torch.optim.AdamW(net.parameters(), params["learning_rate"], weight_decay=params["weight_decay"])
    curve = []
    for _ in range(NUM_EPOCHS):
        net.train()
        for rows in torch.randperm(len(x)).split(params["batch"]):
            optimiser.zero_grad()
            functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
        with torch.no_grad():
            curve.append(metric(y_later.numpy(), net.eval()(x_later).softmax(1).numpy()))
    return curve


def fraud_net(params: Params, seed: int) -> list[float]:
    """Average precision of a net, an epoch at a time."""
    from sklearn.metrics import average_precision_score

    x, y, x_later, y_later = _payments()
    mean, std = np.nanmean(x, 0), np.nanstd(x, 0) + 1e-6
    x, x_later = (np.nan_to_num((part - mean) / std).clip(-5, 5).astype(np.float32) for part in (x, x_later))
    parts = (x, y.astype(np.int64), x_later, y_later.astype(np.int64))
    return _net(params, parts, 2, lambda true, p: float(average_precision_score(true, p[:, 1])), seed)


def digits_net(params: Params, seed: int) -> list[float]:
    """Negative log loss of a net, an epoch at a time."""
    from sklearn.datasets import load_digits
    from sklearn.metrics import log_loss

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32), y.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    early, late = order[:600], order[600:]
    parts = (x[early], y[early], x[late], y[late])
    return _net(params, parts, 10, lambda true, p: -float(log_loss(true, p, labels=range(10))), seed)


@cache
def _films() -> Any:
    from _recommend_data import prepare

    return prepare("movielens-100k")


def films_regression(params: Params, seed: int) -> list[float]:  # noqa: ARG001 - a closed form
    """NDCG@10 of a regression of items on items: penalty, closeness in time and its share, popularity to a power."""
    from assay_pipelines.recommend.evaluate import best_items, ndcg_at_10
    from assay_platform.models.item_regression import together

    data = _films()
    taken = data.fit_matrix
    gram = (taken.T @ taken).toarray() + params["share"] * together(
        data.fit.once(), taken.shape[1], params["closeness_s"]
    )
    popularity = np.maximum(np.asarray(taken.sum(0)).ravel(), 1.0)
    inverse = np.linalg.inv(np.asarray(gram) + params["penalty"] * np.eye(len(gram)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    weights *= popularity ** params["power"]

    def scores(users: Any) -> Any:
        return np.asarray(taken[users] @ weights, dtype=np.float32)

    excluded = data.again.excluded(data.fit, taken.shape[1])
    return [ndcg_at_10(best_items(scores, data.validation, excluded), data.validation)]


def record(name: str, num: int) -> None:
    """Train at random points until the file has so many."""
    space, _ = RECORDED[name]
    train = {"fraud-trees": fraud_trees, "fraud-net": fraud_net, "digits-net": digits_net,
             "films-regression": films_regression}[name]  # fmt: skip
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.csv"
    there = max(0, len(path.read_text().splitlines()) - 1) if path.is_file() else 0
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number in range(there, num):
            params = draw(space, np.random.default_rng([number, len(name)]))
            curve = train(params, seed=number)
            if number == 0:
                writer.writerow([*space, *(f"epoch {epoch}" for epoch in range(1, len(curve) + 1))])
            cells = [*params.values(), *(round(value, 5) for value in curve)]
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in cells])
            file.flush()
            print(name, number, curve[-1], flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _, _, name, *rest = sys.argv
    record(name, int(rest[0]) if rest else 300)
