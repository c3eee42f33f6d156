"""Traces of requests, sent to whatever takes OTLP: a span a request, in it how long it waited, and what its call did.

Off unless `service.traces` names a collector. A caller that is traced (`traceparent`, W3C Trace Context) is traced on;
of the others `service.trace_share`. Spans of a call are made afterwards from the times that came back with its answer,
so that nothing is exported where models are. A request that is not traced costs a look at its headers.
"""

import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from assay_services.stages import Stages

_PARENT, _STATE = b"traceparent", b"tracestate"
_SAMPLED = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f](?P<last>[0-9a-f])")


class Timing(NamedTuple):
    """Of the call that a request was answered by. waited_s: from the request until the call began."""

    waited_s: float
    call_s: float
    requests: int
    rows: int
    process: int
    stages: "Stages"


class Trace:
    """Of one request; in `scope["state"]["trace"]`."""

    def __init__(self, tracer: "Tracer", span: "Span") -> None:
        self._tracer, self.span = tracer, span

    def answered(self, timing: Timing) -> None:
        """Its call has just ended."""
        end = time.time_ns()
        began = end - _ns(timing.call_s)
        self._child("wait in queue", began - _ns(timing.waited_s), began)
        attributes = {
            "assay.batch.requests": timing.requests, "assay.batch.rows": timing.rows, "process.pid": timing.process
        }  # fmt: skip
        call = self._child("call of the model", began, end, attributes)
        at = began
        for name, seconds in timing.stages:
            self._child(name, at, at + _ns(seconds), parent=call)
            at += _ns(seconds)

    def part(self, name: str, began_ns: int, **attributes: Any) -> None:
        """Something else that it took, until now."""
        self._child(name, began_ns, time.time_ns(), attributes)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """By which another service goes on with the trace."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self.span))
        return [(name.encode(), value.encode()) for name, value in carrier.items()]

    def _child(
        self, name: str, begin: int, end: int, attributes: dict[str, Any] | None = None, parent: "Span | None" = None
    ) -> "Span":
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent or self.span)
        span = self._tracer.start_span(name, context, start_time=begin, attributes=attributes)
        span.end(end)
        return span


class Tracing:
    """ASGI middleware, behind what makes request ids. Of one process."""

    def __init__(self, app: Any, *, endpoint: str, share: float, service: str) -> None:
        """endpoint: of a collector, such as http://127.0.0.1:4318/v1/traces; empty for none. share: of requests."""
        self._app, self._share = app, share
        self._tracer: Tracer | None = None
        self._close: Callable[[], None] = lambda: None
        self._random = random.Random()  # noqa: S311 - which requests are traced is no secret
        if endpoint:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
            self._tracer, self._close = provider.get_tracer("assay"), provider.shutdown

    def close(self) -> None:
        """Send what is left."""
        self._close()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        if self._tracer is None or scope["type"] != "http" or not self._wanted(scope["headers"]):
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {k.decode(): v.decode("latin-1") for k, v in scope["headers"] if k in (_PARENT, _STATE)}
        context = TraceContextTextMapPropagator().extract(carrier)
        span = self._tracer.start_span(scope["method"], context, SpanKind.SERVER)
        state = scope.setdefault("state", {})
        state["trace"] = Trace(self._tracer, span)
        status = 500

        async def noting_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            span.update_name(f"{scope['method']} {route}")
            span.set_attributes({
                "http.request.method": scope["method"], "http.route": route, "http.response.status_code": status,
                "assay.request_id": state.get("request_id", ""),
            })  # fmt: skip
            if status >= 500:
                from opentelemetry.trace import StatusCode

                span.set_status(StatusCode.ERROR)
            span.end()

    def _wanted(self, headers: list[tuple[bytes, bytes]]) -> bool:
        parent = next((value for name, value in headers if name == _PARENT), None)
        found = None if parent is None else _SAMPLED.fullmatch(parent)
        if found is not None:
            return bool(int(found["last"], 16) & 1)
        return self._random.random() < self._share


def _ns(seconds: float) -> int:
    return int(1e9 * seconds)
