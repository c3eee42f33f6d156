"""The scoring application: `create_app(deps)` is plain ASGI, alone in a process or inside Ray Serve.

Scores and lists take the fast path: body → queue → one call for all that wait → JSON, see `fast_path` and `batching`.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from assay_features.feast.repository import FeatureRepository
from assay_features.stream import StreamSettings
from assay_platform.config import Config
from assay_platform.errors import DataError
from assay_platform.monitoring.alarms import Finding
from assay_platform.monitoring.metrics import ServiceMetrics, render
from assay_platform.storage.tiered import TieredStore
from assay_platform.tracking import CHAMPION, AuditLog, ModelRegistry
from assay_platform.tracking.records import DecisionRecords
from fastapi import FastAPI, Request, Response
from fastapi.middleware import Middleware

from assay_services import bodies
from assay_services.admin import admin_routes
from assay_services.answering import ListJob, ScoreJob, make_lists, score_jobs
from assay_services.auth import KeyStore
from assay_services.batching import Batcher, BatchLimits
from assay_services.fast_path import Answers, FastPath
from assay_services.fraud import FraudScorer
from assay_services.hot_swap import Follower, Loaded, Slot
from assay_services.idempotency import Idempotency, named_by
from assay_services.limits import Gatekeeper
from assay_services.problems import ProblemError, install
from assay_services.recommend import ItemRecommender
from assay_services.schemas import (
    DecisionRecord,
    DriftFinding,
    DriftResponse,
    EventsRequest,
    EventsResponse,
    FraudResponse,
    FraudScore,
    ItemsRequest,
    ItemsResponse,
    LabelsRequest,
    LabelsResponse,
    LoadedModel,
    ModelRef,
    ModelsResponse,
    Problem,
    RecommendResponse,
)
from assay_services.siblings import HandOver, Siblings, merged

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


_FIRST_LOOK_S = 60.0
# What one process writes the others read within this.
_STREAM = StreamSettings(checkpoint_s=0.25)


@dataclass(frozen=True)
class Dependencies:
    """All that the application needs from outside."""

    config: Config
    keys: KeyStore
    metrics: ServiceMetrics
    fraud: Slot[FraudScorer]
    recommend: Slot[ItemRecommender]
    follower: Follower
    siblings: Siblings
    audit: AuditLog
    scores: Batcher[ScoreJob, list[FraudScore]]
    lists: Batcher[ListJob, RecommendResponse]
    close_stores: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Answer who waits, then write what is in memory."""
        self.scores.close()
        self.lists.close()
        self.close_stores()
        self.siblings.stop()


@dataclass
class _Repositories:
    """Feature repositories, one a model name, shared by its versions: one connection, one lock."""

    root: Path
    may_write: Callable[[], bool]
    _open: dict[str, FeatureRepository] = field(default_factory=dict)
    _records: dict[str, DecisionRecords] = field(default_factory=dict)

    def get(self, name: str) -> FeatureRepository:
        if name not in self._open:
            self._open[name] = FeatureRepository(self.root / name, stream=_STREAM, may_write=self.may_write)
        return self._open[name]

    def records(self, name: str) -> DecisionRecords:
        """Where decisions of a model name are kept."""
        if name not in self._records:
            self._records[name] = DecisionRecords(self.root / name / "records")
        return self._records[name]

    def take_over(self) -> None:
        """Recover what a process that wrote the features has left, if this one writes now."""
        if self.may_write():
            for repository in list(self._open.values()):
                repository.take_over()

    def tiers(self) -> dict[str, TieredStore]:
        """The tiers of those in use."""
        return {name: repository.tiers for name, repository in list(self._open.items())}

    def close(self) -> None:
        """Write what is in memory."""
        for repository in self._open.values():
            repository.close()
        for records in self._records.values():
            records.close()


def make_dependencies(config: Config, *, fraud: str | None = None, recommend: str | None = None) -> Dependencies:
    """Wire the real ones. fraud, recommend: model names to follow instead of the newest champion."""
    metrics = ServiceMetrics()
    siblings = Siblings(config.paths.home)
    repositories = _Repositories(config.paths.feature_repositories, siblings.is_writer)
    metrics.watch_tiers(repositories.tiers)
    metrics.watch_tasks(config.paths.tasks)
    service, audit = config.service, AuditLog(config.paths.audit_log)
    limits = BatchLimits(max_batch_s=service.max_batch_ms / 1e3, max_wait_s=service.max_wait_ms / 1e3)
    scores: Batcher[ScoreJob, list[FraudScore]] = Batcher(
        score_jobs, limits, name="scores", on_batch=metrics.on_batch("fraud")
    )
    # A list is made for one user at a time.
    one_by_one = replace(limits, max_batch_s=1e-9)
    lists: Batcher[ListJob, RecommendResponse] = Batcher(
        make_lists, one_by_one, name="lists", on_batch=metrics.on_batch("recommend")
    )
    metrics.watch_queues(lambda: {"fraud": scores.num_waiting, "recommend": lists.num_waiting})

    def learn(loaded: Loaded[FraudScorer]) -> None:
        for explain, rows, seconds in loaded.model.call_seconds:
            scores.learn((loaded.version, explain), rows, seconds)

    fraud_slot: Slot[FraudScorer] = Slot(
        "fraud",
        lambda name, folder: FraudScorer.load(folder, repositories.get(name), repositories.records(name)),
        metrics,
        pinned_name=fraud,
        rollout=config.rollout,
        audit=audit,
        on_loaded=learn,
    )
    recommend_slot: Slot[ItemRecommender] = Slot(
        "recommend",
        lambda name, folder: ItemRecommender.load(folder, repositories.get(name)),
        metrics,
        pinned_name=recommend,
        rollout=config.rollout,
        audit=audit,
    )
    slots: tuple[Slot[FraudScorer] | Slot[ItemRecommender], ...] = (fraud_slot, recommend_slot)
    metrics.watch_experts(lambda: {s.application: s.current.model.fences for s in slots if s.current is not None})

    def each_time() -> None:
        repositories.take_over()
        if recommend_slot.current is not None:
            recommend_slot.current.model.catch_up()
        if fraud_slot.current is not None and (watch := fraud_slot.current.model.watch) is not None and watch.look():
            metrics.drifted(watch.seen.findings, watch.seen.alarms)

    follower = Follower(
        lambda: ModelRegistry(config.tracking_uri, audit),
        [fraud_slot, recommend_slot],
        poll_s=service.poll_registry_s,
        each_time=each_time,
    )
    keys = KeyStore(config.paths.api_keys)
    return Dependencies(
        config, keys, metrics, fraud_slot, recommend_slot, follower, siblings, audit, scores, lists, repositories.close
    )


def create_app(deps: Dependencies) -> Gatekeeper:
    """Build the application, plain ASGI; the follower runs from its start-up to its shutdown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        deps.siblings.start(front)
        deps.follower.start()
        # A server accepts when this is over. Until then others on its port answer, or requests wait for the first model
        # instead of being sent away.
        await asyncio.to_thread(deps.follower.first_look.wait, _FIRST_LOOK_S)
        yield
        deps.follower.stop()
        deps.close()

    service = deps.config.service
    app = FastAPI(
        title="Assay",
        version=version("assay"),
        summary="Scores what to recommend and whom to trust.",
        lifespan=lifespan,
        redoc_url=None,
        middleware=[Middleware(Idempotency), Middleware(HandOver, siblings=deps.siblings)],
    )
    install(app)
    app.include_router(admin_routes(deps.config, deps.audit, deps.follower.look_now))

    answers = Answers(deps.fraud, deps.recommend, deps.scores, deps.lists, deps.metrics, service.max_batch)

    def check_batch(num_events: int) -> None:
        if num_events > service.max_batch:
            raise DataError(f"events: {num_events} in one request; at most {service.max_batch} are allowed")

    @app.post("/v1/fraud/score", response_model=FraudResponse, responses=_PROBLEMS, openapi_extra=bodies.FRAUD.openapi)
    async def score(request: Request) -> Response:
        """Calibrated fraud probabilities, decisions and, with `explain`, additive reasons."""
        content = await answers.score(await request.body(), _timeout(request))
        return Response(content, media_type="application/json")

    @app.post(
        "/v1/recommend", response_model=RecommendResponse, responses=_PROBLEMS, openapi_extra=bodies.RECOMMEND.openapi
    )
    async def recommend(request: Request) -> Response:
        """The best items for a user; a popular list for somebody of whom nothing is known."""
        content = await answers.recommend_items(await request.body(), _timeout(request))
        return Response(content, media_type="application/json")

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
        answer = deps.fraud.require().model.report(body.labels, now_s=time.time())
        deps.metrics.labels.inc(answer.accepted)
        return answer

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
        found = [(s.application, s.current, s.challenger, s.refused) for s in (deps.fraud, deps.recommend)]
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

    @app.get("/v1/drift", responses={**_PROBLEMS, 404: {"model": Problem}})
    def drift() -> DriftResponse:
        """Whether the newest events still look like those that the fraud model was measured on."""
        loaded = deps.fraud.require()
        watch = loaded.model.watch
        if watch is None:
            raise ProblemError(404, f"{loaded.name} version {loaded.version} was registered without a reference")

        def told(found: tuple[Finding, ...]) -> list[DriftFinding]:
            return [
                DriftFinding(column=one.column, kind=one.kind, moved=one.moved, text=one.text, value=one.value)
                for one in found
            ]

        return DriftResponse(
            model=ModelRef(name=loaded.name, version=loaded.version),
            window_rows=watch.window_rows,
            windows=watch.seen.windows,
            findings=told(watch.seen.findings),
            alarms=told(watch.seen.alarms),
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

    # In front of the framework, which takes three times as long as these.
    front = Gatekeeper(
        FastPath(app, answers=answers),
        keys=deps.keys,
        metrics=deps.metrics,
        max_body_bytes=service.max_body_bytes,
        max_requests_per_s=service.max_requests_per_s,
    )
    return front


def _timeout(request: Request) -> bytes | None:
    value = request.headers.get("x-timeout-ms")
    return None if value is None else value.encode()
