"""The models that ours is measured against, each as its users would train it: on the table's own columns, with stopping
on validation rows, then once more on all rows before the test period for as many rounds.

A peer is a function of (parameters, rows, seed): with held-out rows it stops early and says after how many rounds, with
`rounds` it trains exactly so many.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from assay_pipelines.fraud.baseline import tree_frame
from assay_pipelines.fraud.evaluate import average_precision
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
THREADS = len(os.sched_getaffinity(0))
_PATIENCE, _MAX_ROUNDS = 60, 1500


class Table(NamedTuple):
    """What a peer may know. frame: categories of many values as ranks by frequency. words: all categories as such."""

    frame: pd.DataFrame
    words: pd.DataFrame
    labels: NDArray[np.bool_]


class Fit(NamedTuple):
    """A trained peer. rounds: trees or epochs."""

    score: Callable[[Rows], Floats]  # log-odds of rows of the table
    rounds: int


Params = dict[str, Any]
Draw = Callable[[np.random.Generator], Params]
Train = Callable[[Params, Table, Rows, Rows | None, int | None, int], Fit]


def raw_table(columns: Mapping[str, Any], schema: Any, labels: NDArray[np.bool_], train: Rows) -> Table:
    """The table's own columns, categories ranked by their frequency in training rows."""
    words = pd.DataFrame({name: columns[name] for name in schema.categorical}).fillna("")
    return Table(tree_frame(dict(columns), schema.numeric, schema.categorical, train), words, labels)


def _log(generator: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))


# ---------------------------------------------------------------------- LightGBM


def draw_lightgbm(generator: np.random.Generator) -> Params:
    """One configuration."""
    return {
        "learning_rate": _log(generator, 0.03, 0.1), "num_leaves": int(_log(generator, 16, 512)),
        "min_data_in_leaf": int(_log(generator, 20, 500)), "feature_fraction": generator.uniform(0.2, 0.9),
        "bagging_fraction": generator.uniform(0.6, 1.0), "bagging_freq": 1, "lambda_l2": _log(generator, 1e-3, 30),
    }  # fmt: skip


def train_lightgbm(params: Params, table: Table, train: Rows, held: Rows | None, rounds: int | None, seed: int) -> Fit:
    """LightGBM; categories of at most 200 values natively."""
    import lightgbm as lgb

    fixed = {"objective": "binary", "metric": "average_precision", "verbosity": -1, "num_threads": THREADS}
    data = lgb.Dataset(table.frame.iloc[train], table.labels[train])
    booster = lgb.train(
        {**fixed, **params, "seed": seed},
        data,
        num_boost_round=rounds or _MAX_ROUNDS,
        valid_sets=None if held is None else [lgb.Dataset(table.frame.iloc[held], table.labels[held], reference=data)],
        callbacks=None if held is None else [lgb.early_stopping(_PATIENCE, verbose=False)],
    )
    return Fit(
        lambda rows: np.asarray(booster.predict(table.frame.iloc[rows], raw_score=True), dtype=np.float64),
        booster.best_iteration if held is not None else int(rounds or 0),
    )


# ---------------------------------------------------------------------- XGBoost


def draw_xgboost(generator: np.random.Generator) -> Params:
    """One configuration."""
    return {
        "learning_rate": _log(generator, 0.03, 0.15), "max_depth": int(generator.integers(4, 13)),
        "min_child_weight": _log(generator, 1, 100), "colsample_bytree": generator.uniform(0.2, 0.9),
        "subsample": generator.uniform(0.6, 1.0), "lambda": _log(generator, 1e-2, 30),
    }  # fmt: skip


def train_xgboost(params: Params, table: Table, train: Rows, held: Rows | None, rounds: int | None, seed: int) -> Fit:
    """XGBoost's histogram method; categories of at most 200 values natively."""
    import xgboost as xgb

    def matrix(rows: Rows) -> Any:
        return xgb.DMatrix(table.frame.iloc[rows], table.labels[rows], enable_categorical=True)

    fixed = {"objective": "binary:logistic", "eval_metric": "aucpr", "tree_method": "hist", "nthread": THREADS}
    booster = xgb.train(
        {**fixed, **params, "seed": seed},
        matrix(train),
        num_boost_round=rounds or _MAX_ROUNDS,
        evals=[] if held is None else [(matrix(held), "held")],
        early_stopping_rounds=None if held is None else _PATIENCE,
        verbose_eval=False,
    )
    best = booster.best_iteration + 1 if held is not None else int(rounds or 0)
    return Fit(
        lambda rows: np.asarray(
            booster.predict(matrix(rows), output_margin=True, iteration_range=(0, best)), dtype=np.float64
        ),
        best,
    )


# ---------------------------------------------------------------------- CatBoost


def draw_catboost(generator: np.random.Generator) -> Params:
    """One configuration."""
    return {
        "learning_rate": _log(generator, 0.03, 0.2), "depth": int(generator.integers(5, 10)),
        "l2_leaf_reg": _log(generator, 1, 30), "random_strength": _log(generator, 0.1, 10),
        "bagging_temperature": generator.uniform(0.0, 1.0),
    }  # fmt: skip


def train_catboost(params: Params, table: Table, train: Rows, held: Rows | None, rounds: int | None, seed: int) -> Fit:
    """CatBoost with its own treatment of all categories, on a GPU where there is one."""
    import catboost

    words = list(table.words.columns)
    frame = pd.concat([table.frame.drop(columns=words), table.words], axis=1)

    def pool(rows: Rows) -> Any:
        return catboost.Pool(frame.iloc[rows], table.labels[rows].astype(int), cat_features=words)

    on_gpu = torch.cuda.is_available()
    model = catboost.CatBoostClassifier(
        **params,
        iterations=rounds or _MAX_ROUNDS,
        random_seed=seed,
        task_type="GPU" if on_gpu else "CPU",
        bootstrap_type="Bayesian",
        eval_metric="Logloss" if on_gpu else "PRAUC:type=Classic",  # the GPU has no other that is as fast
        thread_count=THREADS,
        gpu_ram_part=0.3 if on_gpu else None,
        verbose=False,
        allow_writing_files=False,
    )
    model.fit(pool(train), eval_set=None if held is None else pool(held), early_stopping_rounds=_PATIENCE)
    return Fit(
        lambda rows: np.asarray(model.predict(pool(rows), prediction_type="RawFormulaVal"), dtype=np.float64),
        int(model.tree_count_),
    )


# ---------------------------------------------------------------------- TabM


def draw_tabm(generator: np.random.Generator) -> Params:
    """One configuration."""
    return {
        "learning_rate": _log(generator, 5e-4, 4e-3), "weight_decay": _log(generator, 1e-3, 0.3),
        "n_blocks": int(generator.integers(1, 4)), "d_block": int(generator.choice([128, 256, 384])),
        "dropout": generator.uniform(0.0, 0.4), "d_embedding": int(generator.choice([8, 16])),
        "n_bins": int(generator.choice([16, 32])),
    }  # fmt: skip


def train_tabm(params: Params, table: Table, train: Rows, held: Rows | None, rounds: int | None, seed: int) -> Fit:
    """TabM with 32 members and piecewise-linear embeddings of numbers, as its authors' package makes it."""
    import rtdl_num_embeddings
    import tabm

    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = [name for name in table.frame.columns if isinstance(table.frame[name].dtype, pd.CategoricalDtype)]
    names = [name for name in table.frame.columns if name not in words]
    numbers = table.frame[names].to_numpy(dtype=np.float32)
    missing = np.isnan(numbers[train]).any(0)
    # As the authors do: the mean where a number is missing, and beside it a flag that it is.
    mean = np.nanmean(numbers[train], axis=0)
    flags = np.isnan(numbers[:, missing]).astype(np.float32)
    filled = torch.from_numpy(np.where(np.isnan(numbers), mean, numbers)).to(device)
    codes = np.column_stack([*(table.frame[name].cat.codes.to_numpy() + 1 for name in words)])
    sizes = [int(codes[:, i].max()) + 1 for i in range(len(words))]
    codes_t = torch.from_numpy(codes.astype(np.int64)).to(device)
    flags_t = torch.from_numpy(flags).to(device)
    # Binary flags go in as categories of two.
    categories = torch.cat([codes_t, flags_t.long()], dim=1)
    sizes += [2] * flags.shape[1]
    varied = np.flatnonzero(filled[torch.from_numpy(train).to(device)].std(0).cpu().numpy() > 0)
    filled = filled[:, torch.from_numpy(varied).to(device)]
    sample = np.random.default_rng(seed).choice(train, min(len(train), 100_000), replace=False)
    warnings.filterwarnings("ignore", message="The .* feature has just two bin edges")
    bins = rtdl_num_embeddings.compute_bins(filled[torch.from_numpy(sample).to(device)].cpu(), n_bins=params["n_bins"])
    model = tabm.TabM.make(
        n_num_features=filled.shape[1],
        cat_cardinalities=sizes,
        d_out=1,
        num_embeddings=rtdl_num_embeddings.PiecewiseLinearEmbeddings(
            bins, params["d_embedding"], activation=False, version="B"
        ),
        n_blocks=params["n_blocks"],
        d_block=params["d_block"],
        dropout=params["dropout"],
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params["learning_rate"], weight_decay=params["weight_decay"])
    labels = torch.from_numpy(table.labels.astype(np.float32)).to(device)
    generator = torch.Generator().manual_seed(seed)

    def forward(rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return model(filled[rows], categories[rows]).squeeze(-1).float()

    def score(rows: Rows) -> Floats:
        model.eval()
        with torch.no_grad():
            parts = [
                torch.logit(torch.sigmoid(forward(part)).mean(1).double().clamp(1e-9, 1 - 1e-9))
                for part in torch.from_numpy(rows).to(device).split(8192)
            ]
        return torch.cat(parts).cpu().numpy()

    best, best_epoch, best_state = -1.0, 0, None
    index = torch.from_numpy(train)
    for epoch in range(1, (rounds or 40) + 1):
        model.train()
        for part in index[torch.randperm(len(index), generator=generator)].to(device).split(1024):
            logits_NK = forward(part)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits_NK, labels[part].unsqueeze(-1).expand_as(logits_NK)
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if held is not None:
            reached = average_precision(table.labels[held], score(held))
            if reached > best:
                best, best_epoch = reached, epoch
                best_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            elif epoch - best_epoch >= 3:
                break
    if best_state is not None:
        model.load_state_dict(best_state)
    return Fit(score, best_epoch if held is not None else int(rounds or 0))


PEERS: dict[str, tuple[Draw, Train]] = {
    "lightgbm": (draw_lightgbm, train_lightgbm),
    "xgboost": (draw_xgboost, train_xgboost),
    "catboost": (draw_catboost, train_catboost),
    "tabm": (draw_tabm, train_tabm),
}
