"""Which features a fraud model gets when the user only says what the columns mean."""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING

from assay_features.definitions import (
    DAY_S,
    HOUR_S,
    Calendar,
    Cross,
    Decay,
    Definition,
    Entity,
    FeaturePlan,
    Latest,
    SinceLatest,
    Window,
    as_code,
    entity_columns,
)
from assay_features.events import Events, Reports
from assay_features.reports import fraud_share, reports_of, ring
from assay_features.schema import ACCOUNT, FraudSchema
from assay_platform.errors import InputError

if TYPE_CHECKING:
    from assay_features.discovery import Discovery, DiscoverySettings

_NUM_CROSSED, _MAX_PAIRS = 3, 6


def default_plan(schema: FraudSchema) -> FeaturePlan:
    """Features that the schema asks for by itself.

    With `label_delay_days`: what was reported of every entity and group, and how often an amount came again. Without:
    how often, how much and how long ago of every entity, and the first categories crossed.
    """
    reports = reports_of(schema)
    if reports is not None:
        return FeaturePlan(tuple(dict.fromkeys(_reported(schema, reports))))
    definitions: list[Definition] = []
    for entity in (*schema.entities, *schema.worked_out):
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


def discover_features(
    events: Events,
    schema: FraudSchema,
    *,
    reports: Reports | None,
    settings: "DiscoverySettings",
    on_progress: Callable[[float, str], None],
) -> "Discovery":
    """Features that lift later periods of a table for sure. Its test period is not looked at."""
    from assay_features.discovery import discover

    return discover(
        events.take(slice(0, int(len(events) * (schema.split.train + schema.split.validation)))),
        entities=(*schema.entities, *schema.worked_out),
        numeric=schema.numeric,
        categorical=schema.categorical,
        amount=schema.amount,
        reports=reports,
        settings=settings,
        on_progress=on_progress,
    )


def _reported(schema: FraudSchema, reports: Reports) -> Iterator[Definition]:
    who: tuple[Entity, ...] = (*schema.entities, *schema.worked_out, *(schema.groups or _default_groups(schema)))
    for entity in who:
        for length_s in (30 * DAY_S, 180 * DAY_S):
            yield from fraud_share(entity, reports, length_s)
        # Without a delay there is no share that it could be told with; and what an account is known by is always one.
        same = entity_columns(entity)
        if schema.account is not None and ACCOUNT in same:
            same = (*same, *schema.account.within)
        if reports.delay_s and schema.entities and schema.entities[0] not in same:
            yield ring(entity, reports, schema.entities[0], 30 * DAY_S)
        if schema.amount in entity_columns(entity):
            for length_s in (DAY_S, 7 * DAY_S):
                yield Window(entity=entity, aggregate="count", length_s=length_s)
    yield Calendar(part="hour")


def _default_groups(schema: FraudSchema) -> tuple[tuple[str, ...], ...]:
    """Pairs of entities, and each with the amount: the same payment again."""
    pairs = tuple(combinations(schema.entities, 2))[:_MAX_PAIRS]
    if schema.amount is None:
        return pairs
    return (*pairs, *((entity, schema.amount) for entity in schema.entities))


def model_inputs(schema: FraudSchema, plan: FeaturePlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the model's numeric and categorical columns."""
    history = tuple(name for name in plan.numeric_names if name not in plan.helper_names)
    numeric = (*schema.numeric, *history, *plan.row_numeric_names)
    return numeric, (*schema.categorical, *(c.name for c in plan.crosses))


def check_plan(plan: FeaturePlan, schema: FraudSchema) -> None:
    """See that the schema has every column that the plan names, before any row is read.

    Raises:
        InputError: it lacks one; the message names the definition and what the schema has.
    """
    reported = () if schema.label_delay_days is None else (schema.label,)
    sides = (
        (
            "entity, categorical or numeric",
            (*schema.keys, *schema.worked_out, *schema.numbers),
            lambda part: (*part.key_columns(), *(e.column for e in part.embeddings)),
        ),
        ("numeric", (*schema.numbers, *reported), FeaturePlan.number_columns),
    )
    for definition in plan.definitions:
        for kind, known, named in sides:
            for column in named(FeaturePlan((definition,))):
                if column not in known:
                    raise InputError(
                        f"feature plan: {as_code(definition)}: the schema has no {kind} column {column!r}; "
                        f"it has {', '.join(known) or 'none'}"
                    )
