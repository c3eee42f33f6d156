"""Lists of a recommender against tuned EASE, iALS, BPR, own frequency and popularity, and without each of its parts.

Split as the data's schema says (MovieLens-100K: 75/25 at random for each user, seed 42; Complete Journey: December 2017
after all before it, the 8,000 products bought most before). Everyone is tuned on validation with the same number of
configurations, then fitted again on train + validation with every seed; the test part is ranked once, in full.
Intervals: 95 % of 1,000 Poisson bootstraps of users, of means over seeds, differences for the same users.

    assay bench recommend_quality [--json] [--data movielens-100k] [--new] [--whole] [--protocol P] [--only PART,PART]
                                  [--seeds 0,1,2] [--trials N] [--recbole PYTHON] [--keep FOLDER]

With --keep, lists stay in the folder by part and seed and a later call takes them from there, so that parts may be run
one at a time. With --new only items count that a user had not taken before; --whole is of all products, however seldom
bought.

Parts: ours; diverse (as diverse as costs 1 % of NDCG@10 on validation); without graph, without sequence, without
regression, without closeness (time between what is taken), without liked (ratings), linear (no MoE), dense (all
experts for every pair), sources (no ranker); ials, bpr. EASE, popularity and own frequency are always there. iALS and
BPR are those of the optional package implicit; lightgcn and sasrec of RecBole, in an environment of its own, whose
interpreter --recbole names.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from assay_features.schema import Protocol
from assay_pipelines.console import Reporter
from assay_pipelines.recommend.baseline import measure_baselines
from assay_pipelines.recommend.evaluate import DEPTH, Hits, interval, ranking_metrics
from assay_pipelines.recommend.pipeline import Prepared, choose_diversity, choose_recipe, trained
from assay_pipelines.recommend.train import RankerTraining, Recipe, train_ranker
from assay_pipelines.recommend.train_graph import DEFAULTS
from assay_pipelines.recommend.train_sequence import SequenceTraining
from assay_platform.models.histories import Histories
from assay_platform.models.item_regression import RegressionConfig
from assay_platform.models.sources import PAIR_FEATURES, Wanted, Weights, top_candidates
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _recommend_data import Fitted, prepare, recbole
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


class Kept:
    """Lists by part and seed, in a folder if there is one, so that a call that was cut off goes on where it was."""

    def __init__(self, folder: Path | None, case: str) -> None:
        self._folder = None if folder is None else folder / case
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, dict[int, tuple[Lists, float | None]]] = {}
        for path in sorted(self._folder.glob("*.npz")) if self._folder else ():
            part, seed = path.stem.rsplit(".", 1)
            held = np.load(path)
            seconds = float(held["seconds"])
            self.found.setdefault(part, {})[int(seed)] = (held["top"], None if np.isnan(seconds) else seconds)

    def has(self, part: str, seed: int) -> bool:
        """Whether it is there already."""
        return seed in self.found.get(part, {})

    def add(self, part: str, seed: int, top: Lists, seconds: float | None) -> None:
        """Keep what one seed came to."""
        self.found.setdefault(part, {})[seed] = (top, seconds)
        if self._folder is not None:
            spent = np.nan if seconds is None else seconds
            np.savez_compressed(self._folder / f"{part}.{seed}.npz", top=top.astype(np.int32), seconds=spent)

    def outcome(self, part: str, seeds: list[int]) -> Outcome:
        """Of these seeds, as many as there are."""
        by_seed = [self.found[part][seed] for seed in seeds if self.has(part, seed)]
        return Outcome([top for top, _ in by_seed], [seconds for _, seconds in by_seed if seconds is not None])

    def recipe(self, prepared: Prepared) -> Recipe:
        """What validation chooses of the sources, once."""
        path = None if self._folder is None else self._folder / "recipe.json"
        sequence = None if prepared.schema.split.protocol == "random" else SequenceTraining()
        if path is not None and path.is_file():
            held = json.loads(path.read_text())
            return Recipe(
                graph=DEFAULTS, regression=RegressionConfig(**held["regression"]), facts=prepared.facts,
                again=prepared.again, sequence=sequence, weights=Weights(**held["weights"]),
            )  # fmt: skip
        began = time.perf_counter()
        recipe = choose_recipe(prepared, DEFAULTS, Reporter(), seed=0).recipe
        print(f"  chosen on validation in {time.perf_counter() - began:.0f} s: {recipe.regression}, "
              f"{recipe.weights}", flush=True)  # fmt: skip
        if path is not None:
            path.write_text(json.dumps({"regression": asdict(recipe.regression), "weights": asdict(recipe.weights)}))
        return recipe


def ours(parts: list[str], prepared: Prepared, recipe: Recipe, seed: int, kept: Kept) -> None:
    """Train on train + validation with one seed, rank the test part: all parts over the same sources."""
    parts = [part for part in parts if not kept.has(part, seed)]
    near = [part for part in parts if part != "without closeness"]
    far = replace(recipe, regression=replace(recipe.regression, closeness_s=0.0))
    for some, of in ((near, recipe), ([part for part in parts if part not in near], far)):
        if some:
            began = time.perf_counter()
            fitted = Fitted.of(prepared, prepared.train_rows, prepared.train, of, seed=seed)
            spent = time.perf_counter() - began
        for part in some:
            began = time.perf_counter()
            top, choosing = one_part(part, prepared, of, fitted, seed)
            seconds = spent + time.perf_counter() - began - choosing
            kept.add(part, seed, top, seconds)
            print(f"  {part}, seed {seed}: {ndcg(top, prepared):.4f} in {seconds:.0f} s", flush=True)


def one_part(part: str, prepared: Prepared, recipe: Recipe, fitted: Fitted, seed: int) -> tuple[Lists, float]:
    """Lists of the test part, and seconds that went into a choice on validation."""
    gone = {"without graph": GRAPH, "without regression": REGRESSION, "without liked": LIKED, "without closeness": TIME}
    config = prepared.ranker_config
    config = replace(config, features=tuple(name for name in config.features if name not in gone.get(part, ())))
    if part == "without graph":
        recipe = replace(recipe, weights=replace(recipe.weights, graph=0.0))
    if part == "without regression":
        # So much of the others that they alone find candidates.
        recipe = replace(recipe, weights=Weights(graph=1e3, sequence=1e3 * recipe.weights.sequence))
    if part == "without sequence":
        if recipe.sequence is None:
            print("  without sequence: the recipe has none", flush=True)
        recipe = replace(recipe, sequence=None, weights=replace(recipe.weights, sequence=0.0))
        fitted = fitted.without_sequence()
    if part == "dense":
        config = replace(config, backbone=replace(config.backbone, num_experts=2, top_k=2))
    diversity, choosing = 0.0, 0.0
    if part == "diverse":
        began = time.perf_counter()
        allowing = copy(prepared)
        allowing.schema = replace(prepared.schema, diversity_loss=0.01)
        on_fit = trained(prepared, prepared.parts.fit, prepared.fit, recipe, Reporter())
        diversity = choose_diversity(allowing, on_fit, on_fit.rankings["MoE"], Reporter())
        choosing = time.perf_counter() - began
    ranker = None
    if part != "sources":
        lists = fitted.lists(recipe, config, seed=seed)
        ranker, _ = train_ranker(lists, config, seed=seed, training=RankerTraining(), linear=part == "linear")
    model = fitted.model(prepared, recipe, config, ranker, diversity)
    new = Wanted(prepared.again.excluded(prepared.train, len(prepared.items)))
    return model.rank(prepared.train, num=DEPTH, wanted=new)[0], choosing


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


def peer(name: str, prepared: Prepared, seeds: list[int], trials: int, kept: Kept) -> None:
    """Random configurations on validation, the best again on train + validation."""
    generator, repeats, num_items = np.random.default_rng(0), prepared.schema.split.repeats, len(prepared.items)
    tried = []
    for _ in range(trials):
        params = factors(name, generator)
        top = fit_factors(name, params, prepared.fit, repeats, 0, num_items)
        tried.append((float(Hits.of(top, prepared.validation).ndcg().mean()), params))
    reached, params = max(tried, key=lambda pair: pair[0])
    print(f"  {name}: validation {reached:.4f} with {params}", flush=True)
    for seed in seeds:
        began = time.perf_counter()
        top = fit_factors(name, params, prepared.train, repeats, seed, num_items)
        kept.add(name, seed, top, time.perf_counter() - began)


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


def tuned_recbole(
    name: str, prepared: Prepared, seeds: list[int], trials: int, kept: Kept, python: str, most_epochs: int
) -> None:
    """Random configurations, each stopped early on validation; the best for as many epochs on train + validation."""
    generator, every = np.random.default_rng(0), "5" if name == "lightgcn" else "1"
    with recbole(prepared, python) as run:
        tried = []
        for _ in range(trials):
            params = recbole_params(name, generator, most_epochs)
            found = run(RECBOLE[name], params, 0, "--every", every)
            tried.append((float(found["ndcg"]), {**params, "epochs": int(found["epochs"])}))
        reached, params = max(tried, key=lambda pair: pair[0])
        print(f"  {name}: validation {reached:.4f} with {params}", flush=True)
        for seed in seeds:
            found = run(RECBOLE[name], params, seed, "--every", every, "--everything")
            kept.add(name, seed, found["top"], float(found["seconds"]))


def per_user(outcome: Outcome, prepared: Prepared, chosen: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """(N,) NDCG@10 of users, means over seeds."""
    hits = [Hits.of(top, prepared.test) for top in outcome.tops]
    return np.mean([(h if chosen is None else h.of_users(chosen)).ndcg() for h in hits], axis=0)


def measured(top: Lists, prepared: Prepared) -> dict[str, float]:
    """All metrics of lists of the test part."""
    metrics = ranking_metrics(top, prepared.test, prepared.train_matrix)
    return {**metrics, "variety": variety(top, prepared)} if prepared.facts.categories.nnz else metrics


def variety(top: Lists, prepared: Prepared) -> float:
    """1 - mean cosine of the categories of the items of a list, ten of each."""
    words, shown = prepared.facts.categories, top[np.flatnonzero(np.diff(prepared.test.indptr)), :10]
    total = np.array([words[items].sum(0) for items in shown]).reshape(len(shown), -1)
    own = np.array([words[items].multiply(words[items]).sum() for items in shown])
    depth = shown.shape[1]
    return float(1.0 - ((np.square(total).sum(1) - own) / (depth * (depth - 1))).mean())


def report(found: dict[str, Outcome], prepared: Prepared) -> list[dict[str, Any]]:
    """Rows of every part: metrics against the best peer, differences to ours."""
    rows: list[dict[str, Any]] = []
    rivals = [name for name in found if name not in OURS]
    reached = {name: per_user(outcome, prepared) for name, outcome in found.items()}
    best = max(rivals, key=lambda name: float(reached[name].mean()))
    for name, outcome in found.items():
        metrics = [measured(top, prepared) for top in outcome.tops]
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
            rival = [measured(top, prepared)[metric] for top in found[best].tops]
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
    parser.add_argument("--keep", type=Path, help="a folder where lists stay, by part and seed")
    parser.add_argument("--epochs", type=int, default=400, help="the most of lightgcn; of sasrec half as many")
    call, _ = parser.parse_known_args()
    wanted = call.only.split(",")
    unknown = sorted(set(wanted) - {*OURS, *PEERS, *RECBOLE})
    if unknown:
        raise SystemExit(f"--only: unknown part {unknown[0]!r}; known are {', '.join((*OURS, *PEERS, *RECBOLE))}")
    if set(wanted) & set(RECBOLE) and call.recbole is None:
        raise SystemExit("--only: lightgcn and sasrec need --recbole, an interpreter that has recbole")
    prepared = prepare(call.data, call.new, call.whole, call.protocol)
    repeats, split = prepared.schema.split.repeats, prepared.schema.split
    kept = Kept(call.keep, f"{call.data}, {split.protocol}, {split.max_items} items, {'all' if repeats else 'new'}")
    if not kept.has("popularity", 0):
        _, tops = measure_baselines(
            prepared.fit, prepared.validation, prepared.train, prepared.test, again=prepared.again,
            on_progress=lambda _done, _text: None,
        )  # fmt: skip
        for name, top in tops.items():
            kept.add(name, 0, top, None)
    calls: dict[str, Callable[..., None]] = {name: partial(peer, name) for name in PEERS}
    for name in RECBOLE:
        calls[name] = partial(tuned_recbole, name, python=call.recbole, most_epochs=call.epochs)
    for name in (name for name in calls if name in wanted):
        missing = [seed for seed in call.seeds if not kept.has(name, seed)]
        if missing:
            calls[name](prepared, missing, call.trials, kept)
    parts = [name for name in OURS if name in wanted]
    missing = [seed for seed in call.seeds if not all(kept.has(part, seed) for part in parts)]
    if missing:
        recipe = kept.recipe(prepared)
        for seed in missing:
            ours(parts, prepared, recipe, seed, kept)
    baselines = [name for name in kept.found if name not in (*OURS, *calls)]
    found = {name: kept.outcome(name, [0]) for name in baselines}
    found |= {name: kept.outcome(name, call.seeds) for name in wanted}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    finish("recommend_quality", report(found, prepared), device)


if __name__ == "__main__":
    main()
