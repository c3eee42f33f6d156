"""Requests from one process of a service to another, over Unix sockets that this user alone can open.

Who asks has checked key, rates and size already, and says whose request it is; `Trusting` believes it.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from assay_services.auth import Caller, caller_of
from assay_services.logs import REQUEST_ID
from assay_services.replies import Reply

_CALLER, _REQUEST_ID, _ROUTE = b"x-assay-caller", b"x-request-id", b"x-assay-route"
_PASSED_ON = (
    b"content-type", b"accept", b"idempotency-key", b"x-timeout-ms",
    b"x-mlflow-signature", b"x-mlflow-timestamp", b"x-mlflow-delivery-id",
)  # fmt: skip
_LEFT_OUT = ("content-length", "transfer-encoding", "connection", "keep-alive", "date", "server", "x-request-id")
_TIMEOUT_S = 60.0


class InnerClient:
    """Asks other processes. Of one event loop."""

    def __init__(self) -> None:
        self._clients: dict[Path, httpx.AsyncClient] = {}

    async def ask(self, socket: Path, scope: dict[str, Any], body: bytes) -> Reply:
        """What the process behind a socket answers to a request. Sets the route that it is counted under.

        Raises:
            httpx.ConnectError: nobody listens there; nothing was asked.
            httpx.TransportError: the process has gone in the middle.
        """
        client = self._clients.get(socket)
        if client is None:
            transport = httpx.AsyncHTTPTransport(uds=str(socket), verify=False)
            client = self._clients[socket] = httpx.AsyncClient(transport=transport, timeout=_TIMEOUT_S)
        state = scope.get("state", {})
        headers = [(name, value) for name, value in scope["headers"] if name in _PASSED_ON]
        headers.append((_REQUEST_ID, state.get("request_id", "").encode()))
        if (caller := state.get("caller")) is not None:
            headers.append((_CALLER, base64.b64encode(json.dumps(asdict(caller)).encode())))
        query = scope.get("query_string", b"").decode("latin-1")
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1").partition("?")[0]
        url = f"http://inner{path}{'?' if query else ''}{query}"
        try:
            answer = await client.request(scope["method"], url, content=body, headers=headers)
        except httpx.ConnectError:
            await self._forget(socket)
            raise
        if (route := answer.headers.get(_ROUTE.decode())) is not None:
            scope["route"] = SimpleNamespace(path=route)
        left_out = (*_LEFT_OUT, _ROUTE.decode())
        passed = [(k.lower().encode(), v.encode()) for k, v in answer.headers.items() if k.lower() not in left_out]
        return Reply(answer.status_code, answer.content, tuple(passed))

    async def close(self) -> None:
        """Of all sockets."""
        for socket in list(self._clients):
            await self._forget(socket)

    async def _forget(self, socket: Path) -> None:
        client = self._clients.pop(socket, None)
        if client is not None:
            await client.aclose()


class Trusting:
    """ASGI middleware of a process that others ask: the state of a request is what they say."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(_CALLER)
        state = scope.setdefault("state", {})
        state["request_id"] = headers.get(_REQUEST_ID, b"").decode("latin-1")
        REQUEST_ID.set(state["request_id"])
        state["caller"] = None if given is None else _caller(given)

        async def with_route(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", None)
                more: Sequence[tuple[bytes, bytes]] = () if route is None else ((_ROUTE, route.encode()),)
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            await send(message)

        await self._app(scope, receive, with_route)


def _caller(given: bytes) -> Caller:
    return caller_of(json.loads(base64.b64decode(given)))
