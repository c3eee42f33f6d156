"""The same request sent twice is done once: `Idempotency-Key`, for callers that retry when an answer did not come.

As draft-ietf-httpapi-idempotency-key-header-07 has it: the answer to a key is kept for a while and given again with
`Idempotent-Replayed: true`; the key with another body is a 422, with a request that is still running a 409. Answers are
kept in this process. What must not be done twice after a crash is made safe where it is done: events without an id get
one from the key, and the log knows ids.

Only good answers are kept: after an error the caller may try again.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from assay_services.named_models import model_of
from assay_services.problems import MEDIA_TYPE, problem_bytes
from assay_services.schemas import Record
from assay_services.whole_body import given_again, read_body

KEY = b"idempotency-key"
_MAX_KEY_BYTES = 200
_MAX_ANSWERS, _MAX_BYTES, _KEPT_S = 20_000, 64 * 1024 * 1024, 24 * 3600.0


def named_by(key: str | None, records: list[Record], id_column: str) -> list[Record]:
    """Events of a request with a key; those without an id get one from it, so that the log knows them again."""
    if key is None:
        return records
    return [
        record if record.get(id_column) is not None else {**record, id_column: f"{key}:{i}"}
        for i, record in enumerate(records)
    ]


@dataclass
class _Kept:
    """A request's digest, and its answer when there is one."""

    digest: bytes
    until: float
    messages: tuple[dict[str, Any], ...] | None = None
    size: int = 0


class Idempotency:
    """ASGI middleware; requests without a key pass through it."""

    def __init__(self, app: Any, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._kept: OrderedDict[tuple[str, str, bytes], _Kept] = OrderedDict()
        self._bytes = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        key = next((value for name, value in scope.get("headers", ()) if name == KEY), None)
        if scope["type"] != "http" or scope["method"] != "POST" or key is None:
            await self._app(scope, receive, send)
            return
        if not 0 < len(key) <= _MAX_KEY_BYTES or not key.isascii():
            await _refuse(send, 422, f"Idempotency-Key: 1 to {_MAX_KEY_BYTES} ASCII characters are allowed")
            return
        body = await read_body(receive)
        if body is None:
            return
        caller = scope.get("state", {}).get("caller")
        place = (model_of(scope) + scope["path"], "" if caller is None else caller.id, key)
        digest = hashlib.sha256(body).digest()
        self._forget_old()
        kept = self._kept.get(place)
        if kept is not None and kept.digest != digest:
            await _refuse(send, 422, "Idempotency-Key: was used for another body; take a new key for a new request")
        elif kept is not None and kept.messages is None:
            await _refuse(send, 409, "Idempotency-Key: the request of this key is still being answered")
        elif kept is not None and kept.messages is not None:
            for message in kept.messages:
                await send(message)
        else:
            await self._answered(place, _Kept(digest, self._clock() + _KEPT_S), body, scope, receive, send)

    async def _answered(
        self, place: tuple[str, str, bytes], kept: _Kept, body: bytes, scope: dict[str, Any], receive: Any, send: Any
    ) -> None:
        self._kept[place] = kept
        messages: list[dict[str, Any]] = []

        async def noted(message: Any) -> None:
            messages.append(message)
            await send(message)

        try:
            await self._app(scope, given_again(body, receive), noted)
        finally:
            if messages and messages[0]["status"] < 300 and not messages[-1].get("more_body", False):
                start = {**messages[0], "headers": [*messages[0]["headers"], (b"idempotent-replayed", b"true")]}
                kept.messages = (start, *messages[1:])
                kept.size = len(body) + sum(len(message.get("body", b"")) for message in messages)
                self._bytes += kept.size
            else:
                self._kept.pop(place, None)

    def _forget_old(self) -> None:
        """Those whose time is over, and the oldest where there are too many. They are in the order of their times."""
        now = self._clock()
        while self._kept:
            place, kept = next(iter(self._kept.items()))
            is_full = len(self._kept) > _MAX_ANSWERS or self._bytes > _MAX_BYTES
            if kept.until > now and not (is_full and kept.messages is not None):
                return
            del self._kept[place]
            self._bytes -= kept.size


async def _refuse(send: Any, status: int, detail: str) -> None:
    body = problem_bytes(status, detail)
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
