"""How many trials a search needs until its best is as good as it should be, on six surfaces, 20 seeds.

Ours (`assay_platform.tuning`, in this process, nothing stopped early) beside random points, TPE and the Gaussian
process of Optuna with their defaults, and FLAML's BlendSearch where `--flaml PYTHON` names an
interpreter that has it. All start from the same default configuration, which is what a user of any of them would do.
The goal is the quality that one random point in 500 has. A search that does not get there counts with all its trials;
one that does ends. Regret is what is left of the way from the default to the optimum then. Surfaces: `_surfaces.py`.

    assay bench search_regret [--json] [--seeds 20] [--trials 100] [--flaml PYTHON] [--jobs 2]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from assay_platform.tuning.search import Report, SearchBudget, search
from assay_platform.tuning.space import OneOf, Real
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row
from _surfaces import Formula, Recorded, draw, surfaces

RARE = 500  # random points, of which one reaches the goal
Surface = Recorded | Formula


def at_random(surface: Surface, num: int, seed: int) -> NDArray[np.float64]:
    """Metric of random points."""
    generator = np.random.default_rng(seed)
    points = [draw(surface.space, generator) for _ in range(num)]
    if isinstance(surface, Recorded):
        return surface.curves(np.array([[float(value) for value in point.values()] for point in points]))[:, -1]
    return np.array([surface.curve(point)[-1] for point in points])


def ours(surface: Surface, num: int, seed: int, goal: float) -> list[float]:
    """Metric of every trial, in order."""

    def objective(params: dict[str, Any], data: None, report: Report) -> None:  # noqa: ARG001 - of the protocol
        report(1, surface.curve(params)[-1])

    found = search(
        objective, data=None, space=surface.space, defaults=surface.defaults, seed=seed, here=True,
        budget=SearchBudget(num_trials=num, time_s=3600, max_epochs=1, enough=goal),
    )  # fmt: skip
    return [trial.metric for trial in found.trials]


def optuna_alone(surface: Surface, num: int, seed: int, goal: float, sampler: str) -> list[float]:
    """The same with what Optuna does by itself."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = {
        "TPE": lambda: optuna.samplers.TPESampler(seed=seed),
        "GP": lambda: optuna.samplers.GPSampler(seed=seed),
    }
    study = optuna.create_study(direction="maximize", sampler=made[sampler]())
    study.enqueue_trial(dict(surface.defaults))

    def objective(trial: optuna.Trial) -> float:
        params: dict[str, Any] = {}
        for name, dimension in surface.space.items():
            if isinstance(dimension, OneOf):
                params[name] = trial.suggest_categorical(name, dimension.values)
            elif isinstance(dimension, Real):
                params[name] = trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)
            else:
                params[name] = trial.suggest_int(name, dimension.low, dimension.high, log=dimension.log)
        return surface.curve(params)[-1]

    def end(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.value is not None and trial.value >= goal:
            study.stop()

    study.optimize(objective, n_trials=num, callbacks=[end])
    return [float(trial.value or 0.0) for trial in study.trials]


def trials_needed(values: list[float], goal: float) -> int:
    """Of a search: all of them where none is good enough."""
    reached = np.flatnonzero(np.array(values) >= goal)
    return int(reached[0]) + 1 if len(reached) else len(values)


def flaml(python: str, name: str, num: int, seed: int, goal: float) -> list[float]:
    """BlendSearch of FLAML, in its own interpreter."""
    command = [python, str(Path(__file__).parent / "_flaml_peer.py"), name, str(num), str(seed), repr(goal)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


class Setting(NamedTuple):
    """What all seeds of a surface have in common."""

    name: str
    num: int
    goal: float
    flaml: str | None


def all_of(setting: Setting, seed: int) -> tuple[dict[str, list[float]], float]:
    """Metric of every trial of every search, and seconds that ours took a trial."""
    warnings.simplefilter("ignore")
    surface = surfaces(setting.name)[setting.name]
    runs: dict[str, list[float]] = {}
    began = time.perf_counter()
    runs["ours"] = ours(surface, setting.num, seed, setting.goal)
    overhead = (time.perf_counter() - began) / len(runs["ours"])
    start = surface.curve(surface.defaults)[-1]
    runs["random"] = [start, *at_random(surface, 20 * RARE, 100 + seed)]
    for peer in ("TPE", "GP"):
        runs[f"{peer} of Optuna"] = optuna_alone(surface, setting.num, seed, setting.goal, peer)
    if setting.flaml:
        runs["FLAML"] = flaml(setting.flaml, setting.name, setting.num, seed, setting.goal)
    return runs, overhead


def main() -> None:
    """Every search on every surface."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--only", help="names of surfaces, with commas between")
    parser.add_argument("--flaml", help="an interpreter that has flaml")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, a process each")
    call, _ = parser.parse_known_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    ratios: dict[str, list[float]] = {}
    overhead: list[float] = []
    for name, surface in surfaces(*(call.only.split(",") if call.only else ())).items():
        start = surface.curve(surface.defaults)[-1]
        goal = float(np.quantile(at_random(surface, 50_000, 1), 1 - 1 / RARE))
        needed: dict[str, list[int]] = {}
        regret: dict[str, list[float]] = {}
        setting = Setting(name, call.trials, goal, call.flaml)
        with ProcessPoolExecutor(call.jobs, mp_context=get_context("spawn")) as processes:
            of_seeds = list(processes.map(partial(all_of, setting), range(call.seeds)))
        for runs, seconds in of_seeds:
            overhead.append(seconds)
            for searcher, values in runs.items():
                needed.setdefault(searcher, []).append(trials_needed(values, goal))
                regret.setdefault(searcher, []).append((surface.optimum - max(values)) / (surface.optimum - start))
        middle = {searcher: statistics.mean(counts) for searcher, counts in needed.items()}
        print(name, {s: round(m, 1) for s, m in middle.items()},
              {s: round(statistics.median(r), 4) for s, r in regret.items()}, flush=True)  # fmt: skip
        peers = {s: m for s, m in middle.items() if s not in ("ours", "random")}
        best = min(peers, key=lambda s: peers[s])
        ratios.setdefault("random", []).append(middle["ours"] / middle["random"])
        ratios.setdefault("best", []).append(middle["ours"] / peers[best])
        for peer, limit, word in ((best, 0.8 * peers[best], "0.8 of it"),
                                  ("random", middle["random"] / 3, "a third")):  # fmt: skip
            rows.append(
                row(
                    f"{name}: trials to the goal",
                    middle["ours"],
                    "trials",
                    peer=middle[peer],
                    peer_name=peer,
                    limit=limit,
                    limit_name=word,
                    runs=call.seeds,
                    spread=_spread(needed["ours"]),
                    everyone={s: round(m, 2) for s, m in middle.items()},
                    regret={s: round(statistics.median(r), 5) for s, r in regret.items()},
                )
            )
    rows.append(row("all surfaces: trials, of random's (geometric mean)", _geometric(ratios["random"]), "", limit=1 / 3,
                    limit_name="target"))  # fmt: skip
    rows.append(row("all surfaces: trials, of the best peer's (geometric mean)", _geometric(ratios["best"]), "",
                    limit=0.8, limit_name="target"))  # fmt: skip
    rows.append(row("overhead", statistics.median(overhead), "s a trial", limit=0.3, limit_name="target",
                    runs=len(overhead), spread=_spread(overhead)))  # fmt: skip
    finish("search_regret", rows)


def _geometric(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _spread(values: list[Any]) -> float:
    return float((max(values) - min(values)) / max(1e-9, statistics.median(values)))


if __name__ == "__main__":
    main()
