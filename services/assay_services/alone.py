"""The whole service in one process, plain ASGI: what a replica of Ray Serve is, and what tests ask.

The same queues as in front of several processes, with a thread each that answers; what speaks HTTP and what scores
share an interpreter.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from assay_services.app import application
from assay_services.auth import KeyStore
from assay_services.batching import Batcher
from assay_services.dependencies import Dependencies
from assay_services.fast_path import LANES, FastPath, Queues, limits_of, routes_to
from assay_services.idempotency import Idempotency
from assay_services.limits import Gatekeeper
from assay_services.replies import Reply
from assay_services.siblings import HandOver
from assay_services.tracing import Tracing


def create_app(deps: Dependencies) -> Gatekeeper:
    """Build it; the follower runs from its start-up to its shutdown."""
    service, metrics = deps.config.service, deps.metrics
    limits = limits_of(service)
    answers = deps.by_lane()
    queues: dict[str, Batcher[bytes, Reply]] = {
        lane: Batcher(answers[lane], limits[lane], name=lane, on_batch=metrics.on_batch(lane)) for lane in LANES
    }
    metrics.watch_queues(lambda: {lane: queue.num_waiting for lane, queue in queues.items()})
    app = application(deps)

    routes = routes_to(Queues(*(queues[lane] for lane in LANES)))
    tracing = Tracing(
        Idempotency(FastPath(HandOver(app, siblings=deps.siblings), routes)), endpoint=service.traces,
        share=service.trace_share, service="assay",
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A client of other processes belongs to one event loop.
        await asyncio.to_thread(deps.start, HandOver(app, siblings=deps.siblings))
        yield
        for queue in queues.values():
            await asyncio.to_thread(queue.close)
        await asyncio.to_thread(deps.stop)
        await asyncio.to_thread(tracing.close)

    app.router.lifespan_context = lifespan
    return Gatekeeper(
        tracing,
        keys=KeyStore(deps.config.paths.api_keys),
        metrics=metrics,
        max_body_bytes=service.max_body_bytes,
        max_requests_per_s=service.max_requests_per_s,
    )
