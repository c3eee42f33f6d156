"""What operators may do over REST: move aliases, tell that the registry has changed. Needs a key that may `admin`.

The registry's own page moves aliases, too; here the gate is asked first and the audit log has who and why.
"""

import hashlib
from collections.abc import Callable
from typing import Any

from assay_platform.config import Config
from assay_platform.errors import GateRefusedError, RegistryError
from assay_platform.tracking import CHAMPION, AuditLog, ModelRegistry
from fastapi import APIRouter, Request

from assay_services.fraud import FraudScorer
from assay_services.hot_swap import Slot
from assay_services.problems import ProblemError
from assay_services.schemas import AliasMoved, Erased, EraseRequest, Problem, PromoteRequest, RollbackRequest

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in (
        (401, "API key missing or wrong"),
        (403, "The API key may not do this"),
        (404, "No such model or version"),
        (409, "The gate or the history does not allow it"),
        (422, "A field does not fit"),
    )
}


def admin_routes(config: Config, audit: AuditLog, look_now: Callable[[], None], fraud: Slot[FraudScorer]) -> APIRouter:
    """look_now: makes this process look at the registry at once; others look when they do."""
    routes = APIRouter(prefix="/v1/admin", responses=_PROBLEMS)

    def registry() -> ModelRegistry:
        return ModelRegistry(config.tracking_uri, audit)

    @routes.post("/models/{name}/promote")
    def promote(name: str, body: PromoteRequest, request: Request) -> AliasMoved:
        """Point an alias at a version that has passed the gate."""
        held = registry()
        before = held.version_of(name, body.alias)
        try:
            gate = held.promote(
                name, body.version, alias=body.alias, reason=body.reason, unchecked=body.unchecked, actor=_who(request)
            )
        except GateRefusedError as error:
            raise ProblemError(409, str(error)) from error
        except RegistryError as error:
            raise ProblemError(404, str(error)) from error
        look_now()
        return AliasMoved(model=name, alias=body.alias, from_version=before, version=body.version, gate=gate.summary)

    @routes.post("/models/{name}/rollback")
    def rollback(name: str, body: RollbackRequest, request: Request) -> AliasMoved:
        """Point `champion` back at the version before."""
        held = registry()
        if held.version_of(name) is None:
            raise ProblemError(404, f"{name!r} has no champion")
        try:
            before, after = held.rollback(name, reason=body.reason, actor=_who(request))
        except RegistryError as error:
            raise ProblemError(409, str(error)) from error
        look_now()
        summary = held.gate_of(name, after).summary
        return AliasMoved(model=name, alias=CHAMPION, from_version=before, version=after, gate=summary)

    @routes.post("/refresh", status_code=202)
    def refresh() -> dict[str, str]:
        """The registry has changed: look now, instead of at the next poll. For webhooks."""
        look_now()
        return {"status": "looking"}

    @routes.post("/erase")
    def erase(body: EraseRequest, request: Request) -> Erased:
        """Forget a card, an account, an event: what was kept of it, and what was decided. The audit log keeps that it
        was done, with a hash instead of the value.
        """
        loaded = fraud.require()
        erased = loaded.model.erase(body.column, body.value)
        digest = hashlib.sha256(body.value.encode()).hexdigest()
        audit.append("erase", actor=_who(request), model=loaded.name, column=body.column, value_sha256=digest,
                     records=erased, reason=body.reason)  # fmt: skip
        return Erased(erased=erased)

    return routes


def _who(request: Request) -> str | None:
    """Whose key it is, for the audit log; without keys the user of this process."""
    caller = request.state.caller
    return None if caller is None else f"{caller.who} (key {caller.id})"
