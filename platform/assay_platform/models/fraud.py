"""The fraud model: feature embeddings → MoE backbone → one logit, calibrated.

`FraudNet` is the torch module. `FraudModel` is what services and pipelines hold: the net with its encoder,
calibration, threshold and reference, saved and loaded as an artifact.
"""

# N rows, F numeric columns, C categorical columns, G = F + C features, P width of one embedding

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay_platform.errors import ArtifactError, InputError
from assay_platform.models.artifact import load_artifact, load_weights, save_artifact
from assay_platform.models.calibration import PlattCalibration, sigmoid
from assay_platform.models.embeddings import CategoricalEmbedding, PiecewiseLinearEmbedding
from assay_platform.models.explain import integrated_gradients
from assay_platform.moe import Backbone, BackboneConfig

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]
_SCORING_CHUNK = 8192
_LARGEST = 3e38


@dataclass(frozen=True, kw_only=True)
class TabularEncoder:
    """Fitted state that turns named columns into tensors.

    vocabularies: for each categorical column its known values, most frequent first; code 0 is 'missing or
    never seen', code i + 1 is vocabulary[i].
    """

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Feature names in the order of embeddings and contributions."""
        return self.numeric + self.categorical

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Number of codes of each categorical column, code 0 included."""
        return tuple(len(vocabulary) + 1 for vocabulary in self.vocabularies)

    def apply(self, columns: Columns) -> "EncodedRows":
        """Encode rows.

        Raises:
            InputError: a column is missing.
        """
        for name in self.names:
            if name not in columns:
                raise InputError(f"column {name!r} is missing; the model needs {len(self.names)} columns")
        num_rows = len(columns[self.names[0]])
        values_NF = np.empty((num_rows, len(self.numeric)), dtype=np.float32)
        for i, name in enumerate(self.numeric):
            # Beyond float32 a number is as good as its largest; an infinity would make 0 · inf in an empty bin.
            values_NF[:, i] = np.clip(np.asarray(columns[name], dtype=np.float64), -_LARGEST, _LARGEST)
        codes_NC = np.zeros((num_rows, len(self.categorical)), dtype=np.int64)
        for i, name in enumerate(self.categorical):
            code_of = self._code_of[i]
            codes_NC[:, i] = [code_of.get(value, 0) for value in columns[name]]
        return EncodedRows(torch.from_numpy(values_NF), torch.from_numpy(codes_NC))

    def __post_init__(self) -> None:
        lookup = [{value: i + 1 for i, value in enumerate(words)} for words in self.vocabularies]
        object.__setattr__(self, "_code_of", lookup)

    _code_of: Any = None


class EncodedRows(NamedTuple):
    """A batch as the net takes it."""

    values_NF: Tensor  # float32, NaN where missing
    codes_NC: Tensor  # int64

    def rows(self, index: Tensor | slice) -> "EncodedRows":
        """A subset of rows."""
        return EncodedRows(self.values_NF[index], self.codes_NC[index])


def fit_encoder(
    columns: Columns,
    *,
    numeric: Sequence[str],
    categorical: Sequence[str],
    num_bins: int,
    max_categories: int,
) -> tuple[TabularEncoder, Tensor]:
    """Learn vocabularies and quantile bin edges (F, num_bins + 1) from training rows.

    A category seen fewer than 5 times is left to code 0, so that code 0 is trained and a new value at serving
    time meets a row of weights that has learned something.
    """
    vocabularies = []
    for name in categorical:
        counts: dict[str, int] = {}
        for value in columns[name]:
            if value is not None:
                counts[value] = counts.get(value, 0) + 1
        ranked = sorted((v for v in counts if counts[v] >= 5), key=lambda v: (-counts[v], v))
        vocabularies.append(tuple(ranked[:max_categories]))
    edges = np.zeros((len(numeric), num_bins + 1), dtype=np.float64)
    for i, name in enumerate(numeric):
        values = np.asarray(columns[name], dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            unique = np.unique(np.quantile(values, np.linspace(0.0, 1.0, num_bins + 1)))
            edges[i, : len(unique)] = unique
            edges[i, len(unique) :] = unique[-1]
    encoder = TabularEncoder(numeric=tuple(numeric), categorical=tuple(categorical), vocabularies=tuple(vocabularies))
    return encoder, torch.from_numpy(edges.astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class FraudNetConfig:
    """Shape of the net."""

    embedding_dim: int = 8
    num_bins: int = 16
    backbone: BackboneConfig = field(default_factory=BackboneConfig)


class FraudNet(nn.Module):
    """(values, codes) → logits."""

    def __init__(self, edges: Tensor, cardinalities: tuple[int, ...], config: FraudNetConfig) -> None:
        super().__init__()
        self.numeric = PiecewiseLinearEmbedding(edges, config.embedding_dim)
        self.categorical = CategoricalEmbedding(cardinalities, config.embedding_dim)
        num_features = edges.shape[0] + len(cardinalities)
        self.backbone = Backbone(num_features * config.embedding_dim, config.backbone)
        self.head = nn.Linear(config.backbone.width, 1)

    def embed(self, batch: EncodedRows) -> Tensor:
        """(N, G, P)."""
        return torch.cat([self.numeric(batch.values_NF), self.categorical(batch.codes_NC)], dim=1)

    def from_embeddings(self, embedded_NGP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N,) and the balance loss (scalar)."""
        out = self.backbone(embedded_NGP.flatten(1))
        return self.head(out.y_ND).squeeze(-1), out.balance_loss

    def forward(self, batch: EncodedRows) -> tuple[Tensor, Tensor]:
        """Logits (N,) and the balance loss (scalar)."""
        return self.from_embeddings(self.embed(batch))


class FraudScores(NamedTuple):
    """Scores of a batch."""

    probability: NDArray[np.float64]  # calibrated
    decline: NDArray[np.bool_]


class Explanation(NamedTuple):
    """sigmoid(base + Σ contribution) is the calibrated probability."""

    base: float
    contribution_NG: NDArray[np.float64]  # calibrated log-odds, in the order of `FraudModel.feature_names`


class FraudModel:
    """A trained model ready to score. Thread-safe: scoring changes nothing."""

    def __init__(
        self,
        net: FraudNet,
        encoder: TabularEncoder,
        config: FraudNetConfig,
        *,
        reference_GP: Tensor,
        calibration: PlattCalibration | None = None,
        threshold: float = 0.5,
        target_fpr: float = 0.003,
    ) -> None:
        self._net = net.eval().requires_grad_(False)
        self.fences = net.backbone.guard()  # an expert that fails is left out, the others answer
        self._encoder = encoder
        self._config = config
        self._reference_GP = reference_GP
        self.calibration = calibration or PlattCalibration()
        self.threshold = threshold
        self.target_fpr = target_fpr

    @property
    def feature_names(self) -> tuple[str, ...]:
        """In the order of contributions."""
        return self._encoder.names

    @property
    def num_parameters(self) -> int:
        """Trained weights."""
        return sum(p.numel() for p in self._net.parameters())

    def encode(self, columns: Columns) -> EncodedRows:
        """Named columns → tensors."""
        return self._encoder.apply(columns)

    def logits(self, rows: EncodedRows) -> NDArray[np.float64]:
        """Uncalibrated logits, in chunks of bounded memory."""
        with torch.inference_mode():
            parts = [
                self._net(rows.rows(slice(start, start + _SCORING_CHUNK)))[0]
                for start in range(0, len(rows.values_NF), _SCORING_CHUNK)
            ]
        return torch.cat(parts).double().numpy() if parts else np.empty(0)

    def score(self, rows: EncodedRows) -> FraudScores:
        """Calibrated probabilities and decisions."""
        probability = self.calibration.probability(self.logits(rows))
        return FraudScores(probability, probability >= self.threshold)

    def explain(self, rows: EncodedRows) -> tuple[FraudScores, Explanation]:
        """Scores with contributions that add up to the calibrated log-odds."""
        with torch.no_grad():
            embedded_NGP = self._net.embed(rows)
        contribution, base = integrated_gradients(
            lambda x: self._net.from_embeddings(x)[0], embedded_NGP, self._reference_GP
        )
        slope, intercept = self.calibration.slope, self.calibration.intercept
        explanation = Explanation(slope * float(base) + intercept, slope * contribution.numpy())
        probability = sigmoid(explanation.base + explanation.contribution_NG.sum(axis=1))
        return FraudScores(probability, probability >= self.threshold), explanation

    def calibrated(self, calibration: PlattCalibration, threshold: float, target_fpr: float) -> "FraudModel":
        """The same net with another calibration and threshold."""
        return FraudModel(
            self._net,
            self._encoder,
            self._config,
            reference_GP=self._reference_GP,
            calibration=calibration,
            threshold=threshold,
            target_fpr=target_fpr,
        )

    def save(self, folder: Path, companions: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the artifact; see `artifact`."""
        encoder = {k: v for k, v in asdict(self._encoder).items() if not k.startswith("_")}
        config = {
            "net": asdict(self._config),
            "encoder": encoder,
            "calibration": asdict(self.calibration),
            "threshold": self.threshold,
            "target_fpr": self.target_fpr,
        }
        tensors = {f"net.{name}": tensor for name, tensor in self._net.state_dict().items()}
        save_artifact(
            folder,
            kind="fraud",
            config=config,
            tensors=tensors | {"reference": self._reference_GP},
            companions=companions,
        )

    @staticmethod
    def load(folder: Path) -> "FraudModel":
        """Read an artifact; nothing is unpickled.

        Raises:
            ArtifactError: the artifact is damaged or does not fit this release.
        """
        config, tensors = load_artifact(folder, kind="fraud")
        try:
            net_config = FraudNetConfig(**{**config["net"], "backbone": BackboneConfig(**config["net"]["backbone"])})
            encoder = TabularEncoder(
                numeric=tuple(config["encoder"]["numeric"]),
                categorical=tuple(config["encoder"]["categorical"]),
                vocabularies=tuple(tuple(words) for words in config["encoder"]["vocabularies"]),
            )
            calibration = PlattCalibration(**config["calibration"])
            threshold, target_fpr = float(config["threshold"]), float(config["target_fpr"])
            reference_GP = tensors.pop("reference")
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{folder}: config.json does not describe a fraud model: {error}") from error
        edges = torch.zeros(len(encoder.numeric), net_config.num_bins + 1)
        net = FraudNet(edges, encoder.cardinalities, net_config)
        load_weights(net, {name.removeprefix("net."): t for name, t in tensors.items()}, folder)
        return FraudModel(
            net,
            encoder,
            net_config,
            reference_GP=reference_GP,
            calibration=calibration,
            threshold=threshold,
            target_fpr=target_fpr,
        )


def mean_embedding(net: FraudNet, rows: EncodedRows) -> Tensor:
    """(G, P) mean embedding of rows: the reference that explanations start from."""
    with torch.inference_mode():
        total = torch.zeros(1)
        for start in range(0, len(rows.values_NF), _SCORING_CHUNK):
            total = total + net.embed(rows.rows(slice(start, start + _SCORING_CHUNK))).double().sum(0)
    return (total / max(1, len(rows.values_NF))).float().clone()


__all__ = [
    "Columns",
    "EncodedRows",
    "Explanation",
    "FraudModel",
    "FraudNet",
    "FraudNetConfig",
    "FraudScores",
    "TabularEncoder",
    "fit_encoder",
    "mean_embedding",
]
