"""The nearest region answers, writes reach all, and whatever becomes of a region, callers are answered."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from assay_platform.config import Gateway as Settings
from assay_platform.errors import ConfigError, StorageError
from assay_platform.monitoring.metrics import ServiceMetrics
from assay_platform.tracking import AuditLog
from assay_services.auth import KeyStore
from assay_services.gateway.choice import Choice, Region
from assay_services.gateway.gateway import Gateway
from assay_services.gateway.outbox import Outbox, Write
from assay_services.limits import Gatekeeper
from assay_services.tracing import Tracing
from hypothesis import given
from hypothesis import strategies as st

# ---------------------------------------------------------------------- which region


def up(name: str, *seconds: float) -> Region:
    region = Region(name)
    for one in seconds:
        region.answered(one)
    return region


def names(choice: Choice, first: str | None = None) -> list[str]:
    return [region.name for region in choice.order(first)]


def test_the_nearest_region_is_asked_first_and_a_little_nearer_is_not_nearer() -> None:
    near, far = up("near", 0.010), up("far", 0.050)
    choice = Choice([far, near], max_lag_s=2)
    assert names(choice) == ["near", "far"]
    far.answered(0.009)
    assert names(choice) == ["near", "far"]
    far.answered(0.004)
    assert names(choice) == ["far", "near"]


def test_one_slow_probe_of_many_makes_no_region_farther_and_a_way_that_got_longer_does() -> None:
    near, far = up("near", *[0.010] * 20), up("far", *[0.050] * 20)
    choice = Choice([near, far], max_lag_s=2)
    near.answered(0.9)
    assert names(choice)[0] == "near"
    for _ in range(20):
        near.answered(0.2)
    assert names(choice)[0] == "far"


def test_a_region_is_gone_after_two_probes_and_back_after_five() -> None:
    region = up("a", 0.01)
    assert not region.failed()
    assert region.is_up
    assert region.failed()
    assert not region.is_up
    assert [region.answered(0.01) for _ in range(5)] == [False] * 4 + [True]


def test_a_region_that_lacks_writes_is_asked_last_and_a_drained_one_only_by_who_is_bound_to_it() -> None:
    behind, other, drained = up("behind", 0.001), up("other", 0.1), up("drained", 0.001)
    behind.lag_s, drained.drained = 5.0, True
    choice = Choice([behind, other, drained], max_lag_s=2)
    assert names(choice) == ["other", "behind"]
    assert names(choice, "drained")[0] == "drained"
    assert names(choice, "behind") == ["behind", "other"]


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 9), st.floats(0.001, 1)), max_size=6),
    st.integers(0, 6),
)
def test_every_region_that_may_answer_is_asked_once(known: list[tuple[bool, bool, float, float]], first: int) -> None:
    regions = []
    for i, (is_up, drained, lag_s, latency_s) in enumerate(known):
        region = up(str(i), latency_s) if is_up else Region(str(i))
        region.drained, region.lag_s = drained, lag_s
        regions.append(region)
    found = names(Choice(regions, max_lag_s=2), str(first))
    assert sorted(found) == [r.name for r in regions if r.is_up and (not r.drained or r.name == str(first))]


# ---------------------------------------------------------------------- writes that others lack


def write(number: int, origin: str = "a") -> Write:
    return Write("/v1/events", f"k{number}", b"%d" % number, origin, float(number))


def test_an_outbox_goes_on_after_a_restart_where_each_region_was(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, ["a", "b"], clock=lambda: 100.0)
    for i in range(10):
        assert outbox.add(write(i)) == i
    outbox.known("a", 9)
    outbox.known("b", 3)
    assert (outbox.waiting("a"), outbox.waiting("b")) == (0, 6)
    assert (outbox.lag_s("a"), outbox.lag_s("b")) == (0.0, 96.0)
    outbox.save()
    outbox.close()
    again = Outbox(tmp_path, ["a", "b", "new"], clock=lambda: 100.0)
    assert [w for _, w in again.read("b", 100)] == [write(i) for i in range(4, 10)]
    assert [place for place, _ in again.read("b", 2)] == [4, 5]
    assert again.waiting("new") == 10
    assert again.add(write(10)) == 10
    # One part is on the disk alone, the other in memory, too.
    assert [place for place, _ in again.read("b", 100)] == list(range(4, 11))


def test_an_outbox_forgets_what_all_regions_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay_services.gateway.outbox._SEGMENT_BYTES", 200)
    outbox = Outbox(tmp_path, ["a", "b"])
    for i in range(50):
        outbox.add(write(i))
    outbox.known("a", 49)
    outbox.known("b", 40)
    outbox.save()
    outbox.close()
    assert len(list(tmp_path.glob("*.log"))) < 10
    again = Outbox(tmp_path, ["a", "b"])
    assert [place for place, _ in again.read("b", 100)] == list(range(41, 50))


def test_two_gateways_do_not_share_a_folder(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, ["a"])
    with pytest.raises(StorageError, match="another process"):
        Outbox(tmp_path, ["a"])
    outbox.close()


def test_places_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    (tmp_path / "places.json").write_text("{")
    with pytest.raises(StorageError, match=r"places\.json"):
        Outbox(tmp_path, ["a"])


# ---------------------------------------------------------------------- requests


@dataclass
class Place:
    """A region that keeps what it is told and answers who it is."""

    name: str
    delay_s: float = 0.0
    hangs: bool = False
    status: int = 200
    told: list[tuple[str, str, bytes]] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)
    runner: web.AppRunner | None = None
    port: int = 0

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        while self.hangs:
            await asyncio.sleep(0.05)
        await asyncio.sleep(self.delay_s)
        if request.path == "/readyz":
            return web.json_response({})
        self.asked.append({name.lower(): value for name, value in request.headers.items()})
        if request.path.startswith("/v1/fraud/decisions/"):
            return web.json_response({"at": self.name}, status=200 if request.path.endswith(self.name) else 404)
        if self.status == 200 and request.path in ("/v1/events", "/v1/labels"):
            self.told.append((request.path, request.headers["Idempotency-Key"], body))
        return web.json_response({"at": self.name, "path": request.path_qs}, status=self.status)

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self.answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port).start()
        self.port = self.runner.addresses[0][1]

    async def stop(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None


class Running:
    """A gateway in front of places, asked like an application."""

    def __init__(self, gateway: Gateway, client: httpx.AsyncClient, places: list[Place]) -> None:
        self.gateway, self.client = gateway, client
        self.near, self.far = places

    async def at(self, path: str = "/v1/fraud/score", **given: Any) -> str:
        answer = await self.client.post(path, content=b"{}", **given)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-assay-region"] == answer.json()["at"]
        return str(answer.json()["at"])


@asynccontextmanager
async def running(folder: Path, *, keys: KeyStore | None = None, traces: str = "") -> AsyncIterator[Running]:
    places = [Place("near"), Place("far", delay_s=0.03)]
    for place in places:
        await place.start()
    settings = Settings(
        regions={place.name: f"http://127.0.0.1:{place.port}" for place in places}, probe_s=0.02, patience_s=0.15
    )
    metrics = ServiceMetrics()
    outbox = Outbox(folder / "gateway", list(settings.regions))
    gateway = Gateway(settings, outbox, metrics, AuditLog(folder / "audit.jsonl"), key="regions-key")
    tracing = Tracing(gateway, endpoint=traces, share=0.0, service="assay-gateway")
    app = Gatekeeper(
        tracing, keys=keys or KeyStore(folder / "keys.json"), metrics=metrics, max_body_bytes=1000,
        max_requests_per_s=1e6,
    )  # fmt: skip
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    life = asyncio.create_task(app({"type": "lifespan"}, messages.get, said.put))
    await messages.put({"type": "lifespan.startup"})
    assert (await said.get())["type"] == "lifespan.startup.complete"
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=20) as client:
            await until(lambda: all(region.is_up for region in gateway.regions.values()))
            yield Running(gateway, client, places)
    finally:
        await messages.put({"type": "lifespan.shutdown"})
        await life
        await asyncio.to_thread(tracing.close)
        for place in places:
            place.hangs = False
            await place.stop()


async def until(what: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.01)


def test_requests_go_to_the_nearest_region_as_they_came(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            answer = await one.client.get("/v1/audit?last=3", headers={"X-API-Key": "s", "X-Request-Id": "r1"})
            assert answer.json() == {"at": "near", "path": "/v1/audit?last=3"}
            assert answer.headers["x-request-id"] == "r1"
            assert one.near.asked[0]["x-api-key"] == "s"
            assert one.near.asked[0]["x-request-id"] == "r1"
            assert {await one.at() for _ in range(20)} == {"near"}
            assert not one.far.asked

    asyncio.run(work())


def test_what_a_region_is_asked_when_it_dies_or_hangs_another_one_answers(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            one.near.hangs = True
            began = asyncio.get_running_loop().time()
            assert await asyncio.gather(*(one.at() for _ in range(10))) == ["far"] * 10
            assert asyncio.get_running_loop().time() - began < 1.0
            assert one.gateway.regions["near"].is_up is False
            one.near.hangs = False
            await until(lambda: one.gateway.regions["near"].is_up)
            assert await one.at() == "near"
            await one.near.stop()
            assert await one.at() == "far"
            await one.near.start()
            await until(lambda: one.gateway.regions["near"].is_up)
            assert await one.at() == "near"
            text = (await one.client.get("/metrics")).text
            assert 'assay_region_up{region="near"} 1.0' in text
            assert 'assay_region_failovers_total{region="near"} 0.0' not in text

    asyncio.run(work())


def test_writes_reach_all_regions_in_order_also_one_that_was_away(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            await one.far.stop()
            await until(lambda: not one.gateway.regions["far"].is_up)
            for i in range(100):
                answer = await one.client.post("/v1/events", content=b"%d" % i)
                assert answer.status_code == 200
            assert (await one.client.post("/v1/labels", content=b"l", headers={"Idempotency-Key": "k"})).is_success
            told = (await one.client.get("/v1/gateway")).json()["regions"][1]
            assert (told["state"], told["waiting_writes"]) == ("gone", 101)
            await one.far.start()
            await until(lambda: len(one.far.told) == 101)
            assert one.far.told[-1] == ("/v1/labels", "k", b"l")
            assert sorted(one.far.told) == sorted(one.near.told)
            assert len({key for _, key, _ in one.far.told}) == 101
            assert one.far.asked[-1]["x-api-key"] == "regions-key"
            await until(lambda: one.gateway.regions["far"].lag_s == 0)

    asyncio.run(work())


def test_who_has_written_reads_there_until_others_know_it(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            writer = {"X-Assay-Session": "card 1"}
            await one.near.stop()
            await until(lambda: not one.gateway.regions["near"].is_up)
            assert await one.at("/v1/events", headers=writer) == "far"
            # The nearer one is back, and does not take what it is told.
            one.near.status = 500
            await one.near.start()
            await until(lambda: one.gateway.regions["near"].is_up)
            assert await one.at(headers=writer) == "far"
            one.near.status = 200
            await until(lambda: one.near.told)
            await until(lambda: one.gateway._outbox.waiting("near") == 0)
            assert await one.at(headers=writer) == "near"
            # Where the region that knows has gone, another one answers and says so.
            await one.far.stop()
            await until(lambda: not one.gateway.regions["far"].is_up)
            assert await one.at("/v1/events", headers=writer) == "near"
            await one.far.start()
            one.far.status = 500
            await until(lambda: one.gateway.regions["far"].is_up)
            await one.near.stop()
            one.far.status = 200
            answer = await one.client.post("/v1/fraud/score", content=b"{}", headers=writer)
            assert answer.json()["at"] == "far"

    asyncio.run(work())


def test_a_write_that_a_region_never_takes_holds_up_no_other(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            one.far.status = 422
            await one.client.post("/v1/events", content=b"odd")
            await until(lambda: one.gateway._outbox.waiting("far") == 0)
            one.far.status = 200
            await one.client.post("/v1/events", content=b"even")
            await until(lambda: [body for _, _, body in one.far.told] == [b"even"])
            assert 'refused_writes_total{region="far"} 1.0' in (await one.client.get("/metrics")).text

    asyncio.run(work())


def test_a_refused_write_is_told_to_nobody(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            one.near.status = 422
            assert (await one.client.post("/v1/events", content=b"bad")).status_code == 422
            assert one.gateway._outbox.next_place == 0

    asyncio.run(work())


def test_a_region_that_is_full_sends_callers_to_the_next_and_all_full_is_full(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            one.near.status = 503
            assert await one.at() == "far"
            one.far.status = 503
            answer = await one.client.post("/v1/fraud/score", content=b"{}")
            assert (answer.status_code, answer.json()["at"]) == (503, "near")

    asyncio.run(work())


def test_a_decision_is_found_wherever_it_was_made(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            assert (await one.client.get("/v1/fraud/decisions/far")).json() == {"at": "far"}
            assert (await one.client.get("/v1/fraud/decisions/nobody")).status_code == 404

    asyncio.run(work())


def test_what_must_not_be_done_twice_is_not_sent_twice(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            one.near.hangs = True
            answer = await one.client.post("/v1/admin/models/fraud/promote", content=b"{}")
            assert answer.status_code == 503
            assert "look before" in answer.json()["detail"]
            one.near.hangs = False
            await until(lambda: one.gateway.regions["near"].is_up)
            one.near.status = 503
            answer = await one.client.post("/v1/admin/models/fraud/promote", content=b"{}")
            assert (answer.status_code, answer.json()["at"]) == (503, "near")
            assert not one.far.asked

    asyncio.run(work())


def test_a_drained_region_gets_no_requests_until_it_is_resumed_also_after_a_restart(tmp_path: Path) -> None:
    async def drain() -> None:
        async with running(tmp_path) as one:
            answer = await one.client.post("/v1/admin/gateway/near/drain")
            assert answer.json()["state"] == "drained"
            assert await one.at() == "far"
            assert (await one.client.post("/v1/admin/gateway/nowhere/drain")).status_code == 404

    async def resume() -> None:
        async with running(tmp_path) as one:
            assert await one.at() == "far"
            await one.client.post("/v1/admin/gateway/near/resume")
            assert await one.at() == "near"

    asyncio.run(drain())
    asyncio.run(resume())
    actions = [json.loads(line)["action"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert actions == ["drain", "resume"]


def test_without_a_region_a_caller_hears_when_to_come_back(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            await one.near.stop()
            await one.far.stop()
            answer = await one.client.post("/v1/fraud/score", content=b"{}")
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            await until(lambda: not any(region.is_up for region in one.gateway.regions.values()))
            assert (await one.client.get("/readyz")).status_code == 503
            assert (await one.client.get("/healthz")).status_code == 200

    asyncio.run(work())


def test_a_deadline_holds_for_all_regions_together(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as one:
            one.near.hangs = True
            began = asyncio.get_running_loop().time()
            answer = await one.client.post("/v1/fraud/score", content=b"{}", headers={"X-Timeout-Ms": "50"})
            assert answer.status_code == 504
            assert asyncio.get_running_loop().time() - began < 0.14
            one.near.hangs = False
            await one.client.post("/v1/fraud/score", content=b"{}", headers={"X-Timeout-Ms": "5000"})
            given = [float(headers["x-timeout-ms"]) for headers in one.near.asked + one.far.asked]
            assert 4000 < max(given) <= 5000

    asyncio.run(work())


def test_keys_are_asked_for_at_the_gateway(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path / "some.json")
    key = keys.create("shop", scopes=("score",))

    async def work() -> None:
        async with running(tmp_path, keys=keys) as one:
            assert (await one.client.post("/v1/fraud/score", content=b"{}")).status_code == 401
            assert await one.at(headers={"X-API-Key": key}) == "near"
            answer = await one.client.post("/v1/admin/gateway/near/drain", headers={"X-API-Key": key})
            assert answer.status_code == 403

    asyncio.run(work())


@pytest.mark.parametrize("regions", [{"a b": "http://x:1"}, {"a": "x:1"}, {"a": "http://x/path"}, {"a": 3}])
def test_a_region_that_is_none_is_said(regions: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.regions"):
        Settings(regions=regions)


def test_a_trace_goes_on_in_the_region_that_answers_and_shows_the_one_that_did_not(
    tmp_path: Path, otlp_collector: tuple[str, list[Any]]
) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async def work(traces: str) -> str:
        async with running(tmp_path, traces=traces) as one:
            await one.near.stop()
            assert await one.at(headers={"traceparent": parent}) == "far"
            return one.far.asked[0]["traceparent"]

    endpoint, spans = otlp_collector
    given = asyncio.run(work(endpoint))
    (server,) = [span for span in spans if span.name == "POST /v1/fraud/score"]
    assert given == f"{parent[:36]}{server.span_id.hex()}-01"
    assert {span.name for span in spans} - {server.name} == {"region near did not answer", "ask region far"}


def test_a_list_of_drained_regions_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, ["a"])
    (tmp_path / "drained.json").write_text("{")
    with pytest.raises(StorageError, match=r"drained\.json.*remove it"):
        Gateway(Settings(regions={"a": "http://x:1"}), outbox, ServiceMetrics(), AuditLog(tmp_path / "audit.jsonl"))
    outbox.close()
