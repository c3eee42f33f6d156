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
    as_code,
)
from assay_features.schema import FraudSchema
from assay_platform.errors import InputError

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
    numeric = (*schema.numeric, *plan.numeric_names, *plan.row_numeric_names)
    return numeric, (*schema.categorical, *(c.name for c in plan.crosses))


def check_plan(plan: FeaturePlan, schema: FraudSchema) -> None:
    """See that the schema has every column that the plan names, before any row is read.

    Raises:
        InputError: it lacks one; the message names the definition and what the schema has.
    """
    sides = (
        (
            "entity or categorical",
            schema.keys,
            lambda part: (*part.key_columns(), *(e.column for e in part.embeddings)),
        ),
        ("numeric", schema.numbers, FeaturePlan.number_columns),
    )
    for definition in plan.definitions:
        for kind, known, named in sides:
            for column in named(FeaturePlan((definition,))):
                if column not in known:
                    raise InputError(
                        f"feature plan: {as_code(definition)}: the schema has no {kind} column {column!r}; "
                        f"it has {', '.join(known) or 'none'}"
                    )
