"""Does the graph of entities lift a fraud model beyond the shares of reported frauds that ours reads of it?

Payments are joined by what they have in common: a card, a card with its address, a device with its mail domain, an
amount with its product, and so on. Edges lead to the past alone, and a neighbour's label counts once it would have been
known, a week later. On IEEE-CIS, trained on the first 80 % of time, measured on the last 20 %:

    trees                       on the model's columns, and with what is known of each relation's newest 8 neighbours:
                                means of columns and shares, labels, times
    graph net                   a heterogeneous net over the same neighbours: messages from each one's columns, label
                                and age, attention within a relation, then the MoE backbone; inductive, since no entity
                                has weights of its own
    blends                      of the trees with the plain net, and with the graph net

    assay bench fraud_graph [--json] [--rows N] [--seeds N] [--data FOLDER] [--until SHARE: only so much of the table]
"""

# N payments, R relations, K neighbours of each, Q columns, W width of a message

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from assay_features.definitions import Entity
from assay_features.events import Events
from assay_features.state import entity_keys
from assay_pipelines.console import Reporter
from assay_pipelines.fraud.evaluate import fraud_metrics
from assay_pipelines.fraud.prepare import Prepared
from assay_pipelines.fraud.train import DEFAULTS, FraudData, net_config, net_logits, train_net
from assay_pipelines.fraud.trees import TreeRows, train_trees
from assay_platform.models.encoding import EncodedRows
from assay_platform.models.fraud import FraudNet
from assay_platform.moe import Backbone
from assay_platform.robustness.constraints import Constraints
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from _fraud_data import ieee_options
from _report import finish, row

RELATIONS: tuple[Entity, ...] = (
    "card1", ("card1", "addr1"), ("card1", "card2", "card5", "addr1", "R_emaildomain"), ("DeviceInfo", "R_emaildomain"),
    ("id_19", "id_20"), ("ProductCD", "TransactionAmt"), ("card1", "TransactionAmt"), ("addr1", "R_emaildomain"),
)  # fmt: skip
NEIGHBOURS, WIDTH, EPOCHS, NUM_TREES, NET_WEIGHT = 8, 64, 3, 600, 0.2
AVERAGED = ("TransactionAmt", "C1", "C2", "C5", "C13", "C14")
KNOWN_US = 7 * 86_400_000_000
HOUR_US = 3_600_000_000
SHOWN = ("average_precision", "auc", "recall_at_fpr_0.003")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PastNeighbours:
    """The payments of every entity of one relation, oldest first, as compressed rows.

    start (V + 1,), payment (M,): those of entity v are payment[start[v] : start[v + 1]]. entity (N,): of each payment,
    -1 without. place (N,): where it stands in `payment`.
    """

    start: NDArray[np.int64]
    payment: NDArray[np.int64]
    entity: NDArray[np.int64]
    place: NDArray[np.int64]
    time_us: NDArray[np.int64]

    @staticmethod
    def of(entity: Entity, events: Events) -> "PastNeighbours":
        """Of events in order of time."""
        codes: dict[str, int] = {}
        keys = entity_keys(entity, events).tolist()
        of_payment = np.array([-1 if key is None else codes.setdefault(key, len(codes)) for key in keys])
        order = np.argsort(of_payment, kind="stable")
        order = order[int((of_payment < 0).sum()) :]
        start = np.concatenate([[0], np.cumsum(np.bincount(of_payment[order], minlength=len(codes)))])
        place = np.full(len(events), -1)
        place[order] = np.arange(len(order))
        return PastNeighbours(start, order, of_payment, place, events.time_us)

    def newest(self, payments: NDArray[np.intp], num: int) -> NDArray[np.int64]:
        """(N, num) payments of the same entity before each of these, the newest first; -1 where there are fewer."""
        wanted = self.place[payments, None] - np.arange(1, num + 1)
        begins = np.where(self.entity[payments] >= 0, self.start[self.entity[payments]], 0)
        is_there = (self.entity[payments, None] >= 0) & (wanted >= begins[:, None])
        found = np.where(is_there, self.payment[np.maximum(wanted, 0)], -1)
        # Of the same moment is not before.
        return np.where(self.time_us[found] < self.time_us[payments, None], found, -1)


def check(entity: Entity, events: Events, found: NDArray[np.int64]) -> None:
    """Some payments against a search through all earlier ones."""
    keys, generator = entity_keys(entity, events), np.random.default_rng(0)
    for payment in generator.choice(len(events), min(200, len(events)), replace=False):
        before = np.arange(payment)[::-1]
        alike = [] if keys[payment] is None else before[keys[before] == keys[payment]][:NEIGHBOURS]
        expected = [int(p) for p in alike if events.time_us[p] < events.time_us[payment]]
        ours = [p for p in found[payment].tolist() if p >= 0]
        if ours != expected:
            raise SystemExit(f"neighbours of payment {payment} by {entity}: {ours}, expected {expected}")


def aggregates(prepared: Prepared, neighbours: list[NDArray[np.int64]]) -> NDArray[np.float32]:
    """(N, R · …) for trees: what is known of each relation's neighbours."""
    values, time_us = prepared.rows.rows.values_NF.numpy(), prepared.events.time_us
    shares = [i for i, name in enumerate(prepared.numeric) if "__over__" in name and "30d" in name]
    averaged = [*(prepared.numeric.index(name) for name in AVERAGED), *shares]
    parts = []
    for past in neighbours:
        there = past >= 0
        count = there.sum(1, keepdims=True)
        age_us = time_us[:, None] - time_us[past]
        known = there & (age_us > KNOWN_US)

        def mean(of: Any, over: NDArray[np.bool_]) -> Any:
            return np.where(over, of, 0.0).sum(1, keepdims=True) / np.where(over.any(1), over.sum(1), np.nan)[:, None]

        def mean_of(column: int, past: NDArray[np.int64] = past, there: NDArray[np.bool_] = there) -> Any:
            given = values[past, column]
            return mean(given, there & ~np.isnan(given))

        parts += [count, mean(age_us / HOUR_US, there), mean(prepared.labels[past], known), known.sum(1, keepdims=True)]
        parts += [mean_of(column) for column in averaged]
    return np.hstack(parts).astype(np.float32)


class GraphNet(nn.Module):
    """A payment's own embeddings, and for every relation an attended mean of messages from its neighbours."""

    def __init__(self, net: FraudNet, num_columns: int) -> None:
        super().__init__()
        self.net = net
        self.node, self.asked = nn.Linear(num_columns, WIDTH), nn.Linear(num_columns, WIDTH)
        self.edge = nn.Linear(5, WIDTH)
        self.relation = nn.Parameter(torch.zeros(len(RELATIONS), 1, WIDTH))
        own = net.backbone.project.in_features
        self.backbone = Backbone(own + len(RELATIONS) * (WIDTH + 1), net_config(DEFAULTS).backbone)
        self.head, self.dropout = nn.Linear(DEFAULTS["width"], 1), nn.Dropout(DEFAULTS["dropout"])

    def forward(
        self, rows: EncodedRows, own_NQ: Tensor, past_NRKQ: Tensor, edge_NRKE: Tensor, there_NRK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits (N,) and the balance loss."""
        message = nn.functional.gelu(self.node(past_NRKQ) + self.edge(edge_NRKE) + self.relation)
        score_NRK = (message * self.asked(own_NQ)[:, None, None]).sum(-1) / WIDTH**0.5
        weight_NRK = torch.softmax(score_NRK.masked_fill(~there_NRK, -1e4), -1) * there_NRK
        gathered = self.dropout((weight_NRK.unsqueeze(-1) * message).sum(2)).flatten(1)
        inputs = torch.cat([self.net.embed(rows).flatten(1), gathered, there_NRK.float().mean(-1)], 1)
        out = self.backbone(inputs)
        return self.head(out.y_ND).squeeze(-1), out.balance_loss


class GraphRows:
    """Everything of the payments on one device."""

    def __init__(self, prepared: Prepared, neighbours: list[NDArray[np.int64]], device: torch.device) -> None:
        self.rows = prepared.rows.to(device)
        self.past = torch.from_numpy(np.stack(neighbours, 1)).to(device)
        self.days = torch.from_numpy(prepared.events.time_us / (24 * HOUR_US)).to(device)
        values, edges = self.rows.rows.values_NF, prepared.data.edges.to(device)
        width = (edges[:, 1:] - edges[:, :-1]).clamp_min(0)
        inverse = torch.where(width > 0, 1 / width.clamp_min(1e-12), 0.0)
        ranks = []
        for part in values.split(16_384):
            missing = part.isnan()
            filled = torch.where(missing, 0.0, part).unsqueeze(-1)
            rank = ((filled - edges[:, :-1]) * inverse).clamp(0, 1).mean(-1)
            ranks.append(torch.cat([torch.where(missing, 0.0, 2 * rank - 1), missing.float()], 1).half())
        self.columns = torch.cat(ranks)
        self.amount = values[:, prepared.numeric.index("TransactionAmt")].log1p()

    def take(self, index: Tensor) -> tuple[EncodedRows, Tensor, Tensor, Tensor, Tensor]:
        """What the net takes of these payments."""
        past = self.past[index]
        there, past = past >= 0, past.clamp_min(0)
        age = (self.days[index, None, None] - self.days[past]).float()
        known = there & (age > KNOWN_US / (24 * HOUR_US))
        labels = self.rows.labels[past] * known
        larger = self.amount[past] - self.amount[index, None, None]
        edge = torch.stack([torch.log1p(age) / 5, known.float(), labels, (age < 1).float(), larger], -1)
        return self.rows.rows.rows(index), self.columns[index].float(), self.columns[past].float(), edge, there


def graph_logits(prepared: Prepared, rows: GraphRows, fit: NDArray[np.intp], seed: int) -> Floats:
    """Train on the rows of `fit`, score the test rows."""
    torch.manual_seed(seed)
    device = rows.columns.device
    plain = FraudNet(prepared.data.edges, prepared.data.encoder.cardinalities, net_config(DEFAULTS))
    net = GraphNet(plain, rows.columns.shape[1]).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), DEFAULTS["learning_rate"], weight_decay=DEFAULTS["weight_decay"])
    index, num_batches = torch.from_numpy(fit).to(device), max(1, len(fit) // DEFAULTS["batch_size"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, DEFAULTS["learning_rate"], EPOCHS * num_batches + 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        net.train()
        for part in torch.randperm(len(index), generator=generator).to(device).tensor_split(num_batches):
            logits, balance = net(*rows.take(index[part]))
            loss = nn.functional.binary_cross_entropy_with_logits(logits, rows.rows.labels[index[part]]) + balance
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        asked = torch.from_numpy(prepared.test).to(device).split(4096)
        return torch.cat([net(*rows.take(part))[0] for part in asked]).double().cpu().numpy()


def main() -> None:
    """All seeds, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data")
    parser.add_argument("--until", type=float, default=1.0)
    call, _ = parser.parse_known_args()
    options = ieee_options(call, constraints=Constraints())
    held_back = round((1 - call.until) * pq.read_metadata(options.table).num_rows)
    prepared = Prepared(replace(options, num_held_back=held_back), Reporter(), publish=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fit, labels = np.concatenate([prepared.train, prepared.validation]), prepared.labels
    everyone = np.arange(len(labels))
    neighbours = [PastNeighbours.of(relation, prepared.events).newest(everyone, NEIGHBOURS) for relation in RELATIONS]
    for relation, past in zip(RELATIONS, neighbours, strict=True):
        check(relation, prepared.events, past)
    graph, numbers = GraphRows(prepared, neighbours, device), prepared.rows.rows.numbers()
    with_aggregates = np.hstack([numbers, aggregates(prepared, neighbours)])
    data = FraudData(
        encoder=prepared.data.encoder, edges=prepared.data.edges, train=prepared.rows.take(torch.from_numpy(fit)),
        validation=None,
    )  # fmt: skip
    test_rows = prepared.rows.rows.rows(torch.from_numpy(prepared.test))
    found: dict[str, list[dict[str, float]]] = {}

    def measured(name: str, logits: Floats) -> Floats:
        scaled = (logits - logits.mean()) / logits.std()
        found.setdefault(name, []).append(fraud_metrics(1 / (1 + np.exp(-logits)), labels[prepared.test]))
        print(f"  {name}: AP {found[name][-1]['average_precision']:.4f}", flush=True)
        return scaled

    def trees(name: str, columns: NDArray[np.float32], seed: int) -> Floats:
        fitted = train_trees(
            TreeRows(columns[fit], labels[fit], np.ones(len(fit), dtype=np.float32)), seed=seed, num_trees=NUM_TREES
        ).trees
        return measured(name, fitted.logits(columns[prepared.test]))

    for seed in range(call.seeds):
        plain = trees("trees", numbers, seed)
        trees("trees with neighbours' aggregates", with_aggregates, seed)
        net = train_net(DEFAULTS, data, num_epochs=EPOCHS, seed=seed).net
        of_net = measured("net", net_logits(net.to(device), test_rows))
        of_graph = measured("graph net", graph_logits(prepared, graph, fit, seed))
        for name, other in (("net", of_net), ("graph net", of_graph), ("both", (of_net + of_graph) / 2)):
            measured(f"trees and a fifth of {name}", (1 - NET_WEIGHT) * plain + NET_WEIGHT * other)
    rows = []
    for name, metrics in found.items():
        for shown in SHOWN:
            values = [m[shown] for m in metrics]
            baseline = float(np.mean([m[shown] for m in found["trees"]]))
            mean = float(np.mean(values))
            spread = (max(values) - min(values)) / mean
            rows.append(
                row(f"{name}: {shown}", mean, "", peer=baseline, peer_name="trees", higher_is_better=True,
                    spread=spread, runs=len(values))
            )  # fmt: skip
    finish("fraud_graph", rows, torch.cuda.get_device_name() if device.type == "cuda" else "CPU")


if __name__ == "__main__":
    main()
