"""A list of ten with its reasons, features read, as `POST /v1/recommend` makes it; and how soon an event changes it.

Ours: the champion of `assay run recommend` with its online features; every item is scored by all sources, the ranker
orders the best 200. Limit: the ten largest of one exact product of vectors in NumPy, with nothing else. Freshness: an
event of somebody new is folded in through the log and the store, and the next list is another one.

    assay bench recommend_latency [--json] [--data movielens-100k] [--calls N]
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before anything loads OpenMP

import numpy as np
import torch
from assay_platform.models.histories import Histories
from assay_platform.models.recommender import Recommender
from assay_platform.models.sources import Wanted
from assay_services.recommend import ItemRecommender

sys.path.insert(0, str(Path(__file__).parent))
from _champion import champion
from _report import finish, in_turn, row

TARGET_MS = {1_682: 5.0, 8_000: 8.0}


def main() -> None:
    """Lists in turn with the exact product, then new users."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="movielens-100k")
    parser.add_argument("--calls", type=int, default=500)
    call, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    folder, repository = champion(f"recommend-{call.data}", f"assay run recommend --data {call.data}")
    service, model = ItemRecommender.load(folder, repository), Recommender.load(folder)
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
    for shown, q in (("p50", 0.5), ("p99", 0.99)):
        here, there = (float(np.quantile(taken_ms[side], q)) for side in sides)
        rows.append(row(f"{case}: {shown}", here, "ms", peer=there, peer_name="one exact product", limit=target,
                        limit_name="target p99", runs=call.calls))  # fmt: skip
    everyone = model.histories
    assert isinstance(everyone, Histories)
    began = time.perf_counter()
    model.rank(everyone, num=10, wanted=Wanted(None if model.repeats else everyone.matrix(len(model.items))))
    rows.append(row(f"{case}: everybody's list, users/s", everyone.num_users / (time.perf_counter() - began), "1/s",
                    limit=1e4, limit_name="target", higher_is_better=True))  # fmt: skip
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
