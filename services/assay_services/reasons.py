"""Contributions as sentences."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from assay_features.definitions import (
    Calendar,
    Cross,
    Decay,
    Embedding,
    Entity,
    FeaturePlan,
    Latest,
    Ratio,
    SinceLatest,
    Where,
    Window,
    duration_name,
    entity_columns,
)
from assay_features.events import KEY_SEPARATOR
from assay_features.rules import Rule
from numpy.typing import NDArray

from assay_services.schemas import ColumnChange, Reason

NUM_REASONS = 6
OTHERS = "(all other features)"
_AGGREGATES = {
    "count": "events", "sum": "total", "mean": "average", "std": "spread", "min": "smallest", "max": "largest",
    "distinct": "different values", "last": "as the last", "since_last": "seconds since the last one",
    "rate": "times the usual rate",
}  # fmt: skip


Known = Callable[[str], float | str | None]  # any column of the row, by name


class ReasonWriter:
    """Turns a row of contributions into the few that matter and one for the rest.

    The numbers of a learned vector mean nothing one by one: their contributions are added up, and the value shown is
    the column's.
    """

    def __init__(
        self, plan: FeaturePlan, feature_names: tuple[str, ...], usual: Mapping[str, float | str | None] | None = None
    ) -> None:
        """usual: what a typical legitimate event has, which contributions are against."""
        self._usual = usual or {}
        vector_of = {name: embedding.name for embedding in plan.embeddings for name in embedding.names}
        shown = [vector_of.get(name, name) for name in feature_names]
        self._names = tuple(dict.fromkeys(shown))
        self._place_G = np.array([self._names.index(name) for name in shown], dtype=np.intp)
        self._definitions = {d.name: d for d in plan.definitions}
        self._usual_text = {n: self._said_of_usual(n, usual) for n, usual in self._usual.items() if usual is not None}
        self._say = {name: self._sayer(name) for name in self._names}
        self._value_of = {embedding.name: embedding.column for embedding in plan.embeddings}
        self._rings = {
            (d.entity, d.length_s): d
            for d in plan.definitions
            if isinstance(d, Window) and d.aggregate == "distinct" and d.name in plan.helper_names
        }

    def write(self, contribution_NG: NDArray[np.float64], columns: Mapping[str, Sequence[Any]]) -> list[list[Reason]]:
        """Of each row. columns: the model's columns. The contributions of a row add up to all of them."""
        shares_NK = contribution_NG
        if len(self._names) < contribution_NG.shape[1]:
            shares_NK = np.zeros((len(contribution_NG), len(self._names)))
            np.add.at(shares_NK.T, self._place_G, contribution_NG.T)
        order_NK = np.argsort(-np.abs(shares_NK), axis=1, kind="stable")[:, :NUM_REASONS]
        top_NK = np.take_along_axis(shares_NK, order_NK, axis=1)
        rest_N = shares_NK.sum(axis=1) - top_NK.sum(axis=1)
        return [
            self._of_row(places, shares, rest, columns, row)
            for row, (places, shares, rest) in enumerate(
                zip(order_NK.tolist(), top_NK.tolist(), rest_N.tolist(), strict=True)
            )
        ]

    def _of_row(
        self, places: list[int], shares: list[float], rest: float, columns: Mapping[str, Sequence[Any]], row: int
    ) -> list[Reason]:
        def known(column: str) -> float | str | None:
            return _plain(columns[column][row])

        reasons = []
        for place, share in zip(places, shares, strict=True):
            name = self._names[place]
            value = known(self._value_of.get(name, name))
            text = self._text(name, value, share, known)
            reasons.append(Reason(feature=name, value=value, contribution=share, text=text))
        text = f"{len(self._names) - len(places)} other features together {_effect(rest)}"
        return [*reasons, Reason(feature=OTHERS, value=None, contribution=rest, text=text)]

    def _text(self, name: str, value: float | str | None, share: float, known: Known) -> str:
        usual = self._usual.get(name)
        compared = "" if usual is None or usual == value else self._usual_text[name]
        return f"{self._say[name](value, known)}{compared}; this {_effect(share)}"

    def _sayer(self, name: str) -> Callable[[float | str | None, Known], str]:
        """What says a feature's value in words. What is the same for all rows is put together once."""
        definition = self._definitions.get(name)
        where = getattr(definition, "where", None)
        end = "" if where is None else f" (where {where.name.replace('_', ' ')})"
        if isinstance(definition, Window):
            span = f"in the last {duration_name(definition.length_s)}"
            of = f"of {definition.column} " if definition.column else ""
            end = f" {_AGGREGATES[definition.aggregate]} {of}for this {_who(definition.entity)} {span}{end}"
            return lambda value, _: f"{_shown(value)}{end}"
        if isinstance(definition, Decay):
            begin = f"recent {definition.column or 'activity'} of this {_who(definition.entity)} is "
            end = f" (half-life {duration_name(definition.half_life_s)}){end}"
        elif isinstance(definition, SinceLatest):
            who = f"this {_who(definition.entity)} was"
            return lambda value, _: (
                f"{who} never seen before{end}" if value is None else f"{who} last seen {_ago(float(value))} ago{end}"
            )
        elif isinstance(definition, Latest):
            begin, end = f"{definition.column} of this {_who(definition.entity)} was ", f" the time before{end}"
        elif isinstance(definition, Calendar):
            begin = f"the {definition.part} is "
        elif isinstance(definition, Cross):
            begin = f"{' with '.join(definition.columns)} is "
            return lambda value, _: f"{begin}{_shown(value).replace(KEY_SEPARATOR, ' with ')}{end}"
        elif isinstance(definition, Embedding):
            begin, end = f"{definition.column} is ", f", by what was learned of it{end}"
        elif isinstance(definition, Ratio):
            ratio = definition
            return lambda value, known: f"{self._ratio(ratio, value, _shown(value), known)}{end}"
        else:
            begin = f"{name} is "
        return lambda value, _: f"{begin}{_shown(value)}{end}"

    def _said_of_usual(self, name: str, usual: float | str) -> str:
        definition = self._definitions.get(name)
        if isinstance(definition, Ratio) and definition.less is not None and not isinstance(usual, str):
            return f", usual is {100 * usual:.3g} %"
        return f", usual is {_shown(usual)}".replace(KEY_SEPARATOR, " with ")

    def _ratio(self, ratio: Ratio, value: float | str | None, shown: str, known: Known) -> str:
        frauds = self._definitions.get(ratio.numerator)
        if ratio.less is None or not isinstance(frauds, Window):
            return f"{ratio.numerator} is {shown} times {ratio.denominator}"
        of = f"of this {_who(frauds.entity)} in {duration_name(frauds.length_s)}"
        reported, events, late = (_number(known(n)) for n in (ratio.numerator, ratio.denominator, ratio.less))
        judged = events - late
        # Some are reported before others of their age are judged.
        if reported > judged:
            body = f"{reported:,.0f} payments {of} were reported as fraud"
        elif value is None:
            return f"no payment {of} is old enough to be judged"
        else:
            body = f"{reported:,.0f} of {judged:,.0f} payments {of} were reported as fraud"
        ring = self._rings.get((frauds.entity, frauds.length_s))
        different = 0.0 if ring is None else _number(known(ring.name))
        if ring is not None and different > 1:
            body += f", with {different:,.0f} different values of {ring.column}"
        return body


def rule_reason(rule: Rule) -> Reason:
    """A rule that holds, among the reasons; it moves no score, so it contributes nothing."""
    texts = [
        f"{w.column} is one of {', '.join(w.values)}" if w.values else f"{w.column} is {_bounds(w)}" for w in rule.when
    ]
    text = f"rule '{rule.name}' says {rule.action}: {' and '.join(texts)}"
    return Reason(feature=f"rule: {rule.name}", value=None, contribution=0.0, text=text)


def would_have_been(changes: Sequence[ColumnChange]) -> str:
    """A counterfactual as a sentence."""
    parts = [f"{c.feature} were {_shown(c.would_be)} instead of {_shown(c.was)}" for c in changes]
    return f"would have been approved if {' and '.join(parts)}"


def _shown(value: float | str | None) -> str:
    return "unknown" if value is None else value if isinstance(value, str) else f"{value:,.4g}"


def _bounds(where: Where) -> str:
    low = "" if where.at_least is None else f"{where.at_least:g} or more"
    high = "" if where.below is None else f"below {where.below:g}"
    return " and ".join(part for part in (low, high) if part)


def _who(entity: Entity) -> str:
    return " with ".join(entity_columns(entity))


def _effect(share: float) -> str:
    return "raises the risk" if share > 0 else "lowers the risk"


def _ago(seconds: float) -> str:
    for unit_s, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


def _number(value: float | str | None) -> float:
    return float(value) if value is not None else 0.0


def _plain(value: Any) -> float | str | None:
    """JSON has no NaN."""
    if value is None or isinstance(value, str):
        return value
    return None if math.isnan(float(value)) else float(value)
