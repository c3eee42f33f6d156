"""The fewest feasible changes that would have turned a refusal into an approval.

Greedy: of all single changes the one that lowers the score most is kept, then another on top of it, until the event is
approved; then every change that is not needed is taken back. Numbers are tried at quantiles of legitimate events and
categories at their most frequent ones, within what the sender can change. Not covered: proof that no shorter list
exists.
"""

# M candidates

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from assay_platform.robustness.constraints import Constraints, FeasibleSet, Transactions

_NUM_QUANTILES, _NUM_CATEGORIES, _MAX_CHANGES = 9, 12, 3
# (M,) scores and whether each would be approved.
Judge = Callable[[Transactions], tuple[NDArray[np.float64], NDArray[np.bool_]]]


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is tried for each column that can change, and between which values it lies; JSON-ready by `to_dict`."""

    numbers: Mapping[str, tuple[float, ...]]
    values: Mapping[str, tuple[str, ...]]
    ranges: Mapping[str, tuple[float, float]]

    @staticmethod
    def fit(feasible: FeasibleSet, legitimate: Transactions) -> "Choices":
        """legitimate: events whose values are worth trying."""
        numbers, ranges = {}, {}
        for f in np.flatnonzero(feasible.movable_F):
            seen = legitimate.numbers[:, f][np.isfinite(legitimate.numbers[:, f])]
            if len(seen):
                at = np.linspace(0.05, 0.95, _NUM_QUANTILES)
                numbers[feasible.numeric[f]] = tuple(float(v) for v in np.unique(np.quantile(seen, at)))
                ranges[feasible.numeric[f]] = (float(feasible.low_F[f]), float(feasible.high_F[f]))
        values = {
            feasible.categorical[c]: feasible.allowed[c][:_NUM_CATEGORIES] for c in np.flatnonzero(feasible.movable_C)
        }
        return Choices(numbers=numbers, values={k: v for k, v in values.items() if v}, ranges=ranges)

    def to_dict(self) -> dict[str, Any]:
        """For an artifact."""
        return {
            role: {name: list(given) for name, given in getattr(self, role).items()}
            for role in ("numbers", "values", "ranges")
        }

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> "Choices":
        """Read back."""
        return Choices(**{role: {k: tuple(v) for k, v in document[role].items()} for role in document})

    def feasible(self, constraints: Constraints, numeric: tuple[str, ...], keys: tuple[str, ...]) -> FeasibleSet:
        """What is possible, without the table: columns that nothing is known of cannot change."""
        fixed = tuple(n for n in (*numeric, *keys) if n not in self.numbers and n not in self.values)
        limits = replace(
            constraints, immutable=tuple(dict.fromkeys((*constraints.immutable, *fixed))),
            bounds={**self.ranges, **constraints.bounds}, values={**self.values, **constraints.values},
        )  # fmt: skip
        nothing = Transactions(np.empty((0, len(numeric))), np.empty((0, len(keys)), dtype=object))
        return FeasibleSet.fit(limits, numeric, keys, nothing)


class Change(NamedTuple):
    """One column as it was and as it would have to be."""

    column: str
    was: float | str | None
    would_be: float | str


class Counterfactual(NamedTuple):
    """Changes that together turn the decision, and the score that they lead to."""

    changes: tuple[Change, ...]
    score: float


def counterfactual(
    judge: Judge, original: Transactions, feasible: FeasibleSet, choices: Choices
) -> Counterfactual | None:
    """For one event (1, …) that was not approved; None where no few feasible changes get it approved."""
    current, changed = original, dict[str, Change]()
    for _ in range(_MAX_CHANGES):
        candidates, changes = _single_changes(original, current, feasible, choices, set(changed))
        if not changes:
            return None
        scores, approved = judge(candidates)
        best = int(np.argmin(scores))
        current = candidates.take(slice(best, best + 1))
        changed[changes[best].column] = changes[best]
        if approved.any():
            # Of the approved ones the least change of score is the least to ask for.
            best = int(np.flatnonzero(approved)[np.argmax(scores[approved])])
            del changed[next(reversed(changed))]
            changed[changes[best].column] = changes[best]
            return _without_needless(judge, original, feasible, changed)
    return None


def _single_changes(
    original: Transactions, current: Transactions, feasible: FeasibleSet, choices: Choices, done: set[str]
) -> tuple[Transactions, list[Change]]:
    candidates, changes = [], []
    columns = [*((name, True) for name in choices.numbers), *((name, False) for name in choices.values)]
    for name, is_number in columns:
        if name in done:
            continue
        for value in choices.numbers[name] if is_number else choices.values[name]:
            tried = _with(current, feasible, name, value)
            tried = feasible.repair(original, tried)
            was, got = _value(original, feasible, name), _value(tried, feasible, name)
            if got is not None and got != was:
                candidates.append(tried)
                changes.append(Change(name, was, got))
    if not candidates:
        return original.take(slice(0, 0)), []
    return Transactions(
        np.concatenate([c.numbers for c in candidates]), np.concatenate([c.keys for c in candidates])
    ), changes


def _without_needless(
    judge: Judge, original: Transactions, feasible: FeasibleSet, changed: dict[str, Change]
) -> Counterfactual:
    def applied(changes: Mapping[str, Change]) -> Transactions:
        out = original
        for change in changes.values():
            out = _with(out, feasible, change.column, change.would_be)
        return out

    for name in list(changed)[:-1]:
        fewer = {n: c for n, c in changed.items() if n != name}
        if judge(applied(fewer))[1][0]:
            changed = fewer
    return Counterfactual(tuple(changed.values()), float(judge(applied(changed))[0][0]))


def _with(row: Transactions, feasible: FeasibleSet, name: str, value: float | str) -> Transactions:
    out = row.copy()
    if name in feasible.numeric:
        out.numbers[0, feasible.numeric.index(name)] = value
    else:
        out.keys[0, feasible.categorical.index(name)] = value
    return out


def _value(row: Transactions, feasible: FeasibleSet, name: str) -> float | str | None:
    if name in feasible.numeric:
        value = float(row.numbers[0, feasible.numeric.index(name)])
        return None if np.isnan(value) else value
    key: str | None = row.keys[0, feasible.categorical.index(name)]
    return key
