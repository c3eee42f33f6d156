"""Keys and limits, without training anything."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from assay_platform.config import Config
from assay_platform.errors import ConfigError, InputError
from assay_services.alone import create_app
from assay_services.auth import SCOPES, KeyStore
from assay_services.dependencies import make_dependencies
from assay_services.limits import TokenBucket
from fastapi.testclient import TestClient


@pytest.fixture
def client(config: Config) -> TestClient:
    """The real application over an empty registry; not started, so nothing polls."""
    return TestClient(create_app(make_dependencies(config)), raise_server_exceptions=False)


def is_problem(response: Any, status: int, text: str) -> bool:
    body = response.json()
    return bool(
        response.status_code == status
        and response.headers["content-type"] == "application/problem+json"
        and body["status"] == status
        and {"type", "title", "detail"} <= body.keys()
        and text in body["detail"]
    )


def test_without_a_model_every_route_says_when_to_come_back(client: TestClient) -> None:
    for path, body in (
        ("/v1/fraud/score", {"events": [{}]}),
        ("/v1/recommend", {"user_id": "u"}),
        ("/v1/events", {"events": [{}]}),
    ):
        response = client.post(path, json=body)
        assert is_problem(response, 503, "model is loaded")
        assert int(response.headers["retry-after"]) > 0
    assert is_problem(client.get("/readyz"), 503, "no model")
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/v1/models").json() == {"models": []}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/fraud/score", {}, "events"),
        ("/v1/fraud/score", {"events": []}, "events"),
        ("/v1/fraud/score", {"events": "x"}, "events"),
        ("/v1/fraud/score", {"events": [1]}, "events.0"),
        ("/v1/fraud/score", {"events": [{}], "explian": True}, "explian"),
        ("/v1/recommend", {"user_id": None}, "user_id"),
        ("/v1/recommend", {"user_id": "u", "k": 0}, "k"),
        ("/v1/recommend", {"user_id": "u", "k": 100_000}, "k"),
        ("/v1/events", {"events": [{}], "application": "chess"}, "application"),
    ],
)
def test_a_body_that_does_not_fit_names_the_field(client: TestClient, path: str, body: object, field: str) -> None:
    response = client.post(path, json=body)
    assert is_problem(response, 422, field)
    assert response.json()["errors"][0]["field"].startswith(field)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"", b"nul"])
def test_what_is_no_json_is_refused(client: TestClient, content: bytes) -> None:
    response = client.post("/v1/fraud/score", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.headers["content-type"] == "application/problem+json"


def test_a_body_of_10_mb_is_refused_with_and_without_a_length(client: TestClient) -> None:
    large = b'{"events": ["' + b"x" * 10_000_000 + b'"]}'
    assert is_problem(client.post("/v1/fraud/score", content=large), 413, "larger than 1048576 bytes")
    chunks = (large[i : i + 65_536] for i in range(0, len(large), 65_536))
    assert is_problem(client.post("/v1/fraud/score", content=chunks), 413, "larger than")


def test_more_events_than_allowed_are_refused(client: TestClient) -> None:
    response = client.post("/v1/fraud/score", json={"events": [{}] * 1001})
    assert is_problem(response, 422, "1001 in one request; at most 1000")


def test_unknown_routes_and_methods_are_problems_too(client: TestClient) -> None:
    assert is_problem(client.get("/v2"), 404, "Not Found")
    assert is_problem(client.get("/v1/recommend"), 405, "Method Not Allowed")


def test_metrics_count_requests_by_route_template_not_by_path(client: TestClient) -> None:
    client.get("/v1/models")
    client.get("/etc/passwd")
    text = client.get("/metrics").text
    counted = [line for line in text.splitlines() if line.startswith("assay_requests_total")]
    assert 'assay_requests_total{method="GET",route="/v1/models",status="200"} 1.0' in counted
    assert "passwd" not in text


def test_with_keys_a_missing_or_wrong_one_is_401(config: Config) -> None:
    key = KeyStore(config.paths.api_keys).create("shop")
    client = TestClient(create_app(make_dependencies(config)))
    assert is_problem(client.get("/v1/models"), 401, "key is missing")
    assert is_problem(client.get("/v1/models", headers={"x-api-key": "guess"}), 401, "key is wrong")
    assert client.get("/v1/models", headers={"x-api-key": key}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    assert client.get("/healthz").status_code == 200


def test_a_key_may_do_what_it_was_made_for(config: Config) -> None:
    store = KeyStore(config.paths.api_keys)
    keys = {scope: store.create(scope, scopes=[scope]) for scope in SCOPES}
    client = TestClient(create_app(make_dependencies(config)), raise_server_exceptions=False)
    needed = {"/v1/fraud/score": "score", "/v1/recommend": "score", "/v1/events": "write", "/v1/labels": "write",
              "/v1/items": "write"}  # fmt: skip
    for path, scope in needed.items():
        for name, key in keys.items():
            refused = client.post(path, json={}, headers={"x-api-key": key}).status_code == 403
            assert refused == (name != scope), (path, name)
    assert client.get("/v1/models", headers={"x-api-key": keys["read"]}).status_code == 200
    assert is_problem(client.get("/v1/models", headers={"x-api-key": keys["write"]}), 403, "may not read")
    with pytest.raises(InputError, match="scopes: fly; allowed are"):
        store.create("bird", scopes=["fly"])


def test_a_running_service_learns_of_new_and_revoked_keys(config: Config) -> None:
    now = [0.0]
    seen = KeyStore(config.paths.api_keys, clock=lambda: now[0])
    assert not seen
    store = KeyStore(config.paths.api_keys)
    first = store.create("shop")
    now[0] = 2.0
    assert seen
    assert seen.caller(first) is not None
    second = store.create("shop, new")
    [old, _] = store.callers()
    store.revoke(old.id)
    now[0] = 4.0
    assert seen.caller(first) is None
    assert seen.caller(second) is not None
    store.revoke(store.callers()[0].id)
    now[0] = 6.0
    assert seen.caller(second) is None
    assert seen, "without a key nobody may call; the service does not open by itself"
    config.paths.api_keys.write_text("{")
    now[0] = 8.0
    assert seen, "a file that cannot be read leaves everything as it was"
    with pytest.raises(InputError, match="no key has the id"):
        KeyStore(config.paths.api_keys.with_name("other.json")).revoke("x")


def test_a_key_ends_when_its_time_is_over(config: Config) -> None:
    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    store = KeyStore(config.paths.api_keys, now=lambda: now[0])
    key = store.create("guest", days=30)
    assert store.caller(key) is not None
    now[0] += timedelta(days=30)
    assert store.caller(key) is None


def test_a_key_has_a_rate_of_its_own(config: Config) -> None:
    store = KeyStore(config.paths.api_keys)
    slow, fast = store.create("slow", rate=2), store.create("fast")
    client = TestClient(create_app(make_dependencies(config)))
    answers = [client.get("/v1/models", headers={"x-api-key": slow}) for _ in range(20)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert is_problem(refused[0], 429, "this API key allows (2)")
    assert int(refused[0].headers["retry-after"]) >= 1
    assert client.get("/v1/models", headers={"x-api-key": fast}).status_code == 200


def test_every_answer_has_a_request_id_the_callers_own_if_it_is_usable(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "order-17"}).headers["x-request-id"] == "order-17"
    made = [
        client.get("/healthz", headers={"x-request-id": bad}).headers["x-request-id"]
        for bad in ("", "two words", "x" * 129, "")
    ]
    assert len(set(made)) == 4
    assert all(re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", one) for one in made)
    assert "x-request-id" in client.post("/v1/fraud/score", content=b"{").headers


def test_who_asks_for_what_is_not_in_the_registry_is_told(client: TestClient) -> None:
    body = {"version": 1, "reason": "why not"}
    assert is_problem(client.post("/v1/admin/models/nobody/promote", json=body), 404, "nobody")
    assert is_problem(client.post("/v1/admin/models/nobody/rollback", json={"reason": "x"}), 404, "no champion")
    assert is_problem(client.post("/v1/admin/models/nobody/promote", json={"version": 1}), 422, "reason")
    assert client.post("/v1/admin/refresh").status_code == 202
    assert is_problem(client.get("/v1/drift"), 503, "no fraud model")


@pytest.mark.parametrize("given", ["soon", "-5", "0", "inf", "nan"])
def test_a_timeout_that_is_none_is_refused(client: TestClient, given: str) -> None:
    answer = client.post("/v1/recommend", json={"user_id": "u"}, headers={"x-timeout-ms": given})
    assert is_problem(answer, 422, "X-Timeout-Ms")


def test_keys_are_kept_as_hashes_for_the_owner_alone(config: Config) -> None:
    key = KeyStore(config.paths.api_keys).create("shop")
    assert key not in config.paths.api_keys.read_text()
    assert config.paths.api_keys.stat().st_mode & 0o077 == 0
    config.paths.api_keys.write_text("{")
    with pytest.raises(ConfigError, match="not a readable key file"):
        KeyStore(config.paths.api_keys)


def test_the_bucket_refuses_beyond_its_rate_and_refills() -> None:
    now = [0.0]
    bucket = TokenBucket(2.0, clock=lambda: now[0])
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now[0] = 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
