"""Request and response bodies: what OpenAPI shows.

Answers that are made thousands of times a second are dataclasses, which msgspec writes as JSON as they are.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Record = dict[str, Any]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FraudRequest(_Body):
    """Events to score, each with the columns of the model's schema; null where unknown.

    counterfactual: for each event that is not approved, look for a few changes that would have made it so. It scores
    hundreds of forms of the event, so it is meant for one refusal at a time.
    """

    events: Annotated[list[Record], Field(min_length=1)]
    explain: bool = False
    counterfactual: bool = False


@dataclass(slots=True, kw_only=True)
class ModelRef:
    """Which version answered."""

    name: str
    version: int


@dataclass(slots=True, kw_only=True)
class Reason:
    """One feature's share in a score, in log-odds: positive raises the risk."""

    feature: str
    value: float | str | None
    contribution: float
    text: str


@dataclass(slots=True, kw_only=True)
class ColumnChange:
    """One column as it was and as it would have to be."""

    feature: str
    was: float | str | None
    would_be: float | str


@dataclass(slots=True, kw_only=True)
class Counterfactual:
    """Changes within what a sender can change that together would have led to an approval, at this score."""

    changes: list[ColumnChange]
    score: float
    text: str


@dataclass(slots=True, kw_only=True)
class FraudScore:
    """score is a calibrated probability. With `explain`, sigmoid(base + Σ contribution) = score.

    threshold: from this score on, decline. rules: names of the rules that hold; the first of them made the decision.
    """

    id: str | None
    score: float
    decision: Literal["approve", "review", "decline"]
    threshold: float
    rules: list[str] = field(default_factory=list)
    base: float | None = None
    reasons: list[Reason] = field(default_factory=list)
    counterfactual: Counterfactual | None = None


@dataclass(slots=True, kw_only=True)
class FraudResponse:
    """Scores in the order of the events."""

    model: ModelRef
    scores: list[FraudScore]


class RecommendRequest(_Body):
    """context may carry `timestamp`: as of when history and item features are read (default: the newest event known);
    `exclude`: item ids to leave out; `only`: columns of the item table with the values of which an item must have one.
    """

    user_id: str | int
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    exclude_seen: bool | None = None
    context: Record = {}


@dataclass(slots=True, kw_only=True)
class RecommendedItem:
    """One item; scores order a list and mean nothing between lists. propensity: how likely it was to be there."""

    item_id: str
    score: float
    title: str
    reason: str
    propensity: float = 1.0


@dataclass(slots=True, kw_only=True)
class RecommendResponse:
    """Best item first. cold_start: nothing was known of the user. list_id: under which the list is on record, where the
    model's schema lets chance choose now and then.
    """

    model: ModelRef
    items: list[RecommendedItem]
    cold_start: bool
    list_id: str | None = None


class EventsRequest(_Body):
    """New events. Without `application` they go to every loaded model whose columns they have."""

    events: Annotated[list[Record], Field(min_length=1)]
    application: Literal["fraud", "recommend"] | None = None


class EventsResponse(BaseModel):
    """How many events each application took in, and the places of those that it did not.

    duplicates: an event with the same id was taken in before. late: older than the features can still take in.
    """

    accepted: dict[str, int]
    duplicates: dict[str, list[int]]
    late: dict[str, list[int]]


class ItemsRequest(_Body):
    """Items that came after training, each with the columns of the schema's item table; categories may be lists."""

    items: Annotated[list[Record], Field(min_length=1)]


class ItemsResponse(BaseModel):
    """accepted: how many can be recommended from now on. known: places of those that could be already."""

    accepted: int
    known: list[int] = []


class Label(_Body):
    """What became of an event. reported_at: when it was learned, epoch seconds or ISO 8601; now by default.

    event: the event's columns, for one that was neither scored nor posted here.
    """

    id: str | int
    fraud: bool
    reported_at: str | float | None = None
    event: Record | None = None


class LabelsRequest(_Body):
    """Chargebacks and findings as they come in. Frauds change the features of what they have in common with others."""

    labels: Annotated[list[Label], Field(min_length=1)]


class LabelsResponse(BaseModel):
    """accepted: how many were taken in. duplicates: places of labels that were known already.

    unknown: places of labels whose event is not known; send its columns as `event`. late: places of frauds that are on
    record, but whose `reported_at` is too far behind the newest report for the features to take in.
    """

    accepted: int
    duplicates: list[int] = []
    unknown: list[int] = []
    late: list[int] = []


class DecisionRecord(BaseModel):
    """An event as it came, the decision with the feature vector that it was made from, and what was reported since."""

    id: str
    event: Record | None = None
    decision: Record | None = None
    label: Record | None = None


class RecentDecision(BaseModel):
    """One of the newest decisions. decided_at: seconds since 1970. reasons: where they were asked for."""

    id: str | None
    decided_at: float
    event: Record
    score: float
    decision: str
    threshold: float
    reasons: list[dict[str, Any]]


class RecentDecisions(BaseModel):
    """As the process saw them that answered this request, the newest first."""

    decisions: list[RecentDecision]


class RegisteredVersion(BaseModel):
    """A version in the registry. metrics: on the test period of its training."""

    name: str
    version: int
    aliases: list[str]
    application: str
    run_id: str
    metrics: dict[str, float | None]


class RegistryResponse(BaseModel):
    """Every version of every model, the newest first within a model."""

    versions: list[RegisteredVersion]


class AuditEntry(BaseModel):
    """A change of what answers; docs/serving.md. More fields come with some actions."""

    model_config = ConfigDict(extra="allow")

    time: str
    actor: str
    action: str


class AuditResponse(BaseModel):
    """The newest entries first."""

    entries: list[AuditEntry]


class Refused(BaseModel):
    """A version that the alias points to and that does not answer, and why."""

    version: int
    reason: str


class LoadedModel(BaseModel):
    """One model that answers requests. answered, failed: requests, since it was loaded by the process that says so."""

    application: str
    name: str
    version: int
    alias: str
    loaded_at: str
    feature_plan: str
    answered: int = 0
    failed: int = 0
    challenger: int | None = None
    refused: Refused | None = None


class DriftFinding(BaseModel):
    """What recent events have that the model's reference had not. moved: share of rows. value: it is about this one."""

    column: str
    kind: str
    moved: float
    text: str
    value: str | None = None


class DriftResponse(BaseModel):
    """Of the newest windows of events and of labels, as this process saw them. alarms: findings of the window before,
    too.
    """

    model: ModelRef
    window_rows: int
    windows: int
    label_windows: int
    findings: list[DriftFinding]
    alarms: list[DriftFinding]


class PromoteRequest(_Body):
    """unchecked: services take the version without a rehearsal."""

    version: Annotated[int, Field(ge=1)]
    alias: Literal["champion", "challenger"] = "champion"
    reason: Annotated[str, Field(min_length=1, max_length=500)]
    unchecked: bool = False


class RollbackRequest(_Body):
    """Why."""

    reason: Annotated[str, Field(min_length=1, max_length=500)]


class EraseRequest(_Body):
    """Of whom everything is to be forgotten: events of which a column has this value."""

    column: Annotated[str, Field(min_length=1, max_length=200)]
    value: Annotated[str, Field(min_length=1, max_length=500)]
    reason: Annotated[str, Field(min_length=1, max_length=500)]


class Erased(BaseModel):
    """How many events were kept, and are no longer."""

    erased: int


class AliasMoved(BaseModel):
    """Where an alias was and is. gate: what the version was registered with."""

    model: str
    alias: str
    from_version: int | None
    version: int
    gate: str


class ModelsResponse(BaseModel):
    """All models that answer requests."""

    models: list[LoadedModel]


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] = []
