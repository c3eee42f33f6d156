"""Item features of a recommender: the plan, and the scale on which a ranker takes them.

Lives beside the engine because training (pipelines) and serving (services) must apply the very same transform.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from assay_features.definitions import (
    DAY_S,
    Decay,
    Definition,
    Entity,
    FeaturePlan,
    Sequence,
    SinceLatest,
    Where,
    Window,
)
from assay_features.schema import RecommendSchema

RECENT_ITEMS = 100
_NEVER_S = 365 * DAY_S


def item_plan(schema: RecommendSchema) -> FeaturePlan:
    """Item: demand over a week, a month and decayed, rating, freshness. User: the latest items, online.

    Where users do several things, demand is counted of the last of them too, and what a user did is kept with the item.
    """
    item = schema.item
    definitions: list[Definition] = [
        Window(entity=item, aggregate="count", length_s=7 * DAY_S),
        Window(entity=item, aggregate="count", length_s=30 * DAY_S),
        Decay(entity=item, half_life_s=30 * DAY_S),
        SinceLatest(entity=item),
    ]
    if schema.weight is not None:
        definitions.append(Window(entity=item, aggregate="mean", column=schema.weight, length_s=180 * DAY_S))
    followed: Entity = item
    if schema.action is not None:
        wanted = Where(column=schema.action, values=schema.actions[-1:])
        definitions += [
            Window(entity=item, aggregate="count", length_s=30 * DAY_S, where=wanted),
            Decay(entity=item, half_life_s=30 * DAY_S, where=wanted),
        ]
        followed = (item, schema.action)
    definitions.append(Sequence(entity=schema.user, column=followed, length=RECENT_ITEMS))
    return FeaturePlan(tuple(definitions))


def ranker_columns(plan: FeaturePlan, values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float32]:
    """(N, F): counts and ages on a logarithmic scale, means as they are, NaN where there are none."""
    columns = []
    for name in plan.numeric_names:
        column = np.asarray(values[name], dtype=np.float64)
        if "__mean__" in name:
            columns.append(column)
        elif name.endswith("__since_latest_s"):
            columns.append(np.log1p(np.maximum(np.nan_to_num(column, nan=_NEVER_S), 0.0) / DAY_S))
        else:
            columns.append(np.log1p(np.maximum(np.nan_to_num(column, nan=0.0), 0.0)))
    return np.stack(columns, axis=-1).astype(np.float32)
