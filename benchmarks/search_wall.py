"""Wall time until a search of the real fraud net is as good as it should be, with and without stopping and elasticity.

IEEE-CIS, the newest rows and their features, a time split; the space of `assay run fraud`, nine epochs a trial. Three
ways: neither (a trial a core, every trial to its end), stopping (the same, with halving and curves), both (half as many
trials at once; cores that are left go to those that promise most). The goal is what the worst of the searches without
either has found after `--trials` trials, so all of them get there; others end when they do, or count with one and a
half times the longest of those. A search has so many cores of its own, on a local Ray cluster whose start does not
count; seeds run side by side as far as there are cores.

    assay bench search_wall [--json] [--rows 30000] [--seeds 4] [--cores 4] [--trials 24] [--ways both] [--keep FILE]
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from assay_pipelines.fraud.train import DEFAULTS, SPACE, FraudData, LabelledRows, objective
from assay_platform.models.encoding import EncodedRows, TabularEncoder
from assay_platform.tuning.search import SearchBudget, Strategy, TrialResult, search

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row, spread

NUM_EPOCHS, LIMIT, LONGEST_S = 9, 0.43, 3600.0
STRATEGIES = {
    "neither": Strategy(halving=False, curves=False, elastic=False),
    "stopping": Strategy(elastic=False),
    "both": Strategy(),
}


class Found(NamedTuple):
    """Of one search: seconds and metric of each trial in the order of their ends, and epochs in all."""

    trials: list[tuple[float, float]]
    epochs: int

    def seconds_to(self, goal: float, otherwise: float) -> float:
        """Until a trial ended that reached the goal."""
        return next((at for at, metric in self.trials if metric >= goal), otherwise)

    def improvements(self) -> list[tuple[float, float]]:
        """The trials that were better than all that ended before them."""
        best_before = [-math.inf, *accumulate((metric for _, metric in self.trials), max)]
        return [trial for trial, best in zip(self.trials, best_before, strict=False) if trial[1] > best]


def prepare(call: argparse.Namespace, file: Path) -> None:
    """The rows of a search, written to a file."""
    from _fraud_data import ieee_options
    from assay_pipelines.console import Reporter
    from assay_pipelines.fraud.prepare import Prepared

    data = Prepared(ieee_options(call), Reporter(), publish=False).data
    held = {"edges": data.edges, "encoder": data.encoder.__dict__ | {"_code_of": None}}
    for name, part in (("train", data.train), ("validation", data.validation)):
        assert part is not None
        held[name] = {"values": part.rows.values_NF, "codes": part.rows.codes_NC, "labels": part.labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, file)


def read(file: Path) -> FraudData:
    """What `prepare` wrote."""
    held: dict[str, Any] = torch.load(file, weights_only=True)
    parts = {
        name: LabelledRows(EncodedRows(held[name]["values"], held[name]["codes"]), held[name]["labels"])
        for name in ("train", "validation")
    }
    del held["encoder"]["_code_of"]
    return FraudData(encoder=TabularEncoder(**held["encoder"]), edges=held["edges"], **parts)


def one(call: argparse.Namespace, file: Path) -> Found:
    """A search in this process, on a cluster of its own."""
    from assay_platform.tasks.cluster import ray_cluster

    os.environ.pop("RAY_ADDRESS", None)
    trials: list[tuple[float, float]] = []
    data = read(file)
    at_once = call.cores if call.one != "both" else max(1, call.cores // 2)
    with ray_cluster(num_cpus=call.cores):
        began = time.monotonic()

        def on_trial(trial: TrialResult) -> None:
            trials.append((time.monotonic() - began, trial.metric))

        found = search(
            objective, data=data, space=SPACE, seed=call.seed, strategy=STRATEGIES[call.one], on_trial=on_trial,
            defaults={**DEFAULTS, "num_epochs": NUM_EPOCHS, "seed": 0},
            budget=SearchBudget(num_trials=call.trials, time_s=call.longest, max_epochs=NUM_EPOCHS,
                                num_parallel=at_once, enough=call.goal),
        )  # fmt: skip
    return Found(trials, sum(trial.epochs for trial in found.trials))


def in_a_process(call: argparse.Namespace, file: Path, name: str, seed: int, **more: float) -> Found:
    """The same in another process, on cores of its own."""
    cores = sorted(os.sched_getaffinity(0))
    place = seed % max(1, len(cores) // call.cores) * call.cores
    time.sleep(5 * (seed % max(1, len(cores) // call.cores)))  # clusters that start at once look for the same ports
    own = ",".join(map(str, cores[place : place + call.cores]))
    options = {"keep": file, "cores": call.cores, "one": name, "seed": seed, **more}
    done = subprocess.run(
        ["taskset", "-c", own, sys.executable, __file__, *(f"--{key}={value}" for key, value in options.items())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    told = json.loads(done.stdout.splitlines()[-1])
    found = Found([tuple(trial) for trial in told["trials"]], told["epochs"])
    better = ", ".join(f"{metric:.4f} at {at:.0f} s" for at, metric in found.improvements())
    print(f"{name}, seed {seed}: {len(found.trials)} trials, {found.epochs} epochs; {better}", flush=True)
    return found


def main() -> None:
    """All seeds of one way, then of the next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--cores", type=int, default=min(4, len(os.sched_getaffinity(0))), help="of each search")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--ways", nargs="+", choices=("stopping", "both"), default=["stopping", "both"],
                        help="beside neither")  # fmt: skip
    parser.add_argument("--keep", type=Path, help="a file with the prepared rows; written if it is not there")
    parser.add_argument("--data", help="a folder with the table")
    for name, kind in (("one", str), ("seed", int), ("goal", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--longest", type=float, default=LONGEST_S, help=argparse.SUPPRESS)
    call, _ = parser.parse_known_args()
    if call.one:
        print(json.dumps(one(call, call.keep)._asdict()))
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = call.keep or Path(scratch) / "rows.pt"
        if not file.is_file():
            prepare(call, file)
        side_by_side = max(1, len(os.sched_getaffinity(0)) // call.cores)

        def all_seeds(name: str, **more: float) -> list[Found]:
            with ThreadPoolExecutor(side_by_side) as pool:
                return list(pool.map(lambda seed: in_a_process(call, file, name, seed, **more), range(call.seeds)))

        found = {"neither": all_seeds("neither", trials=call.trials)}
        goal = min(max(metric for _, metric in one.trials) for one in found["neither"])
        longest = 1.5 * max(one.trials[-1][0] for one in found["neither"])
        print(f"the goal is average precision {goal:.4f}, others have {longest:.0f} s for it", flush=True)
        for name in call.ways:
            found[name] = all_seeds(name, trials=10 * call.trials, goal=goal, longest=longest)
    seconds = {name: [one.seconds_to(goal, longest) for one in runs] for name, runs in found.items()}
    print(seconds)
    means = {name: statistics.mean(spent) for name, spent in seconds.items()}
    rows = [
        row(f"seconds to average precision {goal:.4f}, {name}", means[name], "s", peer=means["neither"],
            peer_name="neither", limit=LIMIT * means["neither"], limit_name="0.43 of it", spread=spread(seconds[name]),
            runs=call.seeds)
        for name in call.ways
    ]  # fmt: skip
    finish("search_wall", rows)


if __name__ == "__main__":
    main()
