"""Where the values of a column go: cells of its usual values, missing, never seen, and how round numbers are."""

# N rows, V distinct values

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from assay_platform.errors import DataError
from assay_platform.monitoring.g_test import Floats, Ints

Column = NDArray[Any]
"""(N,) numbers, or text as objects. NaN, infinities and None are missing."""

GRAINS = (100.0, 10.0, 1.0, 0.1, 0.01)
NUM_GRAINS = len(GRAINS) + 2
_QUANTILES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_NUMBER_GROUPS, _TEXT_GROUPS = 4, 4


def read_columns(columns: Mapping[str, Column]) -> dict[str, Column]:
    """Columns as float64 with NaN, or as objects that are text or None.

    Raises:
        DataError: a column is not one-dimensional, not as long as the others, or has a value that is neither.
    """
    read = {}
    num_rows = len(next(iter(columns.values()), ()))
    for name, values in columns.items():
        if values.ndim != 1 or len(values) != num_rows:
            raise DataError(f"column {name!r} has shape {values.shape}: need ({num_rows},) as the first column")
        if values.dtype.kind in "fiub":
            numbers = values.astype(np.float64)
            read[name] = np.where(np.isfinite(numbers), numbers, np.nan)
            continue
        # NaN is how pandas writes a missing text.
        texts = [None if v is None or v != v else v for v in values.tolist()]  # noqa: PLR0124
        odd = next((row for row, v in enumerate(texts) if not (v is None or isinstance(v, str))), None)
        if odd is not None:
            raise DataError(f"column {name!r}, row {odd}: {texts[odd]!r} is neither text nor None")
        read[name] = np.array(texts, dtype=object)
    return read


def is_numeric(values: Column) -> bool:
    """Whether a column that was read holds numbers."""
    return values.dtype.kind == "f"


class Rows(NamedTuple):
    """A column that was read, (N,), missing where a row does not count, and which rows count."""

    values: Column
    counted_N: NDArray[np.bool_]

    @staticmethod
    def of(values: Column, counted_N: NDArray[np.bool_]) -> "Rows":
        """Of all values."""
        values = values.copy()
        values[~counted_N] = np.nan if is_numeric(values) else None
        return Rows(values, counted_N)


def distinct(values: Column) -> tuple[list[Any], Ints]:
    """(V,) values that occur, and which of them each row has, (N,); -1 for missing."""
    if is_numeric(values):
        present_N = ~np.isnan(values)
        unique, inverse = np.unique(values[present_N], return_inverse=True)
        code_N = np.full(len(values), -1, dtype=np.int64)
        code_N[present_N] = inverse
        return unique.tolist(), code_N
    place: dict[Any, int] = {}
    codes = [-1 if v is None else place.setdefault(v, len(place)) for v in values.tolist()]
    return list(place), np.array(codes, dtype=np.int64)


def at_top(values: Column, num_blocks: int) -> Ints:
    """(N,) of numbers: 1 where the largest of the block is there once more, 0 where not, -1 for missing."""
    value_BW = values.reshape(num_blocks, -1)
    top_B1 = np.where(np.isnan(value_BW), -np.inf, value_BW).max(1, keepdims=True)
    top_BW = value_BW == top_B1
    # Every block has a largest one; what counts is how often it comes back.
    top_BW[np.arange(num_blocks), top_BW.argmax(1)] = False
    return np.where(np.isnan(value_BW), -1, top_BW).ravel().astype(np.int64)


class Codes(NamedTuple):
    """(N,) each, the place of every row in the cells of each test, -1 for none."""

    missing_N: Ints  # 0 present, 1 missing, -1 where the row does not count
    unseen_N: Ints  # 0 as in training, 1 not
    values_N: Ints  # of what was seen in training
    grain_N: Ints  # numbers only


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of one column.

    Numbers: cell i holds what is at least edges[i - 1] and less than edges[i]; training lay within low … high.
    Text: the first `num_own` known values have a cell each, the other known ones one together.
    known: (V,) the most frequent values, most frequent first, and their counts. rest: rows that the most frequent of
    the values not kept had.
    """

    numeric: bool
    edges: tuple[float, ...]
    low: float
    high: float
    num_own: int
    known: tuple[float | str, ...]
    known_counts: tuple[int, ...]
    rest: int

    @staticmethod
    def of(values: Column, min_share: float, max_known: int) -> "Cells":
        """Of training values. min_share: of the rows that are not missing, in every cell."""
        names, code_N = distinct(values)
        count_V = np.bincount(code_N[code_N >= 0], minlength=len(names))
        order = np.argsort(-count_V, kind="stable")
        kept = order[:max_known]
        numeric = is_numeric(values)
        min_rows = min_share * count_V.sum()
        edges = _edges(np.asarray(names), count_V, min_share) if numeric and names else ()
        return Cells(
            numeric=numeric,
            edges=edges,
            low=names[0] if numeric and names else 0.0,
            high=names[-1] if numeric and names else 0.0,
            num_own=0 if numeric else int((count_V[kept] >= min_rows).sum()),
            known=tuple(names[v] for v in kept),
            known_counts=tuple(count_V[kept].tolist()),
            rest=int(count_V[order[max_known]]) if len(names) > max_known else 0,
        )

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "Cells":
        """Read back from what `dataclasses.asdict` gave, after JSON."""
        read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in document.items()}
        return Cells(**read)

    @property
    def num_cells(self) -> int:
        """C, of the test of values."""
        return (len(self.edges) if self.numeric else self.num_own) + 1

    @property
    def counts(self) -> dict[float | str, int]:
        """Known value → rows of training that had it."""
        return dict(zip(self.known, self.known_counts, strict=True))

    def codes(self, rows: Rows) -> Codes:
        """The cells of rows."""
        values = rows.values
        if self.numeric:
            present_N = ~np.isnan(values)
            seen_N = present_N & (values >= self.low) & (values <= self.high)
            cell_N = np.searchsorted(np.asarray(self.edges), values, side="right")
            grain_N = _grain(values)
        else:
            place = {name: min(i, self.num_own) for i, name in enumerate(self.known)}
            cell_N = np.array([place.get(name, -1) for name in values.tolist()], dtype=np.int64)
            present_N, seen_N = np.array([name is not None for name in values.tolist()], dtype=bool), cell_N >= 0
            grain_N = np.full(len(values), -1, dtype=np.int64)
        return Codes(
            missing_N=np.where(rows.counted_N, np.where(present_N, 0, 1), -1),
            unseen_N=np.where(present_N, np.where(seen_N, 0, 1), -1),
            values_N=np.where(seen_N, cell_N, -1),
            grain_N=grain_N,
        )

    def groups(self, codes: Codes, counts_C: tuple[int, ...]) -> tuple[Ints, int]:
        """A few groups for counts of two columns together: (N,) the group of each row, -1 for none, and how many.

        counts_C: of the cells in training. The unseen have a group, the missing another.
        """
        if self.numeric:
            counts = np.asarray(counts_C, np.float64)
            middle = (np.cumsum(counts) - counts / 2) / max(counts.sum(), 1)
            group_C = np.minimum((middle * _NUMBER_GROUPS).astype(np.int64), _NUMBER_GROUPS - 1)
        else:
            group_C = np.minimum(np.arange(len(counts_C)), _TEXT_GROUPS - 1)
        most = int(group_C.max(initial=0))
        group_N = np.where(codes.unseen_N == 1, most, group_C[codes.values_N])
        return np.where(codes.missing_N == 0, group_N, np.where(codes.missing_N == 1, most + 1, -1)), most + 2


def _edges(value_V: Floats, count_V: Ints, min_share: float) -> tuple[float, ...]:
    """Quantiles, and a cell for each value that is frequent by itself. value_V: in order."""
    num_rows = int(count_V.sum())
    frequent = value_V[count_V >= max(0.02, min_share) * num_rows]
    below_V = np.cumsum(count_V)
    cuts = value_V[np.searchsorted(below_V, np.asarray(_QUANTILES) * num_rows)]
    edges = np.unique(np.concatenate([cuts, frequent, np.nextafter(frequent, np.inf)]))
    kept: list[float] = edges.tolist()
    cell_V = np.searchsorted(edges, value_V, side="right")
    counts = np.bincount(cell_V, weights=count_V, minlength=len(edges) + 1).tolist()
    # A cell too rare for its count to mean anything joins its rarer neighbour.
    while kept and min(counts) < min_share * num_rows:
        i = counts.index(min(counts))
        left = i > 0 and (i == len(kept) or counts[i - 1] <= counts[i + 1])
        j = i - 1 if left else i
        counts[j : j + 2] = [counts[j] + counts[j + 1]]
        del kept[j]
    return tuple(kept)


def _grain(value_N: Floats) -> Ints:
    """0 for zero, then the largest of `GRAINS` that divides, last none of them; -1 for missing."""
    grain_N = np.full(len(value_N), NUM_GRAINS - 1, dtype=np.int64)
    known_N = np.nan_to_num(value_N)
    for i in reversed(range(len(GRAINS))):
        units_N = known_N / GRAINS[i]
        # Values that were float32 once are off by as much.
        grain_N[np.abs(units_N - np.rint(units_N)) <= 1e-6 + 1e-7 * np.abs(units_N)] = i + 1
    return np.where(np.isnan(value_N), -1, np.where(known_N == 0, 0, grain_N))
