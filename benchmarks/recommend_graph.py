"""Training the graph encoder: on MovieLens-100K beside LightGCN of RecBole, and on a made-up graph that is sampled.

An epoch of ours is as many predictions as there are edges, as one of LightGCN's is: a step masks 40 to 80 % of them and
predicts these. Both have 64 dimensions and two layers, learn from the fitting part and rank the validation part in
full; LightGCN stops early by it. In turn, three runs each. The made-up graph has 20 edges a user, half of them within
one of 1,000 tastes; its samples run over the device that there is, and its bytes are those of the whole graph there.

    assay bench recommend_graph [--json] [--recbole PYTHON] [--edges N]
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from assay_pipelines.recommend import train_graph
from assay_pipelines.recommend.pipeline import Prepared
from assay_pipelines.recommend.train import item_graph
from assay_platform.models.graph import GraphEncoder, ItemGraph
from assay_platform.models.item_regression import RegressionConfig
from assay_platform.training import fastest_device
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from _gpu import peak_gb
from _recommend_data import prepare, recbole
from _report import finish, median, row, spread

RUNS, CLOSENESS_S = 3, 150.0
LIGHTGCN = {"embedding_size": 64, "n_layers": 2, "learning_rate": 2e-3, "reg_weight": 1e-4, "train_batch_size": 4096,
            "epochs": 300}  # fmt: skip


def ours(prepared: Prepared, seed: int) -> tuple[float, float, float]:
    """Seconds of an epoch and of all, and NDCG@10 of the validation part."""
    graph = item_graph(prepared.fit, prepared.facts, RegressionConfig(closeness_s=CLOSENESS_S))
    ends: list[float] = []
    began = time.perf_counter()
    encoder = train_graph.train_encoder(
        graph, train_graph.DEFAULTS, seed=seed, on_epoch=lambda _epoch, _metric: ends.append(time.perf_counter())
    )
    seconds = time.perf_counter() - began
    masked = (train_graph.DEFAULTS["mask_low"] + train_graph.DEFAULTS["mask_high"]) / 2
    epoch = float(np.median(np.diff(ends))) / (train_graph._STEPS_AN_EPOCH * masked)
    excluded = prepared.again.excluded(prepared.fit, len(prepared.items))
    return epoch, seconds, train_graph.graph_ndcg(encoder, graph, prepared.validation, excluded)


def lightgcn(prepared: Prepared, seed: int, python: str) -> tuple[float, float, float]:
    """The same of RecBole's."""
    with recbole(prepared, python) as run:
        stop = ("--every", "10", "--patience", "3", "--device", fastest_device().type)
        found = run("LightGCN", LIGHTGCN, seed, *stop)
    return float(np.median(found["epoch_seconds"])), float(found["epoch_seconds"].sum()), float(found["ndcg"])


def made_up(num_edges: int) -> ItemGraph:
    """Users of tastes."""
    rng = np.random.default_rng(0)
    num_users, num_items = max(1000, num_edges // 20), max(10_000, num_edges // 100)
    user = np.sort(rng.integers(0, num_users, num_edges))
    of_taste = num_items // 1000
    near = user % 1000 * of_taste + (of_taste * rng.random(num_edges) ** 2).astype(np.int64)
    far = (num_items * rng.random(num_edges) ** 3).astype(np.int64)
    key = np.unique(user * num_items + np.where(rng.random(num_edges) < 0.5, near, far))
    user, item = key // num_items, key % num_items
    another = (np.diff(user, prepend=-1) != 0) | (rng.random(len(user)) < 0.25)
    kinds: tuple[NDArray[Any], NDArray[Any]] = (np.arange(num_items) // of_taste % 200, np.arange(num_items))
    facts = sp.csr_matrix((np.ones(num_items, dtype=np.float32), kinds), (200, num_items))
    return ItemGraph(user=user, item=item, basket=np.cumsum(another) - 1, num_users=num_users, facts=facts)


def sampled(num_edges: int) -> list[dict[str, Any]]:
    """Steps over samples of a made-up graph."""
    graph, device = made_up(num_edges), fastest_device()
    name = f"made-up graph of {len(graph.user):,} edges, {graph.num_users:,} users, {graph.num_items:,} items"
    began = time.perf_counter()
    encoder = GraphEncoder(graph, width=64, num_layers=2, dropout=0.5).to(device)
    base_s = time.perf_counter() - began
    generator = np.random.default_rng(0)
    source = train_graph._SampledGraph(graph, encoder, generator, device)
    optimizer = torch.optim.AdamW(encoder.parameters())
    seconds: list[float] = []

    def step() -> None:
        began = time.perf_counter()
        masked = source.mask(0.6)
        optimizer.zero_grad()
        masked.softmax(*encoder(masked.graph)).loss(encoder.log_scale.exp(), encoder.bias_I).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)

    step()
    # Rows are 4 bytes and values 4 bytes, both ways round; starts are few beside them.
    whole_gb = 16 * sum(len(relation.item) for relation in graph.relations) / 1e9
    rows = []
    if device.type == "cuda":
        rows.append(row(f"{name}: memory of a step beside the encoder", peak_gb(step), "GB", limit=whole_gb,
                        limit_name="the whole graph's"))  # fmt: skip
    for _ in range(10):
        step()
    rows.append(row(f"{name}: step of 1,024 users", median(seconds[1:]), "s", runs=len(seconds) - 1,
                    spread=spread(seconds[1:])))  # fmt: skip
    rows.append(row(f"{name}: vectors to begin with", base_s, "s"))
    began = time.perf_counter()
    encoder.cpu().all_items(graph)
    rows.append(row(f"{name}: vectors of all items", time.perf_counter() - began, "s"))
    return rows


def main() -> None:
    """Both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recbole", help="an interpreter that has recbole")
    parser.add_argument("--edges", type=int, default=5_000_000)
    call, _ = parser.parse_known_args()
    prepared = prepare("movielens-100k")
    found: dict[str, list[tuple[float, float, float]]] = {"ours": [], "LightGCN": []}
    for seed in range(RUNS):
        found["ours"].append(ours(prepared, seed))
        if call.recbole:
            found["LightGCN"].append(lightgcn(prepared, seed, call.recbole))
        print({name: values[-1] for name, values in found.items() if values}, flush=True)
    rows = []
    for at, (case, unit, better) in enumerate((("an epoch", "s", False), ("training", "s", False),
                                               ("NDCG@10 of validation", "", True))):  # fmt: skip
        mine, theirs = ([run[at] for run in found[name]] for name in ("ours", "LightGCN"))
        peer = median(theirs) if theirs else None
        limit = None if peer is None or at else peer / 5
        rows.append(row(f"MovieLens-100K: {case}", median(mine), unit, peer=peer, peer_name="LightGCN of RecBole",
                        limit=limit, limit_name="target", higher_is_better=better, spread=spread(mine),
                        runs=RUNS))  # fmt: skip
    rows += sampled(call.edges)
    finish("recommend_graph", rows, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")


if __name__ == "__main__":
    main()
