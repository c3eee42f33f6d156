"""Contributions as sentences."""

import math
from typing import Any

import numpy as np
from assay_features.definitions import (
    Calendar,
    Cross,
    Decay,
    FeaturePlan,
    Latest,
    SinceLatest,
    Window,
    duration_name,
)
from numpy.typing import NDArray

from assay_services.schemas import Reason

NUM_REASONS = 6
OTHERS = "(all other features)"


class ReasonWriter:
    """Turns a row of contributions into the few that matter and one for the rest."""

    def __init__(self, plan: FeaturePlan, feature_names: tuple[str, ...]) -> None:
        self._names = feature_names
        self._definitions = {d.name: d for d in plan.definitions}

    def write(self, contribution_G: NDArray[np.float64], values: dict[str, Any]) -> list[Reason]:
        """values: the model's columns of this one event. The contributions add up to all of them."""
        order = np.argsort(-np.abs(contribution_G), kind="stable")
        reasons = []
        for g in order[:NUM_REASONS]:
            name, value = self._names[g], _plain(values[self._names[g]])
            share = float(contribution_G[g])
            reasons.append(Reason(feature=name, value=value, contribution=share, text=self._text(name, value, share)))
        rest = float(contribution_G[order[NUM_REASONS:]].sum())
        text = f"{len(order[NUM_REASONS:])} other features together {_effect(rest)}"
        reasons.append(Reason(feature=OTHERS, value=None, contribution=rest, text=text))
        return reasons

    def _text(self, name: str, value: float | str | None, share: float) -> str:
        definition = self._definitions.get(name)
        shown = "unknown" if value is None else value if isinstance(value, str) else f"{value:,.4g}"
        if isinstance(definition, Window):
            span = f"in the last {duration_name(definition.length_s)}"
            of = f"of {definition.column} " if definition.column else ""
            what = {"count": "events", "sum": "total", "mean": "average", "std": "spread"}[definition.aggregate]
            body = f"{shown} {what} {of}for this {definition.entity} {span}"
        elif isinstance(definition, Decay):
            what = definition.column or "activity"
            half_life = duration_name(definition.half_life_s)
            body = f"recent {what} of this {definition.entity} is {shown} (half-life {half_life})"
        elif isinstance(definition, SinceLatest):
            seen = "never seen before" if value is None else f"last seen {_ago(float(value))} ago"
            body = f"this {definition.entity} was {seen}"
        elif isinstance(definition, Latest):
            body = f"{definition.column} of this {definition.entity} was {shown} the time before"
        elif isinstance(definition, Calendar):
            body = f"the {definition.part} is {shown}"
        elif isinstance(definition, Cross):
            body = f"{' with '.join(definition.columns)} is {shown.replace(chr(31), ' with ')}"
        else:
            body = f"{name} is {shown}"
        return f"{body}; this {_effect(share)}"


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
