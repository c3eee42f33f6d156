"""Train one fraud net: weighted cross-entropy, balance loss, average precision on validation decides."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_platform.models.fraud import (
    EncodedRows,
    FraudModel,
    FraudNet,
    FraudNetConfig,
    TabularEncoder,
    mean_embedding,
)
from assay_platform.moe import BackboneConfig
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.training import FitResult, TrainConfig, fit
from assay_platform.tuning.space import OneOf, Real, Space
from numpy.typing import NDArray
from torch import Tensor

_EVALUATION_CHUNK = 8192
_MIN_BATCH, _MIN_BATCHES = 32, 64

# What a search may vary, and where it starts.
SPACE: Space = {
    "learning_rate": Real(low=5e-4, high=6e-3, log=True),
    "positive_weight": Real(low=1.0, high=8.0, log=True),
    "dropout": Real(low=0.0, high=0.4),
    "weight_decay": Real(low=1e-3, high=0.3, log=True),
    "width": OneOf((64, 96, 128, 192)),
    "num_experts": OneOf((4, 8, 16)),
}
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "positive_weight": 1.0,
    "dropout": 0.15,
    "weight_decay": 0.03,
    "width": 128,
    "num_experts": 8,
    "top_k": 2,
    "num_blocks": 2,
    "embedding_dim": 8,
    "num_bins": 16,
    "batch_size": 512,
}


class LabelledRows(NamedTuple):
    """Rows with their labels."""

    rows: EncodedRows
    labels: Tensor  # float32

    def take(self, index: Tensor) -> "LabelledRows":
        """A subset of rows."""
        return LabelledRows(self.rows.rows(index), self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class FraudData:
    """What a training needs besides its hyperparameters."""

    encoder: TabularEncoder
    edges: Tensor
    train: LabelledRows
    validation: LabelledRows


def net_config(params: Mapping[str, Any]) -> FraudNetConfig:
    """Hyperparameters → shape of the net."""
    return FraudNetConfig(
        embedding_dim=params["embedding_dim"],
        num_bins=params["num_bins"],
        backbone=BackboneConfig(
            width=params["width"],
            hidden=params["width"],
            num_blocks=params["num_blocks"],
            num_experts=params["num_experts"],
            top_k=params["top_k"],
            dropout=params["dropout"],
        ),
    )


def num_batches(params: Mapping[str, Any], num_rows: int) -> int:
    """Steps an epoch: batches of the given size, smaller ones where the table is small."""
    size = min(int(params["batch_size"]), max(_MIN_BATCH, num_rows // _MIN_BATCHES))
    return max(1, num_rows // size)


class TrainedNet(NamedTuple):
    """A net and how it came about."""

    net: FraudNet
    fitted: FitResult
    routing: RoutingMonitor  # a report an epoch


def train_net(
    params: Mapping[str, Any],
    data: FraudData,
    *,
    num_epochs: int,
    seed: int,
    on_epoch: Callable[[int, float], None] = lambda epoch, metric: None,
) -> TrainedNet:
    """Train from scratch; the same seed gives the same weights on the same machine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = FraudNet(data.edges, data.encoder.cardinalities, net_config(params))
    steps = num_batches(params, len(data.train))
    weight = torch.tensor(float(params["positive_weight"]))

    def batches(_: int) -> Iterator[LabelledRows]:
        order = torch.randperm(len(data.train), generator=generator)
        for part in order.tensor_split(steps):
            yield data.train.take(part)

    def loss(batch: LabelledRows) -> Tensor:
        logits, balance = net(batch.rows)
        likelihood = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels, pos_weight=weight)
        total: Tensor = likelihood + balance
        return total

    labels = data.validation.labels.numpy() > 0.5

    def evaluate() -> float:
        from sklearn.metrics import average_precision_score

        return float(average_precision_score(labels, net_logits(net, data.validation.rows)))

    config = TrainConfig(
        num_epochs=num_epochs,
        learning_rate=float(params["learning_rate"]),
        weight_decay=float(params["weight_decay"]),
    )

    def epoch_done(epoch: int, metric: float) -> None:
        monitor.metrics()
        on_epoch(epoch, metric)

    with RoutingMonitor(net) as monitor:
        result = fit(
            net,
            batches=batches,
            num_batches=steps,
            loss=loss,
            evaluate=evaluate,
            config=config,
            on_epoch=epoch_done,
        )
    return TrainedNet(net, result, monitor)


def net_logits(net: FraudNet, rows: EncodedRows) -> NDArray[np.float64]:
    """Logits in chunks."""
    with torch.inference_mode():
        starts = range(0, len(rows.values_NF), _EVALUATION_CHUNK)
        parts = [net(rows.rows(slice(start, start + _EVALUATION_CHUNK)))[0] for start in starts]
    return torch.cat(parts).double().numpy()


def as_model(net: FraudNet, params: Mapping[str, Any], data: FraudData) -> FraudModel:
    """Wrap a net; explanations start from the mean legitimate training row."""
    legitimate = torch.nonzero(data.train.labels < 0.5).squeeze(-1)
    reference = mean_embedding(net, data.train.rows.rows(legitimate))
    return FraudModel(net, data.encoder, net_config(params), reference_GP=reference)


def objective(params: dict[str, Any], data: FraudData, report: Callable[[int, float], None]) -> None:
    """One trial of a search."""
    train_net(params, data, num_epochs=int(params["num_epochs"]), seed=int(params["seed"]), on_epoch=report)
