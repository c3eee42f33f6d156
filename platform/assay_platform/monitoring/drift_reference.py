"""What training rows looked like, kept small enough to travel with the model.

    reference = Reference.of(columns, ReferenceConfig(window_rows=1000), event_id="event_id")
    json.dumps(reference.to_dict())

Each column keeps counts of its cells for a test each (see `drift_findings`), pairs of columns that hang together keep
those of 5 × 5 cells, and every test keeps how far half windows of training were from all others (see `g_test`).
`columns` may hold the score of the model as a column like any other.
"""

# N rows, B blocks (half windows) of the training rows, C cells, V distinct values, G groups

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy

from assay_platform.errors import ConfigError, DataError
from assay_platform.monitoring.drift_cells import (
    NUM_GRAINS,
    Cells,
    Codes,
    Column,
    Rows,
    at_top,
    distinct,
    is_numeric,
    read_columns,
)
from assay_platform.monitoring.g_test import HALVES, MIN_BLOCKS, Floats, GTest, Ints, block_counts, g_statistic

_SAMPLED = 20_000  # rows that partners are chosen by
_MIN_INFORMATION = 0.03  # nats that one column has to tell of another; below it there is nothing to break


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """How much of the training rows is kept.

    window_rows: how many rows a window has. max_texts, max_numbers: values of a column that are kept by name.
    partners: of a column, whose joint cells are kept.
    """

    window_rows: int = 1000
    max_texts: int = 1000
    max_numbers: int = 50
    partners: int = 2

    def __post_init__(self) -> None:
        for name, least in (("window_rows", 100), ("max_texts", 1), ("max_numbers", 1), ("partners", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: need at least {least}")


class Largest(NamedTuple):
    """Over blocks of training, the largest G of one value: mean, deviation and most; zeros where blocks are few."""

    mean: float = 0.0
    deviation: float = 0.0
    most: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ColumnReference:
    """One column of the training rows. tests: missing, unseen, values; of numbers also grain, clipped."""

    cells: Cells
    tests: Mapping[str, GTest]
    largest: Largest

    def groups(self, codes: Codes) -> tuple[Ints, int]:
        """See `Cells.groups`."""
        return self.cells.groups(codes, self.tests["values"].counts)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A summary of training rows. pairs: two columns that hang together and the test of their joint groups."""

    window_rows: int
    columns: Mapping[str, ColumnReference]
    pairs: Mapping[tuple[str, str], GTest]
    entity: str | None
    event_id: str | None
    repeats: GTest | None

    @staticmethod
    def of(
        columns: Mapping[str, Column],
        config: ReferenceConfig,
        *,
        entity: str | None = None,
        event_id: str | None = None,
    ) -> "Reference":
        """Summarise training rows, (N,) a column, in time order. Of N, the newest whole windows are taken.

        entity: the column that says who acts; see `counted_once`. event_id: the column that tells one event from
        another; without it replays are not looked for.

        Raises:
            DataError: there is less than one window, `entity` or `event_id` is no column, or see `read_columns`.
        """
        columns = read_columns(columns)
        num_rows = len(next(iter(columns.values()), ()))
        num_windows = num_rows // config.window_rows
        if not num_windows:
            raise DataError(f"{num_rows} training rows: need at least window_rows, {config.window_rows}")
        for role, name in (("entity", entity), ("event_id", event_id)):
            if name is not None and name not in columns:
                raise DataError(f"{role} {name!r} is no column; there are {', '.join(columns)}")
        num_blocks = num_windows * HALVES
        # Blocks are of equal length, so an odd window ends in a row that no half has.
        taken = num_windows * config.window_rows // num_blocks * num_blocks
        columns = {name: values[-taken:] for name, values in columns.items()}
        # What tells one event from another is new in each.
        rows = counted_once({name: v for name, v in columns.items() if name != event_id}, entity, num_blocks)
        made = {name: _column(one, num_blocks, config) for name, one in rows.items()}
        repeats = None
        if event_id is not None:
            # In whole windows: a replay comes all at once.
            repeats = GTest.of(block_counts(repeated(columns[event_id], num_windows), 2, num_windows))
        return Reference(
            window_rows=config.window_rows,
            columns=made,
            pairs=_pairs(made, rows, entity, num_blocks, config.partners),
            entity=entity,
            event_id=event_id,
            repeats=repeats,
        )

    @property
    def num_tests(self) -> int:
        """How many p-values a window gives: also the largest G of one value of each column."""
        return sum(len(c.tests) + 1 for c in self.columns.values()) + len(self.pairs) + (self.repeats is not None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        pairs = [[*names, asdict(test)] for names, test in self.pairs.items()]
        return {
            "window_rows": self.window_rows,
            "columns": {name: asdict(column) for name, column in self.columns.items()},
            "pairs": pairs,
            "entity": self.entity,
            "event_id": self.event_id,
            "repeats": self.repeats and asdict(self.repeats),
        }

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "Reference":
        """Read back from what `to_dict` gave, after JSON."""
        return Reference(
            window_rows=document["window_rows"],
            columns={
                name: ColumnReference(
                    cells=Cells.from_dict(one["cells"]),
                    tests={kind: GTest.from_dict(test) for kind, test in one["tests"].items()},
                    largest=Largest(*one["largest"]),
                )
                for name, one in document["columns"].items()
            },
            pairs={(a, b): GTest.from_dict(test) for a, b, test in document["pairs"]},
            entity=document["entity"],
            event_id=document["event_id"],
            repeats=document["repeats"] and GTest.from_dict(document["repeats"]),
        )


def counted_once(columns: Mapping[str, Column], entity: str | None, num_blocks: int) -> dict[str, Rows]:
    """Columns in which an entity counts once a block, so that what one of many does in a burst is no change of all.

    The entity's own column keeps all rows, so that a hot key is seen.
    """
    all_N = np.ones(len(next(iter(columns.values()))), dtype=bool)
    once_N = all_N if entity is None else repeated(columns[entity], num_blocks) == 0
    return {name: Rows.of(values, all_N if name == entity else once_N) for name, values in columns.items()}


def repeated(ids: Column, num_blocks: int) -> Ints:
    """(N,) 1 where an id came before in its block; a missing one tells nothing."""
    code_N = distinct(ids)[1]
    keys = code_N + (code_N.max(initial=0) + 1) * np.repeat(np.arange(num_blocks), len(ids) // num_blocks)
    again_N = np.ones(len(ids), dtype=np.int64)
    again_N[np.unique(keys, return_index=True)[1]] = 0
    return np.where(code_N < 0, 0, again_N)


def one_sided_g(count_V: Ints, num_rows: int, other_V: Ints, num_others: int) -> Floats:
    """(V,) G of each value against all others; 0 where it is not more frequent than it was."""
    g_V = g_statistic(np.stack([count_V, num_rows - count_V], -1), np.stack([other_V, num_others - other_V], -1))
    return np.where(count_V * max(num_others, 1) > other_V * max(num_rows, 1), g_V, 0.0)


def joint_groups(a: tuple[Ints, int], b: tuple[Ints, int]) -> tuple[Ints, int]:
    """(N,) the cell of both groups of each row, -1 for none, and how many cells there are; see `Cells.groups`."""
    return np.where((a[0] < 0) | (b[0] < 0), -1, a[0] * b[1] + b[0]), a[1] * b[1]


def _column(rows: Rows, num_blocks: int, config: ReferenceConfig) -> ColumnReference:
    values, numeric = rows.values, is_numeric(rows.values)
    # Five rows in every cell of a window.
    cells = Cells.of(values, 5.0 / config.window_rows, config.max_numbers if numeric else config.max_texts)
    codes = cells.codes(rows)
    unseen_BC, largest = _by_block(values, cells, num_blocks)
    tests = {
        "missing": GTest.of(block_counts(codes.missing_N, 2, num_blocks)),
        "unseen": GTest.of(unseen_BC),
        "values": GTest.of(block_counts(codes.values_N, cells.num_cells, num_blocks)),
    }
    if numeric:
        tests["grain"] = GTest.of(block_counts(codes.grain_N, NUM_GRAINS, num_blocks))
        tests["clipped"] = GTest.of(block_counts(at_top(values, num_blocks), 2, num_blocks))
    return ColumnReference(cells=cells, tests=tests, largest=largest)


def _by_block(values: Column, cells: Cells, num_blocks: int) -> tuple[Ints, Largest]:
    """What each block has that all others have not: (B, 2) rows seen and unseen there, and the largest G of a value.

    Unseen numbers lie outside the others' range. Unseen texts are in no other block, or not kept.
    """
    names, code_N = distinct(values)
    total_V = np.bincount(code_N[code_N >= 0], minlength=len(names))
    num_rows, numeric, known = int(total_V.sum()), is_numeric(values), cells.counts
    kept_V = np.array([name in known for name in names], dtype=bool)
    blocks = [np.unique(block[block >= 0], return_counts=True) for block in code_N.reshape(num_blocks, -1)]
    # Numbers are in order, so a code lies outside the range of all others where the values do.
    first = sorted((int(found[0]), b) for b, (found, _) in enumerate(blocks) if len(found))
    last = sorted(((int(found[-1]), b) for b, (found, _) in enumerate(blocks) if len(found)), reverse=True)
    unseen_BC, largest = np.zeros((num_blocks, 2), dtype=np.int64), []
    for b, (found, count_V) in enumerate(blocks):
        other_V, size = total_V[found] - count_V, int(count_V.sum())
        low, high = (next((code for code, at in ends if at != b), None) for ends in (first, last))
        if low is None or high is None:
            new_V = np.zeros(len(found), dtype=bool)
        else:
            new_V = (found < low) | (found > high) if numeric else (other_V == 0) | ~kept_V[found]
        unseen = int(count_V[new_V].sum())
        unseen_BC[b] = size - unseen, unseen
        largest.append(float(one_sided_g(count_V, size, other_V, num_rows - size).max(initial=0.0)))
    if num_blocks < MIN_BLOCKS:
        return unseen_BC, Largest()
    return unseen_BC, Largest(float(np.mean(largest)), float(np.std(largest, ddof=1)), max(largest))


def _pairs(
    made: Mapping[str, ColumnReference], rows: Mapping[str, Rows], entity: str | None, num_blocks: int, partners: int
) -> dict[tuple[str, str], GTest]:
    """Each column with those that it tells most about."""
    # Which of many entities it is says little, and its column has other rows.
    names = [name for name in made if name != entity]
    if len(names) < 2 or not partners:
        return {}
    groups = [made[name].groups(made[name].cells.codes(rows[name])) for name in names]
    information = _information(groups)
    chosen = set()
    for i in range(len(names)):
        for j in np.argsort(-information[i], kind="stable")[:partners].tolist():
            if information[i, j] >= _MIN_INFORMATION:
                chosen.add((min(i, j), max(i, j)))
    tests = {}
    for i, j in sorted(chosen):
        code_N, num_cells = joint_groups(groups[i], groups[j])
        tests[names[i], names[j]] = GTest.of(block_counts(code_N, num_cells, num_blocks))
    return tests


def _information(groups: list[tuple[Ints, int]]) -> NDArray[np.float64]:
    """Mutual information of every two columns in nats, 0 of a column with itself."""
    step = -(-len(groups[0][0]) // _SAMPLED)
    ends = np.cumsum([num for _, num in groups])
    member_NG = np.zeros((len(groups[0][0][::step]), int(ends[-1])), dtype=np.float32)
    for (code_N, num), end in zip(groups, ends.tolist(), strict=True):
        counted = np.flatnonzero(code_N[::step] >= 0)
        member_NG[counted, code_N[::step][counted] + end - num] = 1.0
    # One product counts the joint groups of every two columns.
    count_GG = (member_NG.T @ member_NG).astype(np.float64)
    share_GG = count_GG / max(1.0, count_GG.diagonal()[: groups[0][1]].sum())
    apart_GG = np.outer(share_GG.diagonal(), share_GG.diagonal())
    part_GG = xlogy(share_GG, share_GG / np.where(apart_GG > 0, apart_GG, 1.0))
    starts = ends - [num for _, num in groups]
    information = np.add.reduceat(np.add.reduceat(part_GG, starts, 0), starts, 1)
    np.fill_diagonal(information, 0.0)
    return np.asarray(information, np.float64)
