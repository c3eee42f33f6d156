"""Contributions as sentences."""

import math
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
    Window,
    duration_name,
    entity_columns,
)
from numpy.typing import NDArray

from assay_services.schemas import Reason

NUM_REASONS = 6
OTHERS = "(all other features)"
_AGGREGATES = {
    "count": "events", "sum": "total", "mean": "average", "std": "spread", "min": "smallest", "max": "largest",
    "distinct": "different values", "last": "as the last", "since_last": "seconds since the last one",
    "rate": "times the usual rate",
}  # fmt: skip


class ReasonWriter:
    """Turns a row of contributions into the few that matter and one for the rest.

    The numbers of a learned vector mean nothing one by one: their contributions are added up, and the value shown is
    the column's.
    """

    def __init__(self, plan: FeaturePlan, feature_names: tuple[str, ...]) -> None:
        vector_of = {name: embedding.name for embedding in plan.embeddings for name in embedding.names}
        shown = [vector_of.get(name, name) for name in feature_names]
        self._names = tuple(dict.fromkeys(shown))
        self._place_G = np.array([self._names.index(name) for name in shown], dtype=np.intp)
        self._definitions = {d.name: d for d in plan.definitions}
        self._value_of = {embedding.name: embedding.column for embedding in plan.embeddings}

    def write(self, contribution_G: NDArray[np.float64], values: dict[str, Any]) -> list[Reason]:
        """values: the model's columns of this one event. The contributions add up to all of them."""
        shares = np.bincount(self._place_G, weights=contribution_G, minlength=len(self._names))
        order = np.argsort(-np.abs(shares), kind="stable")
        reasons = []
        for i in order[:NUM_REASONS]:
            name = self._names[i]
            value, share = _plain(values[self._value_of.get(name, name)]), float(shares[i])
            reasons.append(Reason(feature=name, value=value, contribution=share, text=self._text(name, value, share)))
        rest = float(shares[order[NUM_REASONS:]].sum())
        text = f"{len(order[NUM_REASONS:])} other features together {_effect(rest)}"
        reasons.append(Reason(feature=OTHERS, value=None, contribution=rest, text=text))
        return reasons

    def _text(self, name: str, value: float | str | None, share: float) -> str:
        definition = self._definitions.get(name)
        shown = "unknown" if value is None else value if isinstance(value, str) else f"{value:,.4g}"
        if isinstance(definition, Window):
            span = f"in the last {duration_name(definition.length_s)}"
            of = f"of {definition.column} " if definition.column else ""
            body = f"{shown} {_AGGREGATES[definition.aggregate]} {of}for this {_who(definition.entity)} {span}"
        elif isinstance(definition, Decay):
            what = definition.column or "activity"
            half_life = duration_name(definition.half_life_s)
            body = f"recent {what} of this {_who(definition.entity)} is {shown} (half-life {half_life})"
        elif isinstance(definition, SinceLatest):
            seen = "never seen before" if value is None else f"last seen {_ago(float(value))} ago"
            body = f"this {_who(definition.entity)} was {seen}"
        elif isinstance(definition, Latest):
            body = f"{definition.column} of this {_who(definition.entity)} was {shown} the time before"
        elif isinstance(definition, Calendar):
            body = f"the {definition.part} is {shown}"
        elif isinstance(definition, Cross):
            body = f"{' with '.join(definition.columns)} is {shown.replace(chr(31), ' with ')}"
        elif isinstance(definition, Embedding):
            body = f"{definition.column} is {shown}, by what was learned of it"
        elif isinstance(definition, Ratio):
            body = f"{definition.numerator} is {shown} times {definition.denominator}"
        else:
            body = f"{name} is {shown}"
        where = getattr(definition, "where", None)
        if where is not None:
            body += f" (where {where.name.replace('_', ' ')})"
        return f"{body}; this {_effect(share)}"


def _who(entity: Entity) -> str:
    return " with ".join(entity_columns(entity))


def _effect(share: float) -> str:
    return "raises the risk" if share > 0 else "lowers the risk"


def _ago(seconds: float) -> str:
    for unit_s, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.1f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


def _plain(value: Any) -> float | str | None:
    """JSON has no NaN."""
    if value is None or isinstance(value, str):
        return value
    return None if math.isnan(float(value)) else float(value)
