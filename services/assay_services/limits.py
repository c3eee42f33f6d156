"""What stands in front of every request: key and what it may do, rates, body size, a request id; and the count of all.

Pure ASGI, so it costs microseconds and a refused body is never read into memory.
"""

import itertools
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from assay_platform.monitoring.metrics import ServiceMetrics
from starlette.requests import ClientDisconnect

from assay_services.auth import ADMIN, READ, SCORE, WRITE, Caller, KeyStore
from assay_services.console import PATHS as CONSOLE
from assay_services.logs import REQUEST_ID
from assay_services.named_models import model_of
from assay_services.problems import MEDIA_TYPE, problem_bytes
from assay_services.webhooks import PATH as WEBHOOK

Scope = dict[str, Any]
_OPEN = ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/docs/oauth2-redirect", *CONSOLE)
REQUEST_ID_HEADER, _USABLE_ID = b"x-request-id", re.compile(rb"[\w.:/+=-]{1,128}", re.ASCII)
# The first that fits; whatever else there is needs the right to read.
_SCOPES = (
    ("/v1/admin/", ADMIN),
    ("/v1/fraud/score", SCORE),
    ("/v1/recommend", SCORE),
    ("/v1/events", WRITE),
    ("/v1/items", WRITE),
    ("/v1/labels", WRITE),
)
# What tells of all models, whichever is named.
_OF_ALL_MODELS = ("/v1/registry", "/v1/audit")
_MAX_BUCKETS = 10_000


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

    @property
    def wait_s(self) -> float:
        """Until the next one fits."""
        return max(0.0, (1.0 - self._tokens) / self._rate)


class Gatekeeper:
    """ASGI middleware around the application. Who called is `scope["state"]["caller"]`, None without keys."""

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
        # Ids of requests are this process's and a number: drawing each one takes longer than refusing a request.
        self._process, self._numbers = secrets.token_hex(6).encode(), itertools.count()
        self._buckets: dict[str, tuple[float, TokenBucket]] = {}  # key's id → its rate and what is left of it

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = self.request_id(headers.get(REQUEST_ID_HEADER))
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        REQUEST_ID.set(request_id.decode())

        async def counted_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (REQUEST_ID_HEADER, request_id)]
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await _answer(counted_send, *refusal)
            elif b"content-length" in headers:
                # The server reads no more than it was told.
                await self._app(scope, receive, counted_send)
            else:
                await self._limited(scope, receive, counted_send)
        finally:
            # The route's template, not the raw path: a scanner must not make a time series a guess.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.answered(route, scope["method"], status, time.perf_counter() - started)

    def request_id(self, given: bytes | None) -> bytes:
        """The caller's own, if it can be written into a log as it is."""
        if given is not None and _USABLE_ID.fullmatch(given):
            return given
        return b"%s-%x" % (self._process, next(self._numbers))

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, dict[str, str]] | None:
        path = scope["path"]
        scope["state"]["caller"] = None
        named = model_of(scope)
        if any(part in (".", "..") for part in (named, *path.split("/"))):
            # Whoever passes it on might take the dots for what they say, after the key was asked for something else.
            return 400, "the path has a segment that is '.' or '..'; send it without", {}
        if path in _OPEN and not named:
            return None
        if not self._bucket.take():
            return 429, "more requests a second than this service allows", _come_back(self._bucket)
        length = headers.get(b"content-length", b"0")
        # A webhook is signed instead.
        if path != WEBHOOK and self._keys and (refusal := self._refused_key(scope, headers)) is not None:
            return refusal
        return self._too_large() if length.isdigit() and int(length) > self._max_body_bytes else None

    def _refused_key(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, dict[str, str]] | None:
        presented = headers.get(b"x-api-key", b"").decode("latin-1")
        scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() == "bearer":
            presented = presented or token
        caller = self._keys.caller(presented) if presented else None
        if caller is None:
            what = "wrong" if presented else "missing"
            return 401, f"the API key is {what}; send it as X-API-Key", {"www-authenticate": "Bearer"}
        scope["state"]["caller"] = caller
        needed = next((right for prefix, right in _SCOPES if scope["path"].startswith(prefix)), READ)
        if needed not in caller.scopes:
            return 403, f"this API key may not {needed}; it may {', '.join(caller.scopes)}", {}
        if caller.models is not None and (model_of(scope) not in caller.models or scope["path"] in _OF_ALL_MODELS):
            allowed = ", ".join(f"/models/{name}/v1/…" for name in caller.models)
            return 403, f"this API key may ask some models alone, by their names: {allowed}", {}
        bucket = self._bucket_of(caller)
        if bucket is not None and not bucket.take():
            return 429, f"more requests a second than this API key allows ({caller.rate:g})", _come_back(bucket)
        return None

    def _bucket_of(self, caller: Caller) -> TokenBucket | None:
        if caller.rate is None:
            return None
        held = self._buckets.get(caller.id)
        if held is None or held[0] != caller.rate:
            if len(self._buckets) >= _MAX_BUCKETS:
                self._buckets.clear()
            held = self._buckets[caller.id] = (caller.rate, TokenBucket(caller.rate))
        return held[1]

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


def _come_back(bucket: TokenBucket) -> dict[str, str]:
    # Whole seconds are what HTTP knows.
    return {"retry-after": str(max(1, round(bucket.wait_s)))}


async def _answer(send: Any, status: int, detail: str, headers: dict[str, str]) -> None:
    body = problem_bytes(status, detail)
    fields = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
