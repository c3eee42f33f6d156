"""The process that speaks HTTP: keys, rates, sizes, request ids, repeats, queues. It holds no model and no features.

Scores and lists go to processes that score in batches (`lanes`); every other request goes to one of them as it is. What
speaks HTTP and what scores do not share an interpreter, so neither a flood of requests nor a version that is being
loaded holds the other up, and a process that scores can die without a caller noticing.
"""

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from assay_platform.config import Config
from assay_platform.monitoring.metrics import ServiceMetrics, render

from assay_services.auth import KeyStore
from assay_services.fast_path import FULL, LANES, FastPath, Queues, limits_of, routes_to
from assay_services.idempotency import Idempotency
from assay_services.inner import InnerClient
from assay_services.lanes import Lanes, Pool
from assay_services.limits import REQUEST_ID_HEADER, Gatekeeper
from assay_services.named_models import NamedByPath
from assay_services.problems import ProblemError
from assay_services.replies import JSON, Reply, refusal, send_reply
from assay_services.siblings import merged, metrics_in
from assay_services.tracing import Tracing
from assay_services.whole_body import read_body

_FIRST_S = 90.0
_FULL_HEAD = b"HTTP/1.1 %d Service Unavailable\r\n%scontent-length: %d\r\n" % (
    FULL.status,
    b"".join(b"%s: %s\r\n" % pair for pair in FULL.headers),
    len(FULL.body),
)


class Front:
    """ASGI application. Its lifespan listens to processes that score and waits for the first."""

    def __init__(self, config: Config, folder: Path, name: str) -> None:
        """folder: of the sockets. name: of the socket that processes that score connect to."""
        self._folder, self._metrics = folder, ServiceMetrics()
        self._client = InnerClient()
        service = config.service
        limits = limits_of(service)
        queues = {lane: Pool(limits[lane], on_batch=self._metrics.on_batch(lane)) for lane in LANES}
        self._metrics.watch_queues(lambda: {lane: queue.num_waiting for lane, queue in queues.items()})
        self._lanes = Lanes(folder / name, queues)
        routes = routes_to(Queues(*(queues[lane] for lane in LANES)))
        self._queues = {route.path.encode(): route.queue for route in routes.values()}
        self._tracing = Tracing(
            Idempotency(FastPath(self._others, routes)), endpoint=service.traces, share=service.trace_share,
            service="assay",
        )  # fmt: skip
        self._gatekeeper = Gatekeeper(
            self._tracing,
            keys=KeyStore(config.paths.api_keys),
            metrics=self._metrics,
            max_body_bytes=service.max_body_bytes,
            max_requests_per_s=service.max_requests_per_s,
        )
        self._app = NamedByPath(self._gatekeeper)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await self._app(scope, receive, send)

    def refuse(self, path: bytes, headers: list[tuple[bytes, bytes]]) -> bytes | None:
        """The response to a POST for which there is no room; see `FloodProtocol`."""
        queue = self._queues.get(path)
        if queue is None or queue.has_room():
            return None
        self._metrics.answered(path.decode(), "POST", FULL.status, 0.0)
        given = next((value for name, value in headers if name == REQUEST_ID_HEADER), None)
        return b"%s%s: %s\r\n\r\n%s" % (_FULL_HEAD, REQUEST_ID_HEADER, self._gatekeeper.request_id(given), FULL.body)

    async def _lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        await self._lanes.start()
        # A server accepts when this is over; until then requests wait for the first process instead of being sent away.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._lanes.joined.wait(), _FIRST_S)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._lanes.stop()
        await self._client.close()
        await asyncio.to_thread(self._tracing.close)
        await send({"type": "lifespan.shutdown.complete"})

    async def _others(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """What is no score and no list."""
        if scope["type"] != "http":
            return
        path = scope["path"]
        if scope["method"] == "GET" and path in ("/healthz", "/metrics"):
            scope["route"] = SimpleNamespace(path=path)
            await send_reply(send, Reply(200, b'{"status":"ok"}', JSON) if path == "/healthz" else await self._counts())
            return
        body = await read_body(receive)
        if body is not None:
            await send_reply(send, await self._passed_on(scope, body))

    async def _passed_on(self, scope: dict[str, Any], body: bytes) -> Reply:
        for _ in range(2):
            socket = self._lanes.next_process()
            if socket is None:
                break
            try:
                return await self._client.ask(socket, scope, body)
            except httpx.ConnectError:
                continue
            except httpx.TransportError:
                if scope["method"] not in ("GET", "HEAD"):
                    return refusal(_gone("the process that was to answer has gone; send the same again"))
        return refusal(_gone("no process that scores is there; one is being started"))

    async def _counts(self) -> Reply:
        others = await asyncio.to_thread(metrics_in, self._folder)
        text = render(merged(self._metrics.registry.collect(), others, str(os.getpid())))
        return Reply(200, text, ((b"content-type", b"text/plain; version=0.0.4"),))


def _gone(detail: str) -> ProblemError:
    return ProblemError(503, detail, headers={"Retry-After": "1"})
