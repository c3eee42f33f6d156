"""Models that requests name by their path: read when first asked for, a few in memory, nobody waits for another's."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from assay_platform.config import Config
from assay_platform.errors import InputError
from assay_services.alone import create_app
from assay_services.auth import SCOPES, KeyStore
from assay_services.dependencies import make_dependencies
from assay_services.named_models import NamedByPath, model_of, named_in
from assay_services.problems import ProblemError
from assay_services.tenants import Tenant, Tenants, arrived
from fastapi.testclient import TestClient


class Shelf:
    """Models that take as long to read as a test wants."""

    def __init__(self, most: int = 2) -> None:
        self.go = threading.Event()
        self.go.set()
        self.read: list[str] = []
        self.gone: list[str] = []
        self.now = 0.0
        self.tenants = Tenants(self._read, lambda one: self.gone.append(one.app), most=most, clock=lambda: self.now)

    def _read(self, name: str) -> Tenant:
        self.go.wait(10)
        self.read.append(name)
        if name == "nobody":
            raise ProblemError(404, "no such model")
        if name == "broken":
            raise ValueError("a bug")
        made: Any = SimpleNamespace(app=name)
        return made


def wait_for(shelf: Shelf, name: str) -> Tenant:
    return asyncio.run(arrived(shelf.tenants.get, name))


@pytest.mark.parametrize(
    ("path", "name", "rest"),
    [
        ("/models/cards/v1/fraud/score", "cards", "/v1/fraud/score"),
        ("/models/two words/v1/models", "two words", "/v1/models"),
        ("/models/cards/", "cards", "/"),
        ("/models/cards", "", "/models/cards"),
        ("/models//v1/models", "", "/models//v1/models"),
        ("/v1/models", "", "/v1/models"),
        ("/v1/admin/models/cards/promote", "", "/v1/admin/models/cards/promote"),
    ],
)
def test_a_path_names_a_model_or_none(path: str, name: str, rest: str) -> None:
    assert named_in(path) == (name, rest)


def test_whoever_asks_first_waits_and_the_least_used_one_goes() -> None:
    shelf = Shelf()
    shelf.go.clear()
    assert shelf.tenants.get("a") is None
    assert shelf.tenants.get("a") is None
    shelf.go.set()
    assert wait_for(shelf, "a").app == "a"
    assert wait_for(shelf, "b").app == "b"
    assert shelf.tenants.get("a") is not None
    assert wait_for(shelf, "c").app == "c"
    assert (shelf.read, shelf.gone) == (["a", "b", "c"], ["b"])
    for _ in range(2):
        shelf.tenants.let_go("a")
    assert wait_for(shelf, "d").app == "d"  # after what was to be done before
    assert shelf.gone == ["b", "a"], "there was room for it"
    assert shelf.tenants.get("c") is not None


def test_what_cannot_be_had_is_said_and_looked_for_again_after_a_while() -> None:
    shelf = Shelf()
    for _ in range(3):
        with pytest.raises(ProblemError, match="no such model") as found:
            wait_for(shelf, "nobody")
        assert found.value.status == 404
    with pytest.raises(ProblemError, match="could not be read"):
        wait_for(shelf, "broken")
    assert shelf.read == ["nobody", "broken"]
    shelf.now = 6.0
    with pytest.raises(ProblemError):
        wait_for(shelf, "nobody")
    assert shelf.read == ["nobody", "broken", "nobody"]


def test_a_flood_of_names_is_refused_and_so_is_everybody_at_the_end() -> None:
    shelf = Shelf()
    shelf.go.clear()
    for i in range(16):
        assert shelf.tenants.get(f"m{i}") is None
    with pytest.raises(ProblemError, match="too many models"):
        shelf.tenants.get("one more")
    shelf.tenants.close()
    with pytest.raises(ProblemError, match="being stopped"):
        shelf.tenants.get("and another")
    shelf.go.set()


def test_a_model_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay_services.tenants.PATIENCE_S", 0.1)
    shelf = Shelf()
    shelf.go.clear()
    with pytest.raises(ProblemError, match="is being read"):
        wait_for(shelf, "slow")
    shelf.go.set()


@pytest.mark.parametrize(
    "path", ["/models/a/../b/v1/models", "/x/../v1/admin/erase", "/models/../v1/models", "/a/%2e%2e/b"]
)
def test_dots_that_another_might_resolve_are_refused(config: Config, path: str) -> None:
    async def ask() -> int:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        # As a server hands it over: decoded, and not put in order as clients do.
        scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "headers": [],
                 "query_string": b""}  # fmt: skip
        await create_app(make_dependencies(config))(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(ask()) == 400


def test_only_those_with_a_key_have_a_model_read(config: Config) -> None:
    KeyStore(config.paths.api_keys).create("shop")
    client = TestClient(create_app(make_dependencies(config)), raise_server_exceptions=False)
    assert client.get("/healthz").status_code == 200
    for path in ("/models/cards/healthz", "/models/cards/readyz", "/models/cards/openapi.json"):
        assert client.get(path).status_code == 401


def test_keys_are_asked_for_the_path_behind_the_name(config: Config) -> None:
    keys = KeyStore(config.paths.api_keys)
    reads = {"X-API-Key": keys.create("reader", scopes=("read",))}
    allowed = {"X-API-Key": keys.create("operator", scopes=SCOPES)}
    client = TestClient(create_app(make_dependencies(config)), raise_server_exceptions=False)
    body = {"column": "id", "value": "x", "reason": "asked to"}
    for path in ("/v1/admin/erase", "/models/cards/v1/admin/erase"):
        assert client.post(path, json=body).status_code == 401
        assert client.post(path, json=body, headers=reads).status_code == 403
    answer = client.post("/models/cards/v1/admin/erase", json=body, headers=allowed)
    assert answer.status_code == 404
    assert "'cards'" in answer.json()["detail"]
    score = client.post("/models/cards/v1/fraud/score", json={"events": [{}]}, headers=allowed)
    assert (score.status_code, score.headers["content-type"]) == (404, "application/problem+json")


def test_a_key_for_some_models_asks_those_alone_and_by_their_names(config: Config) -> None:
    keys = KeyStore(config.paths.api_keys)
    key = {"X-API-Key": keys.create("claims desk", models=["claims", "cards"])}
    client = TestClient(create_app(make_dependencies(config)), raise_server_exceptions=False)
    assert client.get("/models/claims/v1/models", headers=key).status_code == 404, "there is none, but it may ask"
    for path in ("/v1/models", "/models/transfers/v1/models", "/models/claims/v1/registry", "/models/claims/v1/audit"):
        refused = client.get(path, headers=key)
        assert (refused.status_code, "/models/cards/v1/" in refused.json()["detail"]) == (403, True), path
    assert client.post("/v1/fraud/score", json={"events": [{}]}, headers=key).status_code == 403
    with pytest.raises(InputError, match="name one at least"):
        keys.create("nobody", models=[])
    with pytest.raises(InputError, match="cannot have the scope admin"):
        keys.create("nobody", models=["claims"], scopes=SCOPES)
    [kept] = KeyStore(config.paths.api_keys).callers()
    assert kept.models == ("claims", "cards")


def test_callers_cannot_name_a_model_but_by_the_path() -> None:
    seen: list[tuple[str, str, bytes]] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.append((model_of(scope), scope["path"], scope.get("raw_path", b"")))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    client = TestClient(NamedByPath(app))
    client.get("/models/two%20words/v1/models", headers={"model": "x"})
    client.get("/v1/models", headers={"serve_multiplexed_model_id": "x"})
    assert seen == [
        ("two words", "/v1/models", b"/models/two%20words/v1/models"),
        ("", "/v1/models", b"/v1/models"),
    ]
