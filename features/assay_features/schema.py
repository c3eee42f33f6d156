"""The schema file: what the columns of a table mean.

TOML → `FraudSchema` or `RecommendSchema`. The file format is part of the public contract; the README shows it.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from assay_platform.errors import SchemaError

Protocol = Literal["temporal", "random", "leave-last-out"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How rows are divided.

    train, validation: fractions of all rows; what is left is the test part. Rows are taken in time order.
    protocol, repeats: recommendation only.
    """

    train: float = 0.7
    validation: float = 0.1
    protocol: Protocol = "temporal"
    repeats: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.train < 1 or not 0 < self.validation < 1 or self.train + self.validation >= 1:
            raise SchemaError(
                f"[split] train = {self.train}, validation = {self.validation}: both must be above 0 and "
                "their sum below 1, so that a test part is left"
            )
        if self.protocol not in ("temporal", "random", "leave-last-out"):
            raise SchemaError(f"[split] protocol = {self.protocol!r}; allowed are temporal, random, leave-last-out")


@dataclass(frozen=True, kw_only=True)
class FraudSchema:
    """Events with a label to predict. `entities` are who acts and with whom."""

    timestamp: str
    label: str
    entities: tuple[str, ...]
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    id: str | None = None
    amount: str | None = None
    immutable: tuple[str, ...] = ()
    split: Split = field(default_factory=Split)

    kind: Literal["fraud"] = "fraud"

    def __post_init__(self) -> None:
        if not self.entities:
            raise SchemaError("[columns] entities is empty; name at least one column, such as the card")
        _no_repeats("entities", self.entities)
        _no_repeats("numeric and categorical", self.numeric + self.categorical)
        if self.amount is not None and self.amount not in self.numeric:
            raise SchemaError(f"[columns] amount = {self.amount!r} must also be listed in numeric")
        inputs = {*self.entities, *self.numeric, *self.categorical}
        for name in self.immutable:
            if name not in inputs:
                raise SchemaError(f"[columns] immutable names {name!r}, which is no entity, numeric or categorical")
        for role, other in (("label", self.label), ("timestamp", self.timestamp), ("id", self.id)):
            if other in inputs:
                raise SchemaError(f"[columns] {role} = {other!r} is also listed as an input of the model")

    @property
    def keys(self) -> tuple[str, ...]:
        """Columns read as strings: entities and categorical ones, each once."""
        return tuple(dict.fromkeys(self.entities + self.categorical))

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns read as numbers."""
        return self.numeric


@dataclass(frozen=True, kw_only=True)
class ItemTable:
    """What is known of items besides who took them."""

    path: str
    id: str
    text: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RecommendSchema:
    """Interactions of users with items."""

    user: str
    item: str
    timestamp: str
    weight: str | None = None
    items: ItemTable | None = None
    split: Split = field(default_factory=Split)

    kind: Literal["recommend"] = "recommend"
    id: None = None
    label: None = None

    def __post_init__(self) -> None:
        named = [n for n in (self.user, self.item, self.timestamp, self.weight) if n is not None]
        _no_repeats("user, item, timestamp, weight", tuple(named))

    @property
    def keys(self) -> tuple[str, ...]:
        """Columns read as strings."""
        return (self.user, self.item)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns read as numbers."""
        return () if self.weight is None else (self.weight,)


Schema = FraudSchema | RecommendSchema


def _no_repeats(role: str, names: tuple[str, ...]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SchemaError(f"[columns] {role}: {twice[0]!r} is named more than once")


def read_schema(path: Path) -> Schema:
    """Read a schema file.

    Raises:
        SchemaError: the file is missing, is no TOML, or misses, adds or mistypes a field; the message names it.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: is not valid TOML: {error}") from error
    try:
        return schema_from_dict(document)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from error


def schema_from_dict(document: Mapping[str, Any]) -> Schema:
    """Build a schema from parsed TOML or from `schema_to_dict`."""
    kind = document.get("kind")
    if kind not in ("fraud", "recommend"):
        raise SchemaError(f"kind = {kind!r}; allowed are 'fraud' and 'recommend'")
    _known("the top level", document, ("kind", "columns", "split", "items"))
    columns = _table(document, "columns")
    split = Split(**_typed("[split]", _table(document, "split"), _SPLIT))
    if kind == "fraud":
        if "items" in document:
            raise SchemaError("[items] belongs to kind = 'recommend'")
        return FraudSchema(**_typed("[columns]", columns, _FRAUD, ("timestamp", "label", "entities")), split=split)
    items = None
    if document.get("items") is not None:
        items = ItemTable(**_typed("[items]", _table(document, "items"), _ITEMS, ("path", "id")))
    wanted = _typed("[columns]", columns, _RECOMMEND, ("user", "item", "timestamp"))
    return RecommendSchema(**wanted, items=items, split=split)


def schema_to_dict(schema: Schema) -> dict[str, Any]:
    """The document that `schema_from_dict` reads back to an equal schema."""
    flat = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(schema).items() if v is not None}
    document: dict[str, Any] = {"kind": flat.pop("kind"), "split": flat.pop("split")}
    items: Any = flat.pop("items", None)
    if items is not None:
        document["items"] = {k: list(v) if isinstance(v, tuple) else v for k, v in items.items()}
    return document | {"columns": flat}


_STRING, _STRINGS, _NUMBER, _FLAG = "a string", "a list of strings", "a number", "true or false"
_FRAUD = {
    "timestamp": _STRING, "label": _STRING, "id": _STRING, "amount": _STRING,
    "entities": _STRINGS, "numeric": _STRINGS, "categorical": _STRINGS, "immutable": _STRINGS,
}  # fmt: skip
_RECOMMEND = {"user": _STRING, "item": _STRING, "timestamp": _STRING, "weight": _STRING}
_ITEMS = {"path": _STRING, "id": _STRING, "text": _STRINGS, "categorical": _STRINGS}
_SPLIT = {"train": _NUMBER, "validation": _NUMBER, "protocol": _STRING, "repeats": _FLAG}


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, Mapping):
        raise SchemaError(f"[{name}] must be a table")
    return table


def _known(where: str, table: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for name in table:
        if name not in allowed:
            raise SchemaError(f"{where}: unknown field {name!r}; allowed are {', '.join(allowed)}")


def _typed(
    where: str, table: Mapping[str, Any], kinds: Mapping[str, str], required: tuple[str, ...] = ()
) -> dict[str, Any]:
    _known(where, table, tuple(kinds))
    for name in required:
        if name not in table:
            raise SchemaError(f"{where}: the field {name!r} is missing; it must be {kinds[name]}")
    values: dict[str, Any] = {}
    for name, value in table.items():
        kind = kinds[name]
        fits = {
            _STRING: isinstance(value, str) and bool(value),
            _STRINGS: isinstance(value, list) and all(isinstance(v, str) and v for v in value),
            _NUMBER: isinstance(value, int | float) and not isinstance(value, bool),
            _FLAG: isinstance(value, bool),
        }[kind]
        if not fits:
            raise SchemaError(f"{where}: {name} = {value!r}; expected {kind}")
        values[name] = tuple(cast("list[str]", value)) if kind == _STRINGS else value
    return values
