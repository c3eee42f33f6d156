"""Fraud on IEEE-CIS, the whole table, against tuned boosting and TabM: quality, calibration, intervals, the ablation.

Split by time 70/10/20. Everyone gets the same number of random configurations, each judged by average precision on the
validation rows; the best is fitted again on train + validation with every seed, and the test rows are scored once. All
log-odds are calibrated alike, by Platt scaling on validation rows. Peers have the table's own columns; 'lightgbm on our
columns' has our features too. Intervals: 95 % of 500 Poisson bootstraps of test rows, differences on the same rows.

    assay bench fraud_quality [--json] [--only PART,PART] [--trials N] [--seeds N] [--rows N] [--keep FOLDER]

Parts: ours, undefended, ablation, lightgbm, xgboost, catboost, tabm, features (lightgbm on our columns). All of them
take hours on two cores. With --keep, scores stay in the folder and a later call takes them from there, so parts may be
run one at a time; the table at the end is of all that the folder has. catboost, xgboost and tabm are optional packages.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_features.definitions import FeaturePlan, Ratio, entity_columns
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.baseline import tree_frame
from assay_pipelines.fraud.evaluate import average_precision, fraud_metrics
from assay_pipelines.fraud.features import default_plan
from assay_pipelines.fraud.fit import fit_models, refit
from assay_pipelines.fraud.prepare import Prepared, as_slice
from assay_pipelines.fraud.train import DEFAULTS, SPACE, train_net
from assay_platform.models.calibration import fit_platt
from assay_platform.robustness.constraints import Constraints
from assay_platform.tuning.space import OneOf, Real
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _fraud_data import ieee_options
from _fraud_peers import PEERS, Table, raw_table
from _report import finish, row

DRAWS = 500
SHOWN = ("auc", "average_precision", "recall_at_fpr_0.003", "precision_at_fpr_0.003", "ece", "brier")
Floats = NDArray[np.float64]


class Part(NamedTuple):
    """What one model came to: calibrated log-odds of the test rows by seed, and how it was got."""

    scores: Floats  # (seeds, test rows)
    labels: NDArray[np.bool_]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Keep it for a later call."""
        np.savez_compressed(
            path, scores=self.scores.astype(np.float32), labels=self.labels, about=np.array(json.dumps(self.about))
        )

    @staticmethod
    def load(path: Path) -> "Part":
        """What `save` kept."""
        held = np.load(path)
        return Part(held["scores"].astype(np.float64), held["labels"], json.loads(str(held["about"])))


# ---------------------------------------------------------------------- peers


class Tuned(NamedTuple):
    """The best of some configurations."""

    trial: int
    validation_ap: float
    rounds: int
    tuned_s: float


def tune(name: str, prepared: Prepared, table: Table, trials: int) -> Tuned:
    """Random configurations, each judged on the validation rows."""
    draw, train = PEERS[name]
    generator, began = np.random.default_rng(0), time.perf_counter()
    best = Tuned(0, -1.0, 0, 0.0)
    for trial in range(1, trials + 1):
        fitted = train(draw(generator), table, prepared.train, prepared.validation, None, 0)
        reached = average_precision(prepared.labels[prepared.validation], fitted.score(prepared.validation))
        seconds = time.perf_counter() - began
        print(
            f"  {name} trial {trial}: validation AP {reached:.4f}, {fitted.rounds} rounds, {seconds:.0f} s", flush=True
        )
        if reached > best.validation_ap:
            best = Tuned(trial, reached, fitted.rounds, seconds)
    return best._replace(tuned_s=time.perf_counter() - began)


def peer(name: str, prepared: Prepared, table: Table, call: argparse.Namespace) -> Part:
    """Tune, then fit again with every seed. What tuning found is kept too, so that a call cut short goes on there."""
    draw, train = PEERS[name]
    shape = f"{len(table.labels)}x{table.frame.shape[1]}-{call.trials}"
    kept = call.keep / f"{name}-{shape}.tuned.json" if call.keep else None
    if kept is not None and kept.is_file():
        tuned = Tuned(**json.loads(kept.read_text()))
    else:
        tuned = tune(name, prepared, table, call.trials)
        if kept is not None:
            kept.write_text(json.dumps(tuned._asdict()))
    y, generator = prepared.labels, np.random.default_rng(0)
    params = [draw(generator) for _ in range(tuned.trial)][-1]
    chosen = train(params, table, prepared.train, None, tuned.rounds, 0)
    calibration = fit_platt(chosen.score(prepared.validation), y[prepared.validation])
    before = np.concatenate([prepared.train, prepared.validation])
    # A tenth more rows, a tenth more trees; as many epochs.
    rounds = tuned.rounds if name == "tabm" else max(1, round(1.1 * tuned.rounds))
    scores, seconds = [], []
    for seed in range(call.seeds):
        began = time.perf_counter()
        fitted = train(params, table, before, None, rounds, seed)
        seconds.append(time.perf_counter() - began)
        scores.append(calibration.logit(fitted.score(prepared.test)))
    about = {**tuned._asdict(), "params": params, "rounds": rounds, "fit_s": seconds}
    return Part(np.array(scores), y[prepared.test], about)


# ---------------------------------------------------------------------- ours


def drawn(generator: np.random.Generator) -> dict[str, Any]:
    """One configuration of the net's space."""
    found = dict(DEFAULTS)
    for name, choice in SPACE.items():
        if isinstance(choice, OneOf):
            found[name] = choice.values[int(generator.integers(len(choice.values)))]
        elif isinstance(choice, Real):
            low, high = (np.log(v) if choice.log else v for v in (choice.low, choice.high))
            value = generator.uniform(low, high)
            found[name] = float(np.exp(value) if choice.log else value)
    return found


def tuned_net(prepared: Prepared, trials: int) -> dict[str, Any]:
    """The best of the default and random configurations on the rows that a search sees."""
    data, generator = prepared.search_data(200.0), np.random.default_rng(0)
    best = -1.0, dict(DEFAULTS)
    for trial in range(trials):
        params = dict(DEFAULTS) if trial == 0 else drawn(generator)
        reached = train_net(params, data, num_epochs=3, seed=0).fitted.best_metric
        print(f"  net trial {trial + 1}: validation AP {reached:.4f}", flush=True)
        if reached > best[0]:
            best = reached, params
    return best[1]


def ours(prepared: Prepared, params: dict[str, Any], seeds: int) -> Iterator[tuple[str, Part]]:
    """The whole model, and what is left of it without its net and without its trees."""
    scores: dict[str, list[Floats]] = {"": [], " without the net": [], " without the trees": []}
    about: dict[str, Any] = {"params": params, "fit_s": [], "refit_s": [], "attacked": [], "validation_ap": []}
    held = prepared.rows.take(as_slice(prepared.validation))
    test = prepared.rows.rows.rows(as_slice(prepared.test))
    y = prepared.labels
    for seed in range(seeds):
        reporter, began = Reporter(), time.perf_counter()
        fitted = fit_models(params, prepared, reporter, seed=seed)
        about["fit_s"].append(time.perf_counter() - began)
        began = time.perf_counter()
        model = refit(fitted, params, prepared, reporter, seed=seed)
        about["refit_s"].append(time.perf_counter() - began)
        about["validation_ap"].append(fitted.validation_ap)
        scores[""].append(model.calibration.logit(model.logits(test)))
        net, trees = fitted.model.net_logits(held.rows), fitted.model.parts.trees
        assert trees is not None
        assert model.parts.trees is not None
        calibrated = fit_platt(trees.logits(held.rows.numbers()), y[prepared.validation])
        scores[" without the net"].append(calibrated.logit(model.parts.trees.logits(test.numbers())))
        scores[" without the trees"].append(fit_platt(net, y[prepared.validation]).logit(model.net_logits(test)))
        if prepared.adversary() is not None:
            adversary = prepared.adversary()
            assert adversary is not None
            attacked = adversary.attack(model, prepared.test, np.random.default_rng(seed), max_attacked=1000)
            about["attacked"].append(attacked._asdict())
        print(f"  seed {seed}: {about['fit_s'][-1]:.0f} s, {about['refit_s'][-1]:.0f} s, {about['attacked'][-1:]}")
    for suffix, found in scores.items():
        yield suffix, Part(np.array(found), y[prepared.test], about)


def without(plan: FeaturePlan, *columns: str, groups: bool = False) -> FeaturePlan:
    """A plan without the features of entities that name one of these columns, or without those of several columns."""
    gone = set()
    for definition in plan.definitions:
        entity = getattr(definition, "entity", None)
        parts = () if entity is None else entity_columns(entity)
        if set(parts) & set(columns) or (groups and len(parts) > 1):
            gone.add(definition.name)
    return FeaturePlan(
        tuple(
            d
            for d in plan.definitions
            if d.name not in gone and not (isinstance(d, Ratio) and gone & {d.numerator, d.denominator})
        )
    )


# ---------------------------------------------------------------------- the table


def intervals(parts: dict[str, Part], metric: Any) -> dict[str, NDArray[np.float64]]:
    """(draws,) of a metric for each part, means over its seeds, the same draws of rows for all."""
    generator = np.random.default_rng(0)
    weights = generator.poisson(1.0, (DRAWS, len(next(iter(parts.values())).labels))).astype(np.float32)
    found = {}
    for name, part in parts.items():
        sums = np.zeros(DRAWS)
        for scores in part.scores:
            order = np.argsort(-scores, kind="stable")
            labels = part.labels[order]
            for draw in range(DRAWS):
                sums[draw] += metric(labels, weights[draw, order])
        found[name] = sums / len(part.scores)
    return found


def weighted_ap(labels: NDArray[np.bool_], weights: NDArray[np.float32]) -> float:
    """Average precision of rows in falling order of score."""
    positive = np.where(labels, weights, 0.0)
    precision = np.cumsum(positive, dtype=np.float64) / np.maximum(np.cumsum(weights, dtype=np.float64), 1e-9)
    return float((precision * positive).sum() / positive.sum())


def weighted_recall(labels: NDArray[np.bool_], weights: NDArray[np.float32], fpr: float = 0.003) -> float:
    """Recall where `fpr` of the negatives are flagged."""
    negative = np.cumsum(np.where(labels, 0.0, weights), dtype=np.float64)
    end = int(np.searchsorted(negative, fpr * negative[-1], side="right"))
    positive = np.where(labels, weights, 0.0)
    return float(positive[:end].sum() / positive.sum())


def weighted_auc(labels: NDArray[np.bool_], weights: NDArray[np.float32]) -> float:
    """Area under the ROC curve; ties are broken by order."""
    negative = np.where(labels, 0.0, weights)
    above = np.cumsum(negative, dtype=np.float64)
    positive = np.where(labels, weights, 0.0)
    return float(1.0 - (positive * above).sum() / (positive.sum() * above[-1]))


def table(parts: dict[str, Part]) -> list[dict[str, Any]]:
    """Rows of the report."""
    rows: list[dict[str, Any]] = []
    metrics = {
        name: [fraud_metrics(1 / (1 + np.exp(-scores)), part.labels) for scores in part.scores]
        for name, part in parts.items()
    }
    drawn_by = {
        "average_precision": intervals(parts, weighted_ap),
        "recall_at_fpr_0.003": intervals(parts, weighted_recall),
        "auc": intervals(parts, weighted_auc),
    }
    rivals = [name for name in parts if name in PEERS]
    first = next(iter(parts.values()))
    for name, part in parts.items():
        if not np.array_equal(part.labels, first.labels):
            raise SystemExit(f"{name} was measured on other rows; give --keep another folder")
    for name, found in metrics.items():
        for shown in SHOWN:
            values = [m[shown] for m in found]
            mean = float(np.mean(values))
            sign = -1 if shown in ("ece", "brier") else 1

            def mean_of(rival: str, shown: str = shown, sign: int = sign) -> float:
                return sign * float(np.mean([m[shown] for m in metrics[rival]]))

            best = max(rivals, key=mean_of) if rivals else None
            more: dict[str, Any] = {}
            if shown in drawn_by:
                low, high = np.quantile(drawn_by[shown][name], [0.025, 0.975])
                more["interval"] = [round(float(low), 4), round(float(high), 4)]
                if best is not None and best != name:
                    gained = drawn_by[shown][name] - drawn_by[shown][best]
                    more["over_best_peer"] = [round(float(v), 4) for v in np.quantile(gained, [0.025, 0.5, 0.975])]
            rows.append(
                row(
                    f"{name}: {shown}", mean, "", peer_name=best or "", higher_is_better=shown not in ("ece", "brier"),
                    peer=None if best is None else float(np.mean([m[shown] for m in metrics[best]])),
                    spread=(max(values) - min(values)) / abs(mean), runs=len(values), **more,
                )
            )  # fmt: skip
    return rows


def run_peers(call: argparse.Namespace, wanted: list[str]) -> Iterator[tuple[str, Part]]:
    """Every peer on the table's own columns, LightGBM on ours besides."""
    prepared = Prepared(ieee_options(call), Reporter(), publish=False)
    raw = raw_table(prepared.columns, prepared.schema, prepared.labels, prepared.train)
    for name in PEERS:
        if name in wanted:
            yield name, peer(name, prepared, raw, call)
    if "features" in wanted:
        frame = tree_frame(prepared.columns, prepared.numeric, prepared.categorical, prepared.train)
        table = raw._replace(frame=frame)
        yield "lightgbm on our columns", peer("lightgbm", prepared, table, call)


def run_ours(call: argparse.Namespace, wanted: list[str]) -> Iterator[tuple[str, Part]]:
    """The model as it is, without its defence, and without each of its parts."""
    defended = Prepared(ieee_options(call), Reporter(), publish=False)
    params = tuned_net(defended, call.trials)
    if "ours" in wanted:
        yield from ((f"ours{suffix}", part) for suffix, part in ours(defended, params, call.seeds))
    if not {"undefended", "ablation"} & set(wanted):
        return
    given = ieee_options(call, constraints=Constraints())
    prepared = Prepared(given, Reporter(), publish=False)
    if "undefended" in wanted:
        yield from ((f"undefended{suffix}", part) for suffix, part in ours(prepared, params, call.seeds))
    if "ablation" in wanted:
        dense = {**params, "num_experts": 2, "top_k": 2}  # all experts run for every row
        for suffix, part in ours(prepared, dense, call.seeds):
            yield f"undefended, dense{suffix}", part
        plan, schema = prepared.plan, prepared.schema
        cases = {
            "no groups of entities": without(plan, groups=True),
            "no crosses with the amount": without(plan, schema.amount or ""),
            "no reported frauds": default_plan(replace(schema, label_delay_days=None)),
        }
        for case, changed in cases.items():
            prepared = Prepared(replace(given, plan=changed), Reporter(), publish=False)
            yield f"undefended, {case}", next(ours(prepared, params, call.seeds))[1]


def main() -> None:
    """Run the parts asked for, then the table of all there are."""
    own, others = ("ours", "undefended", "ablation"), (*PEERS, "features")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join((*own, *others)))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--data")
    call, _ = parser.parse_known_args()
    wanted = [part for part in call.only.split(",") if part]
    unknown = sorted(set(wanted) - {*own, *others})
    if unknown:
        raise SystemExit(f"--only: unknown part {unknown[0]!r}; known are {', '.join((*own, *others))}")
    parts: dict[str, Part] = {}
    if call.keep:
        call.keep.mkdir(parents=True, exist_ok=True)
        parts |= {path.stem: Part.load(path) for path in sorted(call.keep.glob("*.npz"))}
    runs = []
    if set(wanted) & set(others):
        runs.append(run_peers(call, wanted))
    if set(wanted) & set(own):
        runs.append(run_ours(call, wanted))
    for name, part in chain.from_iterable(runs):
        parts[name] = part
        if call.keep:
            part.save(call.keep / f"{name}.npz")
        print(f"{name}: AP {np.mean([average_precision(part.labels, s) for s in part.scores]):.4f}", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    finish("fraud_quality", table(parts), device)


if __name__ == "__main__":
    main()
