"""The fraud model: a net on the MoE backbone, boosted trees, or both, blended into one calibrated probability.

`FraudNet` is the torch module. `FraudModel` is what services and pipelines hold: net, trees, blend, calibration,
decision policy and reference row, saved and loaded as an artifact.
"""

# N rows, F numeric columns, C categorical columns, G = F + C features, P width of one embedding, K members, D width

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay_platform.errors import ArtifactError, ConfigError
from assay_platform.models.artifact import load_artifact, load_weights, save_artifact
from assay_platform.models.calibration import PlattCalibration, sigmoid
from assay_platform.models.decisions import Costs, Decided, Policy
from assay_platform.models.embeddings import CategoricalEmbedding, PeriodicEmbedding, PiecewiseLinearEmbedding
from assay_platform.models.encoding import Columns, EncodedRows, TabularEncoder
from assay_platform.models.explain import Origin, integrated_gradients, segments_for
from assay_platform.models.trees import TreeEnsemble
from assay_platform.moe import Backbone, BackboneConfig
from assay_platform.moe.fences import Fence, Fences

_SCORING_CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class FraudNetConfig:
    """Shape of the net.

    max_embedded: a category with more codes than this has no vector: what a net learns of single cards is wrong a
    month later (IEEE-CIS: average precision 0.52 with vectors of cards, 0.58 without). Trees still see its rank, and
    features say what is known of it.
    num_members: nets that share all weights but a scale of each input and the head; each has a loss of its own, their
    logits are averaged (TabM-mini: Gorishniy et al., arXiv:2410.24210). The backbone does so many times the work.
    """

    embedding_dim: int = 8
    num_bins: int = 16
    numeric_embedding: Literal["piecewise_linear", "periodic"] = "piecewise_linear"
    num_members: int = 1
    max_embedded: int = 200
    backbone: BackboneConfig = field(default_factory=BackboneConfig)


class FraudNet(nn.Module):
    """(values, codes) → logits."""

    def __init__(self, edges: Tensor, cardinalities: tuple[int, ...], config: FraudNetConfig) -> None:
        super().__init__()
        self.embedded = [c for c, size in enumerate(cardinalities) if size <= config.max_embedded]
        embedding = PeriodicEmbedding if config.numeric_embedding == "periodic" else PiecewiseLinearEmbedding
        self.numeric = embedding(edges, config.embedding_dim)
        sizes = tuple(cardinalities[c] for c in self.embedded)
        self.categorical = CategoricalEmbedding(sizes, config.embedding_dim)
        num_features = edges.shape[0] + len(sizes)
        num_inputs = num_features * config.embedding_dim
        self.backbone = Backbone(num_inputs, config.backbone)
        self.head = nn.Linear(config.backbone.width, config.num_members)  # a row of weights a member
        self.scale = None
        if config.num_members > 1:
            self.scale = nn.Parameter(torch.randint(0, 2, (config.num_members, num_inputs)) * 2.0 - 1.0)

    def embed(self, batch: EncodedRows) -> Tensor:
        """(N, features that have a vector, P)."""
        codes = batch.codes_NC if len(self.embedded) == batch.codes_NC.shape[1] else batch.codes_NC[:, self.embedded]
        return torch.cat([self.numeric(batch.values_NF), self.categorical(codes)], dim=1)

    def hidden(self, embedded_NGP: Tensor) -> Tensor:
        """(N, K, D): the affine map that comes first, for each member."""
        inputs_NI = embedded_NGP.flatten(1)
        scaled_NKI = inputs_NI.unsqueeze(1) if self.scale is None else inputs_NI.unsqueeze(1) * self.scale
        hidden_NKD: Tensor = self.backbone.project(scaled_NKI)
        return hidden_NKD

    def members(self, hidden_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) of each member and the balance loss (scalar)."""
        out = self.backbone.blocks(hidden_NKD.flatten(0, 1))
        return (out.y_ND.view_as(hidden_NKD) * self.head.weight).sum(-1) + self.head.bias, out.balance_loss

    def logits(self, hidden_NKD: Tensor) -> Tensor:
        """(N,) logits without the loss."""
        return self.members(hidden_NKD)[0].mean(-1)

    def forward(self, batch: EncodedRows) -> tuple[Tensor, Tensor]:
        """Logits (N,) and the balance loss (scalar)."""
        logits_NK, balance = self.members(self.hidden(self.embed(batch)))
        return logits_NK.mean(-1), balance


@dataclass(frozen=True, kw_only=True)
class Blend:
    """logit = net · net's logit + trees · trees' logit."""

    net: float = 1.0
    trees: float = 0.0

    def __post_init__(self) -> None:
        if not (np.isfinite([self.net, self.trees]).all() and min(self.net, self.trees) >= 0 and self.net + self.trees):
            raise ConfigError(f"blend of net {self.net} and trees {self.trees}: need 0 or more, and one above 0")


class NetSlopes(NamedTuple):
    """How the net's logit changes from N rows, to first order."""

    numbers: NDArray[np.float64]  # (N, F) by one unit of a number; 0 where it is missing
    codes: dict[int, NDArray[np.float64]]  # categorical column that has vectors → (N, its codes), by taking the code


class FraudScores(NamedTuple):
    """Scores of a batch."""

    probability: NDArray[np.float64]  # calibrated
    decided: Decided


class Explanation(NamedTuple):
    """sigmoid(base + Σ contribution) is the calibrated probability."""

    base: float
    contribution_NG: NDArray[np.float64]  # calibrated log-odds, in the order of `FraudModel.feature_names`


@dataclass(frozen=True, kw_only=True)
class FraudModelParts:
    """All that a fraud model is made of; `replace` makes another model of it.

    reference: the one row that explanations start from, such as the typical legitimate payment. net: None if trees
    alone answer.
    """

    encoder: TabularEncoder
    reference: EncodedRows
    config: FraudNetConfig = field(default_factory=FraudNetConfig)
    net: FraudNet | None = None
    trees: TreeEnsemble | None = None
    blend: Blend = field(default_factory=Blend)
    calibration: PlattCalibration = field(default_factory=PlattCalibration)
    policy: Policy = field(default_factory=Policy)
    amount: str | None = None  # the column that costs depend on

    def __post_init__(self) -> None:
        if (self.blend.net and self.net is None) or (self.blend.trees and self.trees is None):
            raise ConfigError(f"blend {self.blend} has a part that the model lacks")


class FraudModel:
    """A trained model ready to score. Thread-safe: scoring changes nothing."""

    def __init__(self, parts: FraudModelParts) -> None:
        self.parts = parts
        self._trees = parts.trees if parts.blend.trees else None
        self._known_origin: tuple[tuple[Fence, ...], Origin] | None = None
        self.fences: tuple[Fences, ...] = ()
        if parts.net is not None:
            parts.net.eval().requires_grad_(False)
            self.fences = parts.net.backbone.guard()  # an expert that fails is left out, the others answer

    @property
    def feature_names(self) -> tuple[str, ...]:
        """In the order of contributions."""
        return self.parts.encoder.names

    @property
    def policy(self) -> Policy:
        """Probability → decision."""
        return self.parts.policy

    @property
    def calibration(self) -> PlattCalibration:
        """Blended logit → probability."""
        return self.parts.calibration

    @property
    def num_parameters(self) -> int:
        """Trained weights of the net, leaves of the trees."""
        num_leaves = 0 if self._trees is None else int((self._trees.column < 0).sum())
        net = self.parts.net
        return num_leaves + (0 if net is None else sum(p.numel() for p in net.parameters()))

    @property
    def _net(self) -> FraudNet:
        assert self.parts.net is not None  # whoever asks has seen that the blend has a net
        return self.parts.net

    def encode(self, columns: Columns) -> EncodedRows:
        """Named columns → tensors."""
        return self.parts.encoder.apply(columns)

    def reference_columns(self) -> dict[str, float | str | None]:
        """The reference row by name, as people write it; None where it is missing."""
        encoder, reference = self.parts.encoder, self.parts.reference
        numbers = [None if np.isnan(v) else v for v in reference.values_NF[0].tolist()]
        words = [
            vocabulary[code - 1] if code else None
            for vocabulary, code in zip(encoder.vocabularies, reference.codes_NC[0].tolist(), strict=True)
        ]
        return dict(zip(encoder.names, [*numbers, *words], strict=True))

    def net_logits(self, rows: EncodedRows) -> NDArray[np.float64]:
        """Logits of the net alone, in chunks of bounded memory."""
        with torch.inference_mode():
            parts = [
                self._net(rows.rows(slice(start, start + _SCORING_CHUNK)))[0]
                for start in range(0, len(rows.values_NF), _SCORING_CHUNK)
            ]
        return torch.cat(parts).double().numpy() if parts else np.empty(0)

    def net_slopes(self, rows: EncodedRows) -> NetSlopes:
        """Gradients of the net's logits, for whoever attacks it. Trees have none: without a net they are 0."""
        if self.parts.net is None:
            return NetSlopes(np.zeros(tuple(rows.values_NF.shape)), {})
        net, sizes = self._net, self.parts.encoder.cardinalities
        with torch.enable_grad():
            values_NF = rows.values_NF.detach().requires_grad_(True)
            embedded_NGP = net.embed(EncodedRows(values_NF, rows.codes_NC))
            total = net.logits(net.hidden(embedded_NGP)).sum()
            numbers_NF, slope_NGP = torch.autograd.grad(total, (values_NF, embedded_NGP))
        codes = {}
        for place, column in enumerate(net.embedded):
            vectors = net.categorical.column(place, sizes[column])
            slope_NP = slope_NGP[:, len(self.parts.encoder.numeric) + place]
            own_N = (slope_NP * vectors[rows.codes_NC[:, column]]).sum(-1, keepdim=True)
            codes[column] = (slope_NP @ vectors.T - own_N).double().numpy()
        return NetSlopes(numbers_NF.nan_to_num().double().numpy(), codes)

    def logits(self, rows: EncodedRows) -> NDArray[np.float64]:
        """Blended, uncalibrated logits."""
        blend = self.parts.blend
        total = np.zeros(len(rows.values_NF))
        if blend.net:
            total += blend.net * self.net_logits(rows)
        if self._trees is not None:
            total += blend.trees * self._trees.logits(rows.numbers())
        return total

    def score(self, rows: EncodedRows) -> FraudScores:
        """Calibrated probabilities and decisions."""
        return self._decided(self.calibration.probability(self.logits(rows)), rows)

    def explain(self, rows: EncodedRows) -> tuple[FraudScores, Explanation]:
        """Scores with contributions that add up to the calibrated log-odds, both parts against one reference row."""
        blend, reference = self.parts.blend, self.parts.reference
        num_numeric = len(self.parts.encoder.numeric)
        total_NG = np.zeros((len(rows.values_NF), len(self.feature_names)))
        base = 0.0
        if blend.net:
            with torch.no_grad():
                embedded_NGP = self._net.embed(rows)
            contribution, start = integrated_gradients(
                self._net.hidden, self._net.logits, embedded_NGP, self._origin,
                num_segments=segments_for(blend.net / (blend.net + blend.trees)),
            )  # fmt: skip
            places = [*range(num_numeric), *(num_numeric + c for c in self._net.embedded)]
            total_NG[:, places] = blend.net * contribution.numpy()
            base += blend.net * float(start)
        if self._trees is not None:
            contribution_NG, start_of_trees = self._trees.explain(rows.numbers(), reference.numbers()[0])
            total_NG += blend.trees * contribution_NG
            base += blend.trees * start_of_trees
        slope, intercept = self.calibration.slope, self.calibration.intercept
        explanation = Explanation(slope * base + intercept, slope * total_NG)
        probability = sigmoid(explanation.base + explanation.contribution_NG.sum(axis=1))
        return self._decided(probability, rows), explanation

    @property
    def _origin(self) -> Origin:
        """Where explanations of the net start; another place as long as experts are fenced off."""
        fenced = tuple(fence for fences in self.fences for fence in fences.fenced())
        if self._known_origin is None or self._known_origin[0] != fenced:
            with torch.no_grad():
                reference_GP = self._net.embed(self.parts.reference)[0]
            self._known_origin = fenced, Origin.of(self._net.hidden, self._net.logits, reference_GP)
        return self._known_origin[1]

    def _decided(self, probability: NDArray[np.float64], rows: EncodedRows) -> FraudScores:
        amount = None
        if self.parts.amount is not None:
            amount = rows.values_NF[:, self.parts.encoder.numeric.index(self.parts.amount)].double().numpy()
        return FraudScores(probability, self.policy.decide(probability, amount))

    def changed(self, **parts: Any) -> "FraudModel":
        """The same model with other parts."""
        return FraudModel(replace(self.parts, **parts))

    def save(self, folder: Path, companions: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the artifact; see `artifact`."""
        parts = self.parts
        config = {
            "net": None if parts.net is None else asdict(parts.config),
            "encoder": {k: v for k, v in asdict(parts.encoder).items() if not k.startswith("_")},
            "blend": asdict(parts.blend),
            "calibration": asdict(parts.calibration),
            "policy": asdict(parts.policy),
            "amount": parts.amount,
        }
        tensors = {} if parts.net is None else {f"net.{k}": tensor for k, tensor in self._net.state_dict().items()}
        tensors |= {"reference.values": parts.reference.values_NF, "reference.codes": parts.reference.codes_NC}
        if self._trees is not None:
            tensors |= {f"trees.{name}": tensor for name, tensor in self._trees.to_tensors().items()}
        save_artifact(folder, kind="fraud", config=config, tensors=tensors, companions=companions)

    @staticmethod
    def load(folder: Path) -> "FraudModel":
        """Read an artifact; nothing is unpickled.

        Raises:
            ArtifactError: the artifact is damaged or does not fit this release.
        """
        config, tensors = load_artifact(folder, kind="fraud")
        try:
            net_config = FraudNetConfig()
            if config["net"] is not None:
                backbone = BackboneConfig(**config["net"]["backbone"])
                net_config = FraudNetConfig(**{**config["net"], "backbone": backbone})
            encoder = TabularEncoder(
                numeric=tuple(config["encoder"]["numeric"]),
                categorical=tuple(config["encoder"]["categorical"]),
                vocabularies=tuple(tuple(words) for words in config["encoder"]["vocabularies"]),
            )
            blend = Blend(**config["blend"])
            calibration = PlattCalibration(**config["calibration"])
            costs = config["policy"]["costs"]
            policy = Policy(**{**config["policy"], "costs": None if costs is None else Costs(**costs)})
            amount = config["amount"]
            if amount is not None:
                encoder.numeric.index(amount)  # or a ValueError
            reference = EncodedRows(tensors["reference.values"], tensors["reference.codes"])
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise ArtifactError(f"{folder}: config.json does not describe a fraud model: {error}") from error
        net = None
        if config["net"] is not None:
            edges = torch.zeros(len(encoder.numeric), net_config.num_bins + 1)
            net = FraudNet(edges, encoder.cardinalities, net_config)
            load_weights(net, _under("net.", tensors), folder)
        trees = TreeEnsemble.from_tensors(_under("trees.", tensors), len(encoder.names)) if blend.trees else None
        try:
            parts = FraudModelParts(
                net=net, encoder=encoder, config=net_config, reference=reference, trees=trees, blend=blend,
                calibration=calibration, policy=policy, amount=amount,
            )  # fmt: skip
        except ConfigError as error:
            raise ArtifactError(f"{folder}: {error}") from error
        return FraudModel(parts)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
