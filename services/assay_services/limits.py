"""What stands in front of every request: API key, rate, body size; and the count of all of it.

Pure ASGI, so it costs microseconds and a refused body is never read into memory.
"""

import time
from collections.abc import Callable
from typing import Any

from assay_platform.monitoring.metrics import ServiceMetrics
from starlette.requests import ClientDisconnect

from assay_services.auth import KeyStore
from assay_services.problems import MEDIA_TYPE, problem_bytes

Scope = dict[str, Any]
_OPEN = ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect")


class TokenBucket:
    """Allows `rate` requests a second on average and bursts of one second's worth."""

    def __init__(self, rate: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._tokens, self._last = max(1.0, rate), clock()

    def take(self) -> bool:
        """Whether one more request fits now."""
        now = self._clock()
        self._tokens = min(max(1.0, self._rate), self._tokens + (now - self._last) * self._rate)
        self._last = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


class Gatekeeper:
    """ASGI middleware around the application."""

    def __init__(
        self,
        app: Any,
        *,
        keys: KeyStore,
        metrics: ServiceMetrics,
        max_body_bytes: int,
        max_requests_per_s: float,
    ) -> None:
        self._app = app
        self._keys, self._metrics = keys, metrics
        self._max_body_bytes = max_body_bytes
        self._bucket = TokenBucket(max_requests_per_s)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def counted_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await _answer(counted_send, *refusal)
            else:
                await self._limited(scope, receive, counted_send)
        finally:
            # The route's template, not the raw path: a scanner must not make a time series a guess.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, scope["method"], str(status)).inc()
            self._metrics.latency.labels(route).observe(time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> tuple[int, str, dict[str, str]] | None:
        if scope["path"] in _OPEN:
            return None
        if not self._bucket.take():
            return 429, "more requests a second than this service allows", {"retry-after": "1"}
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._keys:
            presented = headers.get(b"x-api-key", b"").decode("latin-1")
            scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                presented = presented or token
            if not presented or not self._keys.accepts(presented):
                what = "wrong" if presented else "missing"
                return 401, f"the API key is {what}; send it as X-API-Key", {"www-authenticate": "Bearer"}
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> tuple[int, str, dict[str, str]]:
        return 413, f"the body is larger than {self._max_body_bytes} bytes; send fewer events a request", {}

    async def _limited(self, scope: Scope, receive: Any, send: Any) -> None:
        """Also bodies without a length are cut off at the limit."""
        received = 0

        async def counting_receive() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                # To the application the client has gone; what it then says is not sent.
                return {"type": "http.disconnect"}
            return message

        async def send_unless_too_large(message: Any) -> None:
            if received <= self._max_body_bytes:
                await send(message)

        try:
            await self._app(scope, counting_receive, send_unless_too_large)
        except ClientDisconnect:
            if received <= self._max_body_bytes:
                raise
        finally:
            if received > self._max_body_bytes:
                await _answer(send, *self._too_large())


async def _answer(send: Any, status: int, detail: str, headers: dict[str, str]) -> None:
    body = problem_bytes(status, detail)
    fields = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
