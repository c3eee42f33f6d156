"""What a search may vary, as declared values."""

from dataclasses import dataclass
from typing import Any

from assay_platform.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Real:
    """A number between low and high; log: even on a logarithmic scale."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ConfigError(f"range {self.low} to {self.high}: low must be below high, and above 0 with log")


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A whole number between low and high, both included."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(f"range {self.low} to {self.high}: low must be below high")


@dataclass(frozen=True)
class OneOf:
    """One of a few values."""

    values: tuple[Any, ...]


Space = dict[str, Real | Whole | OneOf]
