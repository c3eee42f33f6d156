"""What is refused by the parser: unread, on a connection that goes on."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import uvicorn
from assay_services.flood import FloodProtocol

pytestmark = pytest.mark.services


class Service:
    """An application that says what it got; `full` says whether /score is refused."""

    def __init__(self) -> None:
        self.full = False
        self.seen: list[bytes] = []
        self.gone: list[bool] = []
        self.go = threading.Event()
        self.go.set()
        protocol: Any = partial(FloodProtocol, refuse=self._refuse)
        config = uvicorn.Config(self._app, http=protocol, port=0, log_level="error", lifespan="off", interface="asgi3")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def _refuse(self, path: bytes, headers: list[tuple[bytes, bytes]]) -> bytes | None:
        if not self.full or path != b"/score":
            return None
        given = dict(headers).get(b"x-request-id", b"none")
        return b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\nx-request-id: %s\r\n\r\nfull" % given

    async def _app(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.seen.append(body)
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        self.gone.append(scope["state"]["gone"]())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.server.should_exit = True
    made.thread.join(10)


def post(body: bytes, path: str = "/score", more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{more}content-length: {len(body)}\r\n\r\n".encode() + body


def answers(connection: socket.socket, number: int) -> list[bytes]:
    """So many responses: statuses with their bodies."""
    got = b""
    while got.count(b"\r\n\r\nok") + got.count(b"\r\n\r\nfull") < number:
        part = connection.recv(65536)
        assert part, got
        got += part
    return [part[:3] for part in got.split(b"HTTP/1.1 ")[1:]]


def test_a_connection_goes_on_after_a_refusal_whatever_its_body_was(service: Service) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        service.full = True
        connection.sendall(post(b"first of all", more="x-request-id: order-17\r\n"))
        got = connection.recv(1000)
        assert got.startswith(b"HTTP/1.1 503")
        assert b"x-request-id: order-17" in got
        request = post(b"x" * 100_000)
        for at in range(0, len(request), 30_000):  # in pieces
            connection.sendall(request[at : at + 30_000])
        assert answers(connection, 1) == [b"503"]
        connection.sendall(post(b"elsewhere", "/other"))
        assert answers(connection, 1) == [b"200"]
        service.full = False
        connection.sendall(post(b"again"))
        assert answers(connection, 1) == [b"200"]
    assert service.seen == [b"elsewhere", b"again"]


def test_requests_that_come_behind_one_another_are_answered_in_order(service: Service) -> None:
    service.go.clear()
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(post(b"slow", "/other"))
        while not service.seen:
            time.sleep(0.01)
        service.full = True
        connection.sendall(post(b"behind it"))  # not refused: its answer would come before the first one's
        time.sleep(0.1)
        service.go.set()
        assert answers(connection, 2) == [b"200", b"200"]
    assert service.seen == [b"slow", b"behind it"]


def test_who_closes_after_an_answer_or_waits_to_send_is_answered_by_the_application(service: Service) -> None:
    service.full = True
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(post(b"last", more="connection: close\r\n"))
        assert answers(connection, 1) == [b"200"]
        assert connection.recv(100) == b""


def test_the_application_sees_whether_the_caller_has_gone(service: Service) -> None:
    service.go.clear()
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(post(b"leaves"))
        while not service.seen:
            time.sleep(0.01)
    time.sleep(0.2)
    service.go.set()
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(post(b"stays"))
        assert answers(connection, 1) == [b"200"]
    deadline = time.monotonic() + 10
    while len(service.gone) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sorted(service.gone) == [False, True]
