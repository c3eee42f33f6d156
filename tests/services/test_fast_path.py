"""What stands in front of the framework."""

import asyncio
import json
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
from assay_services.batching import Batcher, BatchLimits
from assay_services.fast_path import FastPath, Queues, Route, routes_to
from assay_services.replies import Reply

Message = dict[str, Any]


class Echo:
    """One route whose answers wait for a gate; counts what was computed. Else the framework, which says 404."""

    def __init__(self, limits: BatchLimits) -> None:
        self.go = threading.Event()
        self.computed: list[bytes] = []
        self.queue: Batcher[bytes, Reply] = Batcher(self._work, limits, name="echo")
        route = Route("/echo", self.queue, lambda content: (self.queue, 1, None))
        self.app = FastPath(self._framework, {"/echo": route})

    def _work(self, _: Hashable, jobs: Sequence[bytes]) -> list[Reply]:
        self.go.wait(2)
        if b"bug" in jobs:
            raise RuntimeError("a bug")
        self.computed += jobs
        return [Reply(200, job, ()) for job in jobs]

    async def _framework(self, scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"framework"})

    async def ask(
        self, body: bytes, *, path: str = "/echo", headers: Sequence[tuple[bytes, bytes]] = (), leaves: bool = False
    ) -> tuple[int, bytes]:
        """Status and body. leaves: the caller hangs up once it has sent all."""
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in (body[:2], body[2:])]
        messages += [{"type": "http.request", "body": b"", "more_body": False}]
        sent: list[Message] = []

        async def receive() -> Message:
            if messages:
                return messages.pop(0)
            return await asyncio.Future[Message]()

        async def send(message: Message) -> None:
            sent.append(message)

        state = {"gone": lambda: leaves}
        scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers), "state": state}
        await self.app(scope, receive, send)
        return sent[0]["status"], sent[1]["body"]


@pytest.fixture
def echo() -> Any:
    made = Echo(BatchLimits(max_waiting=20))
    yield made
    made.go.set()
    made.queue.close()


def test_bodies_that_come_in_parts_are_answered_and_other_routes_go_on(echo: Echo) -> None:
    echo.go.set()
    assert asyncio.run(echo.ask(b"hello")) == (200, b"hello")
    assert asyncio.run(echo.ask(b"hello", path="/other")) == (404, b"framework")


def test_a_bug_is_an_answer_without_its_trace(echo: Echo) -> None:
    echo.go.set()
    status, body = asyncio.run(echo.ask(b"bug"))
    assert status == 500
    assert "a bug" not in json.loads(body)["detail"]


def test_where_there_is_no_room_nobody_reads_the_body(echo: Echo) -> None:
    async def work() -> tuple[int, bytes]:
        waiting = []
        for _ in range(2):  # some of the first are on their way when the second come
            waiting += [asyncio.ensure_future(echo.ask(b"%d" % i)) for i in range(30)]
            await asyncio.sleep(0.1)
        refused = await echo.ask(b"one too many")
        echo.go.set()
        assert {status for status, _ in await asyncio.gather(*waiting)} == {200, 503}
        return refused

    status, body = asyncio.run(work())
    assert status == 503
    assert json.loads(body)["status"] == 503
    assert b"one too many" not in echo.computed


def test_nothing_is_computed_for_a_caller_who_has_gone(echo: Echo) -> None:
    async def work() -> None:
        first = asyncio.ensure_future(echo.ask(b"first"))
        await asyncio.sleep(0.05)  # it is being answered
        second = asyncio.ensure_future(echo.ask(b"second"))
        await asyncio.sleep(0.05)
        gone = asyncio.ensure_future(echo.ask(b"gone", leaves=True))
        await asyncio.sleep(0.05)
        echo.go.set()
        assert (await gone)[0] == 504
        assert await first == (200, b"first")
        assert await second == (200, b"second")

    asyncio.run(work())
    assert echo.computed == [b"first", b"second"]


def test_a_body_is_queued_by_what_it_wants_and_one_that_is_none_where_it_is_refused() -> None:
    scores, searches, lists = (Batcher[bytes, Reply](lambda _, jobs: [], BatchLimits(), name=n) for n in "abc")
    routes = routes_to(Queues(scores, searches, lists))
    score = routes["/v1/fraud/score"].wanted
    assert score(b'{"events": [{"a": 1}, {"a": {"b": []}}], "explain": true}') == (scores, 2, True)
    assert score(b'{"events": [{}], "counterfactual": true}') == (searches, 1, False)
    assert score(b'{"events": [') == (scores, 1, False)
    assert score(b"[" * 100_000) == (scores, 1, False)
    assert routes["/v1/recommend"].wanted(b"{}") == (lists, 1, None)
    for queue in (scores, searches, lists):
        queue.close()
