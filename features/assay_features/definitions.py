"""Features as declared values: frozen, comparable, printable, serialisable.

A definition says what, never how: the engine (`batch`, `stream`) computes it. The name of a feature is derived
from its definition, and a plan's version is a hash of all its definitions, so that a changed definition can
never pass for the old one.

Not covered yet: composite entities, filtered windows, ratios, learned embeddings.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from assay_platform.errors import SchemaError

Aggregate = Literal["count", "sum", "mean", "std"]
HOUR_S, DAY_S = 3600, 86_400


def duration_name(seconds: float) -> str:
    """3600 → '1h', 604800 → '7d'."""
    for unit_s, unit in ((DAY_S, "d"), (HOUR_S, "h"), (60, "m")):
        if seconds >= unit_s and seconds % unit_s == 0:
            return f"{int(seconds // unit_s)}{unit}"
    return f"{seconds:g}s"


@dataclass(frozen=True, kw_only=True)
class Window:
    """An aggregate of an entity's events in a sliding window that ends, exclusively, at the time asked for.

    column: a numeric column; None counts events. A window is kept as `num_tiles` tiles on a fixed grid: its
    newest tile is the one under way, so it spans between (num_tiles - 1) / num_tiles of its length and all of
    it. 'std' is the population standard deviation. With no value in the window, count and sum are 0, mean and
    std are missing.
    """

    entity: str
    aggregate: Aggregate
    length_s: int
    column: str | None = None
    num_tiles: int = 12

    def __post_init__(self) -> None:
        if self.aggregate not in get_args(Aggregate):
            raise SchemaError(f"aggregate {self.aggregate!r}; allowed are {', '.join(get_args(Aggregate))}")
        if self.column is None and self.aggregate != "count":
            raise SchemaError(f"a window with aggregate {self.aggregate!r} needs a column")
        if self.num_tiles < 1 or self.length_s < 1 or self.length_s * 1_000_000 % self.num_tiles:
            raise SchemaError(
                f"length_s {self.length_s} must be a positive number of seconds that divides into "
                f"num_tiles {self.num_tiles}"
            )

    @property
    def name(self) -> str:
        """Such as `card__amount__mean__7d`."""
        return f"{self.entity}__{self.column or 'events'}__{self.aggregate}__{duration_name(self.length_s)}"


@dataclass(frozen=True, kw_only=True)
class Decay:
    """Σ value · 2^(-age / half-life) over all earlier events; column None counts events."""

    entity: str
    half_life_s: int
    column: str | None = None

    def __post_init__(self) -> None:
        if self.half_life_s < 1:
            raise SchemaError(f"half_life_s is {self.half_life_s}; it must be at least 1 second")

    @property
    def name(self) -> str:
        """Such as `card__events__decay__1d`."""
        return f"{self.entity}__{self.column or 'events'}__decay__{duration_name(self.half_life_s)}"


@dataclass(frozen=True, kw_only=True)
class Latest:
    """The value of a numeric column at the entity's latest earlier event."""

    entity: str
    column: str

    @property
    def name(self) -> str:
        """Such as `card__amount__latest`."""
        return f"{self.entity}__{self.column}__latest"


@dataclass(frozen=True, kw_only=True)
class SinceLatest:
    """Seconds since the entity's latest earlier event."""

    entity: str

    @property
    def name(self) -> str:
        """Such as `card__since_latest_s`."""
        return f"{self.entity}__since_latest_s"


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """The entity's latest `length` values of a key column, oldest first. Online only."""

    entity: str
    column: str
    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise SchemaError(f"length is {self.length}; it must be at least 1")

    @property
    def name(self) -> str:
        """Such as `user__item__sequence__100`."""
        return f"{self.entity}__{self.column}__sequence__{self.length}"


@dataclass(frozen=True, kw_only=True)
class Cross:
    """The Cartesian product of 2 or 3 key columns of the event itself, as one category.

    Missing if any part is. num_buckets 0 keeps the readable pair, any other number hashes into so many.
    """

    columns: tuple[str, ...]
    num_buckets: int = 0

    def __post_init__(self) -> None:
        if not 2 <= len(self.columns) <= 3:
            raise SchemaError(f"a cross takes 2 or 3 columns, not {len(self.columns)}")
        if self.num_buckets < 0:
            raise SchemaError(f"num_buckets is {self.num_buckets}; it must be 0 or more")

    @property
    def name(self) -> str:
        """Such as `provider_x_country`."""
        return "_x_".join(self.columns)


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """Where in the day (hours, 0 to below 24) or week (0 Monday to below 7) the event lies, UTC."""

    part: Literal["hour", "weekday"]

    def __post_init__(self) -> None:
        if self.part not in ("hour", "weekday"):
            raise SchemaError(f"part {self.part!r}; allowed are hour, weekday")

    @property
    def name(self) -> str:
        """`calendar_hour` or `calendar_weekday`."""
        return f"calendar_{self.part}"


EntityFeature = Window | Decay | Latest | SinceLatest
RowFeature = Cross | Calendar
Definition = EntityFeature | Sequence | RowFeature
_KINDS: dict[str, Callable[..., Definition]] = {
    cls.__name__: cls for cls in (Window, Decay, Latest, SinceLatest, Sequence, Cross, Calendar)
}


@dataclass(frozen=True)
class FeaturePlan:
    """All features of one model."""

    definitions: tuple[Definition, ...]

    def __post_init__(self) -> None:
        names = [definition.name for definition in self.definitions]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SchemaError(f"two definitions have the name {twice[0]!r}")

    @property
    def version(self) -> str:
        """Twelve hexadecimal digits that change with any definition."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def entities(self) -> tuple[str, ...]:
        """Entities that have features or sequences, in order of first mention."""
        return tuple(dict.fromkeys(d.entity for d in self.definitions if not isinstance(d, RowFeature)))

    def of_entity(self, entity: str) -> tuple[EntityFeature, ...]:
        """The numeric features of one entity, in order."""
        return tuple(d for d in self.definitions if isinstance(d, EntityFeature) and d.entity == entity)

    def sequence_of(self, entity: str) -> Sequence | None:
        """The sequence kept for an entity, if any."""
        return next((d for d in self.definitions if isinstance(d, Sequence) and d.entity == entity), None)

    @property
    def crosses(self) -> tuple[Cross, ...]:
        """The categorical crosses."""
        return tuple(d for d in self.definitions if isinstance(d, Cross))

    @property
    def calendar(self) -> tuple[Calendar, ...]:
        """The features of the event's own time."""
        return tuple(d for d in self.definitions if isinstance(d, Calendar))

    @property
    def numeric_names(self) -> tuple[str, ...]:
        """Names of all numeric features of entities, entity by entity."""
        return tuple(d.name for entity in self.entities for d in self.of_entity(entity))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form that `from_dict` reads back to an equal plan."""
        return {"definitions": [{"kind": type(d).__name__, **_jsonable(asdict(d))} for d in self.definitions]}

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "FeaturePlan":
        """Read a plan back.

        Raises:
            SchemaError: an unknown kind or field.
        """
        definitions = []
        for entry in document.get("definitions", ()):
            values = dict(entry)
            kind = values.pop("kind", None)
            if kind not in _KINDS:
                raise SchemaError(f"unknown feature kind {kind!r}; allowed are {', '.join(_KINDS)}")
            try:
                definitions.append(
                    _KINDS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
                )
            except TypeError as error:
                raise SchemaError(f"feature kind {kind}: {error}") from error
        return FeaturePlan(tuple(definitions))


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
