"""`POST /v1/webhooks/mlflow`: the registry says that an alias has moved, and services look at once.

MLflow signs what it sends with the secret that the webhook was made with: base64 of the HMAC-SHA256 of
`delivery id.timestamp.payload`, after `v1,` (mlflow.org, 'Webhooks', verification). What is not signed, or was signed
more than five minutes ago, does nothing. No API key: the signature is the right to say one thing, "look".
"""

import base64
import hashlib
import hmac
import os
import time
from collections.abc import Callable, Mapping

from fastapi import APIRouter, Request

from assay_services.problems import ProblemError
from assay_services.schemas import Problem

PATH = "/v1/webhooks/mlflow"
SECRET = "ASSAY_WEBHOOK_SECRET"  # noqa: S105 - the name of the variable
_FRESH_S = 300.0


def signature_of(secret: str, delivery: str, timestamp: str, payload: bytes) -> str:
    """As MLflow makes it."""
    signed = b".".join((delivery.encode(), timestamp.encode(), payload))
    return "v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()


def is_signed(headers: Mapping[str, str], payload: bytes, secret: str, now_s: float) -> bool:
    """Whether somebody who knows the secret has sent this, now."""
    given, timestamp = headers.get("x-mlflow-signature", ""), headers.get("x-mlflow-timestamp", "")
    if not timestamp.isdecimal() or abs(now_s - int(timestamp[:12])) > _FRESH_S:
        return False
    wanted = signature_of(secret, headers.get("x-mlflow-delivery-id", ""), timestamp, payload)
    return hmac.compare_digest(wanted.encode(), given.encode())


def webhook_routes(look_now: Callable[[], None], *, clock: Callable[[], float] = time.time) -> APIRouter:
    """look_now: makes this process look at the registry. The secret is read from the environment at each request."""
    routes = APIRouter()

    @routes.post(
        PATH,
        status_code=202,
        responses={401: {"model": Problem, "description": "Not signed, or not now"},
                   404: {"model": Problem, "description": f"The service has no {SECRET}"}},
    )  # fmt: skip
    async def mlflow(request: Request) -> dict[str, str]:
        """MLflow says that the registry has changed. Signed with the secret in ASSAY_WEBHOOK_SECRET."""
        secret = os.environ.get(SECRET, "")
        if not secret:
            raise ProblemError(404, f"webhooks are off: the service was started without {SECRET}")
        if not is_signed(request.headers, await request.body(), secret, clock()):
            raise ProblemError(401, "the signature does not fit, or is older than five minutes")
        look_now()
        return {"status": "looking"}

    return routes
