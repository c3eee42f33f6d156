"""A request that is sent twice is done once."""

import asyncio
import json
from typing import Any

import pytest
from assay_services.idempotency import Idempotency
from fastapi import FastAPI, Request, Response
from httpx import ASGITransport, AsyncClient


class Counter:
    """An application that counts what it does; fails when told to; waits when told to."""

    def __init__(self) -> None:
        self.done = 0
        self.go = asyncio.Event()
        self.go.set()

    def app(self, **more: Any) -> Idempotency:
        app = FastAPI()

        @app.post("/add")
        async def add(request: Request) -> Response:
            body = await request.json()
            await self.go.wait()
            if body.get("fail"):
                return Response(status_code=503)
            self.done += body["by"]
            return Response(json.dumps({"done": self.done}), media_type="application/json")

        return Idempotency(app, **more)


def run(work: Any) -> Any:
    return asyncio.run(work)


def client_of(app: Any) -> AsyncClient:
    return AsyncClient(transport=ASGITransport(app), base_url="http://test")


def key(name: str) -> dict[str, str]:
    return {"Idempotency-Key": name}


def test_the_second_time_the_first_answer_comes_again() -> None:
    async def work() -> None:
        counter = Counter()
        async with client_of(counter.app()) as client:
            first = await client.post("/add", json={"by": 1}, headers=key("a"))
            again = await client.post("/add", json={"by": 1}, headers=key("a"))
            other = await client.post("/add", json={"by": 1}, headers=key("b"))
            without = [await client.post("/add", json={"by": 1}) for _ in range(2)]
        assert (first.json(), again.json(), other.json()) == ({"done": 1}, {"done": 1}, {"done": 2})
        assert "idempotent-replayed" not in first.headers
        assert again.headers["idempotent-replayed"] == "true"
        assert [answer.json()["done"] for answer in without] == [3, 4]

    run(work())


def test_a_key_with_another_body_is_refused() -> None:
    async def work() -> None:
        counter = Counter()
        async with client_of(counter.app()) as client:
            await client.post("/add", json={"by": 1}, headers=key("a"))
            refused = await client.post("/add", json={"by": 2}, headers=key("a"))
        assert refused.status_code == 422
        assert "another body" in refused.json()["detail"]
        assert counter.done == 1

    run(work())


def test_while_the_first_is_running_the_second_is_told_so() -> None:
    async def work() -> None:
        counter = Counter()
        counter.go.clear()
        async with client_of(counter.app()) as client:
            first = asyncio.ensure_future(client.post("/add", json={"by": 1}, headers=key("a")))
            await asyncio.sleep(0.05)
            assert (await client.post("/add", json={"by": 1}, headers=key("a"))).status_code == 409
            counter.go.set()
            assert (await first).json() == {"done": 1}

    run(work())


def test_after_an_error_the_same_key_may_try_again() -> None:
    async def work() -> None:
        counter = Counter()
        async with client_of(counter.app()) as client:
            assert (await client.post("/add", json={"by": 1, "fail": True}, headers=key("a"))).status_code == 503
            assert (await client.post("/add", json={"by": 1}, headers=key("a"))).json() == {"done": 1}

    run(work())


def test_an_answer_is_forgotten_after_its_time() -> None:
    async def work() -> None:
        now = [0.0]
        counter = Counter()
        async with client_of(counter.app(clock=lambda: now[0])) as client:
            await client.post("/add", json={"by": 1}, headers=key("a"))
            now[0] = 25 * 3600.0
            assert (await client.post("/add", json={"by": 1}, headers=key("a"))).json() == {"done": 2}

    run(work())


@pytest.mark.parametrize("name", ["", "x" * 201])
def test_a_key_that_is_none_is_refused(name: str) -> None:
    async def work() -> None:
        async with client_of(Counter().app()) as client:
            answer = await client.post("/add", json={"by": 1}, headers=key(name))
        assert answer.status_code == 422

    run(work())
