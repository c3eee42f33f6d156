"""Features of what is reported later: which part of a plan reads labels, and how labels become known.

Frauds are reported; honest payments are not. So the share of fraud in a window is the frauds reported in it, over the
events that are old enough to have been reported.
"""

from collections.abc import Iterator

from assay_features.definitions import DAY_S, Definition, Entity, FeaturePlan, Ratio, Where, Window
from assay_features.events import Reports
from assay_features.schema import FraudSchema, Schema


def reports_of(schema: Schema) -> Reports | None:
    """How the schema says that labels become known, if it does."""
    if not isinstance(schema, FraudSchema) or schema.label_delay_days is None:
        return None
    return Reports(schema.label, round(schema.label_delay_days * DAY_S))


def plan_parts(plan: FeaturePlan, schema: Schema) -> list[tuple[FeaturePlan, Reports | None]]:
    """What the store keeps apart: features of events, and those of what is reported of them later, if there are any."""
    reports = reports_of(schema)
    if reports is None:
        return [(plan, None)]
    of_reports, of_events = plan.split(reports.column)
    return [(of_events, None), (of_reports, reports)] if of_reports.definitions else [(plan, None)]


def fraud_share(entity: Entity, reports: Reports, length_s: int) -> Iterator[Definition]:
    """The share of fraud among an entity's events old enough to have been reported, and what it is made of."""
    delay_s = round(reports.delay_s)
    frauds = Window(entity=entity, aggregate="sum", column=reports.column, length_s=length_s)
    events = Window(entity=entity, aggregate="count", length_s=length_s + delay_s)
    yield frauds
    yield events
    if delay_s == 0:
        yield Ratio(numerator=frauds.name, denominator=events.name)
    else:
        recent = Window(entity=entity, aggregate="count", length_s=delay_s)
        yield recent
        yield Ratio(numerator=frauds.name, denominator=events.name, less=recent.name)


_MAX_DIFFERENT = 16


def ring(entity: Entity, reports: Reports, column: str, length_s: int) -> Window:
    """How many different values of a key column the frauds reported of an entity have: a device with frauds on several
    cards. It is told in reasons; as an input it lifts nothing that the share does not.
    """
    fraud = Where(column=reports.column, at_least=0.5)
    return Window(
        entity=entity, aggregate="distinct", column=column, where=fraud, length_s=length_s, max_distinct=_MAX_DIFFERENT
    )
