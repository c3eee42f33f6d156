"""What is logged of a request has its id, as a line for people or as JSON."""

import json
import logging
from collections.abc import Iterator

import pytest
from assay_platform.config import Config
from assay_services.alone import create_app
from assay_services.dependencies import make_dependencies
from assay_services.logs import LogFormat, log_to_stderr
from fastapi.testclient import TestClient


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    before = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], logger.level = before


def broken(_: object) -> None:
    raise IndexError("a bug")


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_error_names_the_request(
    form: LogFormat,
    config: Config,
    root: logging.Logger,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log_to_stderr(form)
    deps = make_dependencies(config)
    client = TestClient(create_app(deps), raise_server_exceptions=False)
    monkeypatch.setattr(type(deps.audit), "entries", broken)
    assert client.get("/v1/audit", headers={"x-request-id": "order-17"}).status_code == 500
    err = capsys.readouterr().err
    if form == "text":
        assert "ERROR assay.service: unexpected error (request order-17)" in err
        assert "IndexError" in err
        return
    lines = [json.loads(line) for line in err.splitlines() if "unexpected" in line]
    assert (lines[0]["severity"], lines[0]["request_id"], lines[0]["logger"]) == ("ERROR", "order-17", "assay.service")
    assert "IndexError" in lines[0]["exception"]
