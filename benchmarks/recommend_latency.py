"""A list of ten with its reasons, features read, as `POST /v1/recommend` makes it; and how soon an event changes it.

Ours: the champion of `assay run recommend` with its online features; every item is scored by all sources, the ranker
orders the best 200. Limit: the ten largest of one exact product of vectors in NumPy, with nothing else. Freshness: an
event of somebody new is folded in through the log and the store, and the next list is another one.

With --items a made-up catalogue instead: vectors around 2,000 centres, 20,000 users with 30 events each near a centre,
the items taken most often much more often; a ranker that was not trained, which takes as long. Recall: of the index
beyond the 8,000 items taken most, against all products, for the users' own queries.

    assay bench recommend_latency [--json] [--data movielens-100k] [--items N] [--calls N]
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# As `assay serve` sets them, before anything loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from assay_features.events import Events
from assay_features.feast.repository import FeatureRepository
from assay_features.items import item_plan
from assay_features.schema import ItemTable, RecommendSchema
from assay_platform.models.content import ItemFacts, fit_content_map
from assay_platform.models.histories import DAY_US, Again, Histories
from assay_platform.models.item_regression import RegressionConfig, fit_item_regression
from assay_platform.models.recommender import PairRanker, RankerConfig, Recommender
from assay_platform.models.sources import ItemPast, ItemVectors, Sources, Wanted, Weights
from assay_services.recommend import ItemRecommender

sys.path.insert(0, str(Path(__file__).parent))
from _champion import champion
from _report import finish, in_turn, median, row, spread

TARGET_MS = {1_682: 5.0, 8_000: 8.0, 1_000_000: 15.0}
NUM_CENTRES, NUM_USERS, NUM_EVENTS, NUM_HEAD, WIDTH = 2_000, 20_000, 30, 8_000, 64
END_US = 1_700_000_000_000_000
NUM_RANKED = 50  # as validation chooses for MovieLens-100K


def made_up(num_items: int, repository: FeatureRepository) -> tuple[ItemRecommender, Recommender]:
    """A catalogue of any size, with demand, categories and histories; the store knows the newest events."""
    rng = np.random.default_rng(0)
    centre = rng.integers(0, NUM_CENTRES, num_items)
    centres = rng.normal(size=(NUM_CENTRES, WIDTH)).astype(np.float32)
    item_ID = centres[centre] + 0.7 * rng.normal(size=(num_items, WIDTH)).astype(np.float32)
    item_ID /= np.linalg.norm(item_ID, axis=1, keepdims=True)
    by_centre = np.argsort(centre, kind="stable")
    start = np.searchsorted(centre[by_centre], np.arange(NUM_CENTRES + 1))
    user = np.repeat(np.arange(NUM_USERS), NUM_EVENTS)
    taste = rng.integers(0, NUM_CENTRES, (NUM_USERS, 3))[user, rng.integers(0, 3, len(user))]
    size = np.maximum(start[taste + 1] - start[taste], 1)
    item = by_centre[np.minimum(start[taste] + (rng.random(len(user)) ** 3 * size).astype(int), num_items - 1)]
    time_us = END_US - rng.integers(1, 90 * DAY_US, len(user))
    histories = Histories.of(user, item, time_us, num_users=NUM_USERS, now_us=END_US)
    past = ItemPast.of(histories, num_items)
    head = past.head(NUM_HEAD)
    items = [f"p{i}" for i in range(num_items)]
    table = {f"p{i}": {"title": f"Product {i}", "kind": f"k{c % 200}"} for i, c in enumerate(centre.tolist())}
    facts = ItemFacts.of(items, table, text=["title"], categorical=["kind"])
    vectors = ItemVectors(item_ID, (0.1 * np.log1p(past.takers)).astype(np.float32), 1.0)
    content = fit_content_map(facts, vectors.stacked(), past.takers)
    regression = fit_item_regression(histories, num_items, RegressionConfig(closeness_s=0.0), head)
    sources = Sources(regression, None, vectors, past, facts, content, head, weights=Weights(graph=0.5))
    schema = RecommendSchema(
        user="user_id", item="item_id", timestamp="timestamp",
        items=ItemTable(path="items.csv", id="item_id", text=("title",), categorical=("kind",)),
    )  # fmt: skip
    plan = item_plan(schema)
    config = RankerConfig(num_store_features=len(plan.numeric_names))
    model = Recommender(
        ranker=PairRanker(config), config=config, users=[f"u{u}" for u in range(NUM_USERS)], items=items,
        histories=histories, sources=sources, again=Again.NOTHING,
        store_features_IF=np.zeros((num_items, config.num_store_features), dtype=np.float32), num_ranked=NUM_RANKED,
    )  # fmt: skip
    names = np.array(items, dtype=object)
    newest = np.sort(np.argsort(time_us)[-50_000:])
    newest = newest[np.argsort(time_us[newest], kind="stable")]
    keys = {"user_id": np.array([f"u{u}" for u in user[newest]], dtype=object), "item_id": names[item[newest]]}
    service = ItemRecommender(model, schema, plan, repository)
    service.add(Events(time_us=time_us[newest], keys=keys))
    return service, model


def recall(model: Recommender) -> float:
    """Of 200 items beyond the head, for the users' own queries."""
    sources, histories = model.sources, model.histories.part(0, 300)
    taken = histories.matrix(len(model.items))
    query = np.column_stack([sources.user_vectors(taken), np.ones(histories.num_users)]).astype(np.float32)
    tail = np.flatnonzero(sources.place < 0)
    products = query @ sources.vectors.stacked(tail).T
    best = tail[np.argpartition(-products, 200, axis=1)[:, :200]]
    assert sources.index is not None
    found, _ = sources.index.search(query, 200)
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(best, found, strict=True)]))


def main() -> None:
    """Lists in turn with the exact product, then new users."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="movielens-100k")
    parser.add_argument("--items", type=int)
    parser.add_argument("--calls", type=int, default=500)
    call, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    scratch = tempfile.TemporaryDirectory()
    if call.items is None:
        folder, repository = champion(f"recommend-{call.data}", f"assay run recommend --data {call.data}")
        service, model = ItemRecommender.load(folder, repository), Recommender.load(folder)
    else:
        repository = FeatureRepository(Path(scratch.name) / "made-up")
        service, model = made_up(call.items, repository)
    users = [model.users[i] for i in np.random.default_rng(0).permutation(len(model.users))]
    vectors = np.random.default_rng(0).normal(size=(len(model.items), 64)).astype(np.float32)
    at = iter(range(10**9))

    def ours() -> None:
        service.recommend(users[next(at) % len(users)], k=10, exclude_seen=None, context={})

    def exact() -> None:
        scores = vectors @ vectors[next(at) % len(vectors)]
        best = np.argpartition(-scores, 10)[:10]
        best[np.argsort(-scores[best])]

    sides = {"ours": ours, "exact": exact}
    in_turn(sides, 20)
    taken_ms = {side: 1e3 * np.array(seconds) for side, seconds in in_turn(sides, call.calls).items()}
    case, target = f"{len(model.items):,} items", TARGET_MS.get(len(model.items))
    rows = []
    if model.sources.index is not None:
        rows.append(row(f"{case}: recall of the index at 200", recall(model), "", limit=0.98, limit_name="target",
                        higher_is_better=True))  # fmt: skip
    for shown, q in (("p50", 0.5), ("p99", 0.99)):
        here, there = (float(np.quantile(taken_ms[side], q)) for side in sides)
        rows.append(row(f"{case}: {shown}", here, "ms", peer=there, peer_name="one exact product", limit=target,
                        limit_name="target p99", runs=call.calls))  # fmt: skip
    everyone = model.histories
    assert isinstance(everyone, Histories)
    wanted = Wanted(model.again.excluded(everyone, len(model.items)))
    bulk = in_turn({"bulk": lambda: model.rank(everyone, num=10, wanted=wanted)}, 5)["bulk"]
    rows.append(row(f"{case}: everybody's list, users/s", everyone.num_users / median(bulk), "1/s", limit=1e4,
                    limit_name="target", higher_is_better=True, runs=len(bulk), spread=spread(bulk)))  # fmt: skip
    newest_us, fresh = int(everyone.now_us.max()), []
    schema = service.schema
    for i in range(50):
        user = f"somebody new {i} {time.time_ns()}"
        before, cold = service.recommend(user, k=10, exclude_seen=None, context={})
        began = time.perf_counter()
        event = {schema.user: user, schema.item: model.items[7 * i % len(model.items)]}
        event |= {schema.timestamp: newest_us / 1e6, **({schema.weight: 5.0} if schema.weight else {})}
        service.add(service.parse_events([event]))
        after, still_cold = service.recommend(user, k=10, exclude_seen=None, context={})
        fresh.append(1e3 * (time.perf_counter() - began))
        assert (cold, still_cold) == (True, False), "a first event has to end the cold start"
        assert [item.item_id for item in before] != [item.item_id for item in after], "the list has to change"
    rows.append(row(f"{case}: event to another list, p99", float(np.quantile(fresh, 0.99)), "ms", limit=500.0,
                    limit_name="target", runs=len(fresh)))  # fmt: skip
    repository.close()
    finish("recommend_latency", rows)


if __name__ == "__main__":
    main()
