"""Named columns become tensors: vocabularies and bin edges are learned once and kept with the model."""

# N rows, F numeric columns, C categorical columns

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay_platform.errors import InputError

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]
_LARGEST = 3e38
_FEW_ROWS = 4096


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
        # Some columns at once: one by one is slow for one row, all of them are much memory for many.
        step = len(self.numeric) if num_rows <= _FEW_ROWS else 16
        for start in range(0, len(self.numeric), max(1, step)):
            part_FN = np.array([columns[name] for name in self.numeric[start : start + step]], dtype=np.float64)
            # Beyond float32 a number is as good as its largest; an infinity would make 0 · inf in an empty bin.
            np.clip(part_FN, -_LARGEST, _LARGEST, out=part_FN)
            values_NF[:, start : start + step] = part_FN.T
        codes_NC = np.zeros((num_rows, len(self.categorical)), dtype=np.int64)
        for i, name in enumerate(self.categorical):
            code_of = self._code_of[i]
            codes_NC[:, i] = np.fromiter(map(code_of.get, columns[name], repeat(0)), np.int64, num_rows)
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

    def to(self, device: torch.device | str) -> "EncodedRows":
        """The batch on another device."""
        return EncodedRows(self.values_NF.to(device), self.codes_NC.to(device))

    def numbers(self) -> NDArray[np.float32]:
        """(N, F + C) as trees take them: a category is its rank by frequency, NaN where missing or never seen."""
        codes = self.codes_NC.numpy().astype(np.float32)
        codes[codes == 0] = np.nan
        return np.concatenate([self.values_NF.numpy(), codes], axis=1)


def typical_row(rows: EncodedRows) -> EncodedRows:
    """One row: of each column the median and the most frequent category; missing where most rows miss it."""
    values = rows.values_NF.numpy()
    missing = np.isnan(values)
    median = np.array(
        [np.median(v[~m]) if 2 * m.sum() < len(v) else np.nan for v, m in zip(values.T, missing.T, strict=True)]
    )
    mode = [int(np.bincount(codes).argmax()) if len(codes) else 0 for codes in rows.codes_NC.numpy().T]
    return EncodedRows(torch.from_numpy(median.astype(np.float32))[None], torch.tensor(mode, dtype=torch.int64)[None])


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
