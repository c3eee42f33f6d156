"""Lists for users of whom little is known, and of items that nobody has taken yet.

Cold users: a fifth of the users is kept out of training; of each, three events are known: the last three before the
test part, or where the split is random any three, and then all others are what should be found. Cold items: a fifth of
the items is kept out of training, and lists are of these alone. Against popularity and content neighbours: the words of
a history (tf-idf of titles and categories) against an item's. Everybody has the same words; nothing is tuned.
Intervals: 95 % of 1,000 Poisson bootstraps of users.

    assay bench recommend_cold [--json] [--data movielens-100k] [--seeds 0,1,2] [--sentences] [--only users|items]

--sentences: ours reads titles with a sentence encoder as well (the extra 'text').
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from assay_pipelines.recommend.evaluate import DEPTH, Hits, best_items, interval
from assay_pipelines.recommend.pipeline import Prepared
from assay_pipelines.recommend.train import RankerTraining, Recipe, train_ranker
from assay_pipelines.recommend.train_graph import DEFAULTS
from assay_pipelines.recommend.train_sequence import SequenceTraining
from assay_platform.models.histories import Histories, Index
from assay_platform.models.item_regression import RegressionConfig
from assay_platform.models.sources import Wanted, Weights
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _recommend_data import Fitted, prepare
from _report import finish, row

KEPT_OUT, KNOWN = 0.2, 3
CLOSENESS_S = {"movielens-100k": 150.0}  # as validation chooses it
Lists = NDArray[np.int64]


class Case(NamedTuple):
    """What a model may learn from (rows of the table), whom it is asked about, and what they want of which items."""

    rows: NDArray[np.intp]
    asked: Histories
    wanted: sp.csr_matrix
    allowed: NDArray[np.bool_] | None


def cold_users(prepared: Prepared, seed: int) -> Case:
    """Three events of users that training does not see."""
    rng, at_random = np.random.default_rng(seed), prepared.schema.split.protocol == "random"
    out = rng.random(len(prepared.users)) < KEPT_OUT
    rows = prepared.train_rows
    theirs = rows[out[prepared.user[rows]]]
    order = rng.random(len(theirs)) if at_random else -prepared.events.time_us[theirs]
    theirs = theirs[np.lexsort((order, prepared.user[theirs]))]
    user = prepared.user[theirs]
    is_known = np.arange(len(theirs)) - np.searchsorted(user, user) < KNOWN
    asked = prepared.histories(theirs[is_known], prepared.train.now_us)
    wanted = sp.diags(out.astype(np.float32)) @ prepared.test
    if at_random:
        wanted = wanted + prepared.matrix(theirs[~is_known])
    wanted = sp.csr_matrix(wanted)
    wanted.eliminate_zeros()
    return Case(rows[~out[prepared.user[rows]]], asked, wanted, None)


def cold_items(prepared: Prepared, seed: int) -> Case:
    """Items that training does not see."""
    out = np.random.default_rng(seed).random(len(prepared.items)) < KEPT_OUT
    rows = prepared.train_rows[~out[prepared.item[prepared.train_rows]]]
    wanted = sp.csr_matrix(prepared.test @ sp.diags(out.astype(np.float32)))
    wanted.eliminate_zeros()
    return Case(rows, prepared.histories(rows, prepared.train.now_us), wanted, out)


def ours(prepared: Prepared, case: Case, seed: int) -> Lists:
    """Sources and ranker of what training sees."""
    config = prepared.ranker_config
    closeness_s = CLOSENESS_S.get(prepared.options.data, 0.0)
    regression = RegressionConfig(closeness_s=closeness_s)
    at_random = prepared.schema.split.protocol == "random"
    recipe = Recipe(
        graph=DEFAULTS, regression=regression, facts=prepared.facts, again=prepared.again, weights=Weights(graph=0.5),
        sequence=None if at_random else SequenceTraining(),
    )  # fmt: skip
    histories = prepared.histories(case.rows, prepared.train.now_us)
    fitted = Fitted.of(prepared, case.rows, histories, recipe, seed=seed)
    lists = fitted.lists(recipe, config, seed=seed)
    ranker, _ = train_ranker(lists, config, seed=seed, training=RankerTraining())
    model = fitted.model(prepared, recipe, config, ranker)
    seen = prepared.again.excluded(case.asked, len(prepared.items))
    return model.rank(case.asked, num=DEPTH, wanted=Wanted(seen, case.allowed))[0]


def content(prepared: Prepared, case: Case) -> Lists:
    """The items whose words are most like those of a history."""
    words, seen = prepared.facts.content, case.asked.matrix(len(prepared.items))
    return listed(prepared, case, lambda users: (seen[users] @ words @ words.T).toarray())


def popularity(prepared: Prepared, case: Case) -> Lists:
    """What most took; among items that nobody took, by chance."""
    counts = np.bincount(prepared.item[case.rows], minlength=len(prepared.items))
    ties = np.random.default_rng(0).random(len(counts))
    score = (counts + ties).astype(np.float32)
    return listed(prepared, case, lambda users: np.tile(score, (len(users), 1)))


def listed(prepared: Prepared, case: Case, scores: Callable[[Index], NDArray[np.float32]]) -> Lists:
    """Lists of scores, of what is allowed."""

    def allowed(users: Index) -> NDArray[np.float32]:
        found = scores(users)
        if case.allowed is not None:
            found[:, ~case.allowed] = -np.inf
        return found

    return best_items(allowed, case.wanted, prepared.again.excluded(case.asked, len(prepared.items)))


def main() -> None:
    """Both cases, every seed another part kept out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="movielens-100k")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--sentences", action="store_true")
    parser.add_argument("--only", choices=["users", "items"])
    call, _ = parser.parse_known_args()
    prepared, rows = prepare(call.data, sentences=call.sentences), []
    cases = {"cold users": cold_users, "cold items": cold_items}
    for name, of in cases.items():
        if call.only is not None and not name.endswith(call.only):
            continue
        reached: dict[str, list[NDArray[np.float64]]] = {"ours": [], "content neighbours": [], "popularity": []}
        for seed in call.seeds:
            case = of(prepared, seed)
            tops = (ours(prepared, case, seed), content(prepared, case), popularity(prepared, case))
            for side, top in zip(reached, tops, strict=True):
                reached[side].append(Hits.of(top, case.wanted).ndcg())
            print(
                f"  {name}, seed {seed}: { ({s: round(float(v[-1].mean()), 4) for s, v in reached.items()}) }",
                flush=True,
            )
        means = {side: [float(v.mean()) for v in values] for side, values in reached.items()}
        best = max(("content neighbours", "popularity"), key=lambda side: float(np.mean(means[side])))
        here, there = float(np.mean(means["ours"])), float(np.mean(means[best]))
        gained = np.concatenate([a - b for a, b in zip(reached["ours"], reached[best], strict=True)])
        rows.append(
            row(f"{name}: NDCG@10", here, "", peer=there, peer_name=best, limit=1.5 * there, limit_name="target +50 %",
                higher_is_better=True, runs=len(call.seeds), over_best_peer=interval(gained),
                spread=(max(means["ours"]) - min(means["ours"])) / here, everyone=means)
        )  # fmt: skip
    finish("recommend_cold", rows)


if __name__ == "__main__":
    main()
