"""Spans as a collector gets them."""

import asyncio
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from assay_platform.config import Config, Service
from assay_platform.errors import ConfigError
from assay_services.front import Front
from assay_services.lanes import LaneWorker
from assay_services.replies import Reply
from assay_services.stages import Laps

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def answer(_: Hashable, jobs: Sequence[bytes]) -> list[Reply]:
    lap = Laps()
    time.sleep(0.02)
    lap("read features")
    time.sleep(0.01)
    lap("score")
    return [Reply(503 if b"full" in job else 200, job, ()) for job in jobs]


def asked(config: Config, folder: Path, *requests: dict[str, Any]) -> None:
    """A front and what answers scores, until all are answered; spans are sent at the end."""

    async def work() -> None:
        front = Front(config, folder, "front")
        worker = LaneWorker("fraud", folder / "front", folder / "none.sock", answer)
        worker.start()
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        life = asyncio.create_task(front({"type": "lifespan"}, messages.get, said.put))
        await messages.put({"type": "lifespan.startup"})
        await said.get()
        transport = httpx.ASGITransport(front)
        async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
            for request in requests:
                await client.post("/v1/fraud/score", **{"content": b'{"events": [{}, {}]}', **request})
        await messages.put({"type": "lifespan.shutdown"})
        await life
        await asyncio.to_thread(worker.stop)

    asyncio.run(work())


def by_name(spans: list[Any]) -> dict[str, Any]:
    return {span.name: span for span in spans}


def seconds(span: Any) -> float:
    return float(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_callers_trace_goes_on_with_what_its_call_spent_its_time_on(
    config: Config, tmp_path: Path, otlp_collector: tuple[str, list[Any]]
) -> None:
    endpoint, spans = otlp_collector
    traced = replace(config, service=Service(traces=endpoint, trace_share=0.0))
    headers = {"traceparent": PARENT, "tracestate": "shop=1", "X-Request-Id": "r1"}
    asked(traced, tmp_path, {"headers": headers})
    found = by_name(spans)
    assert set(found) == {
        "POST /v1/fraud/score", "wait in queue", "call of the model", "read features", "score"
    }  # fmt: skip
    server, call = found["POST /v1/fraud/score"], found["call of the model"]
    assert {span.trace_id.hex() for span in spans} == {PARENT[3:35]}
    assert server.parent_span_id.hex() == PARENT[36:52]
    assert call.parent_span_id == found["wait in queue"].parent_span_id == server.span_id
    assert found["read features"].parent_span_id == found["score"].parent_span_id == call.span_id
    assert seconds(found["read features"]) >= 0.02
    assert seconds(found["score"]) >= 0.01
    assert seconds(server) + 1e-3 >= seconds(call) >= seconds(found["read features"]) + seconds(found["score"])
    attributes = {one.key: one.value for one in server.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["assay.request_id"].string_value == "r1"
    assert {one.key: one.value.int_value for one in call.attributes}["assay.batch.rows"] == 2


@pytest.mark.parametrize(
    ("headers", "share", "num"),
    [
        ({"traceparent": PARENT[:-1] + "0"}, 1.0, 0),  # the caller has decided against
        ({"traceparent": "nonsense"}, 1.0, 1),
        ({}, 1.0, 1),
        ({}, 0.0, 0),
    ],
)
def test_who_is_traced(
    config: Config,
    tmp_path: Path,
    headers: dict[str, str],
    share: float,
    num: int,
    otlp_collector: tuple[str, list[Any]],
) -> None:
    endpoint, spans = otlp_collector
    traced = replace(config, service=Service(traces=endpoint, trace_share=share))
    asked(traced, tmp_path, {"headers": headers})
    assert sum(span.name == "POST /v1/fraud/score" for span in spans) == num


def test_an_answer_that_is_a_fault_is_marked(
    config: Config, tmp_path: Path, otlp_collector: tuple[str, list[Any]]
) -> None:
    endpoint, spans = otlp_collector
    traced = replace(config, service=Service(traces=endpoint, trace_share=1.0))
    asked(traced, tmp_path, {"content": b'{"events": [{}], "full": 1}'})
    assert by_name(spans)["POST /v1/fraud/score"].status.code == 2


def test_a_collector_that_is_not_there_holds_up_nobody(config: Config, tmp_path: Path) -> None:
    began = time.monotonic()
    asked(replace(config, service=Service(traces="http://127.0.0.1:9/v1/traces", trace_share=1.0)), tmp_path, {})
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(("name", "value"), [("traces", "collector:4318"), ("trace_share", 1.5)])
def test_settings_that_are_none_are_said(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"service.{name}"):
        Service(**{name: value})
