"""Learned vectors of a key column with many values: versioned by content, looked up like any feature.

As every other feature, a vector is of a time: an event is given what was learned from earlier ones. How they are
trained, and why by time, is in `embedding_training`.
"""

# N rows, B vectors of one value by time, V values, W width of a vector

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from assay_platform.errors import ArtifactError, DataError
from assay_platform.storage.files import atomic_file
from numpy.typing import NDArray

from assay_features.definitions import Embedding, FeaturePlan
from assay_features.events import Keys

Floats = NDArray[np.float64]
Times = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """Vectors of the known values of one column; the last of V is the shared one of rare and unseen values.

    since_us: (B,) ascending; vectors_BVW[b] is for events from since_us[b] on, and learned from earlier ones alone.
    Events before since_us[0] get the first. A trained table ends with what was learned from all of its rows.
    """

    column: str
    values: tuple[str, ...]
    vectors_BVW: NDArray[np.float32]
    since_us: Times

    def __post_init__(self) -> None:
        if self.vectors_BVW.shape[:2] != (len(self.since_us), len(self.values) + 1) or not len(self.since_us):
            raise DataError(
                f"{len(self.since_us)} times and {len(self.values)} values need as many vectors, a shared one besides"
            )

    @property
    def width(self) -> int:
        """Numbers a vector."""
        return int(self.vectors_BVW.shape[2])

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the content: the version."""
        content = "\x00".join((self.column, *self.values)).encode() + self.vectors_BVW.astype("<f4").tobytes()
        return hashlib.sha256(content + self.since_us.astype("<i8").tobytes()).hexdigest()[:12]

    @property
    def definition(self) -> Embedding:
        """The feature that this table serves."""
        return Embedding(column=self.column, width=self.width, table=self.digest)

    @property
    def learned_until_us(self) -> int:
        """The newest event that the vectors may have learned from."""
        return int(self.since_us[-1]) - 1

    @cached_property
    def _index(self) -> "pd.Index[str]":
        return pd.Index(list(self.values), dtype=object)

    def apply(self, keys: Keys | Sequence[str | None], time_us: Times) -> Floats:
        """(N, W) vectors as of the times; values that are rare, unseen or missing get the shared one."""
        block = np.maximum(np.searchsorted(self.since_us, time_us, side="right") - 1, 0)
        value = self._index.get_indexer(pd.Index(np.asarray(keys, dtype=object)))
        return self.vectors_BVW[block, value].astype(np.float64)  # -1, not found, is the last one

    def save(self, repository: Path) -> Path:
        """Write into a feature repository, atomically; the same table again changes nothing."""
        path = table_path(repository, self.digest)
        columns = {"value": pa.array([*self.values, None], pa.string())}
        for since_us, vectors_VW in zip(self.since_us, self.vectors_BVW, strict=True):
            columns[str(since_us)] = pa.array(list(vectors_VW), pa.list_(pa.float32()))
        with atomic_file(path) as part:
            pq.write_table(pa.table(columns, metadata={"column": self.column}), part)
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
            since_us = table.column_names[1:]
            vectors = np.stack([np.stack(table[name].to_numpy()) for name in since_us]).astype(np.float32)
            column = table.schema.metadata[b"column"].decode()
            loaded = EmbeddingTable(column, tuple(values), vectors, np.array(since_us, dtype=np.int64))
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException, DataError) as error:
            raise ArtifactError(f"{path}: is not a readable embedding table ({error})") from error
        if loaded.digest != path.stem:
            raise ArtifactError(f"{path}: its content has digest {loaded.digest}; the file is damaged")
        return loaded


def table_path(repository: Path, digest: str) -> Path:
    """Where a feature repository keeps a table."""
    return repository / "embeddings" / f"{digest}.parquet"


def load_tables(repository: Path, plan: FeaturePlan) -> dict[str, EmbeddingTable]:
    """The trained tables of a plan's embeddings, by digest, from the folder of a feature repository.

    Raises:
        ArtifactError: one is missing or damaged.
    """
    names = {embedding.table for embedding in plan.embeddings}
    return {name: EmbeddingTable.load(table_path(repository, name)) for name in names}
