"""All routers on the same data, budget and seeds: quality of the task, balance of experts, time of a step.

IEEE-CIS: the fraud net on raw columns, the newest 100,000 rows of the training period, three epochs, average precision
of the whole test period. MovieLens-100K: the ranker over the graph's candidates, trained on the fitting part of the
pipeline's split, NDCG@10 of the test part. 16 experts, 2 chosen, 1 shared; 'dense' has as many active weights in each
row (3 experts that all rows share). Nothing is chosen by looking at the test part; hyperparameters are the
defaults of the routers. Balance is that of the last epoch, over training batches, mean over layers; 'served' is what
experts with room for 1.25 times their even share would take.

    assay bench moe_routers [--json] [--seeds N] [--only fraud|recommend] [--plot FILE.png: only the load over time]
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_features.schema import FraudSchema
from assay_pipelines.datasets.catalogue import CATALOGUE, EVENTS, get_dataset
from assay_pipelines.datasets.table import load_table
from assay_pipelines.fraud.train import LabelledRows, net_logits
from assay_pipelines.recommend.evaluate import ranking_metrics
from assay_pipelines.recommend.train import RankerTraining, Recipe, train_ranker
from assay_pipelines.recommend.train_graph import DEFAULTS
from assay_platform.config import load_config
from assay_platform.models.encoding import fit_encoder
from assay_platform.models.fraud import FraudNet, FraudNetConfig
from assay_platform.models.item_regression import RegressionConfig
from assay_platform.models.sources import Wanted, Weights
from assay_platform.moe import ROUTERS, BackboneConfig, MoELayer
from assay_platform.moe.router import count_choices
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.training import TrainConfig, fit
from sklearn.metrics import average_precision_score
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from _recommend_data import Fitted, prepare
from _report import finish, in_turn, median, row

SEEDS = 3
NUM_EXPERTS, TOP_K, ROOM = 16, 2, 1.25
FRAUD_ROWS, FRAUD_EPOCHS, BATCH, MAX_CATEGORIES = 100_000, 3, 512, 2_000
VARIANTS = (*ROUTERS, "dense")


class Outcome(NamedTuple):
    """One training."""

    quality: float
    utilisation: float
    imbalance: float
    served: float | None  # not measured for the ranker


def shaped(config: BackboneConfig, variant: str) -> BackboneConfig:
    """The backbone of a variant."""
    if variant == "dense":
        return replace(config, num_experts=1, top_k=1, num_shared=TOP_K, router="unbalanced")
    return replace(config, num_experts=NUM_EXPERTS, top_k=TOP_K, num_shared=1, router=variant)


class Served:
    """Listens for the fraction of choices that would find room."""

    def __init__(self, module: nn.Module) -> None:
        self.parts: list[torch.Tensor] = []
        for layer in module.modules():
            if isinstance(layer, MoELayer):
                layer.register_forward_hook(self._listen)

    def _listen(self, layer: nn.Module, _: Any, out: Any) -> None:
        if layer.training:
            counts = count_choices(out.routing.expert_NK, layer.num_experts)
            room = np.ceil(ROOM * float(counts.sum()) / layer.num_experts)
            self.parts.append(counts.clamp_max(room).sum() / counts.sum().clamp_min(1.0))

    def last(self, num: int) -> float:
        """Mean of the last batches."""
        return float(torch.stack(self.parts[-num:]).mean())


def balance_of(monitor: RoutingMonitor) -> tuple[float, float]:
    """Utilisation and imbalance of the last report, mean over layers."""
    last = [reports[-1] for reports in monitor.history.values()]
    return statistics.mean(r.utilisation for r in last), statistics.mean(r.imbalance for r in last)


class Fraud:
    """IEEE-CIS."""

    name, metric = "IEEE-CIS", "AP"

    def __init__(self) -> None:
        folder = get_dataset("ieee-cis", load_config().paths.data)
        schema = CATALOGUE["ieee-cis"].schema(folder)
        assert isinstance(schema, FraudSchema)
        events = load_table(folder / EVENTS, schema).events
        assert events.labels is not None
        cuts = [int(len(events) * f) for f in (schema.split.train, schema.split.train + schema.split.validation)]
        self.numeric, self.categorical = tuple(schema.numeric), tuple(schema.categorical)
        columns = {n: events.numbers[n] for n in self.numeric} | {c: events.keys[c] for c in self.categorical}
        newest = slice(max(0, cuts[0] - FRAUD_ROWS), cuts[0])
        self.encoder, self.edges = fit_encoder(
            {n: v[newest] for n, v in columns.items()}, numeric=self.numeric, categorical=self.categorical,
            num_bins=16, max_categories=MAX_CATEGORIES,
        )  # fmt: skip
        labels = torch.from_numpy(events.labels.astype(np.float32))
        everything = LabelledRows(self.encoder.apply(columns), labels)
        self.train = everything.take(torch.arange(newest.start, newest.stop))
        self.test = everything.take(torch.arange(cuts[1], len(events)))

    def net(self, variant: str, seed: int) -> FraudNet:
        """Untrained."""
        torch.manual_seed(seed)
        config = FraudNetConfig(max_embedded=MAX_CATEGORIES + 1, backbone=shaped(BackboneConfig(dropout=0.15), variant))
        return FraudNet(self.edges, self.encoder.cardinalities, config)

    def loss(self, net: FraudNet, batch: LabelledRows) -> torch.Tensor:
        """Cross-entropy and the router's."""
        logits, balance = net(batch.rows)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels) + balance

    def fit(self, net: FraudNet, seed: int, on_epoch: Callable[[], object]) -> FraudNet:
        """Train a net."""
        generator = torch.Generator().manual_seed(seed)
        num_batches = len(self.train) // BATCH

        def batches(_: int) -> Any:
            order = torch.randperm(len(self.train), generator=generator)
            return (self.train.take(part) for part in order.tensor_split(num_batches))

        fit(
            net, batches=batches, num_batches=num_batches, loss=lambda batch: self.loss(net, batch), evaluate=None,
            config=TrainConfig(num_epochs=FRAUD_EPOCHS, learning_rate=2e-3, weight_decay=0.03),
            on_epoch=lambda epoch, metric: on_epoch() and None,
        )  # fmt: skip
        return net.eval()

    def train_one(self, variant: str, seed: int) -> Outcome:
        """From scratch to the test period."""
        net = self.net(variant, seed)
        served = Served(net)
        with RoutingMonitor(net) as monitor:
            self.fit(net, seed, monitor.metrics)
        quality = average_precision_score(self.test.labels.numpy() > 0.5, net_logits(net, self.test.rows))
        return Outcome(float(quality), *balance_of(monitor), served.last(len(self.train) // BATCH))

    def step(self, variant: str) -> Callable[[], None]:
        """One training step."""
        net = self.net(variant, 0).train()
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        routers = [layer.router for layer in net.modules() if isinstance(layer, MoELayer)]
        batch = self.train.take(torch.arange(BATCH))

        def call() -> None:
            optimizer.zero_grad()
            self.loss(net, batch).backward()
            optimizer.step()
            for router in routers:
                router.after_step()

        return call


class Recommend:
    """MovieLens-100K."""

    name, metric = "MovieLens-100K", "NDCG@10"

    def __init__(self) -> None:
        self.prepared = prepared = prepare("movielens-100k")
        self.recipe = Recipe(
            graph=DEFAULTS,
            regression=RegressionConfig(),
            facts=prepared.facts,
            again=prepared.again,
            weights=Weights(graph=0.5),
        )
        self.config = prepared.ranker_config
        self.fitted = Fitted.of(prepared, prepared.parts.fit, prepared.fit, self.recipe, seed=0)
        self.lists = self.fitted.lists(self.recipe, self.config, seed=0)

    def train_one(self, variant: str, seed: int) -> Outcome:
        """From scratch to the test part."""
        config = replace(self.config, backbone=shaped(self.config.backbone, variant))
        ranker, monitor = train_ranker(self.lists, config, seed=seed, training=RankerTraining())
        prepared = self.prepared
        model = self.fitted.model(prepared, self.recipe, config, ranker)
        top, _ = model.rank(prepared.fit, num=20, wanted=Wanted(prepared.train_matrix))
        quality = ranking_metrics(top, prepared.test, prepared.fit_matrix)["ndcg_at_10"]
        return Outcome(quality, *balance_of(monitor), None)


def plot(path: Path) -> None:
    """Load of experts over a training without balance and one with the auxiliary loss."""
    task = Fraud()
    nets = nn.ModuleDict({name: task.net(name, 0) for name in ("unbalanced", "softmax")})
    with RoutingMonitor(nets) as monitor:
        for name, net in nets.items():
            assert isinstance(net, FraudNet), name
            optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, fused=True)
            for step in range(300):
                batch = task.train.take(torch.randint(len(task.train), (BATCH,)))
                optimizer.zero_grad()
                task.loss(net.train(), batch).backward()
                optimizer.step()
                if step % 10 == 9:
                    monitor.metrics()
    monitor.plot(path)


def option(name: str, default: str) -> str:
    """The word after an option."""
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def main() -> None:
    """Train them all."""
    seeds = range(int(option("--seeds", str(SEEDS))))
    only = option("--only", "")
    if "--plot" in sys.argv:
        plot(Path(option("--plot", "")))
        return
    rows: list[dict[str, Any]] = []
    tasks: list[Fraud | Recommend] = []
    if only in ("", "fraud"):
        tasks.append(Fraud())
    if only in ("", "recommend"):
        tasks.append(Recommend())
    for task in tasks:
        steps: dict[str, float] = {}
        if isinstance(task, Fraud):
            calls = {variant: task.step(variant) for variant in VARIANTS}
            in_turn(calls, 2)
            steps = {name: 1e3 * median(seconds) for name, seconds in in_turn(calls, 15).items()}
        outcomes: dict[str, list[Outcome]] = {variant: [] for variant in VARIANTS}
        for seed in seeds:
            for variant in VARIANTS:
                outcomes[variant].append(task.train_one(variant, seed))
                print(f"{task.name} seed {seed} {variant}: {outcomes[variant][-1]}", flush=True)
        dense = [o.quality for o in outcomes["dense"]]
        for variant in VARIANTS:
            found = outcomes[variant]
            mean = statistics.mean
            rows.append(
                row(
                    f"{task.name}, {variant}", mean(o.quality for o in found), task.metric, peer=mean(dense),
                    peer_name="dense of equal work", higher_is_better=True, runs=len(found),
                    spread=(max(o.quality for o in found) - min(o.quality for o in found)) / mean(dense),
                    difference_by_seed=[round(o.quality - d, 4) for o, d in zip(found, dense, strict=True)],
                    utilisation=round(mean(o.utilisation for o in found), 3),
                    imbalance=round(mean(o.imbalance for o in found), 4),
                    served=None if found[0].served is None else round(mean(o.served or 0.0 for o in found), 4),
                    step_ms=round(steps.get(variant, 0.0), 1),
                )
            )  # fmt: skip
    finish("moe_routers", rows)
    for r in rows:
        print(r["case"], {k: r[k] for k in ("difference_by_seed", "utilisation", "imbalance", "served", "step_ms")})


if __name__ == "__main__":
    main()
