"""Frauds that adapt: what attacks leave of the recall of our model, with and without its defence, and of boosting.

IEEE-CIS, split by time 70/10/20, models of the training rows alone, thresholds chosen on validation. The same frauds of
the test period are attacked, those that no model catches too; every form that is scored could exist, with its features
looked up anew. Attacks: evolution through scores (the gate of promotion), the same twice as long, descent along the
slopes of the net with restarts (trees have none: the slopes are of the net beside them), and two of
adversarial-robustness-toolbox, if it is installed, each on `--few` frauds: HopSkipJump, by decisions, and ZOO, by
scores. They know nothing of what is feasible, so what they propose is repaired before it is scored. How long each model
took to train, validation included, is told too.

    assay bench fraud_attacks [--json] [--rows N] [--frauds N] [--few N] [--data FOLDER]
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.adversary import GATE_ATTACK, Adversary, Robustness
from assay_pipelines.fraud.evaluate import average_precision
from assay_pipelines.fraud.fit import fit_models
from assay_pipelines.fraud.prepare import Prepared, as_slice
from assay_pipelines.fraud.train import DEFAULTS
from assay_platform.models.calibration import fit_platt
from assay_platform.models.decisions import Policy
from assay_platform.models.fraud import Blend, FraudModel
from assay_platform.models.trees import TreeEnsemble
from assay_platform.robustness.attacks import DescentConfig, EvolutionConfig
from assay_platform.robustness.constraints import Constraints, Transactions
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _fraud_data import ieee_options
from _report import finish, row

ATTACKS: dict[str, EvolutionConfig | DescentConfig] = {
    "evolution 10 x 12": GATE_ATTACK,
    "evolution 20 x 12": EvolutionConfig(num_generations=20, population=12),
    "slopes 4 x 10": DescentConfig(num_starts=4, num_steps=10),
}
# The best of 8 configurations of `fraud_quality`, on the table's own columns as on ours.
LIGHTGBM = {
    "objective": "binary", "metric": "average_precision", "verbosity": -1, "learning_rate": 0.062, "num_leaves": 200,
    "min_data_in_leaf": 115, "feature_fraction": 0.85, "bagging_fraction": 0.93, "bagging_freq": 1, "lambda_l2": 0.001,
}  # fmt: skip
_MAX_TREES, _PATIENCE = 1500, 60


def boosted(prepared: Prepared, beside: FraudModel, *, own_columns: bool) -> FraudModel:
    """LightGBM, stopped, calibrated and thresholded on validation as ours is."""
    import lightgbm as lgb

    numbers, labels = prepared.rows.rows.numbers(), prepared.labels
    if own_columns:
        own = {*prepared.schema.numeric, *prepared.schema.categorical}
        # A column that is always missing is never split on.
        numbers[:, [name not in own for name in prepared.data.encoder.names]] = np.nan
    data = lgb.Dataset(numbers[prepared.train], labels[prepared.train])
    held = lgb.Dataset(numbers[prepared.validation], labels[prepared.validation], reference=data)
    booster = lgb.train(
        LIGHTGBM, data, _MAX_TREES, valid_sets=[held], callbacks=[lgb.early_stopping(_PATIENCE, verbose=False)]
    )
    trees = TreeEnsemble.from_lightgbm(booster, num_trees=booster.best_iteration)
    logits = trees.logits(numbers[prepared.validation])
    calibration = fit_platt(logits, labels[prepared.validation])
    policy = Policy.fit(prepared.schema.decisions, calibration.probability(logits), labels[prepared.validation])
    return beside.changed(trees=trees, blend=Blend(net=0.0, trees=1.0), calibration=calibration, policy=policy)


class Box:
    """One fraud as a toolbox sees it: a vector of 0 to 1, a number each that the sender can change."""

    def __init__(self, adversary: Adversary, model: FraudModel, fraud: int) -> None:
        self._adversary, self._model, self._fraud = adversary, model, fraud
        feasible, self._own = adversary.feasible, adversary.transactions(np.array([fraud]))
        low, high = feasible.limits(self._own)
        self._low_F, self._span_F = low[0], high[0] - low[0]
        self._numbers = [int(f) for f in np.flatnonzero(feasible.movable_F & (self._span_F > 0))]
        self._keys = [int(c) for c in np.flatnonzero(feasible.movable_C) if len(feasible.allowed[c]) > 1]
        self.lowest = float(model.logits(adversary.encode(np.array([fraud]), self._own))[0])

    @property
    def start(self) -> NDArray[np.float32]:
        """(1, columns) where the fraud is."""
        allowed = self._adversary.feasible.allowed
        numbers = [(self._own.numbers[0, f] - self._low_F[f]) / self._span_F[f] for f in self._numbers]
        keys = [
            allowed[c].index(self._own.keys[0, c]) / (len(allowed[c]) - 1)
            if self._own.keys[0, c] in allowed[c]
            else 0.0
            for c in self._keys
        ]
        return np.array([[*numbers, *keys]], dtype=np.float32)

    def probabilities(self, vectors: NDArray[np.floating]) -> NDArray[np.float64]:
        """(M, 2) of being let through and of being declined; the threshold lies at one half."""
        own, feasible = self._own, self._adversary.feasible
        forms = Transactions(np.repeat(own.numbers, len(vectors), 0), np.repeat(own.keys, len(vectors), 0))
        for place, f in enumerate(self._numbers):
            forms.numbers[:, f] = self._low_F[f] + np.clip(vectors[:, place], 0, 1) * self._span_F[f]
        for place, c in enumerate(self._keys, start=len(self._numbers)):
            allowed = np.array(feasible.allowed[c], dtype=object)
            forms.keys[:, c] = allowed[np.round(np.clip(vectors[:, place], 0, 1) * (len(allowed) - 1)).astype(int)]
        originals = own.take(np.zeros(len(vectors), dtype=np.intp))
        rows = np.full(len(vectors), self._fraud)
        logits = self._model.logits(self._adversary.encode(rows, feasible.repair(originals, forms)))
        self.lowest = min(self.lowest, float(logits.min()))
        threshold = self._model.policy.decline_from
        margin = self._model.calibration.logit(logits) - np.log(threshold / (1 - threshold))
        declined = 1.0 / (1.0 + np.exp(-margin))
        return np.column_stack([1.0 - declined, declined])


def toolbox(kind: str, adversary: Adversary, model: FraudModel, frauds: NDArray[np.intp]) -> NDArray[np.float64]:
    """The lowest logit that an attack of adversarial-robustness-toolbox came upon, of each fraud."""
    from art.attacks.evasion import HopSkipJump, ZooAttack
    from art.estimators.classification import BlackBoxClassifier

    found = []
    for fraud in frauds:
        box = Box(adversary, model, int(fraud))
        start = box.start
        victim = BlackBoxClassifier(box.probabilities, start.shape[1:], 2, clip_values=(0.0, 1.0))
        if kind == "HopSkipJump":
            attack: Any = HopSkipJump(victim, max_iter=5, max_eval=200, init_eval=20, init_size=200, verbose=False)
        else:
            attack = ZooAttack(
                victim, max_iter=20, nb_parallel=start.shape[1], use_resize=False, use_importance=False,
                binary_search_steps=2, initial_const=10.0, learning_rate=0.1, variable_h=0.1, verbose=False,
            )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attack.generate(start, np.array([[0.0, 1.0]], dtype=np.float32))
        found.append(box.lowest)
    return np.array(found)


def results(
    model: FraudModel, prepared: Prepared, frauds: NDArray[np.intp], honest: NDArray[np.intp], few: int
) -> Iterator[tuple[str, Robustness, float]]:
    """Every attack, what it left, and how long it took."""
    adversary = prepared.adversary()
    assert adversary is not None
    rows = np.sort(np.concatenate([frauds, honest]))
    for attack, config in ATTACKS.items():
        began = time.perf_counter()
        left = adversary.attack(model, rows, np.random.default_rng(0), config, max_attacked=len(frauds))
        yield attack, left, time.perf_counter() - began
    try:
        import art  # noqa: F401
    except ImportError:
        print("adversarial-robustness-toolbox is not installed; its attacks are left out", flush=True)
        return
    for kind in ("HopSkipJump", "ZOO"):
        began = time.perf_counter()
        lowest = toolbox(kind, adversary, model, frauds[:few])
        left = adversary.judged(model, frauds[:few], honest, lowest)
        yield f"toolbox's {kind}", left, time.perf_counter() - began


def main() -> None:
    """Train the models, attack them in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--frauds", type=int, default=1000)
    parser.add_argument("--few", type=int, default=30)
    parser.add_argument("--data")
    call, _ = parser.parse_known_args()
    prepared = Prepared(ieee_options(call), Reporter(), publish=False)
    careless = Prepared(ieee_options(call, constraints=Constraints()), Reporter(), publish=False)
    models: dict[str, FraudModel] = {}
    makers: dict[str, Callable[[], FraudModel]] = {
        "ours": lambda: fit_models(DEFAULTS, prepared, Reporter(), seed=0).model,
        "ours undefended": lambda: fit_models(DEFAULTS, careless, Reporter(), seed=0).model,
        "LightGBM": lambda: boosted(prepared, models["ours"], own_columns=True),
        "LightGBM on our columns": lambda: boosted(prepared, models["ours"], own_columns=False),
    }
    seconds_of, reached = {}, {}
    for name, make in makers.items():
        began = time.perf_counter()
        models[name] = make()
        seconds_of[name] = time.perf_counter() - began
        scores = models[name].logits(prepared.rows.rows.rows(as_slice(prepared.test)))
        reached[name] = average_precision(prepared.labels[prepared.test], scores)
        print(f"{name}: trained in {seconds_of[name]:.0f} s, test AP {reached[name]:.4f}", flush=True)
    labels, generator = prepared.labels[prepared.test], np.random.default_rng(0)
    frauds, honest = prepared.test[labels], prepared.test[~labels]
    frauds = np.sort(generator.choice(frauds, min(call.frauds, len(frauds)), replace=False))
    peer = "LightGBM on our columns"
    rows = [
        row(
            f"training of {name}", seconds, "s", peer=seconds_of[peer], peer_name=peer,
            limit=3 * seconds_of[peer], limit_name="3 x the peer", average_precision=round(reached[name], 4),
        )
        for name, seconds in seconds_of.items()
    ]  # fmt: skip
    for name, model in models.items():
        for attack, left, seconds in results(model, prepared, frauds, honest, call.few):
            print(f"{name}, {attack}: {left}, {seconds:.0f} s", flush=True)
            kept = left.robust_recall / left.recall if left.recall else float("nan")
            rows.append(
                row(
                    f"{name}, {attack}: recall kept", kept, "", limit=0.9, limit_name="target", runs=left.num_attacked,
                    higher_is_better=True, **{k: round(v, 4) for k, v in left._asdict().items()},
                )
            )  # fmt: skip
    finish("fraud_attacks", rows, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")


if __name__ == "__main__":
    main()
