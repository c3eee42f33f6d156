"""The shortest way from a request to a queue: what comes thousands of times a second passes no framework.

A request that will be refused because too many wait is refused before its body is read, in a twentieth of the time of
one that is answered: else a flood of refusals would take the time that answers need. Every other route goes on to the
application.
"""

import asyncio
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from assay_platform.config import Service
from assay_platform.errors import DataError

from assay_services.batching import BatchLimits, OverloadedError
from assay_services.bodies import glance
from assay_services.named_models import model_of
from assay_services.replies import Reply, refusal, send_reply
from assay_services.tenants import LOOK_S, PATIENCE_S, is_being_read
from assay_services.tracing import Timing
from assay_services.whole_body import read_body

_TIMEOUT = b"x-timeout-ms"
# Made once: under a flood most answers are this one. Waiting a second is what HTTP knows as the least.
FULL = refusal(OverloadedError("more requests than can be answered; come back in a second", 1.0))


class Queue(Protocol):
    """Where requests wait for their answers: a thread of this process, or processes that score."""

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""

    def has_room(self) -> bool:
        """Whether a request that comes now may be taken on, before anybody looks at what it wants."""

    async def submit(
        self,
        job: bytes,
        *,
        rows: int,
        shape: Hashable,
        within_s: float,
        gone: Callable[[], bool],
        told: Callable[[Timing], None] | None,
    ) -> Reply:
        """The answer to a body. gone: whether nobody waits for it any more. told: of the call that answers it.

        Raises:
            OverloadedError: it was not taken on.
            DeadlinePassedError: its turn did not come in time.
        """


SCORES, COUNTERFACTUALS, LISTS = LANES = ("fraud", "counterfactual", "recommend")
# Whose models answer what is queued there.
APPLICATIONS = {SCORES: "fraud", COUNTERFACTUALS: "fraud", LISTS: "recommend"}
# A counterfactual is a search; who asks for one waits longer.
_PATIENT = 20.0


def limits_of(service: Service) -> dict[str, BatchLimits]:
    """Of each queue. Lists and counterfactuals are made one by one."""
    usual = BatchLimits(max_batch_s=service.max_batch_ms / 1e3, max_wait_s=service.max_wait_ms / 1e3)
    one_by_one = replace(usual, max_rows=1)
    patient = replace(one_by_one, max_wait_s=_PATIENT * usual.max_wait_s)
    return {SCORES: usual, COUNTERFACTUALS: patient, LISTS: one_by_one}


class Queues(NamedTuple):
    """One an application, and one for what takes long, so that it holds up nobody else. In the order of `LANES`."""

    scores: Queue
    counterfactuals: Queue
    lists: Queue


class Route(NamedTuple):
    """path: under which it is counted. queue: whose room is asked first. wanted: a body → its queue, rows and shape."""

    path: str
    queue: Queue
    wanted: Callable[[bytes], tuple[Queue, int, Hashable]]


def routes_to(queues: Queues) -> dict[str, Route]:
    """Path → what answers it."""

    def score(content: bytes) -> tuple[Queue, int, Hashable]:
        seen = glance(content)
        queue = queues.counterfactuals if seen.counterfactual else queues.scores
        return queue, max(1, len(seen.events)), seen.explain

    found = (
        Route("/v1/fraud/score", queues.scores, score),
        Route("/v1/recommend", queues.lists, lambda _: (queues.lists, 1, None)),
    )
    return {route.path: route for route in found}


class FastPath:
    """ASGI middleware in front of the application."""

    def __init__(self, app: Any, routes: dict[str, Route]) -> None:
        self._app, self._routes = app, routes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        route = self._routes.get(scope.get("path", ""))
        if route is None or scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        if not route.queue.has_room():
            await send_reply(send, FULL)
            return
        try:
            within_s = _within_s(next((value for name, value in scope["headers"] if name == _TIMEOUT), None))
            content = await read_body(receive)
            if content is None:
                return
            queue, rows, shape = route.wanted(content)
            state = scope.get("state", _NOBODY)
            gone, trace = state.get("gone", _stays), state.get("trace")
            told = None if trace is None else trace.answered
            named = model_of(scope)
            until = time.monotonic() + min(within_s, PATIENCE_S)
            while True:
                left_s = within_s if not named else until - time.monotonic()
                reply = await queue.submit(
                    content, rows=rows, shape=(named, shape), within_s=left_s, gone=gone, told=told
                )
                if not named or not is_being_read(reply) or gone() or time.monotonic() + LOOK_S > until:
                    break
                await asyncio.sleep(LOOK_S)
        except Exception as error:  # noqa: BLE001 - every error has an answer
            reply = refusal(error)
        await send_reply(send, reply)


_NOBODY: dict[str, Any] = {}


def _stays() -> bool:
    """Of callers of whom nobody says when they hang up."""
    return False


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
