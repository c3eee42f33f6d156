"""Fraud on IEEE-CIS, the whole table, against tuned boosting and TabM: quality, calibration, intervals, the ablation.

Split by time 70/10/20. Everyone gets the same number of random configurations, each judged by average precision on the
validation rows; the best is fitted again on train + validation with every seed, and the test rows are scored once. All
log-odds are calibrated alike, by Platt scaling on validation rows. Peers have the table's own columns; 'lightgbm on our
columns' has our features too. Intervals: 95 % of 500 Poisson bootstraps of test rows, differences on the same rows.

    assay bench fraud_quality [--json] [--only PART,PART] [--trials N] [--seeds 0,1,2] [--protocols all,reported]
                              [--delay-days N] [--rows N] [--keep FOLDER] [--data FOLDER]

Parts: ours; undefended, and so too with dense experts, without features of accounts, of several columns together, of an
amount, of reported frauds (dense, no accounts, no groups, no amounts, no reports); lightgbm, xgboost, catboost, tabm;
features (lightgbm on our columns). Of ours the net alone and the trees alone are told too. All take hours on two cores.
With --keep, scores stay in the folder by part and seed and a later call takes them from there, so they may be run one
at a time or beside one another; the table at the end is of all that the folder has.

Protocols: 'all' learns from all labels before the test period; 'reported' only from rows as old as the label delay,
whose labels are known when it begins, which is what an operator has. --delay-days is another delay than the data's 7.
catboost, xgboost and tabm are optional packages.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_features.definitions import FeaturePlan, Ratio, entity_columns
from assay_features.schema import ACCOUNT
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.baseline import tree_frame
from assay_pipelines.fraud.evaluate import average_precision, fraud_metrics
from assay_pipelines.fraud.features import default_plan
from assay_pipelines.fraud.fit import fit_models, refit
from assay_pipelines.fraud.prepare import Prepared, as_slice
from assay_pipelines.fraud.train import DEFAULTS, SPACE, train_net
from assay_pipelines.options import RunOptions
from assay_platform.models.calibration import fit_platt
from assay_platform.robustness.constraints import Constraints
from assay_platform.tuning.space import OneOf, Real
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _fraud_data import ieee_options
from _fraud_peers import PEERS, Table, raw_table
from _report import finish, row

# Without the defence, and then without one part more: see the text above.
ABLATED = ("undefended", "dense", "no accounts", "no groups", "no amounts", "no reports")
PROTOCOLS = {"all": "", "reported": ", reported labels"}
DRAWS = 500
SHOWN = ("auc", "average_precision", "recall_at_fpr_0.003", "precision_at_fpr_0.003", "ece", "brier")
Floats = NDArray[np.float64]


class Part(NamedTuple):
    """What one model came to: calibrated log-odds of the test rows by seed, and how it was got."""

    scores: Floats  # (seeds, test rows)
    labels: NDArray[np.bool_]
    about: list[dict[str, Any]]  # by seed


class Kept:
    """Scores by name and seed, in a folder if one is given: a call cut short goes on there, parts may be run apart."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._parts: dict[str, dict[int, Part]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.npz")):
                name, seed = path.stem.rsplit(".", 1)
                held = np.load(path)
                about = [json.loads(str(held["about"]))]
                self._parts.setdefault(name, {})[int(seed)] = Part(held["scores"][None], held["labels"], about)

    def has(self, name: str, seed: int) -> bool:
        """Whether it was scored already."""
        return seed in self._parts.get(name, {})

    def add(self, name: str, seed: int, scores: Floats, labels: NDArray[np.bool_], about: dict[str, Any]) -> None:
        """Keep what one seed came to."""
        self._parts.setdefault(name, {})[seed] = Part(scores[None].astype(np.float32), labels, [about])
        print(f"{name}, seed {seed}: AP {average_precision(labels, scores):.4f}, {json.dumps(about)}", flush=True)
        if self._folder is not None:
            np.savez_compressed(
                self._folder / f"{name}.{seed}.npz",
                scores=scores.astype(np.float32), labels=labels, about=np.array(json.dumps(about)),
            )  # fmt: skip

    def parts(self) -> dict[str, Part]:
        """All there is of each name."""
        return {
            name: Part(
                np.concatenate([p.scores for p in by_seed.values()]).astype(np.float64),
                next(iter(by_seed.values())).labels,
                [p.about[0] for p in by_seed.values()],
            )
            for name, by_seed in self._parts.items()
        }

    def trials(self, name: str) -> list[dict[str, Any]]:
        """What trials of a peer came to so far."""
        path = None if self._folder is None else self._folder / f"{name}.trials.json"
        return json.loads(path.read_text()) if path is not None and path.is_file() else []

    def keep_trials(self, name: str, trials: list[dict[str, Any]]) -> None:
        """Keep what trials came to."""
        if self._folder is not None:
            (self._folder / f"{name}.trials.json").write_text(json.dumps(trials))


# ---------------------------------------------------------------------- peers


def tune(
    name: str, prepared: Prepared, table: Table, call: argparse.Namespace, kept: Kept
) -> tuple[dict[str, Any], int]:
    """The best of some random configurations by the validation rows, and its rounds."""
    draw, train = PEERS[name]
    key = f"{name}-{len(table.labels)}x{table.frame.shape[1]}"
    generator, done = np.random.default_rng(0), kept.trials(key)
    drawn_all = [draw(generator) for _ in range(call.trials)]
    for trial, params in enumerate(drawn_all[len(done) :], start=len(done)):
        began = time.perf_counter()
        fitted = train(params, table, prepared.train, prepared.validation, None, 0)
        reached = average_precision(prepared.labels[prepared.validation], fitted.score(prepared.validation))
        seconds = time.perf_counter() - began
        done.append({"validation_ap": reached, "rounds": fitted.rounds, "seconds": round(seconds, 1)})
        kept.keep_trials(key, done)
        print(f"  {name} trial {trial + 1}: {json.dumps(done[-1])}", flush=True)
    best = int(np.argmax([t["validation_ap"] for t in done[: call.trials]]))
    return drawn_all[best], int(done[best]["rounds"])


def peer(name: str, label: str, prepared: Prepared, table: Table, call: argparse.Namespace, kept: Kept) -> None:
    """Tune, then fit again with every seed, by each protocol."""
    left = [(p, seed) for p in call.protocols for seed in call.seeds if not kept.has(label + PROTOCOLS[p], seed)]
    if not left:
        return
    train, y = PEERS[name][1], prepared.labels
    params, found = tune(name, prepared, table, call, kept)
    chosen = train(params, table, prepared.train, None, found, 0)
    calibration = fit_platt(chosen.score(prepared.validation), y[prepared.validation])
    # A tenth more rows, a tenth more trees; as many epochs.
    rounds = found if name == "tabm" else max(1, round(1.1 * found))
    for protocol, seed in left:
        began = time.perf_counter()
        fitted = train(params, table, learned(prepared, protocol), None, rounds, seed)
        about = {"rounds": rounds, "fit_s": round(time.perf_counter() - began, 1), "params": params}
        scores = calibration.logit(fitted.score(prepared.test))
        kept.add(label + PROTOCOLS[protocol], seed, scores, y[prepared.test], about)


def learned(prepared: Prepared, protocol: str) -> NDArray[np.intp]:
    """Rows of the last fit: all before the test period, or those whose labels are reported when it begins."""
    before = np.concatenate([prepared.train, prepared.validation])
    if protocol == "all":
        return before
    time_us, delay_days = prepared.events.time_us, prepared.schema.label_delay_days or 0.0
    return before[time_us[before] < time_us[prepared.test[0]] - round(delay_days * 86_400e6)]


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


def tuned_net(prepared: Prepared, trials: int, kept: Kept) -> dict[str, Any]:
    """The best of the default and random configurations on the rows that a search sees."""
    data, generator = prepared.search_data(200.0), np.random.default_rng(0)
    configurations = [dict(DEFAULTS), *(drawn(generator) for _ in range(trials - 1))]
    key = f"net-{len(prepared.labels)}"
    done = kept.trials(key)
    for params in configurations[len(done) :]:
        done.append({"validation_ap": train_net(params, data, num_epochs=3, seed=0).fitted.best_metric})
        kept.keep_trials(key, done)
        print(f"  net trial {len(done)}: {json.dumps(done[-1])}", flush=True)
    return configurations[int(np.argmax([t["validation_ap"] for t in done[:trials]]))]


def ours(name: str, prepared: Prepared, params: dict[str, Any], call: argparse.Namespace, kept: Kept) -> None:
    """The whole model, and what is left of it without its net and without its trees."""
    held = prepared.rows.take(as_slice(prepared.validation))
    test = prepared.rows.rows.rows(as_slice(prepared.test))
    y, adversary = prepared.labels, prepared.adversary()
    for seed in call.seeds:
        left = [p for p in call.protocols if not kept.has(f"{name} without the trees{PROTOCOLS[p]}", seed)]
        if not left:
            continue
        reporter, began = Reporter(), time.perf_counter()
        fitted = fit_models(params, prepared, reporter, seed=seed)
        fit_s, early = round(time.perf_counter() - began, 1), fitted.model.parts.trees
        assert early is not None
        alone = early.logits(held.rows.numbers()), fitted.model.net_logits(held.rows)
        calibrations = [fit_platt(logits, y[prepared.validation]) for logits in alone]
        for protocol in left:
            began = time.perf_counter()
            model = refit(fitted, params, prepared.until(len(learned(prepared, protocol))), reporter, seed=seed)
            refit_s = round(time.perf_counter() - began, 1)
            about: dict[str, Any] = {"validation_ap": fitted.validation_ap, "fit_s": fit_s, "refit_s": refit_s}
            if adversary is not None:
                attacked = adversary.attack(model, prepared.test, np.random.default_rng(seed), max_attacked=1000)
                about["attacked"] = attacked._asdict()
            late, suffix = model.parts.trees, PROTOCOLS[protocol]
            assert late is not None
            kept.add(name + suffix, seed, model.calibration.logit(model.logits(test)), y[prepared.test], about)
            parts = {"without the net": late.logits(test.numbers()), "without the trees": model.net_logits(test)}
            for (part, logits), calibration in zip(parts.items(), calibrations, strict=True):
                kept.add(f"{name} {part}{suffix}", seed, calibration.logit(logits), y[prepared.test], {})


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
    first = next(iter(parts.values()))
    for name, part in parts.items():
        if not np.array_equal(part.labels, first.labels):
            raise SystemExit(f"{name} was measured on other rows; give --keep another folder")
    for name, found in metrics.items():
        suffix = next(s for s in sorted(PROTOCOLS.values(), key=len, reverse=True) if name.endswith(s))
        rivals = [peer + suffix for peer in PEERS if peer + suffix in parts]
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


def _options(call: argparse.Namespace, **schema: Any) -> RunOptions:
    return ieee_options(call, **schema, **({} if call.delay_days is None else {"label_delay_days": call.delay_days}))


def run_peers(call: argparse.Namespace, wanted: list[str], kept: Kept) -> None:
    """Every peer on the table's own columns, LightGBM on ours besides."""
    prepared = Prepared(_options(call), Reporter(), publish=False)
    raw = raw_table(prepared.columns, prepared.schema, prepared.labels, prepared.train)
    for name in PEERS:
        if name in wanted:
            peer(name, name, prepared, raw, call, kept)
    if "features" in wanted:
        frame = tree_frame(prepared.columns, prepared.numeric, prepared.categorical, prepared.train)
        peer("lightgbm", "lightgbm on our columns", prepared, raw._replace(frame=frame), call, kept)


def run_ours(call: argparse.Namespace, wanted: list[str], kept: Kept) -> None:
    """The model as it is, without its defence, and without each of its parts."""
    prepared = Prepared(_options(call), Reporter(), publish=False)
    params = tuned_net(prepared, call.trials, kept)
    if "ours" in wanted:
        ours("ours", prepared, params, call, kept)
    left = [part for part in ABLATED if part in wanted]
    if not left:
        return
    given = _options(call, constraints=Constraints())
    prepared = Prepared(given, Reporter(), publish=False)
    plan, schema = prepared.plan, prepared.schema
    plans = {
        "no accounts": without(plan, ACCOUNT),
        "no groups": without(plan, groups=True),
        "no amounts": without(plan, schema.amount or ""),
        "no reports": default_plan(replace(schema, label_delay_days=None)),
    }
    for part in left:
        if part in plans:
            prepared = Prepared(replace(given, plan=plans[part]), Reporter(), publish=False)
        # All experts run for every row.
        chosen = {**params, "num_experts": 2, "top_k": 2} if part == "dense" else params
        ours("undefended" if part == "undefended" else f"undefended, {part}", prepared, chosen, call, kept)


def main() -> None:
    """Run the parts asked for, then the table of all there are."""
    own, others = ("ours", *ABLATED), (*PEERS, "features")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join((*own, *others)))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=list(range(5)))
    parser.add_argument("--protocols", type=lambda text: text.split(","), default=list(PROTOCOLS))
    parser.add_argument("--delay-days", type=float)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--data")
    call, _ = parser.parse_known_args()
    wanted = [part for part in call.only.split(",") if part]
    unknown = sorted(set(wanted) - {*own, *others})
    if set(call.protocols) - set(PROTOCOLS):
        raise SystemExit(f"--protocols: known are {', '.join(PROTOCOLS)}")
    if unknown:
        raise SystemExit(f"--only: unknown part {unknown[0]!r}; known are {', '.join((*own, *others))}")
    kept = Kept(call.keep)
    if set(wanted) & set(others):
        run_peers(call, wanted, kept)
    if set(wanted) & set(own):
        run_ours(call, wanted, kept)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    finish("fraud_quality", table(kept.parts()), device)


if __name__ == "__main__":
    main()
