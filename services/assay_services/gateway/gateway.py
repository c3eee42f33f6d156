"""The gateway: every request goes to the nearest region that is up, every write in the end to all of them.

A region that does not answer is left at once: what can be asked twice goes to the next one, and callers notice nothing
but the time. A caller that has written is bound to the region that took the write until others know it, so it reads
what it wrote. Keys, rates and sizes are checked in front (`limits`), and again by the region.
"""

import asyncio
import contextlib
import json
import logging
import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from assay_platform.config import Gateway as Settings
from assay_platform.errors import StorageError
from assay_platform.monitoring.metrics import ServiceMetrics
from assay_platform.storage import write_json
from assay_platform.tracking import AuditLog

from assay_services.auth import Caller
from assay_services.gateway.choice import Choice, Region
from assay_services.gateway.metrics import RegionMetrics
from assay_services.gateway.outbox import Outbox, Write
from assay_services.gateway.remote import GoneError, Remote
from assay_services.named_models import model_of
from assay_services.problems import ProblemError
from assay_services.replies import JSON, Reply, refusal, send_reply
from assay_services.tracing import Trace
from assay_services.whole_body import read_body

# What changes a region's own state, so that others have to be told. An answer to one is the same if it is sent again.
WRITES = ("/v1/events", "/v1/labels", "/v1/items", "/v1/admin/erase")
_PURE = ("/v1/fraud/score", "/v1/recommend")
# Known to the region that decided, whichever that was.
_SOUGHT = "/v1/fraud/decisions/"
_OWN, _ADMIN = "/v1/gateway", "/v1/admin/gateway/"
_SESSION, _KEY, _TIMEOUT, _REQUEST_ID = b"x-assay-session", b"idempotency-key", b"x-timeout-ms", b"x-request-id"
_TRACE = (b"traceparent", b"tracestate")
# By which Ray Serve finds a replica that has the model.
_MODEL = b"serve_multiplexed_model_id"
_MAX_SESSIONS = 100_000
# Writes that a region is told of at once; more than that waits until it has answered.
_AT_ONCE = 64
_PAUSE_S, _SAVED_S, _ANSWER_S = 0.2, 1.0, 60.0
_log = logging.getLogger("assay.gateway")


class Gateway:
    """ASGI application; one event loop."""

    def __init__(
        self,
        settings: Settings,
        outbox: Outbox,
        metrics: ServiceMetrics,
        audit: AuditLog,
        *,
        key: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """key: an API key of all regions that may write and administrate; what others have taken is told with it.

        Raises:
            StorageError: which regions are drained cannot be read.
        """
        self._settings, self._outbox, self._audit, self._clock = settings, outbox, audit, clock
        self._service_metrics = metrics
        self.regions = {name: Region(name) for name in settings.regions}
        self._remotes = {name: Remote(url) for name, url in settings.regions.items()}
        self._choice = Choice(list(self.regions.values()), max_lag_s=settings.max_lag_s)
        self._metrics = RegionMetrics(metrics.registry, self.regions, outbox)
        self._own_headers = ((b"x-api-key", key.encode()),) if key else ()
        self._sessions: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self._in_flight = dict.fromkeys(self.regions, 0)
        self._wake = {name: asyncio.Event() for name in self.regions}
        self._tasks: set[asyncio.Task[None]] = set()
        self._drained_file = outbox.folder / "drained.json"
        for name in _read_names(self._drained_file):
            if name in self.regions:
                self.regions[name].drained = True

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        body = await read_body(receive)
        if body is None:
            return
        try:
            reply = await self._answer(scope, body)
        except Exception as error:  # noqa: BLE001 - every error has an answer
            reply = refusal(error)
        await send_reply(send, reply)

    # ------------------------------------------------------------------ requests

    async def _answer(self, scope: dict[str, Any], body: bytes) -> Reply:
        path, method = scope["path"], scope["method"]
        scope["route"] = SimpleNamespace(path=path if path in (*WRITES, *_PURE, _OWN) else "passed on")
        if path == "/healthz":
            return Reply(200, b'{"status":"ok"}', JSON)
        if path == "/readyz":
            return self._ready()
        if path == "/metrics":
            return Reply(200, self._service_metrics.render(), ((b"content-type", b"text/plain; version=0.0.4"),))
        if path == _OWN:
            return _json(200, {"regions": [self._told(name) for name in self.regions]})
        if path.startswith(_ADMIN) and method == "POST":
            return await self._administrated(path.removeprefix(_ADMIN), scope)
        return await self._passed_on(scope, body)

    async def _passed_on(self, scope: dict[str, Any], body: bytes) -> Reply:
        path, method = scope["path"], scope["method"]
        writes = method == "POST" and path in WRITES
        repeatable = writes or method in ("GET", "HEAD") or path in _PURE
        headers, trace = _headers_of(scope, named=writes), scope["state"].get("trace")
        session = _session_of(scope, headers)
        until = _deadline(headers)
        raw = scope.get("raw_path", path.encode()).decode("latin-1").partition("?")[0]
        query = scope.get("query_string", b"").decode("latin-1")
        target = f"{raw}?{query}" if query else raw
        refused: Reply | None = None
        bound = self._bound(session)
        for region in self._choice.order(bound):
            within_s = until - time.monotonic()
            headers = _with_time_left(headers, within_s)
            began_ns = time.time_ns()
            try:
                reply = await self._asked(region, method, target, headers, body, min(within_s, _ANSWER_S))
            except GoneError as error:
                if time.monotonic() >= until:
                    raise _too_late() from error
                self._metrics.failovers.labels(region.name).inc()
                if trace is not None:
                    trace.part(f"region {region.name} did not answer", began_ns)
                if error.was_asked and not repeatable:
                    detail = f"region {region.name} went while it was answering; look before you send the same again"
                    raise ProblemError(503, detail, headers={"Retry-After": "1"}) from error
                continue
            if trace is not None:
                trace.part(f"ask region {region.name}", began_ns, **{"http.response.status_code": reply.status})
            # A region that says so may have done it, if whoever did it then went.
            if (reply.status == 503 and repeatable) or (reply.status == 404 and path.startswith(_SOUGHT)):
                refused = refused or reply
                continue
            if writes and reply.status < 300:
                self._keep(raw, headers, body, region.name, session)
            told = [(b"x-assay-region", region.name.encode())]
            if bound not in (None, region.name):
                # The region that took what the caller has written is gone.
                told.append((b"x-assay-behind", b"%d" % self._outbox.waiting(region.name)))
            return reply._replace(headers=(*reply.headers, *told))
        if refused is not None:
            return refused
        raise ProblemError(503, "no region is ready; see /v1/gateway", headers={"Retry-After": "1"})

    async def _asked(
        self,
        region: Region,
        method: str,
        target: str,
        headers: list[tuple[bytes, bytes]],
        body: bytes,
        within_s: float,
    ) -> Reply:
        self._in_flight[region.name] += 1
        try:
            return await self._remotes[region.name].ask(method, target, headers, body, within_s=within_s)
        finally:
            self._in_flight[region.name] -= 1

    def _keep(self, path: str, headers: list[tuple[bytes, bytes]], body: bytes, origin: str, session: bytes) -> None:
        """Other regions are to be told of a write. Without a place to keep it, it is not acknowledged."""
        if len(self.regions) == 1:
            return
        key = next(value for name, value in headers if name == _KEY).decode("latin-1")
        try:
            place = self._outbox.add(Write(path, key, body, origin, self._clock()))
        except StorageError as error:
            detail = "one region has taken it, and it cannot be kept for the others; send the same again"
            raise ProblemError(503, detail, headers={"Retry-After": "5"}) from error
        self._sessions[session] = (origin, place)
        self._sessions.move_to_end(session)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        for event in self._wake.values():
            event.set()

    def _bound(self, session: bytes) -> str | None:
        """The region that took what a caller wrote last, as long as another one does not know it."""
        held = self._sessions.get(session)
        if held is None:
            return None
        origin, place = held
        if all(self._outbox.place_of(name) > place for name in self.regions):
            del self._sessions[session]
            return None
        return origin

    # ------------------------------------------------------------------ what operators see and do

    def _ready(self) -> Reply:
        if any(region.is_up for region in self.regions.values()):
            return Reply(200, b'{"status":"ready"}', JSON)
        raise ProblemError(503, "no region is ready; see /v1/gateway", headers={"Retry-After": "1"})

    def _told(self, name: str) -> dict[str, Any]:
        region = self.regions[name]
        return {
            "name": name,
            "state": "drained" if region.drained else "gone" if not region.is_up else "up",
            "latency_ms": round(1e3 * region.latency_s, 3) if region.is_up else None,
            "lag_s": round(region.lag_s, 3),
            "waiting_writes": self._outbox.waiting(name),
            "in_flight": self._in_flight[name],
        }

    async def _administrated(self, what: str, scope: dict[str, Any]) -> Reply:
        name, _, action = what.partition("/")
        if name not in self.regions or action not in ("drain", "resume"):
            allowed = ", ".join(f"{_ADMIN}{region}/drain and /resume" for region in self.regions)
            raise ProblemError(404, f"no such thing to do; there are {allowed}")
        caller: Caller | None = scope["state"].get("caller")
        who = None if caller is None else f"{caller.who} (key {caller.id})"
        await asyncio.to_thread(self._audit.append, action, actor=who, region=name)
        self.regions[name].drained = action == "drain"
        write_json(self._drained_file, [region.name for region in self.regions.values() if region.drained])
        _log.warning("region %s: %s", name, action)
        return _json(200, self._told(name))

    # ------------------------------------------------------------------ what runs beside

    async def _lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        for name in self.regions:
            self._begin(self._watch(name))
            self._begin(self._tell(name))
        self._begin(self._save())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        running = list(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for remote in self._remotes.values():
            await remote.cut()
        self._outbox.save()
        self._outbox.close()
        await send({"type": "lifespan.shutdown.complete"})

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, name: str) -> None:
        """Ask whether a region is there, again and again, without waiting for the last answer."""
        while True:
            self._begin(self._probe(name))
            region = self.regions[name]
            region.lag_s = self._outbox.lag_s(name)
            await asyncio.sleep(self._settings.probe_s)

    async def _probe(self, name: str) -> None:
        region = self.regions[name]
        try:
            seconds = await self._remotes[name].probe(self._settings.patience_s)
        except GoneError as error:
            if region.failed():
                _log.error("region %s has gone: %s", name, error)
                # What it was answering goes to others.
                await self._remotes[name].cut()
        else:
            if region.answered(seconds):
                _log.warning("region %s is there", name)
                self._wake[name].set()

    async def _save(self) -> None:
        while True:
            await asyncio.sleep(_SAVED_S)
            try:
                await asyncio.to_thread(self._outbox.save)
            except StorageError:
                _log.exception("how far regions are could not be written; trying again")

    async def _tell(self, name: str) -> None:
        """Bring a region what others have taken, in the order in which they took it."""
        wake = self._wake[name]
        while True:
            await wake.wait()
            wake.clear()
            while self.regions[name].is_up and (waiting := self._outbox.read(name, _AT_ONCE)):
                # Labels are of events: kinds are told one after the other.
                path = waiting[0][1].path
                together = waiting[: next((i for i, (_, w) in enumerate(waiting) if w.path != path), len(waiting))]
                told = await asyncio.gather(*(self._tell_one(name, write) for _, write in together))
                if not all(told):
                    await asyncio.sleep(_PAUSE_S)
                    continue
                self._outbox.known(name, together[-1][0])
                self.regions[name].lag_s = self._outbox.lag_s(name)

    async def _tell_one(self, name: str, write: Write) -> bool:
        """Whether a region knows a write, or has said that it never will."""
        if write.origin == name:
            return True
        headers = ((_KEY, write.key.encode("latin-1")), (b"content-type", b"application/json"), *self._own_headers)
        try:
            reply = await self._remotes[name].ask("POST", write.path, headers, write.body, within_s=_ANSWER_S)
        except GoneError:
            return False
        if reply.status < 300:
            self._metrics.told.labels(name).observe(max(0.0, self._clock() - write.accepted_at))
            return True
        if reply.status in (400, 404, 409, 413, 422):
            # Taken there and not here: regions are not alike. Waiting would hold up all that come after it.
            _log.error("region %s does not take what %s has taken: %s", name, write.origin, reply.body[:300])
            self._metrics.refused.labels(name).inc()
            return True
        with contextlib.suppress(UnicodeDecodeError):
            _log.warning("region %s answers %d to what %s has taken; it is told again: %s", name, reply.status,
                         write.origin, reply.body[:300].decode())  # fmt: skip
        return False


def _read_names(file: Path) -> list[str]:
    try:
        return list(json.loads(file.read_text())) if file.is_file() else []
    except (OSError, ValueError) as error:
        detail = f"{file}: which regions are drained cannot be read ({error}); remove it to begin with none"
        raise StorageError(detail) from error


def _headers_of(scope: dict[str, Any], *, named: bool) -> list[tuple[bytes, bytes]]:
    """What a region is told of a request. named: with a key, by which a region knows it again when it comes a second
    time through another region.
    """
    trace: Trace | None = scope["state"].get("trace")
    replaced = (_REQUEST_ID, *(_TRACE if trace is not None else ()))
    headers = [(name.lower(), value) for name, value in scope["headers"] if name.lower() not in replaced]
    if (model := model_of(scope)) and not any(name == _MODEL for name, _ in headers):
        headers.append((_MODEL, model.encode()))
    if named and not any(name == _KEY for name, _ in headers):
        headers.append((_KEY, uuid.uuid4().hex.encode()))
    headers.append((_REQUEST_ID, scope["state"]["request_id"].encode()))
    return headers + ([] if trace is None else trace.headers())


def _with_time_left(headers: list[tuple[bytes, bytes]], within_s: float) -> list[tuple[bytes, bytes]]:
    if within_s <= 0:
        raise _too_late()
    if within_s == math.inf:
        return headers
    left_ms = b"%d" % max(1, 1e3 * within_s)
    return [(name, left_ms if name == _TIMEOUT else value) for name, value in headers]


def _session_of(scope: dict[str, Any], headers: list[tuple[bytes, bytes]]) -> bytes:
    """Who reads what they wrote: whoever the caller says, or else the caller."""
    given = next((value for name, value in headers if name == _SESSION), None)
    if given is not None:
        return given
    caller: Caller | None = scope["state"].get("caller")
    if caller is not None:
        return b"key " + caller.id.encode()
    return (scope.get("client") or ("nobody",))[0].encode()


def _too_late() -> ProblemError:
    return ProblemError(504, "the answer was not ready in the time that the request gave")


def _deadline(headers: list[tuple[bytes, bytes]]) -> float:
    given = next((value for name, value in headers if name == _TIMEOUT), None)
    try:
        # What is no number is for the region to refuse.
        return time.monotonic() + float(given) / 1e3 if given is not None else math.inf
    except ValueError:
        return math.inf


def _json(status: int, content: dict[str, Any]) -> Reply:
    return Reply(status, json.dumps(content).encode(), JSON)
