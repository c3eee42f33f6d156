"""The schema file: what the columns of a table mean.

TOML → `FraudSchema`, `RecommendSchema` or, for `assay automl`, `TableSchema`. The file format is part of the public
contract; the README shows it.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from assay_platform.errors import ConfigError, SchemaError
from assay_platform.models.decisions import Costs, DecisionSettings
from assay_platform.models.list_rules import NO_RULES, ListRules
from assay_platform.robustness.constraints import Constraints

Protocol = Literal["temporal", "random", "leave-last-out"]
_MAX_DELAY_DAYS = 3650
_Parsed = TypeVar("_Parsed")
# The key column that is worked out, not read, where a schema says how accounts are known.
ACCOUNT = "account"


@dataclass(frozen=True, kw_only=True)
class Split:
    """How rows are divided.

    train, validation: fractions of all rows; what is left is the test part. Rows are taken in time order.
    protocol, repeats: recommendation only. validation_from, test_from: moments in ISO 8601 instead of fractions, for
    recommendation by time. max_items: those taken most before the test part are kept; default all.
    """

    train: float = 0.7
    validation: float = 0.1
    protocol: Protocol = "temporal"
    repeats: bool = False
    validation_from: str | None = None
    test_from: str | None = None
    max_items: float | None = None

    def __post_init__(self) -> None:
        if self.max_items is not None and (self.max_items < 1 or self.max_items != int(self.max_items)):
            raise SchemaError(f"[split] max_items = {self.max_items}; allowed is a whole number from 1")
        if self.moments_us is not None and self.protocol != "temporal":
            raise SchemaError(f"[split] validation_from and test_from need protocol 'temporal', not {self.protocol!r}")
        if not 0 < self.train < 1 or not 0 < self.validation < 1 or self.train + self.validation >= 1:
            raise SchemaError(
                f"[split] train = {self.train}, validation = {self.validation}: both must be above 0 and "
                "their sum below 1, so that a test part is left"
            )
        if self.protocol not in ("temporal", "random", "leave-last-out"):
            raise SchemaError(f"[split] protocol = {self.protocol!r}; allowed are temporal, random, leave-last-out")

    @property
    def moments_us(self) -> tuple[int, int] | None:
        """Where validation and test begin, if moments say so.

        Raises:
            SchemaError: only one of the two is given, one is no moment, or they are the wrong way round.
        """
        if self.validation_from is None and self.test_from is None:
            return None
        found = []
        for name in ("validation_from", "test_from"):
            text = getattr(self, name)
            try:
                moment = datetime.fromisoformat(str(text))
            except ValueError as error:
                raise SchemaError(f"[split] {name} = {text!r}; both must be moments, such as '2017-12-01'") from error
            found.append(round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e6))
        if found[0] >= found[1]:
            raise SchemaError(f"[split] validation_from = {self.validation_from!r} is not before test_from")
        return found[0], found[1]


@dataclass(frozen=True, kw_only=True)
class Account:
    """How payments of one account are known where no column names it.

    total: a numeric column, what the account had spent before the payment. within: columns that stay the same for it.
    """

    total: str
    within: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FraudSchema:
    """Events with a label to predict. `entities` are who acts and with whom; there may be none.

    groups: columns that together are an entity too, such as a card and the amount: the same payment again.
    account: given, payments are joined to accounts, and `account` is an entity too; see `assay_features.accounts`.
    label_delay_days: how long after its event a label is known. Given, features count what was reported of an entity.
    constraints: what of an event its sender can change. decisions: from a probability to approve, review or decline.
    """

    timestamp: str
    label: str
    entities: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    id: str | None = None
    amount: str | None = None
    immutable: tuple[str, ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    account: Account | None = None
    label_delay_days: float | None = None
    constraints: Constraints = field(default_factory=Constraints)
    decisions: DecisionSettings = field(default_factory=DecisionSettings)
    split: Split = field(default_factory=Split)

    kind: Literal["fraud"] = "fraud"

    def __post_init__(self) -> None:
        if not self.numeric and not self.categorical and not self.entities:
            raise SchemaError("[columns] names no entities, numeric or categorical column; a model needs one at least")
        _no_repeats("entities", self.entities)
        _no_repeats("numeric and categorical", self.numeric + self.categorical)
        if self.amount is not None and self.amount not in self.numeric:
            raise SchemaError(f"[columns] amount = {self.amount!r} must also be listed in numeric")
        inputs = {*self.entities, *self.numeric, *self.categorical}
        for name in self.immutable:
            if name not in inputs:
                raise SchemaError(f"[columns] immutable names {name!r}, which is no entity, numeric or categorical")
        self._check_account(inputs)
        self._check_groups(inputs | set(self.worked_out))
        self._check_constraints(inputs)
        for role, other in (("label", self.label), ("timestamp", self.timestamp), ("id", self.id)):
            if other in inputs:
                raise SchemaError(f"[columns] {role} = {other!r} is also listed as an input of the model")

    def _check_account(self, inputs: set[str]) -> None:
        if self.account is None:
            return
        if self.amount is None:
            raise SchemaError("[account] needs [columns] amount: what a payment adds to the total")
        if self.account.total not in self.numeric:
            raise SchemaError(f"[account] total = {self.account.total!r} must also be listed in numeric")
        for name in self.account.within:
            if name not in inputs:
                raise SchemaError(f"[account] within names {name!r}, which is no entity, numeric or categorical")
        if ACCOUNT in {*inputs, self.timestamp, self.label, self.id}:
            raise SchemaError(f"[account]: the table has a column {ACCOUNT!r} already; name it in entities instead")

    def _check_groups(self, inputs: set[str]) -> None:
        for group in self.groups:
            _no_repeats("groups", group)
            if len(group) < 2:
                raise SchemaError(f"[columns] groups has {list(group)}; a group has two columns or more")
            for name in group:
                if name not in inputs:
                    raise SchemaError(f"[columns] groups names {name!r}, which is no entity, numeric or categorical")

    def _check_constraints(self, inputs: set[str]) -> None:
        if self.label_delay_days is not None and not 0 <= self.label_delay_days <= _MAX_DELAY_DAYS:
            raise SchemaError(f"[labels] delay_days = {self.label_delay_days:g}; allowed are 0 to {_MAX_DELAY_DAYS}")
        numbers = set(self.numeric)
        for role, allowed, wanted in (
            ("any", inputs, "column of the model"),
            ("number", numbers, "numeric column"),
            ("category", inputs - numbers, "category or entity"),
        ):
            for name in self.constraints.named[role]:
                if name not in allowed:
                    raise SchemaError(f"[constraints] names {name!r}, which is no {wanted}")

    @property
    def keys(self) -> tuple[str, ...]:
        """Columns read as strings: entities and categorical ones, each once."""
        return tuple(dict.fromkeys(self.entities + self.categorical))

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns read as numbers."""
        return self.numeric

    @property
    def worked_out(self) -> tuple[str, ...]:
        """Entities that no column names."""
        return () if self.account is None else (ACCOUNT,)

    @property
    def limits(self) -> Constraints:
        """The constraints, with the immutable columns among them; nobody sends what an account is known by."""
        account = () if self.account is None else (self.account.total, *self.account.within)
        return replace(self.constraints, immutable=tuple(dict.fromkeys((*self.immutable, *account))))


@dataclass(frozen=True, kw_only=True)
class ItemTable:
    """What is known of items besides who took them. sentences: whether an encoder reads all that a row says."""

    path: str
    id: str
    text: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    sentences: bool = False


@dataclass(frozen=True, kw_only=True)
class RecommendSchema:
    """Interactions of users with items.

    action, actions: the column that says what a user did with an item, and its values, weakest first; lists are of what
    users will do the last of them with. diversity_loss: the part of NDCG@10 that lists may lose for being diverse.
    rules: what every list keeps to.
    """

    user: str
    item: str
    timestamp: str
    weight: str | None = None
    action: str | None = None
    actions: tuple[str, ...] = ()
    items: ItemTable | None = None
    split: Split = field(default_factory=Split)
    diversity_loss: float = 0.0
    rules: ListRules = NO_RULES

    kind: Literal["recommend"] = "recommend"
    id: None = None
    label: None = None

    def __post_init__(self) -> None:
        named = [n for n in (self.user, self.item, self.timestamp, self.weight, self.action) if n is not None]
        _no_repeats("user, item, timestamp, weight, action", tuple(named))
        if (self.action is None) != (not self.actions):
            raise SchemaError("[columns] action and [actions] order belong together; one of them is missing")
        if len(self.actions) == 1 or len(set(self.actions)) != len(self.actions):
            raise SchemaError(f"[actions] order = {list(self.actions)}; it must be two different actions or more")
        if not 0 <= self.diversity_loss < 1:
            raise SchemaError(f"[lists] diversity_loss = {self.diversity_loss}; allowed is 0 to below 1")
        for name in ("new_share", "explore"):
            if not 0 <= getattr(self.rules, name) <= 1:
                raise SchemaError(f"[lists] {name} = {getattr(self.rules, name)}; allowed is 0 to 1")
        if self.rules.new_days <= 0:
            raise SchemaError(f"[lists] new_days = {self.rules.new_days}; it must be above 0")
        categories = self.items.categorical if self.items else ()
        for column in (*self.rules.at_most, *self.rules.never):
            if column not in categories:
                known = ", ".join(categories) or "none"
                raise SchemaError(f"[lists] {column!r} is not a category of [items]; there are {known}")
        for column, most in self.rules.at_most.items():
            if most < 1:
                raise SchemaError(f"[lists.at_most] {column} = {most}; it must be at least 1")

    @property
    def keys(self) -> tuple[str, ...]:
        """Columns read as strings."""
        return (self.user, self.item) if self.action is None else (self.user, self.item, self.action)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns read as numbers."""
        return () if self.weight is None else (self.weight,)


@dataclass(frozen=True, kw_only=True)
class TableSchema:
    """Any table with a yes or no to predict, for `assay automl`.

    Columns that are not named are looked at, and used as what they seem to be. positive: the label's value that means
    yes, where it is not 1 or true. timestamp: given, the split is by time. group: given, the rows of one value of this
    column stay on one side of every split, such as all visits of a patient. ignore: what is known only afterwards.
    """

    label: str
    positive: str | None = None
    timestamp: str | None = None
    group: str | None = None
    id: str | None = None
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    split: Split = field(default_factory=Split)

    kind: Literal["table"] = "table"

    def __post_init__(self) -> None:
        _no_repeats("numeric, categorical and ignore", self.numeric + self.categorical + self.ignore)
        if self.label in {*self.numeric, *self.categorical, *self.ignore, self.group, self.timestamp, self.id}:
            raise SchemaError(f"[columns] label = {self.label!r} is named for something else too")
        for role, name in (("timestamp", self.timestamp), ("id", self.id)):
            if name is not None and name in {*self.numeric, *self.categorical}:
                raise SchemaError(f"[columns] {role} = {name!r} is also listed as an input of the model")


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
    return _read(path, schema_from_dict)


def read_labelled_schema(path: Path) -> FraudSchema | TableSchema:
    """Read a schema file of a table with labels.

    Raises:
        SchemaError: as `read_schema`, or the file is of a table without labels.
    """

    def parse(document: Mapping[str, Any]) -> FraudSchema | TableSchema:
        if document.get("kind") == "table":
            return _table_schema(document)
        schema = schema_from_dict(document)
        if not isinstance(schema, FraudSchema):
            raise SchemaError(f"kind = {schema.kind!r} has no label; allowed are 'fraud' and 'table'")
        return schema

    return _read(path, parse)


def _read(path: Path, parse: Callable[[Mapping[str, Any]], _Parsed]) -> _Parsed:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: is not valid TOML: {error}") from error
    try:
        return parse(document)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from error


def _table_schema(document: Mapping[str, Any]) -> TableSchema:
    for name in document:
        if name not in ("kind", "columns", "split"):
            raise SchemaError(f"[{name}] does not belong to kind = 'table'; allowed are columns and split")
    columns = _typed("[columns]", _table(document, "columns"), _TABLE, ("label",))
    return TableSchema(**columns, split=Split(**_typed("[split]", _table(document, "split"), _PARTS)))


def schema_from_dict(document: Mapping[str, Any]) -> Schema:
    """Build a schema from parsed TOML or from `schema_to_dict`."""
    kind = document.get("kind")
    if kind not in ("fraud", "recommend"):
        also = "; 'table' is for `assay automl`" if kind == "table" else ""
        raise SchemaError(f"kind = {kind!r}; allowed are 'fraud' and 'recommend'{also}")
    _known("the top level", document, _TABLES)
    columns = _table(document, "columns")
    split = Split(**_typed("[split]", _table(document, "split"), _SPLIT))
    if kind == "fraud":
        for name in ("items", "lists", "actions"):
            if name in document:
                raise SchemaError(f"[{name}] belongs to kind = 'recommend'")
        if split.moments_us is not None:
            raise SchemaError("[split] validation_from and test_from belong to kind = 'recommend'")
        if split.max_items is not None:
            raise SchemaError("[split] max_items belongs to kind = 'recommend'")
        labels = _typed("[labels]", _table(document, "labels"), {"delay_days": _NUMBER})
        return FraudSchema(
            **_typed("[columns]", columns, _FRAUD, ("timestamp", "label")),
            account=_account(_table(document, "account")),
            label_delay_days=labels.get("delay_days"),
            constraints=_constraints(_table(document, "constraints")),
            decisions=_decisions(_table(document, "decisions")),
            split=split,
        )
    for name in ("account", "labels", "constraints", "decisions"):
        if name in document:
            raise SchemaError(f"[{name}] belongs to kind = 'fraud'")
    items = None
    if document.get("items") is not None:
        items = ItemTable(**_typed("[items]", _table(document, "items"), _ITEMS, ("path", "id")))
    wanted = _typed("[columns]", columns, _RECOMMEND, ("user", "item", "timestamp"))
    actions: dict[str, Any] = {}
    if "actions" in document:
        actions = _typed("[actions]", _table(document, "actions"), {"order": _STRINGS}, ("order",))
    return RecommendSchema(
        **wanted, actions=actions.get("order", ()), **_lists(_table(document, "lists")), items=items, split=split
    )


def schema_to_dict(schema: Schema) -> dict[str, Any]:
    """The document that `schema_from_dict` reads back to an equal schema."""
    flat: dict[str, Any] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in asdict(schema).items() if v is not None
    }
    split = {name: value for name, value in flat.pop("split").items() if value is not None}
    document: dict[str, Any] = {"kind": flat.pop("kind"), "split": split}
    if isinstance(schema, FraudSchema):
        delay_days, limits = flat.pop("label_delay_days", None), schema.constraints
        flat |= {"groups": [list(group) for group in schema.groups]}
        account = flat.pop("account", None)
        if account is not None:
            document |= {"account": {**account, "within": list(account["within"])}}
        document |= {"labels": {} if delay_days is None else {"delay_days": delay_days}}
        document |= {"constraints": {
            **{role: list(getattr(limits, role)) for role in ("integer", "increasing", "decreasing")},
            **{role: {k: list(v) for k, v in getattr(limits, role).items()} for role in ("bounds", "times", "values")},
            "relations": [f"{smaller} <= {larger}" for smaller, larger in limits.relations],
        }}  # fmt: skip
        chosen = {k: v for k, v in flat.pop("decisions").items() if v is not None}
        document |= {"decisions": chosen}
        del flat["constraints"]
    if isinstance(schema, RecommendSchema):
        rules = flat.pop("rules")
        rules["never"] = {column: list(values) for column, values in rules["never"].items()}
        document |= {"lists": {"diversity_loss": flat.pop("diversity_loss"), **rules}}
        actions = flat.pop("actions")
        document |= {"actions": {"order": actions}} if actions else {}
    items: Any = flat.pop("items", None)
    if items is not None:
        document["items"] = {k: list(v) if isinstance(v, tuple) else v for k, v in items.items()}
    return document | {"columns": flat}


_TABLES = ("kind", "columns", "split", "items", "actions", "lists", "account", "labels", "constraints", "decisions")
_STRING, _STRINGS, _NUMBER, _FLAG = "a string", "a list of strings", "a number", "true or false"
_GROUPS, _CHOICES = "a list of lists of strings", "a table of lists of strings"
_PAIR, _RANGES, _COSTS = "[low, high]", "a table of [low, high]", "a table of numbers"
_FRAUD = {
    "timestamp": _STRING, "label": _STRING, "id": _STRING, "amount": _STRING,
    "entities": _STRINGS, "numeric": _STRINGS, "categorical": _STRINGS, "immutable": _STRINGS, "groups": _GROUPS,
}  # fmt: skip
_CONSTRAINTS = {
    "integer": _STRINGS, "increasing": _STRINGS, "decreasing": _STRINGS, "relations": _STRINGS,
    "bounds": _RANGES, "times": _RANGES, "values": _CHOICES,
}  # fmt: skip
_RECOMMEND = {"user": _STRING, "item": _STRING, "timestamp": _STRING, "weight": _STRING, "action": _STRING}
_LISTS = {
    "diversity_loss": _NUMBER, "new_share": _NUMBER, "new_days": _NUMBER, "explore": _NUMBER, "at_most": _COSTS,
    "never": _CHOICES,
}  # fmt: skip
_ITEMS = {"path": _STRING, "id": _STRING, "text": _STRINGS, "categorical": _STRINGS, "sentences": _FLAG}
_TABLE = {
    "label": _STRING, "positive": _STRING, "timestamp": _STRING, "group": _STRING, "id": _STRING,
    "numeric": _STRINGS, "categorical": _STRINGS, "ignore": _STRINGS,
}  # fmt: skip
_PARTS = {"train": _NUMBER, "validation": _NUMBER}
_SPLIT = {
    "train": _NUMBER, "validation": _NUMBER, "protocol": _STRING, "repeats": _FLAG, "validation_from": _STRING,
    "test_from": _STRING, "max_items": _NUMBER,
}  # fmt: skip


def _lists(table: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a RecommendSchema."""
    given = _typed("[lists]", table, _LISTS)
    rules: dict[str, Any] = {name: given.pop(name) for name in list(given) if name != "diversity_loss"}
    if "at_most" in rules:
        counts = _typed("[lists.at_most]", rules["at_most"], dict.fromkeys(rules["at_most"], _NUMBER))
        rules["at_most"] = {column: int(most) for column, most in counts.items()}
    return {**given, "rules": ListRules(**rules)}


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
        if not _fits(value, kind):
            raise SchemaError(f"{where}: {name} = {value!r}; expected {kind}")
        values[name] = _frozen(value)
    return values


def _fits(value: Any, kind: str) -> bool:
    many, table = isinstance(value, list), isinstance(value, Mapping)
    return {
        _STRING: lambda: isinstance(value, str) and bool(value),
        _NUMBER: lambda: isinstance(value, int | float) and not isinstance(value, bool),
        _FLAG: lambda: isinstance(value, bool),
        _STRINGS: lambda: many and all(_fits(v, _STRING) for v in value),
        _GROUPS: lambda: many and all(_fits(v, _STRINGS) for v in value),
        _CHOICES: lambda: table and all(_fits(v, _STRINGS) for v in value.values()),
        _RANGES: lambda: table and all(_fits(v, _PAIR) for v in value.values()),
        _COSTS: lambda: table,
        _PAIR: lambda: many and len(value) == 2 and all(_fits(v, _NUMBER) for v in value),
    }[kind]()


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(v) for v in value)
    return {k: _frozen(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _account(table: Mapping[str, Any]) -> Account | None:
    kinds = {"total": _STRING, "within": _STRINGS}
    return Account(**_typed("[account]", table, kinds, ("total",))) if table else None


def _constraints(table: Mapping[str, Any]) -> Constraints:
    values = _typed("[constraints]", table, _CONSTRAINTS)
    pairs = []
    for relation in values.pop("relations", ()):
        smaller, sign, larger = (part.strip() for part in relation.partition("<="))
        if not (smaller and sign and larger):
            raise SchemaError(f"[constraints]: relation {relation!r}; expected 'smaller_column <= larger_column'")
        pairs.append((smaller, larger))
    try:
        return Constraints(relations=tuple(pairs), **values)
    except ConfigError as error:
        raise SchemaError(f"[constraints]: {error}") from error


def _decisions(table: Mapping[str, Any]) -> DecisionSettings:
    kinds = {"target_fpr": _NUMBER, "review_fpr": _NUMBER, "costs": _COSTS}
    values = _typed("[decisions]", table, kinds)
    try:
        if "costs" in values:
            numbers = dict.fromkeys(("missed_fraud", "declined_good", "review", "review_finds"), _NUMBER)
            given = _typed("[decisions.costs]", values["costs"], numbers, ("declined_good", "review"))
            values["costs"] = Costs(**given)
        return DecisionSettings(**values)
    except ConfigError as error:
        raise SchemaError(f"[decisions]: {error}") from error
