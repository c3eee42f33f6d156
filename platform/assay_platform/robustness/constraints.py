"""What of a transaction its sender can change, and how far: an attack is a transaction that could exist.

`Constraints` is what somebody declares; `FeasibleSet` is what they mean for a table: which rows are reachable from a
given one, and the nearest reachable row to one that is not. The original row is always feasible, whatever it breaks:
bounds widen to hold it, and a relation that it breaks is not asked of its changes.
"""

# N rows, F numeric columns, C key columns

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from assay_platform.errors import ConfigError

Numbers = NDArray[np.float64]
Keys = NDArray[np.object_]
_MAX_VALUES = 500


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """immutable: cannot change at all. integer: whole numbers. increasing, decreasing: can only go up, or down.

    bounds: lowest and highest value. times: lowest and highest multiple of its own value. values: the categories that
    can be taken. relations: (smaller, larger) columns, such as a 1-hour count and a 24-hour count. A number that is
    missing stays missing. Without bounds a number moves within what the table has, and a category within its values.
    """

    immutable: tuple[str, ...] = ()
    integer: tuple[str, ...] = ()
    increasing: tuple[str, ...] = ()
    decreasing: tuple[str, ...] = ()
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    times: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    relations: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for role in ("bounds", "times"):
            for name, (low, high) in getattr(self, role).items():
                if not low <= high:
                    raise ConfigError(f"{role}.{name} = [{low:g}, {high:g}]; the first must not be above the second")
        for name, (low, high) in self.times.items():
            if not low <= 1.0 <= high or low < 0:
                raise ConfigError(f"times.{name} = [{low:g}, {high:g}]; it must hold 1 and not go below 0")
        both = set(self.increasing) & set(self.decreasing)
        if both:
            raise ConfigError(f"{sorted(both)[0]!r} is increasing and decreasing; name it in immutable instead")
        for name, allowed in self.values.items():
            if not allowed:
                raise ConfigError(f"values.{name} is empty; name at least one category")

    @property
    def named(self) -> dict[str, tuple[str, ...]]:
        """Column names by the role they have here: 'number', 'category' or 'any'."""
        pairs = tuple(name for pair in self.relations for name in pair)
        return {
            "any": self.immutable,
            "number": (*self.integer, *self.increasing, *self.decreasing, *self.bounds, *self.times, *pairs),
            "category": tuple(self.values),
        }


class Transactions(NamedTuple):
    """N events as an attacker writes them."""

    numbers: Numbers  # (N, F), NaN where missing
    keys: Keys  # (N, C) text or None

    def take(self, rows: NDArray[np.intp] | slice) -> "Transactions":
        """A subset or another order of rows."""
        return Transactions(self.numbers[rows], self.keys[rows])

    def copy(self) -> "Transactions":
        """To be changed."""
        return Transactions(self.numbers.copy(), self.keys.copy())

    def where(self, other: "Transactions", mask: NDArray[np.bool_]) -> "Transactions":
        """Rows of `other` where the mask (N,) holds, else these."""
        return Transactions(
            np.where(mask[:, None], other.numbers, self.numbers), np.where(mask[:, None], other.keys, self.keys)
        )


@dataclass(frozen=True)
class FeasibleSet:
    """Constraints over the columns of one table."""

    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    movable_F: NDArray[np.bool_]
    movable_C: NDArray[np.bool_]
    low_F: Numbers
    high_F: Numbers
    times_F: NDArray[np.bool_]  # bounded by multiples of its own value
    least_F: Numbers
    most_F: Numbers
    up_F: NDArray[np.bool_]  # cannot go down
    down_F: NDArray[np.bool_]  # cannot go up
    integer_F: NDArray[np.bool_]
    allowed: tuple[tuple[str, ...], ...]  # of each key column, most frequent first
    relations: tuple[tuple[int, int], ...]  # places of the smaller and the larger number

    @staticmethod
    def fit(
        constraints: Constraints, numeric: tuple[str, ...], categorical: tuple[str, ...], table: Transactions
    ) -> "FeasibleSet":
        """table: rows whose ranges and categories stand for what is possible where the constraints leave it open."""

        def flags(names: tuple[str, ...], columns: tuple[str, ...]) -> NDArray[np.bool_]:
            return np.array([name in names for name in columns], dtype=bool)

        low, high = np.full(len(numeric), -np.inf), np.full(len(numeric), np.inf)
        least, most = np.ones(len(numeric)), np.ones(len(numeric))
        for f, name in enumerate(numeric):
            seen = table.numbers[:, f][np.isfinite(table.numbers[:, f])]
            if name in constraints.bounds:
                low[f], high[f] = constraints.bounds[name]
            elif len(seen):
                low[f], high[f] = seen.min(), seen.max()
            if name in constraints.times:
                least[f], most[f] = constraints.times[name]
        allowed = []
        for c, name in enumerate(categorical):
            counts: dict[str, int] = {}
            for value in table.keys[:, c]:
                if value is not None:
                    counts[value] = counts.get(value, 0) + 1
            ranked = tuple(sorted(counts, key=lambda v: (-counts[v], v))[:_MAX_VALUES])
            allowed.append(constraints.values.get(name, ranked))
        place = {name: f for f, name in enumerate(numeric)}
        return FeasibleSet(
            numeric, categorical,
            ~flags(constraints.immutable, numeric), ~flags(constraints.immutable, categorical),
            low, high, flags(tuple(constraints.times), numeric), least, most,
            flags(constraints.increasing, numeric), flags(constraints.decreasing, numeric),
            flags(constraints.integer, numeric), tuple(allowed),
            tuple((place[a], place[b]) for a, b in constraints.relations),
        )  # fmt: skip

    def limits(self, original: Transactions) -> tuple[Numbers, Numbers]:
        """(N, F) lowest and highest values that each row can take, its own included; relations apart."""
        own = original.numbers
        one, other = own * self.least_F, own * self.most_F
        low = np.maximum(self.low_F, np.where(self.times_F, np.minimum(one, other), -np.inf))
        high = np.minimum(self.high_F, np.where(self.times_F, np.maximum(one, other), np.inf))
        fixed = ~self.movable_F
        low = np.where(self.up_F | fixed, own, np.minimum(low, own))
        high = np.where(self.down_F | fixed, own, np.maximum(high, own))
        return low, high

    def repair(self, original: Transactions, changed: Transactions) -> Transactions:
        """The changes brought back to what is feasible: numbers to their limits, categories to the row's own."""
        own = original.numbers
        low, high = self.limits(original)
        numbers = np.where(np.isnan(own) | np.isnan(changed.numbers), own, np.clip(changed.numbers, low, high))
        # Towards the row's own value, so that no limit is crossed again.
        whole = np.where(numbers > own, np.floor(numbers), np.ceil(numbers))
        beyond = (whole - own) * (numbers - own) < 0
        numbers = np.where(self.integer_F & (numbers != own), np.where(beyond, own, whole), numbers)
        numbers = self._related(own, numbers)
        keys = original.keys.copy()
        for c in np.flatnonzero(self.movable_C):
            known = set(self.allowed[c])
            keys[:, c] = [
                new if new in known else old for new, old in zip(changed.keys[:, c], original.keys[:, c], strict=True)
            ]
        return Transactions(numbers, keys)

    def _related(self, own: Numbers, numbers: Numbers) -> Numbers:
        """Columns of a relation that the changes break go back to the row's own values, until none is broken."""
        for _ in range(len(self.relations) + 1):
            settled = True
            for smaller, larger in self.relations:
                broken = (numbers[:, smaller] > numbers[:, larger]) & ~(own[:, smaller] > own[:, larger])
                if broken.any():
                    settled = False
                    for f in (smaller, larger):
                        numbers[broken, f] = own[broken, f]
            if settled:
                break
        return numbers

    def holds(self, original: Transactions, changed: Transactions) -> NDArray[np.bool_]:
        """(N,) whether each changed row can be reached from its original."""
        own, numbers = original.numbers, changed.numbers
        low, high = self.limits(original)
        same = (numbers == own) | (np.isnan(numbers) & np.isnan(own))
        inside = same | ((numbers >= low) & (numbers <= high) & ~np.isnan(own))
        inside &= same | ~self.integer_F | (numbers == np.round(numbers))
        out: NDArray[np.bool_] = inside.all(axis=1)
        for smaller, larger in self.relations:
            out &= ~(numbers[:, smaller] > numbers[:, larger]) | (own[:, smaller] > own[:, larger])
        for c in range(len(self.categorical)):
            known = set(self.allowed[c]) if self.movable_C[c] else set()
            out &= [
                new == old or new in known for new, old in zip(changed.keys[:, c], original.keys[:, c], strict=True)
            ]
        return out
