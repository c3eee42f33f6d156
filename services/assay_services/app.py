"""The routes of the scoring application, plain FastAPI. `alone` puts it in one process, `scorer` behind a front."""

import math
import os
import time
from collections import deque
from importlib.metadata import version
from typing import Annotated, Any, Literal

from assay_platform.errors import DataError
from assay_platform.monitoring.alarms import Finding
from assay_platform.monitoring.metrics import render
from assay_platform.tracking import CHAMPION, ModelRegistry
from fastapi import FastAPI, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from assay_services import bodies
from assay_services.admin import admin_routes
from assay_services.answering import Answering
from assay_services.console import console_routes
from assay_services.dependencies import Dependencies
from assay_services.fraud import FraudScorer
from assay_services.hot_swap import Loaded, Slot
from assay_services.idempotency import named_by
from assay_services.problems import ProblemError, install
from assay_services.schemas import (
    AuditEntry,
    AuditResponse,
    DecisionRecord,
    DriftFinding,
    DriftResponse,
    EventsRequest,
    EventsResponse,
    FraudResponse,
    ItemsRequest,
    ItemsResponse,
    LabelsRequest,
    LabelsResponse,
    LoadedModel,
    ModelRef,
    ModelsResponse,
    Problem,
    RecentDecisions,
    RecommendResponse,
    RegisteredVersion,
    RegistryResponse,
)
from assay_services.siblings import merged
from assay_services.webhooks import webhook_routes

_PROBLEMS: dict[int | str, dict[str, object]] = {
    code: {"model": Problem, "description": text}
    for code, text in (
        (401, "API key missing or wrong"),
        (413, "Body too large"),
        (422, "A field does not fit"),
        (429, "Too many requests"),
        (503, "No model is loaded, or more requests than can be answered"),
        (504, "Not answered within X-Timeout-Ms"),
    )
}


def application(deps: Dependencies) -> FastAPI:
    """All routes, each answered at once: what queues, counts and refuses requests stands in front."""
    service = deps.config.service
    app = FastAPI(
        title="Assay",
        version=version("assay"),
        summary="Scores what to recommend and whom to trust.",
        redoc_url=None,
    )
    install(app)
    app.include_router(console_routes())
    app.include_router(webhook_routes(deps.follower.look_now))
    app.include_router(admin_routes(deps.config, deps.audit, deps.follower.look_now, deps.fraud))

    def check_batch(num_events: int) -> None:
        if num_events > service.max_batch:
            raise DataError(f"events: {num_events} in one request; at most {service.max_batch} are allowed")

    # Neither of the two is called where the fast path is in front, which knows the same answers.
    @app.post("/v1/fraud/score", response_model=FraudResponse, responses=_PROBLEMS, openapi_extra=bodies.FRAUD.openapi)
    async def score(request: Request) -> Response:
        """Calibrated fraud probabilities, decisions and, with `explain`, additive reasons."""
        return await _answered(deps.scores, request)

    @app.post(
        "/v1/recommend", response_model=RecommendResponse, responses=_PROBLEMS, openapi_extra=bodies.RECOMMEND.openapi
    )
    async def recommend(request: Request) -> Response:
        """The best items for a user; a popular list for somebody of whom nothing is known."""
        return await _answered(deps.lists, request)

    @app.post("/v1/events", status_code=202, responses=_PROBLEMS)
    def events(body: EventsRequest, request: Request) -> EventsResponse:
        """Fold new events into the online features; the answer comes when they are in. Events that are sent again with
        their ids, or with the same Idempotency-Key, count once.
        """
        check_batch(len(body.events))
        key = request.headers.get("idempotency-key")
        parsed, refused = [], []
        for slot in (deps.fraud, deps.recommend):
            if body.application not in (None, slot.application):
                continue
            if body.application is not None:
                slot.require()
            loaded = slot.current
            if loaded is None:
                continue
            try:
                # All are checked before any is written, so a bad one changes nothing.
                records = named_by(key, body.events, loaded.model.id_column)
                parsed.append((slot.application, loaded.model, records, loaded.model.parse_events(records)))
            except DataError as error:
                refused.append((slot.application, error))
        if not parsed and refused:
            raise DataError("; ".join(f"for {name}: {error}" for name, error in refused))
        if not parsed:
            raise ProblemError(503, "no model is loaded", headers={"Retry-After": "5"})
        answer = EventsResponse(accepted={}, duplicates={}, late={})
        for application, model, records, batch in parsed:
            report = model.add(batch)
            if isinstance(model, FraudScorer):
                model.keep_events(records)
            else:
                users, items = (batch.keys[name].tolist() for name in (model.schema.user, model.schema.item))
                taken = sum(deps.lists.shown.taken(*pair) for pair in zip(users, items, strict=True))
                deps.metrics.conversions.inc(taken)
            deps.metrics.events.labels(application).inc(report.accepted)
            answer.accepted[application] = report.accepted
            if report.duplicates:
                answer.duplicates[application] = report.duplicates
            if report.late:
                answer.late[application] = report.late
        return answer

    @app.post("/v1/items", status_code=202, responses=_PROBLEMS)
    def items(body: ItemsRequest) -> ItemsResponse:
        """Items that training did not see: from the answer on they can be recommended, by what is said of them."""
        if len(body.items) > service.max_batch:
            raise DataError(f"items: {len(body.items)} in one request; at most {service.max_batch} are allowed")
        accepted, known = deps.recommend.require().model.add_items(body.items)
        return ItemsResponse(accepted=accepted, known=known)

    @app.post("/v1/labels", status_code=202, responses=_PROBLEMS)
    def labels(body: LabelsRequest) -> LabelsResponse:
        """Chargebacks and findings: what became of events. The answer comes when they are in the features."""
        if len(body.labels) > service.max_batch:
            raise DataError(f"labels: {len(body.labels)} in one request; at most {service.max_batch} are allowed")
        loaded = deps.fraud.require()
        model = loaded.model
        answer, judged = model.report(body.labels, now_s=time.time())
        deps.metrics.labels.inc(answer.accepted)
        for one in judged:
            deps.metrics.judged(one.decision, one.score, one.delay_s, fraud=one.fraud)
        if model.calibration is not None and model.calibration.add([(one.score, one.fraud) for one in judged]):
            deps.metrics.drifted(loaded.name, *model.seen())
        return answer

    @app.get("/v1/fraud/decisions", responses=_PROBLEMS)
    def recent_decisions(limit: Annotated[int, Query(ge=1, le=100)] = 20) -> RecentDecisions:
        """The newest decisions with their events, also of events without an id."""
        return RecentDecisions(decisions=deps.fraud.require().model.recent(limit))

    @app.get("/v1/fraud/decisions/{event_id}", responses={**_PROBLEMS, 404: {"model": Problem}})
    def decision(event_id: str) -> DecisionRecord:
        """What was decided of an event, from which features, by which version, and what became of it."""
        record = deps.fraud.require().model.record(event_id)
        if record is None:
            raise ProblemError(404, f"no event {event_id!r} was scored or posted here")
        return DecisionRecord(id=event_id, **record)

    @app.get("/v1/models")
    def models() -> ModelsResponse:
        """What answers requests now."""
        found = [(s.application, s.current, s.challenger, s.refused) for s in list(deps.slots)]
        return ModelsResponse(
            models=[
                LoadedModel(
                    application=application,
                    name=loaded.name,
                    version=loaded.version,
                    alias=CHAMPION,
                    loaded_at=loaded.loaded_at.isoformat(timespec="seconds"),
                    feature_plan=loaded.model.plan.version,
                    answered=loaded.outcomes.answered,
                    failed=loaded.outcomes.failed,
                    challenger=None if challenger is None else challenger.version,
                    refused=refused,
                )
                for application, loaded, challenger, refused in found
                if loaded is not None
            ]
        )

    @app.get("/v1/registry", responses=_PROBLEMS)
    def registry() -> RegistryResponse:
        """What could answer: versions, where aliases point, what was measured."""
        found = ModelRegistry(deps.config.tracking_uri, deps.audit).versions()
        return RegistryResponse(
            versions=[
                RegisteredVersion(
                    name=one.name,
                    version=one.version,
                    aliases=list(one.aliases),
                    application=one.application,
                    run_id=one.run_id,
                    metrics={k: v if math.isfinite(v) else None for k, v in one.metrics.items()},
                )
                for one in found
            ]
        )

    @app.get("/v1/audit", responses=_PROBLEMS)
    def audit(last: Annotated[int, Query(ge=1, le=1000)] = 50) -> AuditResponse:
        """Who changed what answers, when, why, and what was seen."""
        newest = deque(deps.audit.entries(), maxlen=last)
        return AuditResponse(entries=[AuditEntry(**entry) for entry in reversed(newest)])

    @app.get("/v1/drift", responses={**_PROBLEMS, 404: {"model": Problem}})
    def drift(application: Literal["fraud", "recommend"] | None = None) -> DriftResponse:
        """Whether the newest events still look like those that a model was made from. application: by default that of
        the fraud model, where there is one.
        """
        nothing_said = deps.recommend if deps.fraud.current is None and deps.recommend.current else deps.fraud
        slots: dict[str | None, Slot[Any]] = {None: nothing_said, "fraud": deps.fraud, "recommend": deps.recommend}
        loaded: Loaded[Any] = slots[application].require()
        watch = loaded.model.watch
        if watch is None:
            raise ProblemError(404, f"{loaded.name} version {loaded.version} was registered without a reference")

        def told(found: list[Finding]) -> list[DriftFinding]:
            return [
                DriftFinding(column=one.column, kind=one.kind, moved=one.moved, text=one.text, value=one.value)
                for one in found
            ]

        findings, alarms = loaded.model.seen()
        return DriftResponse(
            model=ModelRef(name=loaded.name, version=loaded.version),
            window_rows=watch.window_rows,
            windows=watch.seen.windows,
            label_windows=loaded.model.label_windows,
            findings=told(findings),
            alarms=told(alarms),
        )

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": Problem}})
    async def readyz() -> dict[str, str]:
        """At least one model answers."""
        if deps.fraud.current is None and deps.recommend.current is None:
            raise ProblemError(503, "no model is loaded yet", headers={"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/metrics")
    def metrics(own: str | None = None) -> Response:
        """For Prometheus, of all processes that serve this home folder. own: of this process alone."""
        others = {} if own is not None else deps.siblings.others_metrics()
        text = deps.metrics.render()
        if others:
            text = render(merged(deps.metrics.registry.collect(), others, str(os.getpid())))
        return Response(text, media_type="text/plain; version=0.0.4")

    return app


async def _answered(answering: Answering[Any, Any], request: Request) -> Response:
    (reply,) = await run_in_threadpool(answering, None, [await request.body()])
    return Response(reply.body, reply.status, {name.decode(): value.decode() for name, value in reply.headers})
