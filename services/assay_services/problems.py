"""Errors as RFC 9457 problem details, `application/problem+json`."""

import http
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from assay_platform.errors import InputError
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from assay_services.batching import DeadlinePassedError, OverloadedError

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


def _response(
    status: int,
    detail: str,
    errors: list[dict[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    return JSONResponse(
        problem_body(status, detail, errors), status, headers=dict(headers or {}), media_type=MEDIA_TYPE
    )


def install(app: FastAPI) -> None:
    """Make every error of an app a problem."""

    @app.exception_handler(ProblemError)
    async def on_problem(_: Request, error: ProblemError) -> Response:
        return _response(error.status, error.detail, headers=error.headers)

    @app.exception_handler(OverloadedError)
    async def on_overload(_: Request, error: OverloadedError) -> Response:
        # Whole seconds are what HTTP knows.
        return _response(503, str(error), headers={"Retry-After": str(max(1, math.ceil(error.retry_after_s)))})

    @app.exception_handler(DeadlinePassedError)
    async def on_deadline(_: Request, error: DeadlinePassedError) -> Response:
        return _response(504, str(error))

    @app.exception_handler(InputError)
    async def on_input(_: Request, error: InputError) -> Response:
        return _response(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def on_validation(_: Request, error: RequestValidationError) -> Response:
        errors = [
            {
                "field": ".".join(str(part) for part in e["loc"] if part != "body") or "body",
                "message": e["msg"],
            }
            for e in error.errors()
        ]
        first = errors[0]
        return _response(422, f"{first['field']}: {first['message']}", errors)

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> Response:
        return _response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(RecursionError)
    async def on_depth(_request: Request, _error: RecursionError) -> Response:
        return _response(400, "the body is nested too deeply")

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        _log.error("unexpected error on %s", request.url.path, exc_info=error)
        return _response(500, "an unexpected error; the server's log has the details")
