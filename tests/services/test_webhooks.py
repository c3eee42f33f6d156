"""A webhook that is signed makes the service look; whatever else comes does nothing."""

import time

import pytest
from assay_platform.config import Config
from assay_services.alone import create_app
from assay_services.auth import KeyStore
from assay_services.dependencies import make_dependencies
from assay_services.webhooks import PATH, SECRET, is_signed, signature_of
from fastapi.testclient import TestClient

NOW = 1_800_000_000.0
BODY = b'{"entity": "model_version_alias", "action": "created"}'


def headers(known: str = "s3cret", at: float = NOW) -> dict[str, str]:
    made = signature_of(known, "d1", str(int(at)), BODY)
    return {"x-mlflow-signature": made, "x-mlflow-timestamp": str(int(at)), "x-mlflow-delivery-id": "d1"}


def test_only_who_knows_the_secret_is_believed_and_only_now() -> None:
    good = headers()
    assert is_signed(good, BODY, "s3cret", NOW)
    assert is_signed(good, BODY, "s3cret", NOW + 299)
    assert not is_signed(good, BODY, "s3cret", NOW + 301), "an old one that somebody has kept"
    assert not is_signed(good, BODY + b" ", "s3cret", NOW)
    assert not is_signed(good, BODY, "another", NOW)
    assert not is_signed({**good, "x-mlflow-delivery-id": "d2"}, BODY, "s3cret", NOW)
    for odd in ("", "soon", "-1", "1e9", "٣"):
        assert not is_signed({**good, "x-mlflow-timestamp": odd}, BODY, "s3cret", NOW), odd
    assert not is_signed({}, BODY, "s3cret", NOW)


def test_it_is_what_mlflow_signs() -> None:
    from mlflow.webhooks.delivery import _generate_hmac_signature

    theirs = _generate_hmac_signature("s3cret", "d1", str(int(NOW)), BODY.decode())
    assert theirs == headers()["x-mlflow-signature"]


def test_the_route_needs_no_key_but_a_signature_and_is_off_without_a_secret(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    KeyStore(config.paths.api_keys).create("shop")
    client = TestClient(create_app(make_dependencies(config)))
    assert client.post(PATH, content=BODY, headers=headers(at=time.time())).status_code == 404
    monkeypatch.setenv(SECRET, "s3cret")
    assert client.post(PATH, content=BODY, headers=headers(at=time.time())).status_code == 202
    assert client.post(PATH, content=BODY, headers=headers("guess", at=time.time())).status_code == 401
    assert client.post(PATH, content=BODY).status_code == 401
    assert client.post(PATH, content=b"x" * 2_000_000).status_code == 413
    assert client.post("/v1/admin/refresh").status_code == 401
