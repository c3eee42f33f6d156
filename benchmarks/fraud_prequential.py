"""Week after week on IEEE-CIS: a model that is never touched, one that learns on, one trained anew.

The first model has the first 70 % of the table, less what was not yet labelled then. Each week of the rest is scored by
all three before any of them may learn from it, and a payment's label is known a week after it. Everyone reads features
that are new in every score. Undefended. Average precision and recall at each model's own threshold, means over weeks;
seconds are those of all weeks together.

    assay bench fraud_prequential [--json] [--rows N] [--seeds 0,1,2] [--data FOLDER]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.evaluate import fraud_metrics
from assay_pipelines.fraud.fit import fit_models, refit
from assay_pipelines.fraud.prepare import Prepared
from assay_pipelines.fraud.train import DEFAULTS, LabelledRows
from assay_pipelines.fraud.update import calibrated, update_model
from assay_platform.models.fraud import FraudModel
from assay_platform.robustness.constraints import Constraints

sys.path.insert(0, str(Path(__file__).parent))
from _fraud_data import ieee_options
from _report import finish, row

WEEK_US = 7 * 86_400_000_000
START, HELD = 0.7, 0.1
SIDES = ("no update", "learning on", "trained anew")


def trained(prepared: Prepared, end: int, seed: int) -> FraudModel:
    """On the rows before `end`, the newest tenth of them chosen by, then learned from too."""
    split = prepared.split_at(int((1 - HELD) * end), end, len(prepared.events))
    fitted = fit_models(DEFAULTS, split, Reporter(), seed=seed)
    return refit(fitted, DEFAULTS, split, Reporter(), seed=seed)


def weeks(prepared: Prepared, seed: int) -> tuple[dict[str, list[dict[str, float]]], dict[str, float]]:
    """Metrics of every week and seconds of all of them, a side each."""
    time_us, labels, settings = prepared.events.time_us, prepared.labels, prepared.schema.decisions
    start_us = int(time_us[int(START * len(labels))])

    def known_at(moment_us: int) -> int:
        return int(np.searchsorted(time_us, moment_us - WEEK_US))

    learned = known_at(start_us)
    models = dict.fromkeys(SIDES, trained(prepared, learned, seed))
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    seconds = dict.fromkeys(SIDES, 0.0)
    for begin_us in range(start_us, int(time_us[-1]) - WEEK_US, WEEK_US):
        asked = np.arange(*np.searchsorted(time_us, [begin_us, begin_us + WEEK_US]))
        known = known_at(begin_us)
        if known > learned:
            began = time.perf_counter()
            models["trained anew"] = trained(prepared, known, seed)
            seconds["trained anew"] += time.perf_counter() - began
            began = time.perf_counter()
            model = models["learning on"]
            rows = LabelledRows(model.encode(prepared.columns), torch.from_numpy(labels.astype(np.float32)))
            # A quarter of what is new says where calibration and thresholds belong, then all is learned from.
            new, old = np.arange(learned, known), np.arange(learned)
            middle = learned + 3 * (known - learned) // 4
            first = update_model(model, rows, new=new[: middle - learned], old=old, training=DEFAULTS, seed=seed)
            first = calibrated(first, rows.take(slice(middle, known)), settings)
            final = update_model(model, rows, new=new, old=old, training=DEFAULTS, seed=seed)
            models["learning on"] = final.changed(calibration=first.calibration, policy=first.policy)
            seconds["learning on"] += time.perf_counter() - began
            learned = known
        for side, model in models.items():
            rows_of_week = model.encode({name: np.asarray(c)[asked] for name, c in prepared.columns.items()})
            probability = model.score(rows_of_week).probability
            metrics = fraud_metrics(probability, labels[asked], threshold=model.policy.decline_from)
            found[side].append(metrics)
            print(f"  week {len(found[side])} {side:<13} AP {metrics['average_precision']:.4f} "
                  f"recall {metrics['recall_at_threshold']:.3f} at FPR {metrics['fpr_at_threshold']:.4f} "
                  f"ECE {metrics['ece']:.4f}", flush=True)  # fmt: skip
    return found, seconds


def main() -> None:
    """All seeds, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0])
    parser.add_argument("--data")
    call, _ = parser.parse_known_args()
    prepared = Prepared(ieee_options(call, constraints=Constraints()), Reporter(), publish=False)
    runs = [weeks(prepared, seed) for seed in call.seeds]
    rows = []
    for metric in ("average_precision", "recall_at_threshold", "fpr_at_threshold", "ece"):
        means = {side: [float(np.mean([m[metric] for m in found[side]])) for found, _ in runs] for side in SIDES}
        rows += [
            row(
                f"{side}: {metric}, {len(runs[0][0][side])} weeks", float(np.mean(means[side])), "",
                peer=float(np.mean(means[SIDES[2]])), peer_name=SIDES[2], higher_is_better=metric[0] in "ar",
                spread=(max(means[side]) - min(means[side])) / float(np.mean(means[side])), runs=len(runs),
            )
            for side in SIDES[:2]
        ]  # fmt: skip
    spent = {side: float(np.mean([seconds[side] for _, seconds in runs])) for side in SIDES}
    rows.append(row(f"{SIDES[1]}: cost", spent[SIDES[1]], "s", peer=spent[SIDES[2]], peer_name=SIDES[2]))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    finish("fraud_prequential", rows, device)


if __name__ == "__main__":
    main()
