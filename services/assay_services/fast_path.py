"""The shortest way from a request to a score or a list: what comes thousands of times a second passes no framework.

A request that will be refused because too many wait is refused before its body is read, in a twentieth of the time of
one that is answered: else a flood of refusals would take the time that answers need. What has an Idempotency-Key, and
every other route, goes on to the application, whose routes call the same two functions.
"""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from assay_platform.errors import DataError
from assay_platform.monitoring.metrics import ServiceMetrics
from fastapi.concurrency import run_in_threadpool

from assay_services import bodies
from assay_services.answering import ListJob, ScoreJob, answered
from assay_services.batching import Batcher
from assay_services.fraud import FraudScorer
from assay_services.hot_swap import Loaded, Slot
from assay_services.idempotency import KEY
from assay_services.problems import MEDIA_TYPE, problem_bytes, problem_of
from assay_services.recommend import ItemRecommender
from assay_services.schemas import FraudResponse, FraudScore, ModelRef, RecommendResponse
from assay_services.whole_body import read_body

_MAX_COUNTERFACTUALS = 10
_TIMEOUT = b"x-timeout-ms"
# Requests that wait from which on it is worth noticing that a caller has gone.
_CROWD = 64
_JSON, _PROBLEM = b"application/json", MEDIA_TYPE.encode()
# Made once: under a flood most answers are this one. Waiting a second is what HTTP knows as the least.
_FULL, _RETRY = (
    problem_bytes(503, "more requests than can be answered; come back in a second"),
    ((b"retry-after", b"1"),),
)


@dataclass(frozen=True)
class Answers:
    """Bodies → answers. max_batch: events in one request."""

    fraud: Slot[FraudScorer]
    recommend: Slot[ItemRecommender]
    scores: Batcher[ScoreJob, list[FraudScore]]
    lists: Batcher[ListJob, RecommendResponse]
    metrics: ServiceMetrics
    max_batch: int

    async def score(self, content: bytes, timeout: bytes | None) -> bytes:
        """Of `POST /v1/fraud/score`. timeout: what the header says."""
        body = bodies.FRAUD.read(content)
        if len(body.events) > self.max_batch:
            raise DataError(f"events: {len(body.events)} in one request; at most {self.max_batch} are allowed")
        if body.counterfactual and len(body.events) > _MAX_COUNTERFACTUALS:
            raise DataError(f"counterfactual: {len(body.events)} events; at most {_MAX_COUNTERFACTUALS} in one request")
        within_s = _within_s(timeout)

        async def by(loaded: Loaded[FraudScorer]) -> FraudResponse:
            job = ScoreJob(loaded, body.events, body.explain)
            shape = (loaded.version, body.explain)
            scores = await self.scores.submit(job, rows=len(body.events), shape=shape, within_s=within_s)
            if body.counterfactual:
                for event, result in zip(body.events, scores, strict=True):
                    result.counterfactual = await run_in_threadpool(loaded.model.counterfactual, event, result)
            return FraudResponse(model=ModelRef(name=loaded.name, version=loaded.version), scores=scores)

        answer = await answered(self.fraud, lambda champion: champion.model.key_of(body.events[0]), by)
        self.fraud.remember(body.events)
        for result in answer.scores:
            self.metrics.decided(result.decision)
        return bodies.as_json(answer)

    async def recommend_items(self, content: bytes, timeout: bytes | None) -> bytes:
        """Of `POST /v1/recommend`."""
        body = bodies.RECOMMEND.read(content)
        within_s = _within_s(timeout)

        def by(loaded: Loaded[ItemRecommender]) -> Awaitable[RecommendResponse]:
            return self.lists.submit(ListJob(loaded, body), rows=1, shape=loaded.version, within_s=within_s)

        answer = await answered(self.recommend, lambda _: str(body.user_id), by)
        self.recommend.remember(body)
        self.metrics.recommendations.labels(str(answer.cold_start).lower()).inc()
        return bodies.as_json(answer)


@dataclass(frozen=True)
class Route:
    """path: under which it is counted."""

    path: str
    answer: Callable[[bytes, bytes | None], Coroutine[Any, Any, bytes]]
    queue: Batcher[Any, Any]


class FastPath:
    """ASGI middleware in front of the application."""

    def __init__(self, app: Any, *, answers: Answers) -> None:
        self._app = app
        routes = (
            Route("/v1/fraud/score", answers.score, answers.scores),
            Route("/v1/recommend", answers.recommend_items, answers.lists),
        )
        self._routes = {route.path: route for route in routes}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        route = self._routes.get(scope.get("path", ""))
        if route is None or scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        timeout = None
        for name, value in scope["headers"]:
            if name == KEY:
                await self._app(scope, receive, send)
                return
            if name == _TIMEOUT:
                timeout = value
        scope["route"] = route
        if not route.queue.has_room():
            await _send(send, 503, _FULL, _PROBLEM, _RETRY)
            return
        try:
            content = await read_body(receive)
            if content is None:
                return
            if route.queue.num_waiting < _CROWD:
                answer = await route.answer(content, timeout)
            elif (found := await _unless_gone(receive, route.answer(content, timeout))) is not None:
                answer = found
            else:
                return
        except Exception as error:  # noqa: BLE001 - every error has an answer
            problem, more_headers = problem_of(error)
            body = json.dumps(problem).encode()
            headers = [(name.lower().encode(), value.encode()) for name, value in more_headers.items()]
            await _send(send, problem["status"], body, _PROBLEM, headers)
        else:
            await _send(send, 200, answer, _JSON, [])


async def _unless_gone(receive: Any, answer: Coroutine[Any, Any, bytes]) -> bytes | None:
    """The answer; None, and no work for it, if the caller hangs up before its turn comes."""
    task, gone = asyncio.ensure_future(answer), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()


async def _send(send: Any, status: int, body: bytes, kind: bytes, more: Sequence[tuple[bytes, bytes]]) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _within_s(given: bytes | None) -> float:
    """How long the caller needs the answer for, from now."""
    if given is None:
        return math.inf
    try:
        within_ms = float(given)
    except ValueError:
        within_ms = math.nan
    if not 0 < within_ms < math.inf:
        raise DataError(f"X-Timeout-Ms: {given[:40].decode('latin-1')!r} is no number of milliseconds above 0")
    return within_ms / 1e3
