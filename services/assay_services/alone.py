"""The whole service in one process, plain ASGI: what a replica of Ray Serve is, and what tests ask.

The same queues as in front of several processes, with a thread each that answers; what speaks HTTP and what scores
share an interpreter.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from assay_services.auth import KeyStore
from assay_services.batching import Batcher
from assay_services.dependencies import Dependencies
from assay_services.fast_path import LANES, FastPath, Queues, limits_of, routes_to
from assay_services.idempotency import Idempotency
from assay_services.limits import Gatekeeper
from assay_services.named_models import NamedByPath
from assay_services.replies import Reply
from assay_services.served import Served
from assay_services.tracing import Tracing


def create_app(deps: Dependencies, held: Callable[[Any, Served], Any] = lambda app, _: app) -> NamedByPath:
    """Build it; the follower runs from its start-up to its shutdown. held: middleware that sees which models requests
    name before they are queued.
    """
    service, metrics = deps.config.service, deps.metrics
    limits = limits_of(service)
    served = Served(deps)
    answers = served.by_lane()
    queues: dict[str, Batcher[bytes, Reply]] = {
        lane: Batcher(answers[lane], limits[lane], name=lane, on_batch=metrics.on_batch(lane)) for lane in LANES
    }
    metrics.watch_queues(lambda: {lane: queue.num_waiting for lane, queue in queues.items()})
    routes = routes_to(Queues(*(queues[lane] for lane in LANES)))
    tracing = Tracing(
        Idempotency(held(FastPath(served.app(), routes), served)), endpoint=service.traces,
        share=service.trace_share, service="assay",
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(served.start)
        yield
        for queue in queues.values():
            await asyncio.to_thread(queue.close)
        await asyncio.to_thread(served.stop)
        await asyncio.to_thread(tracing.close)

    served.followed.router.lifespan_context = lifespan
    return NamedByPath(
        Gatekeeper(
            tracing,
            keys=KeyStore(deps.config.paths.api_keys),
            metrics=metrics,
            max_body_bytes=service.max_body_bytes,
            max_requests_per_s=service.max_requests_per_s,
        )
    )
