"""Train one fraud net: weighted cross-entropy, balance loss, average precision on validation decides."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from assay_platform.models.encoding import EncodedRows, TabularEncoder, typical_row
from assay_platform.models.fraud import FraudModel, FraudModelParts, FraudNet, FraudNetConfig
from assay_platform.moe import BackboneConfig
from assay_platform.monitoring.routing import RoutingMonitor
from assay_platform.training import ALONE, Checkpoint, FitResult, Ranks, TrainConfig, fastest_device, fit
from assay_platform.tuning.space import OneOf, Real, Space
from numpy.typing import NDArray
from torch import Tensor

_EVALUATION_CHUNK = 8192
_MIN_BATCH, _MIN_BATCHES = 32, 64
# What another form of a fraud counts beside the fraud itself. For trees, on a fold of IEEE-CIS: 1 costs 0.028 of
# average precision and keeps 92 % of recall under attack, 0.5 costs 0.012 and keeps 91 %, 0.25 keeps 85 %.
FORM_WEIGHT = 0.5

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
    "numeric_embedding": "piecewise_linear",
    "num_members": 1,
    "batch_size": 1024,
    "update_on": "device",  # see `TrainConfig`
}


class LabelledRows(NamedTuple):
    """Rows with their labels."""

    rows: EncodedRows
    labels: Tensor  # float32

    def take(self, index: Tensor | slice) -> "LabelledRows":
        """A subset of rows."""
        return LabelledRows(self.rows.rows(index), self.labels[index])

    def to(self, device: torch.device) -> "LabelledRows":
        """The rows on another device."""
        return LabelledRows(self.rows.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.labels)


class Copies(NamedTuple):
    """Other forms that the frauds of a table could have had.

    rows: (frauds, forms, …). of (N,): for each training row its place among the frauds, -1 for an honest one.
    """

    rows: EncodedRows
    of: Tensor

    def to(self, device: torch.device) -> "Copies":
        """The forms on another device."""
        return Copies(self.rows.to(device), self.of.to(device))

    def and_also(self, forms: Sequence[EncodedRows]) -> "Copies":
        """One more form of every fraud, in the order of `rows`, from each of `forms`."""
        parts = zip(self.rows, *forms, strict=True)
        return self._replace(
            rows=EncodedRows(*(torch.cat([held, *(f.unsqueeze(1) for f in new)], dim=1) for held, *new in parts))
        )

    def worst(self, net: Callable[[EncodedRows], tuple[Tensor, Any]], frauds: Tensor) -> EncodedRows:
        """Of each fraud the form that the net takes for the most harmless."""
        values, codes = self.rows.values_NF[frauds], self.rows.codes_NC[frauds]
        with torch.no_grad():
            logits, _ = net(EncodedRows(values.flatten(0, 1), codes.flatten(0, 1)))
        chosen = logits.view(values.shape[:2]).argmin(dim=1)
        at = torch.arange(len(frauds), device=chosen.device)
        return EncodedRows(values[at, chosen], codes[at, chosen])


@dataclass(frozen=True, kw_only=True)
class FraudData:
    """What a training needs besides its hyperparameters. Without validation rows the last weights are kept.

    copies: given, training is adversarial: beside each fraud, the worst of its forms counts as another, but less.
    """

    encoder: TabularEncoder
    edges: Tensor
    train: LabelledRows
    validation: LabelledRows | None
    copies: Copies | None = None


def net_config(params: Mapping[str, Any]) -> FraudNetConfig:
    """Hyperparameters → shape of the net."""
    return FraudNetConfig(
        embedding_dim=params["embedding_dim"],
        num_bins=params["num_bins"],
        numeric_embedding=params["numeric_embedding"],
        num_members=params["num_members"],
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
    device: torch.device | None = None,
    start: FraudNet | None = None,
    checkpoint: Checkpoint | None = None,
    ranks: Ranks = ALONE,
) -> TrainedNet:
    """Train from scratch, or on from a net; the same seed gives the same weights on the same machine.

    start: is left as it is. device: a GPU by default where there is one. The net that comes back is on the CPU.
    checkpoint: a training that was killed goes on; its routing report begins there. ranks: that train it together, all
    with the same arguments; the routing report is of one's own share.
    """
    torch.manual_seed(seed)
    device = device or fastest_device()
    generator = torch.Generator().manual_seed(seed)
    net = FraudNet(data.edges, data.encoder.cardinalities, net_config(params)) if start is None else deepcopy(start)
    net = net.requires_grad_(True).to(device)
    train, copies = data.train.to(device), None if data.copies is None else data.copies.to(device)
    steps = num_batches(params, len(data.train))
    weight = torch.tensor(float(params["positive_weight"]), device=device)

    def batches(_: int) -> Iterable[Tensor]:
        return torch.randperm(len(train), generator=generator).to(device).tensor_split(steps)

    def loss(part: Tensor) -> Tensor:
        mine, num_rows = part[ranks.share(len(part))], len(part)
        rows, labels = train.take(mine)
        weights = torch.ones(len(mine), device=device)
        if copies is not None:
            of = copies.of[mine]
            num_rows += int((copies.of[part] >= 0).sum())
            forms = copies.worst(net, of[of >= 0])
            rows = EncodedRows(*(torch.cat(pair) for pair in zip(rows, forms, strict=True)))
            labels = torch.cat([labels, torch.ones(len(forms.values_NF), device=device)])
            weights = torch.cat([weights, torch.full((len(forms.values_NF),), FORM_WEIGHT, device=device)])
        logits_NK, balance = net.members(net.hidden(net.embed(rows)))
        likelihood = torch.nn.functional.binary_cross_entropy_with_logits(
            logits_NK, labels.unsqueeze(-1).expand_as(logits_NK), weights.unsqueeze(-1), pos_weight=weight,
            reduction="sum",
        )  # fmt: skip
        total: Tensor = likelihood / (len(part) * logits_NK.shape[1]) + balance * (len(logits_NK) / num_rows)
        return total

    def evaluate(held: LabelledRows) -> float:
        from sklearn.metrics import average_precision_score

        return float(average_precision_score(held.labels.numpy() > 0.5, net_logits(net, held.rows)))

    config = TrainConfig(
        num_epochs=num_epochs,
        learning_rate=float(params["learning_rate"]),
        weight_decay=float(params["weight_decay"]),
        update_on=params.get("update_on", DEFAULTS["update_on"]),  # models of before do not say
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
            evaluate=None if data.validation is None else partial(evaluate, data.validation),
            config=config,
            on_epoch=epoch_done,
            units=list(net.backbone.layers),
            checkpoint=checkpoint,
            generators=[generator],
            ranks=ranks,
        )
    return TrainedNet(net.cpu(), result, monitor)


def net_logits(net: FraudNet, rows: EncodedRows) -> NDArray[np.float64]:
    """Logits in chunks, where the net is."""
    device = next(net.parameters()).device
    with torch.inference_mode():
        starts = range(0, len(rows.values_NF), _EVALUATION_CHUNK)
        parts = [net(rows.rows(slice(start, start + _EVALUATION_CHUNK)).to(device))[0] for start in starts]
    return torch.cat(parts).double().cpu().numpy()


def as_model(net: FraudNet, params: Mapping[str, Any], data: FraudData, **parts: Any) -> FraudModel:
    """A net with other parts of a model; explanations start from the typical legitimate training row."""
    legitimate = torch.nonzero(data.train.labels < 0.5).squeeze(-1)
    reference = typical_row(data.train.rows.rows(legitimate))
    return FraudModel(
        FraudModelParts(net=net, encoder=data.encoder, config=net_config(params), reference=reference, **parts)
    )


def objective(params: dict[str, Any], data: FraudData, report: Callable[[int, float], None]) -> None:
    """One trial of a search."""
    train_net(params, data, num_epochs=int(params["num_epochs"]), seed=int(params["seed"]), on_epoch=report)
