"""What a flood of requests costs: a refusal without an ASGI call, a task or a message, straight from the HTTP parser.

At three times what can be answered two of three answers are the same 503. Through the middleware each of them takes a
fifth of a millisecond of the process that feeds those that score; here it takes a fiftieth.
"""

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

Headers = list[tuple[bytes, bytes]]


class FloodProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1. Also lets the application see whether the caller has hung up: `scope["state"]["gone"]`."""

    def __init__(self, *arguments: Any, refuse: Callable[[bytes, Headers], bytes | None], **named: Any) -> None:
        """refuse: path and headers of a POST → the whole response if it is to be refused unread, or None."""
        super().__init__(*arguments, **named)
        self._refuse = refuse
        self._is_refused = False

    def on_message_begin(self) -> None:
        """A request begins."""
        self._is_refused = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Refuse it, or have it answered."""
        is_next = self.cycle is None or self.cycle.response_complete
        if (
            is_next
            and self.parser.get_method() == b"POST"
            and self.parser.should_keep_alive()
            and not self.expect_100_continue
            and (response := self._refuse(self.url, self.headers)) is not None
        ):
            self._is_refused = True
            self.transport.write(response)
            return
        super().on_headers_complete()
        cycle = self.cycle
        self.scope["state"]["gone"] = lambda: cycle.disconnected

    def on_body(self, body: bytes) -> None:
        """What a refused request brings is not looked at."""
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The connection is free for the next request."""
        if self._is_refused:
            self.on_response_complete()
        else:
            super().on_message_complete()
