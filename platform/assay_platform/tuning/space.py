"""What a search may vary, as declared values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from assay_platform.errors import ConfigError


@dataclass(frozen=True)
class When:
    """The dimension is there only where an earlier one, a choice, has one of these values."""

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Real:
    """A number between low and high; log: even on a logarithmic scale."""

    low: float
    high: float
    log: bool = False
    when: When | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ConfigError(f"range {self.low} to {self.high}: low must be below high, and above 0 with log")

    def holds(self, value: Any) -> bool:
        """Whether it is a value of this dimension."""
        return isinstance(value, int | float) and self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A whole number between low and high, both included."""

    low: int
    high: int
    log: bool = False
    when: When | None = None

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ConfigError(f"range {self.low} to {self.high}: low must be below high, and above 0 with log")

    def holds(self, value: Any) -> bool:
        """Whether it is a value of this dimension."""
        return isinstance(value, int) and self.low <= value <= self.high


@dataclass(frozen=True)
class OneOf:
    """One of a few values."""

    values: tuple[Any, ...]
    when: When | None = None

    def holds(self, value: Any) -> bool:
        """Whether it is a value of this dimension."""
        return value in self.values


Dimension = Real | Whole | OneOf
# In order: a dimension that hangs on another comes after it.
Space = Mapping[str, Dimension]


def check_space(space: Space, defaults: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: a dimension has no default or one outside of it, or hangs on what is no earlier choice.
    """
    without = sorted(set(space) - set(defaults))
    if without:
        raise ConfigError(f"the search space varies {', '.join(without)}, which has no default")
    earlier: dict[str, Dimension] = {}
    for name, dimension in space.items():
        if not dimension.holds(defaults[name]):
            raise ConfigError(f"the default of {name} is {defaults[name]!r}, which is not in {dimension}")
        if dimension.when is not None:
            parent = earlier.get(dimension.when.name)
            if not isinstance(parent, OneOf) or not all(parent.holds(value) for value in dimension.when.values):
                raise ConfigError(f"{name} hangs on {dimension.when}, which is no choice declared before it")
        earlier[name] = dimension


def is_there(dimension: Dimension, params: Mapping[str, Any]) -> bool:
    """Whether a dimension has a value, given those of the dimensions before it."""
    return dimension.when is None or params.get(dimension.when.name) in dimension.when.values


def active(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """Of a point with values of all dimensions, those that are there."""
    found: dict[str, Any] = {}
    for name, dimension in space.items():
        if is_there(dimension, found):
            found[name] = params[name]
    return found


def contains(space: Space, params: Mapping[str, Any]) -> bool:
    """Whether every dimension that is there has a value of it."""
    found: dict[str, Any] = {}
    for name, dimension in space.items():
        if is_there(dimension, found):
            if not dimension.holds(params.get(name)):
                return False
            found[name] = params[name]
    return True


def to_unit(dimension: Dimension, value: Any) -> float:
    """Where a value lies in its dimension, from 0 to 1, on its scale; of a choice, how far down the list."""
    if isinstance(dimension, OneOf):
        return (dimension.values.index(value) + 0.5) / len(dimension.values)
    low, high = dimension.low, dimension.high
    return math.log(value / low) / math.log(high / low) if dimension.log else (value - low) / (high - low)


def from_unit(dimension: Dimension, share: float) -> Any:
    """The value that lies at a share, from 0 up to but without 1, of a dimension on its scale."""
    if isinstance(dimension, OneOf):
        return dimension.values[int(share * len(dimension.values))]
    # Each whole number has as much room as its neighbours.
    margin = 0.0 if isinstance(dimension, Real) else 0.5
    low, high = dimension.low - margin, dimension.high + margin
    value = math.exp(math.log(low) + share * math.log(high / low)) if dimension.log else low + share * (high - low)
    value = min(max(value, dimension.low), dimension.high)
    return value if isinstance(dimension, Real) else round(value)


def read_value(dimension: Dimension, text: str) -> Any:
    """A value that was written with `str`; None where it is none of this dimension."""
    if isinstance(dimension, OneOf):
        return next((value for value in dimension.values if str(value) == text), None)
    try:
        return float(text) if isinstance(dimension, Real) else int(text)
    except ValueError:
        return None
