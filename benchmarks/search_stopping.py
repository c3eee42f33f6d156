"""Epochs that a search trains until its best is as good as it should be, with and without early stopping.

Two surfaces of nets recorded epoch by epoch (`_surfaces.py`), nine epochs a trial; an epoch is the unit of time, as an
epoch of any trial takes about as long. The goal is the quality that one random point in 100 has after nine epochs.
The same proposals, the same seeds; nothing is stopped / successive halving / curves that end below the best / both.

    assay bench search_stopping [--json] [--seeds 20]
"""

import argparse
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from assay_platform.tuning.search import Report, SearchBudget, Strategy, search

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row, spread
from _surfaces import NUM_EPOCHS, Formula, Recorded, surfaces
from search_regret import at_random

RARE, MOST_TRIALS, LIMIT = 100, 150, 0.43
STRATEGIES = {
    "neither": Strategy(halving=False, curves=False),
    "halving": Strategy(curves=False),
    "curves": Strategy(halving=False),
    "both": Strategy(),
}


def epochs_needed(surface: Recorded | Formula, strategy: Strategy, goal: float, seed: int) -> int:
    """Of all trials together; the search has to reach the goal."""

    def objective(params: dict[str, Any], data: None, report: Report) -> None:  # noqa: ARG001 - of the protocol
        for epoch, metric in enumerate(surface.curve(params), start=1):
            report(epoch, metric)

    budget = SearchBudget(num_trials=MOST_TRIALS, time_s=3600, max_epochs=NUM_EPOCHS, enough=goal)
    found = search(objective, data=None, space=surface.space, defaults=surface.defaults, seed=seed, here=True,
                   strategy=strategy, budget=budget)  # fmt: skip
    assert found.metric >= goal, f"seed {seed} did not get there in {MOST_TRIALS} trials"
    return sum(trial.epochs for trial in found.trials)


def main() -> None:
    """Every strategy on both surfaces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    call, _ = parser.parse_known_args()
    warnings.simplefilter("ignore")
    rows = []
    for name, surface in surfaces("fraud-net", "digits-net").items():
        goal = float(np.quantile(at_random(surface, 50_000, 1), 1 - 1 / RARE))
        needed = {
            strategy: [epochs_needed(surface, chosen, goal, seed) for seed in range(call.seeds)]
            for strategy, chosen in STRATEGIES.items()
        }
        mean = {strategy: statistics.mean(counts) for strategy, counts in needed.items()}
        print(name, mean, flush=True)
        rows.append(
            row(
                f"{name}: epochs to the goal",
                mean["both"],
                "epochs",
                peer=mean["neither"],
                peer_name="neither",
                limit=LIMIT * mean["neither"],
                limit_name="0.43 of it",
                spread=spread(list(needed["both"])),
                runs=call.seeds,
                everyone=mean,
            )
        )
    finish("search_stopping", rows)


if __name__ == "__main__":
    main()
