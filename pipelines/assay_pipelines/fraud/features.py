"""Which features a fraud model gets when the user only says what the columns mean."""

from assay_features.definitions import (
    DAY_S,
    HOUR_S,
    Calendar,
    Cross,
    Decay,
    Definition,
    FeaturePlan,
    Latest,
    SinceLatest,
    Window,
)
from assay_features.schema import FraudSchema

_NUM_CROSSED = 3


def default_plan(schema: FraudSchema) -> FeaturePlan:
    """For every entity: how often, how much, how long ago; then calendar and the first categories crossed."""
    definitions: list[Definition] = []
    for entity in schema.entities:
        definitions += [Window(entity=entity, aggregate="count", length_s=s) for s in (HOUR_S, DAY_S, 7 * DAY_S)]
        definitions += [Decay(entity=entity, half_life_s=s) for s in (DAY_S, 30 * DAY_S)]
        definitions.append(SinceLatest(entity=entity))
        if schema.amount is not None:
            amount = schema.amount
            definitions += [
                Window(entity=entity, aggregate="sum", column=amount, length_s=DAY_S),
                Window(entity=entity, aggregate="mean", column=amount, length_s=7 * DAY_S),
                Window(entity=entity, aggregate="mean", column=amount, length_s=30 * DAY_S),
                Window(entity=entity, aggregate="std", column=amount, length_s=30 * DAY_S),
                Decay(entity=entity, column=amount, half_life_s=7 * DAY_S),
                Latest(entity=entity, column=amount),
            ]
    definitions += [Calendar(part="hour"), Calendar(part="weekday")]
    crossed = schema.categorical[:_NUM_CROSSED]
    definitions += [Cross(columns=(a, b)) for i, a in enumerate(crossed) for b in crossed[i + 1 :]]
    return FeaturePlan(tuple(definitions))


def model_inputs(schema: FraudSchema, plan: FeaturePlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the model's numeric and categorical columns."""
    numeric = (*schema.numeric, *plan.numeric_names, *(c.name for c in plan.calendar))
    return numeric, (*schema.categorical, *(c.name for c in plan.crosses))
