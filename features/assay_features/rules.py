"""Rules beside a model, as data: allow and block lists, velocity limits. They travel with the version that they serve.

    [[rules]]
    name = "known mule account"
    action = "decline"
    when = [{column = "account", values = ["A-17", "A-99"]}]

    [[rules]]
    name = "more than ten payments in an hour"
    action = "review"
    when = [{column = "card__events__count__1h", at_least = 11}]

A rule holds where all its conditions do; a missing value fulfils none. A column is one of the event or a feature. The
first rule that holds decides, whatever the model says; all that hold are in the reasons.
"""

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from assay_platform.errors import SchemaError
from numpy.typing import NDArray

from assay_features.definitions import Where

Action = Literal["approve", "review", "decline"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule; see the module."""

    name: str
    action: Action
    when: tuple[Where, ...]

    def __post_init__(self) -> None:
        if not self.name or not self.when:
            raise SchemaError(f"rule {self.name!r}: needs a name and one condition at least under `when`")
        if self.action not in get_args(Action):
            raise SchemaError(f"rule {self.name!r}: action {self.action!r}; allowed are {', '.join(get_args(Action))}")

    def holds(self, columns: Mapping[str, Any]) -> NDArray[np.bool_]:
        """(N,) where all conditions are met. columns: those that a model takes, see `model_columns`."""
        met = np.stack([_met(where, np.asarray(columns[where.column])) for where in self.when])
        return np.asarray(met.all(axis=0))


def check_rules(rules: Sequence[Rule], known: Collection[str]) -> None:
    """See that every column is known.

    Raises:
        SchemaError: one is not, or two rules have one name.
    """
    names = [rule.name for rule in rules]
    for rule in rules:
        if names.count(rule.name) > 1:
            raise SchemaError(f"two rules have the name {rule.name!r}")
        for where in rule.when:
            if where.column not in known:
                near = ", ".join(sorted(name for name in known if where.column in name)[:5])
                hint = f"; near it are {near}" if near else ""
                raise SchemaError(f"rule {rule.name!r}: {where.column!r} is neither a column nor a feature{hint}")


def read_rules(path: Path) -> tuple[Rule, ...]:
    """Rules from a TOML file.

    Raises:
        SchemaError: the file cannot be read, or a rule is wrong; the message names it.
    """
    try:
        return rules_from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SchemaError(f"{path}: cannot be read as rules: {error}") from error
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from error


def rules_from_dict(document: Mapping[str, Any]) -> tuple[Rule, ...]:
    """Rules from parsed TOML or from `rules_to_dict`."""
    entries = document.get("rules", [])
    if not isinstance(entries, list) or set(document) - {"rules"}:
        raise SchemaError("expected [[rules]] tables and nothing else")
    rules = []
    for i, entry in enumerate(entries):
        try:
            values = {**entry, "when": tuple(_where(condition) for condition in entry["when"])}
            rules.append(Rule(**values))
        except (KeyError, TypeError) as error:
            raise SchemaError(f"rules[{i}]: {error}; a rule has name, action and when") from error
        except SchemaError as error:
            raise SchemaError(f"rules[{i}]: {error}") from error
    return tuple(rules)


def rules_to_dict(rules: Sequence[Rule]) -> dict[str, Any]:
    """JSON-ready form that `rules_from_dict` reads back."""
    entries = [{"name": r.name, "action": r.action, "when": [_given(where) for where in r.when]} for r in rules]
    return {"rules": entries}


def _where(condition: Any) -> Where:
    values = dict(condition)
    if "values" in values:
        values["values"] = tuple(str(value) for value in values["values"])
    return Where(**values)


def _given(where: Where) -> dict[str, Any]:
    given = {name: value for name, value in asdict(where).items() if value not in (None, ())}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _met(where: Where, column: NDArray[Any]) -> NDArray[np.bool_]:
    if where.values:
        return np.array([value in where.values for value in column.tolist()], dtype=bool)
    if column.dtype == object:
        raise SchemaError(f"{where.column!r} is no number; give `values`")
    low = -np.inf if where.at_least is None else where.at_least
    high = np.inf if where.below is None else where.below
    return (column >= low) & (column < high) if low <= high else (column >= low) | (column < high)
