"""Lists of a recommender against tuned EASE, iALS, BPR, own frequency and popularity, and without each of its parts.

Split as the data's schema says (MovieLens-100K: 75/25 at random for each user, seed 42; Complete Journey: December 2017
after all before it, the 8,000 products bought most before). Everyone is tuned on validation with the same number of
configurations, then fitted again on train + validation with every seed; the test part is ranked once, in full.
Intervals: 95 % of 1,000 Poisson bootstraps of users, of means over seeds, differences for the same users.

    assay bench recommend_quality [--json] [--data movielens-100k] [--new] [--whole] [--protocol P] [--only PART,PART]
                                  [--seeds 0,1,2] [--trials N] [--recbole PYTHON]

With --new only items count that a user had not taken before; --whole is of all products, however seldom bought.

Parts: ours; diverse (as diverse as costs 1 % of NDCG@10 on validation); without graph, without sequence, without
regression, without closeness (time between what is taken), without liked (ratings), linear (no MoE), dense (all
experts for every pair), sources (no ranker); ials, bpr. EASE, popularity and own frequency are always there. iALS and
BPR are those of the optional package implicit; lightgcn and sasrec of RecBole, in an environment of its own, whose
interpreter --recbole names.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from assay_features.schema import Protocol, RecommendSchema
from assay_pipelines.console import Reporter
from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS, get_dataset
from assay_pipelines.options import RunOptions
from assay_pipelines.recommend.baseline import measure_baselines
from assay_pipelines.recommend.evaluate import DEPTH, Hits, interval, ranking_metrics
from assay_pipelines.recommend.pipeline import Prepared, choose_diversity, choose_recipe, trained
from assay_pipelines.recommend.train import (
    DEFAULTS,
    RankerTraining,
    Recipe,
    fit_earliest,
    fit_sources,
    make_lists,
    train_ranker,
)
from assay_platform.config import load_config
from assay_platform.models.histories import Histories
from assay_platform.models.recommender import PairRanker, Recommender
from assay_platform.models.sources import PAIR_FEATURES, Wanted, Weights, top_candidates
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

GRAPH = tuple(name for name in PAIR_FEATURES if name.startswith("graph"))
REGRESSION = tuple(name for name in PAIR_FEATURES if "regression" in name)
TIME = ("days_after_first_taken", "days_before_last_taken")
LIKED = ("liked_regression_z",)
OURS = (
    "ours",
    "diverse",
    "without graph",
    "without sequence",
    "without regression",
    "without closeness",
    "without liked",
    "linear",
    "dense",
    "sources",
)
PEERS = ("ials", "bpr")
RECBOLE = {"lightgcn": "LightGCN", "sasrec": "SASRec"}
Lists = NDArray[np.int64]


class Outcome(NamedTuple):
    """Lists of the test part by seed, and seconds of a training."""

    tops: list[Lists]
    seconds: list[float]


def prepare(name: str, new: bool = False, whole: bool = False, protocol: Protocol | None = None) -> Prepared:
    """The data set as `assay run recommend` sees it. whole: whatever the schema says of a limit on items."""
    config = load_config()
    folder = get_dataset(name, config.paths.data)
    schema = CATALOGUE[name].schema(folder)
    assert isinstance(schema, RecommendSchema)
    if protocol is not None:
        schema = replace(schema, split=replace(schema.split, protocol=protocol))
    if whole:
        schema = replace(schema, split=replace(schema.split, max_items=None))
    if new:
        schema = replace(schema, split=replace(schema.split, repeats=False))
    options = RunOptions(
        config=config, application="recommend", data=name, table=folder / EVENTS, schema=schema, schema_folder=folder,
        model_name="recommend-bench",
    )  # fmt: skip
    return Prepared(options, Reporter())


def ours(part: str, prepared: Prepared, recipe: Recipe, seeds: list[int]) -> Outcome:
    """Train on train + validation with every seed, rank the test part."""
    config, tops, seconds = prepared.ranker_config, [], []
    gone = {"without graph": GRAPH, "without regression": REGRESSION, "without liked": LIKED, "without closeness": TIME}
    config = replace(config, features=tuple(name for name in config.features if name not in gone.get(part, ())))
    if part == "without graph":
        recipe = replace(recipe, weights=replace(recipe.weights, graph=0.0))
    if part == "without regression":
        # So much of the others that they alone find candidates.
        recipe = replace(recipe, weights=Weights(graph=1e3, sequence=1e3 * recipe.weights.sequence))
    if part == "without sequence":
        recipe = replace(recipe, sequence=None, weights=replace(recipe.weights, sequence=0.0))
    if part == "without closeness":
        recipe = replace(recipe, regression=replace(recipe.regression, closeness_s=0.0))
    diversity = 0.0
    if part == "diverse":
        allowing = copy(prepared)
        allowing.schema = replace(prepared.schema, diversity_loss=0.01)
        fitted = trained(prepared, prepared.parts.fit, prepared.fit, recipe, Reporter())
        diversity = choose_diversity(allowing, fitted, fitted.rankings["MoE"], Reporter())
    if part == "without sequence" and recipe.sequence is None:
        print("  without sequence: the recipe has none", flush=True)
    if part == "dense":
        config = replace(config, backbone=replace(config.backbone, num_experts=2, top_k=2))
    new = Wanted(None if recipe.repeats else prepared.train_matrix)
    for seed in seeds:
        began = time.perf_counter()
        holdouts = prepared.holdouts(prepared.train_rows)
        earliest = fit_earliest(holdouts, recipe, seed=seed)
        sources = fit_sources(prepared.train, recipe, seed=seed, sequence=earliest.sources.sequence)
        if part == "sources":
            ranker = PairRanker(config)
        else:
            lists = make_lists(holdouts, recipe, config, earliest, seed=seed)
            ranker, _ = train_ranker(lists, config, seed=seed, training=RankerTraining(), linear=part == "linear")
        seconds.append(time.perf_counter() - began)
        model = Recommender(
            ranker=ranker, config=config, users=prepared.users, items=prepared.items, histories=prepared.train,
            sources=sources, store_features_IF=prepared.item_features(prepared.train_rows, prepared.train),
            repeats=recipe.repeats, use_ranker=part != "sources", diversity=diversity,
        )  # fmt: skip
        tops.append(model.rank(prepared.train, num=DEPTH, wanted=new)[0])
        print(f"  {part}, seed {seed}: {ndcg(tops[-1], prepared):.4f} in {seconds[-1]:.0f} s", flush=True)
    return Outcome(tops, seconds)


def ndcg(top: Lists, prepared: Prepared) -> float:
    """NDCG@10 of the test part."""
    return float(Hits.of(top, prepared.test).ndcg().mean())


def factors(name: str, generator: np.random.Generator) -> dict[str, Any]:
    """One configuration of a factor model."""

    def log(low: float, high: float) -> float:
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))

    num = int(generator.choice([32, 64, 128, 256]))
    if name == "ials":
        return {"factors": num, "regularization": log(1e-3, 30.0), "alpha": log(0.5, 40.0), "iterations": 20}
    return {"factors": num, "regularization": log(1e-4, 0.1), "learning_rate": log(5e-3, 0.1),
            "iterations": int(generator.choice([50, 100, 200, 400]))}  # fmt: skip


def fit_factors(name: str, params: dict[str, Any], histories: Histories, repeats: bool, seed: int, depth: int) -> Lists:
    """Of the package implicit; counts are confidences where items are taken again."""
    import scipy.sparse as sp
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking

    shape = (histories.num_users, depth)
    counts = sp.csr_matrix((np.ones(len(histories.item), dtype=np.float32), (histories.users(), histories.item)), shape)
    counts.sum_duplicates()
    if not repeats:
        counts.data[:] = 1.0
    maker = AlternatingLeastSquares if name == "ials" else BayesianPersonalizedRanking
    model = maker(**params, random_state=seed)
    model.fit(counts, show_progress=False)
    scores = np.asarray(model.user_factors @ model.item_factors.T, dtype=np.float32)
    if not repeats:
        scores[counts.nonzero()] = -np.inf
    return top_candidates(scores, DEPTH)


def peer(name: str, prepared: Prepared, seeds: list[int], trials: int) -> Outcome:
    """Random configurations on validation, the best again on train + validation."""
    generator, repeats, num_items = np.random.default_rng(0), prepared.schema.split.repeats, len(prepared.items)
    tried = []
    for _ in range(trials):
        params = factors(name, generator)
        top = fit_factors(name, params, prepared.fit, repeats, 0, num_items)
        tried.append((float(Hits.of(top, prepared.validation).ndcg().mean()), params))
    reached, params = max(tried, key=lambda pair: pair[0])
    print(f"  {name}: validation {reached:.4f} with {params}", flush=True)
    tops, seconds = [], []
    for seed in seeds:
        began = time.perf_counter()
        tops.append(fit_factors(name, params, prepared.train, repeats, seed, num_items))
        seconds.append(time.perf_counter() - began)
    return Outcome(tops, seconds)


def recbole_params(name: str, generator: np.random.Generator, most_epochs: int) -> dict[str, Any]:
    """One configuration of a model of RecBole."""

    def log(low: float, high: float) -> float:
        return float(np.exp(generator.uniform(np.log(low), np.log(high))))

    width = int(generator.choice([64, 128]))
    if name == "lightgcn":
        return {"embedding_size": width, "n_layers": int(generator.integers(1, 5)), "learning_rate": log(5e-4, 5e-3),
                "reg_weight": log(1e-6, 1e-2), "train_batch_size": int(generator.choice([2048, 4096])),
                "epochs": most_epochs}  # fmt: skip
    return {"hidden_size": width, "inner_size": 4 * width, "n_layers": int(generator.integers(1, 4)),
            "n_heads": int(generator.integers(1, 3)), "hidden_dropout_prob": float(generator.uniform(0.1, 0.6)),
            "attn_dropout_prob": float(generator.uniform(0.1, 0.6)), "learning_rate": log(3e-4, 3e-3),
            "MAX_ITEM_LIST_LENGTH": int(generator.choice([50, 100, 200])), "loss_type": "CE",
            "train_batch_size": int(generator.choice([2048, 4096])), "epochs": most_epochs // 2}  # fmt: skip


def recbole(name: str, prepared: Prepared, seeds: list[int], trials: int, python: str, most_epochs: int) -> Outcome:
    """Random configurations, each stopped early on validation; the best for as many epochs on train + validation."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        split = {
            "user": prepared.user, "item": prepared.item, "time_us": prepared.events.time_us,
            "fit": prepared.parts.fit, "validation": prepared.parts.validation, "num_users": len(prepared.users),
            "num_items": len(prepared.items), "wv_indptr": prepared.validation.indptr,
            "wv_indices": prepared.validation.indices,
        }  # fmt: skip
        np.savez(Path(scratch) / "split.npz", **split)

        def run(params: dict[str, Any], seed: int, *more: str) -> dict[str, NDArray[Any]]:
            script = Path(__file__).parent / "_recbole_peer.py"
            every = "5" if name == "lightgcn" else "1"
            command = [python, "-W", "ignore", str(script), "split.npz", "out.npz", "--model", RECBOLE[name],
                       "--params", json.dumps(params), "--seed", str(seed), "--every", every,
                       "--threads", str(torch.get_num_threads()), *more]  # fmt: skip
            subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
            return dict(np.load(Path(scratch) / "out.npz"))

        tried = []
        for _ in range(trials):
            params = recbole_params(name, generator, most_epochs)
            found = run(params, 0)
            tried.append((float(found["ndcg"]), {**params, "epochs": int(found["epochs"])}))
        reached, params = max(tried, key=lambda pair: pair[0])
        print(f"  {name}: validation {reached:.4f} with {params}", flush=True)
        fitted = [run(params, seed, "--everything") for seed in seeds]
    return Outcome([found["top"] for found in fitted], [float(found["seconds"]) for found in fitted])


def per_user(outcome: Outcome, prepared: Prepared, chosen: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """(N,) NDCG@10 of users, means over seeds."""
    hits = [Hits.of(top, prepared.test) for top in outcome.tops]
    return np.mean([(h if chosen is None else h.of_users(chosen)).ndcg() for h in hits], axis=0)


def report(found: dict[str, Outcome], prepared: Prepared) -> list[dict[str, Any]]:
    """Rows of every part: metrics against the best peer, differences to ours."""
    rows: list[dict[str, Any]] = []
    rivals = [name for name in found if name not in OURS]
    reached = {name: per_user(outcome, prepared) for name, outcome in found.items()}
    best = max(rivals, key=lambda name: float(reached[name].mean()))
    for name, outcome in found.items():
        metrics = [ranking_metrics(top, prepared.test, prepared.train_matrix) for top in outcome.tops]
        for metric in metrics[0]:
            values = [m[metric] for m in metrics]
            mean = float(np.mean(values))
            more: dict[str, Any] = {}
            if metric == "ndcg_at_10":
                more["interval"] = interval(reached[name])
                if name != best:
                    more["over_best_peer"] = interval(reached[name] - reached[best])
                if name in OURS and name != "ours" and "ours" in reached:
                    more["lift_of_the_part"] = [
                        float((reached["ours"] - reached[name]).mean()), *interval(reached["ours"] - reached[name])
                    ]  # fmt: skip
                print(f"  {name}: {mean:.4f} {more}", flush=True)
            rival = [ranking_metrics(top, prepared.test, prepared.train_matrix)[metric] for top in found[best].tops]
            rows.append(
                row(f"{name}: {metric}", mean, "", peer=float(np.mean(rival)), peer_name=best,
                    higher_is_better=metric != "gini", runs=len(values),
                    spread=(max(values) - min(values)) / max(1e-9, abs(mean)), **more)
            )  # fmt: skip
        if outcome.seconds:
            rows.append(row(f"{name}: training", float(np.median(outcome.seconds)), "s", runs=len(outcome.seconds)))
    return rows


def main() -> None:
    """Every part asked for, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="movielens-100k")
    parser.add_argument("--new", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--protocol", choices=get_args(Protocol), help="instead of the schema's")
    parser.add_argument("--only", default=",".join((*OURS, *PEERS)))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--recbole", help="an interpreter that has recbole, for lightgcn and sasrec")
    parser.add_argument("--epochs", type=int, default=400, help="the most of lightgcn; of sasrec half as many")
    call, _ = parser.parse_known_args()
    wanted = call.only.split(",")
    unknown = sorted(set(wanted) - {*OURS, *PEERS, *RECBOLE})
    if unknown:
        raise SystemExit(f"--only: unknown part {unknown[0]!r}; known are {', '.join((*OURS, *PEERS, *RECBOLE))}")
    if set(wanted) & set(RECBOLE) and call.recbole is None:
        raise SystemExit("--only: lightgcn and sasrec need --recbole, an interpreter that has recbole")
    prepared = prepare(call.data, call.new, call.whole, call.protocol)
    repeats = prepared.schema.split.repeats

    def progress(_done: float, _text: str) -> None:
        pass

    _, tops = measure_baselines(
        prepared.fit, prepared.validation, prepared.train, prepared.test, repeats=repeats, on_progress=progress
    )
    found = {name: Outcome([top], []) for name, top in tops.items()}
    parts: dict[str, Callable[[], Outcome]] = {}
    for name in (name for name in PEERS if name in wanted):
        parts[name] = partial(peer, name, prepared, call.seeds, call.trials)
    for name in (name for name in RECBOLE if name in wanted):
        parts[name] = partial(recbole, name, prepared, call.seeds, call.trials, call.recbole, call.epochs)
    if set(wanted) & set(OURS):
        began = time.perf_counter()
        recipe = choose_recipe(prepared, DEFAULTS, Reporter(), seed=0).recipe
        print(f"  chosen on validation in {time.perf_counter() - began:.0f} s: {recipe.regression}, "
              f"{recipe.weights}", flush=True)  # fmt: skip
        for name in (name for name in OURS if name in wanted):
            parts[name] = partial(ours, name, prepared, recipe, call.seeds)
    for name, run in parts.items():
        found[name] = run()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    finish("recommend_quality", report(found, prepared), device)


if __name__ == "__main__":
    main()
