"""Rows that boosted trees score a second, in bulk: `TreeEnsemble`, and LightGBM, whose trees they are.

Made-up tables of float32, 5 % missing; both on all cores, in turn, medians; answers are compared.

    assay bench trees_scoring [--json] [--rows 60000]
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from assay_platform.models.trees import TreeEnsemble
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, in_turn, median, row, spread

RUNS, LEARNED = 7, 40_000
SHAPES = ((500, 12, 14), (894, 31, 14), (344, 96, 189), (200, 255, 40))  # trees, leaves, columns


def made_up(num_rows: int, num_columns: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Rows, half of the columns whole numbers, and labels."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(num_rows, num_columns)).astype(np.float32)
    rows[:, : num_columns // 2] = np.round(2 * rows[:, : num_columns // 2])
    rows[generator.random(rows.shape) < 0.05] = np.nan
    known = np.nan_to_num(rows)
    signal = known[:, 0] * known[:, 1] + np.sin(2 * known[:, 2]) + known[:, -1]
    return rows, signal + generator.normal(size=num_rows) > 0.5


def main() -> None:
    """Every shape of trees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    call, _ = parser.parse_known_args()
    rows: list[dict[str, Any]] = []
    for num_trees, num_leaves, num_columns in SHAPES:
        learned, labels = made_up(LEARNED, num_columns, 0)
        settings = {"objective": "binary", "num_leaves": num_leaves, "learning_rate": 0.03, "max_bin": 127,
                    "verbosity": -1, "feature_fraction": 0.5}  # fmt: skip
        booster = lgb.train(settings, lgb.Dataset(learned, labels), num_trees)
        trees, asked = TreeEnsemble.from_lightgbm(booster), made_up(call.rows, num_columns, 1)[0]
        calls = {"ours": partial(trees.logits, asked), "LightGBM": partial(booster.predict, asked, raw_score=True)}
        assert np.allclose(calls["ours"](), calls["LightGBM"](), rtol=0, atol=1e-12)
        rates = {name: [call.rows / second for second in spent] for name, spent in in_turn(calls, RUNS).items()}
        case = f"{num_trees} trees of {num_leaves} leaves over {num_columns} columns"
        rows.append(row(case, median(rates["ours"]), "rows/s", peer=median(rates["LightGBM"]), peer_name="LightGBM",
                        higher_is_better=True, spread=spread(rates["ours"]), runs=RUNS))  # fmt: skip
    finish("trees_scoring", rows)


if __name__ == "__main__":
    main()
