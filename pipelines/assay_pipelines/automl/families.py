"""The families of models that AutoML chooses among, each with what a search may vary of it.

A family learns from some rows, stops by others, and says what it thinks of those. CatBoost is there where it is
installed (`pip install assay[automl]`).
"""

# N rows, F numeric columns, C categorical columns

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_platform.models.encoding import TabularEncoder
from assay_platform.training import StopTraining
from assay_platform.tuning.space import Dimension, OneOf, Real, Space, When, Whole
from numpy.typing import NDArray

from assay_pipelines.fraud.train import DEFAULTS as NET
from assay_pipelines.fraud.train import FraudData, LabelledRows, net_logits, train_net

Floats = NDArray[np.float64]
Params = Mapping[str, Any]

_MAX_TREES, _PATIENCE = 2000, 60
_NET_EPOCHS = 20
_LARGEST_LOGIT = 15.0
# Of a category with more values, a linear model sees the most frequent ones.
_ONE_HOT, _LINEAR_STEPS = 60, 200
_TREES, _OBLIVIOUS, _MOE, _TABM, _LINEAR = FAMILIES = ("lightgbm", "catboost", "moe", "tabm", "linear")
_NETS = (_MOE, _TABM)


@dataclass(frozen=True, kw_only=True)
class Known:
    """What all families share. edges: quantiles of numeric columns. threads: that a training may use."""

    encoder: TabularEncoder
    edges: torch.Tensor
    threads: int = 1


class Fitted(NamedTuple):
    """logits (N,): of the held rows. size: trees, or epochs, that were best."""

    logits: Floats
    size: int


def available() -> tuple[str, ...]:
    """The families that can be trained here."""
    return tuple(name for name in FAMILIES if name != _OBLIVIOUS or importlib.util.find_spec("catboost") is not None)


def space_of(families: tuple[str, ...]) -> Space:
    """What a search varies: the family, and of each family its own."""

    def of(*names: str) -> When | None:
        return When("family", tuple(name for name in names if name in families))

    space: dict[str, Dimension] = {
        "family": OneOf(families),
        "leaves": Whole(low=7, high=255, log=True, when=of(_TREES)),
        "min_rows": Whole(low=5, high=200, log=True, when=of(_TREES)),
        "columns": Real(low=0.15, high=1.0, when=of(_TREES)),
        "l2": Real(low=0.01, high=50.0, log=True, when=of(_TREES)),
        "rate": Real(low=0.02, high=0.15, log=True, when=of(_TREES)),
        "cat_depth": Whole(low=4, high=9, when=of(_OBLIVIOUS)),
        "cat_l2": Real(low=1.0, high=30.0, log=True, when=of(_OBLIVIOUS)),
        "cat_rate": Real(low=0.03, high=0.2, log=True, when=of(_OBLIVIOUS)),
        "learning_rate": Real(low=5e-4, high=6e-3, log=True, when=of(*_NETS)),
        "dropout": Real(low=0.0, high=0.4, when=of(*_NETS)),
        "weight_decay": Real(low=1e-3, high=0.3, log=True, when=of(*_NETS)),
        "width": OneOf((64, 96, 128, 192), when=of(*_NETS)),
        "num_blocks": Whole(low=1, high=3, when=of(*_NETS)),
        "num_experts": OneOf((4, 8, 16), when=of(_MOE)),
        "top_k": OneOf((1, 2, 4), when=of(_MOE)),
        "num_members": OneOf((4, 8, 16), when=of(_TABM)),
        "inverse_penalty": Real(low=1e-3, high=10.0, log=True, when=of(_LINEAR)),
    }
    return {name: d for name, d in space.items() if d.when is None or d.when.values}


DEFAULT: dict[str, Any] = {
    "family": _TREES, "leaves": 31, "min_rows": 30, "columns": 0.6, "l2": 5.0, "rate": 0.06,
    "cat_depth": 6, "cat_l2": 3.0, "cat_rate": 0.08,
    "learning_rate": 2e-3, "dropout": 0.15, "weight_decay": 0.03, "width": 128, "num_blocks": 2, "num_experts": 8,
    "top_k": 2, "num_members": 8, "inverse_penalty": 0.1,
}  # fmt: skip
# What is tried first: one of each family, and large trees that see few columns each.
PORTFOLIO: tuple[Params, ...] = (
    {"family": _OBLIVIOUS},
    {"family": _TREES, "leaves": 96, "min_rows": 60, "columns": 0.2, "rate": 0.05},
    {"family": _MOE},
    {"family": _LINEAR},
    {"family": _TABM, "width": 96},
    {"family": _TREES, "leaves": 12, "min_rows": 20, "columns": 0.4, "l2": 1.0, "rate": 0.08},
)


def fit(
    params: Params,
    known: Known,
    train: LabelledRows,
    held: LabelledRows,
    *,
    seed: int,
    until: float,
    on_progress: Callable[[], None] = lambda: None,
) -> Fitted:
    """Train one model. until: of the monotonic clock; what there is then counts. on_progress: called now and then."""

    def goes_on() -> bool:
        on_progress()
        return time.monotonic() < until

    fits = {_TREES: _fit_lightgbm, _OBLIVIOUS: _fit_catboost, _MOE: _fit_net, _TABM: _fit_net, _LINEAR: _fit_linear}
    found = fits[params["family"]](params, known, train, held, seed, goes_on)
    return found._replace(logits=np.clip(found.logits, -_LARGEST_LOGIT, _LARGEST_LOGIT))


def flags(rows: LabelledRows) -> NDArray[np.bool_]:
    """The labels (N,)."""
    return rows.labels.numpy() > 0.5


def lightgbm_params(params: Params, *, threads: int, seed: int) -> dict[str, Any]:
    """A point of the search as LightGBM's parameters, without the objective."""
    return {
        "verbosity": -1, "learning_rate": params["rate"], "num_leaves": params["leaves"], "lambda_l2": params["l2"],
        "min_data_in_leaf": params["min_rows"], "feature_fraction": params["columns"], "bagging_freq": 1,
        "bagging_fraction": 0.8, "max_bin": 127, "deterministic": True, "force_row_wise": True, "seed": seed,
        "num_threads": threads,
    }  # fmt: skip


class BestRound:
    """A callback of LightGBM that remembers the round with the smallest loss, and ends a training in time."""

    def __init__(self, until: float, goes_on: Callable[[], bool] = lambda: True) -> None:
        self._until, self._goes_on = until, goes_on
        self._loss, self.size = float("inf"), 1

    def __call__(self, env: Any) -> None:
        """After each round."""
        from lightgbm.callback import EarlyStopException

        loss = float(env.evaluation_result_list[0][2])
        if loss < self._loss:
            self._loss, self.size = loss, env.iteration + 1
        if time.monotonic() > self._until or not self._goes_on():
            raise EarlyStopException(self.size - 1, env.evaluation_result_list)


def _fit_lightgbm(
    params: Params, known: Known, train: LabelledRows, held: LabelledRows, seed: int, goes_on: Callable[[], bool]
) -> Fitted:
    import lightgbm as lgb

    best = BestRound(until=float("inf"), goes_on=goes_on)
    numbers = held.rows.numbers()
    data = lgb.Dataset(train.rows.numbers(), flags(train))
    booster = lgb.train(
        lightgbm_params(params, threads=known.threads, seed=seed) | {"objective": "binary", "metric": "binary_logloss"},
        data,
        num_boost_round=_MAX_TREES,
        valid_sets=[lgb.Dataset(numbers, flags(held), reference=data)],
        callbacks=[lgb.early_stopping(_PATIENCE, verbose=False), best],
    )
    return Fitted(np.asarray(booster.predict(numbers, raw_score=True, num_iteration=best.size)), best.size)


def _fit_catboost(
    params: Params, known: Known, train: LabelledRows, held: LabelledRows, seed: int, goes_on: Callable[[], bool]
) -> Fitted:
    import catboost

    def pool(rows: LabelledRows) -> Any:
        values, codes = rows.rows.values_NF.numpy(), rows.rows.codes_NC.numpy().astype(np.int32)
        features = catboost.FeaturesData(
            num_feature_data=np.ascontiguousarray(values) if values.shape[1] else None,
            cat_feature_data=np.char.encode(codes.astype("U12"), "ascii").astype(object) if codes.shape[1] else None,
        )
        return catboost.Pool(features, flags(rows).astype(np.int32))

    class Watch:
        def after_iteration(self, info: Any) -> bool:
            return goes_on()

    model = catboost.CatBoostClassifier(
        iterations=_MAX_TREES, depth=params["cat_depth"], l2_leaf_reg=params["cat_l2"],
        learning_rate=params["cat_rate"], random_seed=seed, thread_count=known.threads, od_type="Iter",
        od_wait=_PATIENCE, use_best_model=True, verbose=False, allow_writing_files=False,
        max_ctr_complexity=2, border_count=128,
    )  # fmt: skip
    held_pool = pool(held)
    model.fit(pool(train), eval_set=held_pool, callbacks=[Watch()])
    return Fitted(np.asarray(model.predict(held_pool, prediction_type="RawFormulaVal")), int(model.tree_count_))


def _fit_net(
    params: Params, known: Known, train: LabelledRows, held: LabelledRows, seed: int, goes_on: Callable[[], bool]
) -> Fitted:
    def on_epoch(_epoch: int, _metric: float) -> None:
        if not goes_on():
            raise StopTraining

    shape = {"num_members": 1} if params["family"] == _MOE else {"num_experts": 1, "top_k": 1}
    trained = train_net(
        NET | dict(params) | shape,
        FraudData(encoder=known.encoder, edges=known.edges, train=train, validation=held),
        num_epochs=_NET_EPOCHS,
        seed=seed,
        on_epoch=on_epoch,
    )
    return Fitted(net_logits(trained.net, held.rows), trained.fitted.best_epoch)


def _fit_linear(
    params: Params, known: Known, train: LabelledRows, held: LabelledRows, _seed: int, goes_on: Callable[[], bool]
) -> Fitted:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=params["inverse_penalty"], max_iter=_LINEAR_STEPS, tol=1e-3)
    model.fit(_linear_inputs(known, train), flags(train))
    goes_on()
    return Fitted(np.asarray(model.decision_function(_linear_inputs(known, held))), int(model.n_iter_[0]))


def _linear_inputs(known: Known, rows: LabelledRows) -> Any:
    """Numbers by their rank among those of the training rows, whether they are missing, categories one by one."""
    from scipy.sparse import csr_matrix, hstack

    values_NF, codes_NC = rows.rows.values_NF.numpy(), rows.rows.codes_NC.numpy()
    parts = []
    for column, edges in zip(values_NF.T, known.edges.numpy(), strict=True):
        places, at = np.unique(edges, return_index=True)
        rank = np.interp(column, places, at / max(1, len(edges) - 1)) * 4 - 2
        is_missing = np.isnan(column)
        parts.append(csr_matrix(np.column_stack([np.where(is_missing, 0.0, rank), is_missing])))
    everyone = np.arange(len(codes_NC))
    for codes, size in zip(codes_NC.T, known.encoder.cardinalities, strict=True):
        width = min(size, _ONE_HOT) + 1
        ones = np.ones(len(codes))
        parts.append(csr_matrix((ones, (everyone, np.minimum(codes, width - 1))), shape=(len(codes), width)))
    return hstack(parts, format="csr")
