"""Features as declared values: frozen, comparable, printable, serialisable.

A definition says what, never how: the engine (`state`, `batch`, `stream`) computes it. The name of a feature is
derived from its definition, and a plan's version is a hash of all its definitions, so that a changed definition can
never pass for the old one.

Two kinds. *Features of an entity* summarise its earlier events and are kept as state: `Window`, `Decay`, `Latest`,
`SinceLatest`, `Sequence`. *Features of a row* are computed from the event itself and from the former: `Cross`,
`Ratio`, `Calendar`, `Embedding`.
"""

import hashlib
import json
import re
import zoneinfo
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

from assay_platform.errors import SchemaError

Aggregate = Literal["count", "sum", "mean", "std", "min", "max", "distinct", "last", "since_last", "rate"]
CalendarPart = Literal["hour", "weekday"]
# One key column, or several whose combination is the entity, such as ("card", "device").
Entity = str | tuple[str, ...]
HOUR_S, DAY_S = 3600, 86_400
# Columns that every event has: where in the day and in the week it lies, UTC.
CALENDAR_COLUMNS = ("calendar_hour", "calendar_weekday")
_WITHOUT_COLUMN = ("count", "since_last", "rate")


def duration_name(seconds: float) -> str:
    """3600 → '1h', 604800 → '7d'."""
    for unit_s, unit in ((DAY_S, "d"), (HOUR_S, "h"), (60, "m")):
        if seconds >= unit_s and seconds % unit_s == 0:
            return f"{int(seconds // unit_s)}{unit}"
    return f"{seconds:g}s"


def entity_columns(entity: Entity) -> tuple[str, ...]:
    """The key columns of an entity."""
    return (entity,) if isinstance(entity, str) else entity


def entity_name(entity: Entity) -> str:
    """One word for an entity: `card`, or `card_and_device` for a composite one."""
    return "_and_".join(entity_columns(entity))


def _check_entity(entity: Entity) -> None:
    columns = entity_columns(entity)
    if not columns or not all(columns) or len(set(columns)) != len(columns):
        raise SchemaError(f"entity {entity!r}; it must be a column or several different ones")


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which events count: those whose key is one of `values`, or whose number lies in [at_least, below).

    column: a key column with `values`; a numeric or calendar column with bounds. Bounds with at_least above below
    take both ends of a circle: hours from 22 to 6. A missing value never counts.
    """

    column: str
    values: tuple[str, ...] = ()
    at_least: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        bounded = self.at_least is not None or self.below is not None
        if bool(self.values) == bounded:
            raise SchemaError(f"where on {self.column!r} needs either values, or at_least and below")

    @cached_property
    def name(self) -> str:
        """Such as `channel_web` or `calendar_hour_22_to_6`."""
        if self.values:
            readable = "_or_".join(self.values)
        elif self.at_least is None:
            readable = f"below_{self.below:g}"
        else:
            readable = f"{self.at_least:g}_up" if self.below is None else f"{self.at_least:g}_to_{self.below:g}"
        plain = re.sub(r"[^A-Za-z0-9_]", "_", readable)
        if plain != readable or len(plain) > 40:
            plain = f"{plain[:40]}_{hashlib.sha256(readable.encode()).hexdigest()[:6]}"
        return f"{self.column}_{plain}"


def _suffix(where: Where | None) -> str:
    return "" if where is None else f"__where_{where.name}"


@dataclass(frozen=True, kw_only=True)
class Window:
    """An aggregate of an entity's events in a sliding window that ends, exclusively, at the time asked for.

    aggregate:
        count       events, or with a column: events where it is not missing
        sum, mean, std, min, max    of a numeric column; std is the population's
        distinct    different values of a key column, at most `max_distinct`
        last        the numeric column at the newest event
        since_last  seconds since the newest event; missing if it is out of the window
        rate        events (with a column: its sum) a second, over that of the longer window `against_s`
    With nothing in the window, count, sum and distinct are 0, the others are missing.

    num_tiles: the window is kept as so many tiles on a fixed grid. Its newest tile is the one under way, so it spans
    between (num_tiles - 1) / num_tiles of its length and all of it.
    max_events: above 0 the window is exact instead, [t - length, t): the entity's newest `max_events` events are kept,
    and a window that holds more than that sees only them. Costs memory for each event kept.
    """

    entity: Entity
    aggregate: Aggregate
    length_s: int
    column: str | None = None
    where: Where | None = None
    num_tiles: int = 12
    max_events: int = 0
    max_distinct: int = 64
    against_s: int | None = None

    def __post_init__(self) -> None:
        _check_entity(self.entity)
        if self.aggregate not in get_args(Aggregate):
            raise SchemaError(f"aggregate {self.aggregate!r}; allowed are {', '.join(get_args(Aggregate))}")
        if self.column is None and self.aggregate not in _WITHOUT_COLUMN:
            raise SchemaError(f"a window with aggregate {self.aggregate!r} needs a column")
        for length_s in (self.length_s, self.length_s if self.against_s is None else self.against_s):
            if self.num_tiles < 1 or length_s < 1 or length_s * 1_000_000 % self.num_tiles:
                raise SchemaError(
                    f"length_s {length_s} must be a positive number of seconds that divides into "
                    f"num_tiles {self.num_tiles}"
                )
        if not 0 <= self.max_events <= 4096 or not 1 <= self.max_distinct <= 4096:
            raise SchemaError(
                f"max_events {self.max_events} must be 0 to 4096, max_distinct {self.max_distinct} 1 to 4096"
            )
        if (self.aggregate == "rate") != (self.against_s is not None):
            raise SchemaError("against_s, the longer window, belongs to aggregate 'rate' and to no other")
        if self.against_s is not None and self.against_s <= self.length_s:
            raise SchemaError(f"against_s {self.against_s} must be longer than length_s {self.length_s}")

    @cached_property
    def name(self) -> str:
        """Such as `card__amount__mean__7d`."""
        name = (
            f"{entity_name(self.entity)}__{self.column or 'events'}__{self.aggregate}__{duration_name(self.length_s)}"
        )
        if self.against_s is not None:
            name += f"_of_{duration_name(self.against_s)}"
        return name + ("__exact" if self.max_events else "") + _suffix(self.where)


@dataclass(frozen=True, kw_only=True)
class Decay:
    """Σ value · 2^(-age / half-life) over all earlier events; column None counts events."""

    entity: Entity
    half_life_s: int
    column: str | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        _check_entity(self.entity)
        if self.half_life_s < 1:
            raise SchemaError(f"half_life_s is {self.half_life_s}; it must be at least 1 second")

    @cached_property
    def name(self) -> str:
        """Such as `card__events__decay__1d`."""
        name = f"{entity_name(self.entity)}__{self.column or 'events'}__decay__{duration_name(self.half_life_s)}"
        return name + _suffix(self.where)


@dataclass(frozen=True, kw_only=True)
class Latest:
    """The value of a numeric column at the entity's latest earlier event."""

    entity: Entity
    column: str
    where: Where | None = None

    def __post_init__(self) -> None:
        _check_entity(self.entity)

    @cached_property
    def name(self) -> str:
        """Such as `card__amount__latest`."""
        return f"{entity_name(self.entity)}__{self.column}__latest" + _suffix(self.where)


@dataclass(frozen=True, kw_only=True)
class SinceLatest:
    """Seconds since the entity's latest earlier event."""

    entity: Entity
    where: Where | None = None

    def __post_init__(self) -> None:
        _check_entity(self.entity)

    @cached_property
    def name(self) -> str:
        """Such as `card__since_latest_s`."""
        return f"{entity_name(self.entity)}__since_latest_s" + _suffix(self.where)


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """The entity's latest `length` values of a key column, or of several side by side, oldest first. Online only."""

    entity: Entity
    column: Entity
    length: int

    def __post_init__(self) -> None:
        _check_entity(self.entity)
        if self.length < 1:
            raise SchemaError(f"length is {self.length}; it must be at least 1")

    @cached_property
    def name(self) -> str:
        """Such as `user__item__sequence__100`."""
        return f"{entity_name(self.entity)}__{entity_name(self.column)}__sequence__{self.length}"


@dataclass(frozen=True, kw_only=True)
class Cross:
    """The Cartesian product of 2 or 3 columns, as one category; missing if any part is.

    columns: key columns as they are; numeric columns, or features of the plan, where `edges` has cut points for them.
    edges: nothing, or one tuple a column: () for a key column, else ascending cut points; the part is then the
    number of cut points at or below the value. num_buckets 0 keeps the readable combination, any other number
    hashes into so many.
    """

    columns: tuple[str, ...]
    num_buckets: int = 0
    edges: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= len(self.columns) <= 3:
            raise SchemaError(f"a cross takes 2 or 3 columns, not {len(self.columns)}")
        if self.num_buckets < 0:
            raise SchemaError(f"num_buckets is {self.num_buckets}; it must be 0 or more")
        if self.edges and len(self.edges) != len(self.columns):
            raise SchemaError(f"edges has {len(self.edges)} entries for {len(self.columns)} columns")
        for cuts in self.edges:
            if list(cuts) != sorted(set(cuts)):
                raise SchemaError(f"edges {cuts} must ascend")

    @cached_property
    def name(self) -> str:
        """Such as `provider_x_country`."""
        return "_x_".join(self.columns)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One number over another, such as the amount over the card's usual amount; missing if either is, or at 0.

    numerator, denominator: names of numeric columns, or of numeric features of the plan. less: another one that is
    taken off the denominator first: frauds reported in 30 days, over the events of 44 days less those of the newest
    14, is the share of fraud among events old enough to have been reported after 14 days.
    """

    numerator: str
    denominator: str
    less: str | None = None

    def __post_init__(self) -> None:
        if not self.numerator or not self.denominator or self.numerator == self.denominator:
            raise SchemaError(f"a ratio needs two different names, not {self.numerator!r} and {self.denominator!r}")

    @cached_property
    def name(self) -> str:
        """Such as `amount__over__card__amount__mean__7d`."""
        name = f"{self.numerator}__over__{self.denominator}"
        return name if self.less is None else f"{name}__less__{self.less}"


@dataclass(frozen=True, kw_only=True)
class Calendar:
    """Where in the day (hours, 0 to below 24) or week (0 Monday to below 7) the event lies, in a time zone.

    Local clocks are used: on the day that summer time begins, no event lies between 2 and 3.
    """

    part: CalendarPart
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        if self.part not in get_args(CalendarPart):
            raise SchemaError(f"part {self.part!r}; allowed are hour, weekday")
        if self.timezone != "UTC":
            try:
                zoneinfo.ZoneInfo(self.timezone)
            except (KeyError, ValueError, OSError) as error:
                raise SchemaError(f"timezone {self.timezone!r} is not known; write it as Europe/Oslo") from error

    @cached_property
    def name(self) -> str:
        """`calendar_hour`, or `calendar_hour_Europe_Oslo`."""
        zone = "" if self.timezone == "UTC" else "_" + re.sub(r"\W", "_", self.timezone)
        return f"calendar_{self.part}{zone}"


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A learned vector in place of a key column with many values: `width` numeric features.

    table: the digest of the trained `EmbeddingTable`, so that a vector trained anew is another feature.
    """

    column: str
    width: int
    table: str

    def __post_init__(self) -> None:
        if self.width < 1 or not re.fullmatch(r"[0-9a-f]{12}", self.table):
            raise SchemaError(
                f"width is {self.width}, table is {self.table!r}; allowed are 1 or more, and the 12 digits "
                "that EmbeddingTable.digest gives"
            )

    @cached_property
    def name(self) -> str:
        """Such as `store__embedding`."""
        return f"{self.column}__embedding"

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the vector."""
        return tuple(f"{self.name}__{i}" for i in range(self.width))


EntityFeature = Window | Decay | Latest | SinceLatest
RowFeature = Cross | Ratio | Calendar | Embedding
Definition = EntityFeature | Sequence | RowFeature
_KINDS: dict[str, Callable[..., Definition]] = {
    cls.__name__: cls for cls in (Window, Decay, Latest, SinceLatest, Sequence, Cross, Ratio, Calendar, Embedding)
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
        for entity in self.entities:
            if sum(isinstance(d, Sequence) and d.entity == entity for d in self.definitions) > 1:
                raise SchemaError(f"entity {entity_name(entity)!r} has two sequences; one is kept")

    @cached_property
    def version(self) -> str:
        """Twelve hexadecimal digits that change with any definition."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    @cached_property
    def entities(self) -> tuple[Entity, ...]:
        """Entities that have features or sequences, in order of first mention."""
        return tuple(dict.fromkeys(d.entity for d in self.definitions if not isinstance(d, RowFeature)))

    def of_entity(self, entity: Entity) -> tuple[EntityFeature, ...]:
        """The numeric features of one entity, in order."""
        return tuple(d for d in self.definitions if isinstance(d, EntityFeature) and d.entity == entity)

    def sequence_of(self, entity: Entity) -> Sequence | None:
        """The sequence kept for an entity, if any."""
        return next((d for d in self.definitions if isinstance(d, Sequence) and d.entity == entity), None)

    @property
    def crosses(self) -> tuple[Cross, ...]:
        """The categorical crosses."""
        return tuple(d for d in self.definitions if isinstance(d, Cross))

    @property
    def ratios(self) -> tuple[Ratio, ...]:
        """The ratios."""
        return tuple(d for d in self.definitions if isinstance(d, Ratio))

    @property
    def calendar(self) -> tuple[Calendar, ...]:
        """The features of the event's own time."""
        return tuple(d for d in self.definitions if isinstance(d, Calendar))

    @property
    def embeddings(self) -> tuple[Embedding, ...]:
        """The learned vectors."""
        return tuple(d for d in self.definitions if isinstance(d, Embedding))

    @property
    def numeric_names(self) -> tuple[str, ...]:
        """Names of all numeric features of entities, entity by entity."""
        return tuple(d.name for entity in self.entities for d in self.of_entity(entity))

    @property
    def row_numeric_names(self) -> tuple[str, ...]:
        """Names of the numeric features of the row: calendar, ratios, embeddings."""
        vectors = tuple(name for embedding in self.embeddings for name in embedding.names)
        return (*(c.name for c in self.calendar), *(r.name for r in self.ratios), *vectors)

    @cached_property
    def helper_names(self) -> tuple[str, ...]:
        """What a share is made of, over and under the line of a ratio with `less`, and how many different values
        are among what is over it: no inputs by themselves, but what reasons are told with.
        """
        parts = [(r.numerator, r.denominator) for r in self.ratios if r.less is not None]
        over = {name for name, _ in parts}
        counted = {
            (d.entity, d.column) for d in self.definitions if isinstance(d, Window) and d.name in over and d.column
        }
        spread = [d.name for d in self.definitions if _counts_distinct(d) and _among(d) in counted]
        return tuple(dict.fromkeys((*(name for names in parts for name in names), *spread)))

    def split(self, column: str) -> tuple["FeaturePlan", "FeaturePlan"]:
        """(features of entities over this numeric column, all other definitions)."""
        over = {d: column in FeaturePlan((d,)).number_columns() for d in self.definitions}
        return FeaturePlan(tuple(d for d in over if over[d])), FeaturePlan(tuple(d for d in over if not over[d]))

    def key_columns(self) -> tuple[str, ...]:
        """Key columns that entities, sequences, distinct counts and filters need of every event."""
        columns: list[str] = [c for entity in self.entities for c in entity_columns(entity)]
        for definition in self.definitions:
            if isinstance(definition, Sequence):
                columns.extend(entity_columns(definition.column))
            elif _counts_distinct(definition):
                columns.append(definition.column)  # type: ignore[union-attr,arg-type]
            where = getattr(definition, "where", None)
            if where is not None and where.values:
                columns.append(where.column)
        return tuple(dict.fromkeys(columns))

    def number_columns(self) -> tuple[str, ...]:
        """Numeric columns that the features of entities need of every event."""
        columns: list[str] = []
        for definition in self.definitions:
            if not isinstance(definition, EntityFeature):
                continue
            column = getattr(definition, "column", None)
            if column is not None and not _counts_distinct(definition):
                columns.append(column)
            if definition.where is not None and not definition.where.values:
                columns.append(definition.where.column)
        return tuple(c for c in dict.fromkeys(columns) if c not in CALENDAR_COLUMNS)

    def inputs(self, numeric: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Columns to read of every event as keys and as numbers; an entity's column that is `numeric` is a number."""
        keys = tuple(name for name in self.key_columns() if name not in numeric)
        numbers = tuple(name for name in self.key_columns() if name in numeric)
        return keys, tuple(dict.fromkeys((*self.number_columns(), *numbers)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form that `from_dict` reads back to an equal plan. Fields at their default are left out."""
        return {"definitions": [_to_dict(d) for d in self.definitions]}

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "FeaturePlan":
        """Read a plan back.

        Raises:
            SchemaError: an unknown kind or field.
        """
        return FeaturePlan(tuple(definition_from_dict(entry) for entry in document.get("definitions", ())))


def _among(definition: Definition) -> tuple[Entity, str | None]:
    """Whose events a filtered window counts, and by which column they are filtered."""
    assert isinstance(definition, Window)
    return definition.entity, None if definition.where is None else definition.where.column


def _counts_distinct(definition: Definition) -> bool:
    return isinstance(definition, Window) and definition.aggregate == "distinct"


def _to_dict(definition: Definition) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": type(definition).__name__}
    for field in fields(definition):
        value = getattr(definition, field.name)
        if value != field.default:
            entry[field.name] = _given(value) if isinstance(value, Where) else value
    return json.loads(json.dumps(entry))  # type: ignore[no-any-return]  # tuples become lists, as they will in a file


def _given(where: Where) -> dict[str, Any]:
    return {k: v for k, v in asdict(where).items() if v not in ((), None)}


def definition_from_dict(entry: Mapping[str, Any]) -> Definition:
    """One definition from its JSON form.

    Raises:
        SchemaError: an unknown kind or field.
    """
    values = dict(entry)
    kind = values.pop("kind", None)
    if kind not in _KINDS:
        raise SchemaError(f"unknown feature kind {kind!r}; allowed are {', '.join(_KINDS)}")
    try:
        if values.get("where") is not None:
            values["where"] = Where(**{k: _tuples(v) for k, v in values["where"].items()})
        return _KINDS[kind](**{k: _tuples(v) for k, v in values.items()})
    except TypeError as error:
        raise SchemaError(f"feature kind {kind}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def as_code(definition: Definition) -> str:
    """The definition as Python source, without fields at their default: what discovery writes for people to read."""
    parts = []
    for field in fields(definition):
        value = getattr(definition, field.name)
        if value != field.default:
            shown = repr(value)
            if isinstance(value, Where):
                shown = f"Where({', '.join(f'{k}={v!r}' for k, v in _given(value).items())})"
            parts.append(f"{field.name}={shown}")
    return f"{type(definition).__name__}({', '.join(parts)})"
