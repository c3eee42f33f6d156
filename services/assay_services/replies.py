"""What goes back to a caller, as it passes between threads and processes."""

import json
from typing import Any, NamedTuple

from assay_services.problems import MEDIA_TYPE, problem_of

Headers = tuple[tuple[bytes, bytes], ...]
JSON: Headers = ((b"content-type", b"application/json"),)


class Reply(NamedTuple):
    """An answer without what HTTP adds. headers: name and value, lower case."""

    status: int
    body: bytes
    headers: Headers


def refusal(error: Exception) -> Reply:
    """The reply that an error is."""
    problem, more = problem_of(error)
    headers = [(name.lower().encode(), value.encode()) for name, value in more.items()]
    return Reply(problem["status"], json.dumps(problem).encode(), ((b"content-type", MEDIA_TYPE.encode()), *headers))


async def send_reply(send: Any, reply: Reply) -> None:
    """As ASGI messages."""
    headers = [*reply.headers, (b"content-length", str(len(reply.body)).encode())]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
