"""Errors as RFC 9457 problem details, `application/problem+json`."""

import http
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from assay_platform.errors import InputError, RegistryError, StorageError
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from assay_services.batching import DeadlinePassedError, OverloadedError
from assay_services.logs import REQUEST_ID

MEDIA_TYPE = "application/problem+json"
_log = logging.getLogger("assay.service")


class ProblemError(Exception):
    """An error that becomes an answer."""

    def __init__(self, status: int, detail: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


def problem_body(status: int, detail: str, errors: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """The JSON object of a problem."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    return body | ({"errors": errors} if errors else {})


def problem_bytes(status: int, detail: str) -> bytes:
    """The same, for middleware that answers before the application does."""
    return json.dumps(problem_body(status, detail)).encode()


def problem_of(error: Exception) -> tuple[dict[str, Any], dict[str, str]]:
    """The problem that an error is, and the headers that go with it. What nobody has foreseen is logged."""
    headers: Mapping[str, str] | None = None
    errors: list[dict[str, Any]] | None = None
    match error:
        case ProblemError():
            status, detail, headers = error.status, error.detail, error.headers
        case OverloadedError():
            # Whole seconds are what HTTP knows.
            status, detail = 503, str(error)
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        case DeadlinePassedError():
            status, detail = 504, str(error)
        case InputError():
            status, detail = 422, str(error)
        case StorageError() | RegistryError():
            _log.error("what is stored cannot be reached (request %s)", REQUEST_ID.get(), exc_info=error)
            # Messages of stores have addresses in them.
            status, detail = 503, "what is stored cannot be reached, and nothing was changed; the log has the details"
            headers = {"Retry-After": "5"}
        case RequestValidationError():
            errors = [
                {
                    "field": ".".join(str(part) for part in e["loc"] if part != "body") or "body",
                    "message": e["msg"],
                }
                for e in error.errors()
            ]
            status, detail = 422, f"{errors[0]['field']}: {errors[0]['message']}"
        case HTTPException():
            status, detail, headers = error.status_code, str(error.detail), error.headers
        case RecursionError():
            status, detail = 400, "the body is nested too deeply"
        case _:
            _log.error("unexpected error (request %s)", REQUEST_ID.get(), exc_info=error)
            status, detail = 500, "an unexpected error; the server's log has the details"
    return problem_body(status, detail, errors), dict(headers or {})


def install(app: FastAPI) -> None:
    """Make every error of an app a problem, and say so in its OpenAPI."""
    made = app.openapi

    def documented() -> dict[str, Any]:
        found = made()
        for operations in found["paths"].values():
            for operation in operations.values():
                for code, response in operation["responses"].items():
                    if int(code) >= 400:
                        response["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        for unused in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(unused, None)
        return found

    app.openapi = documented  # type: ignore[method-assign]

    async def answer(_: Request, error: Exception) -> Response:
        body, headers = problem_of(error)
        return JSONResponse(body, body["status"], headers=headers, media_type=MEDIA_TYPE)

    for kind in (
        ProblemError, OverloadedError, DeadlinePassedError, InputError, RequestValidationError, HTTPException,
        RecursionError, StorageError, RegistryError, Exception,
    ):  # fmt: skip
        app.add_exception_handler(kind, answer)
