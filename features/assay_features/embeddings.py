"""Learned vectors of a key column with many values, trained once, versioned by content, looked up like any feature.

A small network learns to predict the label from the value's vector and the row's numbers (entity embeddings, Guo and
Berkhahn 2016). Values seen fewer than `min_count` times share one vector, which values never seen get too; it is
trained on them and on a random part of all others, so it means 'any value'.
"""

# N rows, V values, W width of a vector, K numbers of the context

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from assay_platform.errors import ArtifactError, DataError
from assay_platform.storage.files import atomic_file
from numpy.typing import NDArray

from assay_features.definitions import Embedding
from assay_features.events import Keys

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class EmbeddingTable:
    """Vectors of the known values of one column; the last row is the shared one of rare and unseen values."""

    column: str
    values: tuple[str, ...]
    vectors_VW: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.vectors_VW.shape[0] != len(self.values) + 1:
            raise DataError(f"{len(self.values)} values need as many vectors and a shared one")
        object.__setattr__(self, "_index", pd.Index(list(self.values), dtype=object))

    @property
    def width(self) -> int:
        """Numbers a vector."""
        return int(self.vectors_VW.shape[1])

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the content: the version."""
        content = "\x00".join((self.column, *self.values)).encode() + self.vectors_VW.astype("<f4").tobytes()
        return hashlib.sha256(content).hexdigest()[:12]

    @property
    def definition(self) -> Embedding:
        """The feature that this table serves."""
        return Embedding(column=self.column, width=self.width, table=self.digest)

    def apply(self, keys: Keys | Sequence[str | None]) -> Floats:
        """(N, W) vectors; values that are rare, unseen or missing get the shared one."""
        index: pd.Index[str] = self._index  # type: ignore[attr-defined]
        rows = index.get_indexer(pd.Index(np.asarray(keys, dtype=object)))
        return self.vectors_VW[rows].astype(np.float64)  # -1, not found, is the last row

    def save(self, folder: Path) -> Path:
        """Write `<digest>.parquet` into a folder, atomically; the same table again changes nothing."""
        path = folder / f"{self.digest}.parquet"
        names = [*self.values, None]
        table = pa.table(
            {"value": pa.array(names, pa.string()), "vector": pa.array(list(self.vectors_VW), pa.list_(pa.float32()))},
            metadata={"column": self.column},
        )
        with atomic_file(path) as part:
            pq.write_table(table, part)
        return path

    @staticmethod
    def load(path: Path) -> "EmbeddingTable":
        """Read a table back.

        Raises:
            ArtifactError: the file is missing, damaged, or not what its name says.
        """
        try:
            table = pq.read_table(path)
            values = table["value"].to_pylist()[:-1]
            vectors = np.stack(table["vector"].to_numpy()).astype(np.float32)
            loaded = EmbeddingTable(table.schema.metadata[b"column"].decode(), tuple(values), vectors)
        except (OSError, KeyError, ValueError, pa.ArrowException, DataError) as error:
            raise ArtifactError(f"{path}: is not a readable embedding table ({error})") from error
        if loaded.digest != path.stem:
            raise ArtifactError(f"{path}: its content has digest {loaded.digest}; the file is damaged")
        return loaded


@dataclass(frozen=True, kw_only=True)
class EmbeddingTraining:
    """How a table is trained."""

    width: int = 8
    min_count: int = 10
    num_epochs: int = 3
    batch_size: int = 1024
    learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    shared_share: float = 0.05  # of rows, each epoch, that see the shared vector instead of their own
    seed: int = 0


def train_embedding(
    column: str,
    keys: Keys,
    context_NK: Floats,
    labels: NDArray[np.bool_],
    training: EmbeddingTraining = EmbeddingTraining(),
) -> EmbeddingTable:
    """Learn vectors of a key column from rows of the training period alone.

    context_NK: numbers of the rows; missing ones become the column's mean. Same seed and rows, same table.

    Raises:
        DataError: no value is frequent enough, or the labels are of one class.
    """
    import torch
    from torch import nn

    if labels.all() or not labels.any():
        raise DataError(f"embedding of {column!r}: all {len(labels)} labels are the same")
    counts = pd.Series(keys).value_counts()
    kept = counts.index[counts >= training.min_count]
    if not len(kept):
        raise DataError(
            f"embedding of {column!r}: no value occurs {training.min_count} times; the commonest does "
            f"{int(counts.iloc[0]) if len(counts) else 0} times"
        )
    values = tuple(sorted(str(value) for value in kept))
    shared = len(values)
    code = pd.Index(list(values), dtype=object).get_indexer(pd.Index(keys))
    code_N = torch.from_numpy(np.where(code < 0, shared, code).astype(np.int64))
    context = _standardised(context_NK)
    target_N = torch.from_numpy(labels.astype(np.float32))
    torch.manual_seed(training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    vectors = nn.Embedding(shared + 1, training.width)
    nn.init.normal_(vectors.weight, std=0.1)
    head = nn.Sequential(nn.Linear(training.width + context.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(
        [*vectors.parameters(), *head.parameters()], lr=training.learning_rate, weight_decay=training.weight_decay
    )
    loss_of = nn.BCEWithLogitsLoss()
    for _ in range(training.num_epochs):
        for rows in torch.split(torch.randperm(len(code_N), generator=generator), training.batch_size):
            seen = code_N[rows]
            hidden = torch.rand(len(rows), generator=generator) < training.shared_share
            seen = torch.where(hidden, torch.full_like(seen, shared), seen)
            logit = head(torch.cat([vectors(seen), context[rows]], dim=1)).squeeze(1)
            optimizer.zero_grad()
            loss_of(logit, target_N[rows]).backward()
            optimizer.step()
    return EmbeddingTable(column, values, vectors.weight.detach().numpy().copy())


def _standardised(context_NK: Floats) -> "torch.Tensor":
    import torch

    filled = np.where(np.isfinite(context_NK), context_NK, np.nan)
    with np.errstate(all="ignore"):
        mean = np.nan_to_num(np.nanmean(filled, axis=0)) if len(filled) else 0.0
        spread = np.nan_to_num(np.nanstd(filled, axis=0)) if len(filled) else 1.0
    scaled = (np.where(np.isnan(filled), mean, filled) - mean) / np.where(spread > 0, spread, 1.0)
    return torch.from_numpy(np.clip(scaled, -5, 5).astype(np.float32))
