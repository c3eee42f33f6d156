"""A region as the gateway speaks to it: connections that stay open, and all of them cut at once when it has gone."""

import asyncio
import time
from collections.abc import Iterable

import aiohttp
from yarl import URL

from assay_services.replies import Reply

# Less than a service keeps a connection that nobody uses, so that none is used that is being closed.
_IDLE_S = 4.0
_CONNECT_S = 1.0
# Of one connection, or made anew.
_LEFT_OUT = frozenset((
    b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"proxy-connection",
    b"content-length", b"host", b"expect", b"date", b"server", b"accept-encoding",
))  # fmt: skip


class GoneError(Exception):
    """No answer came. was_asked: whether the region may have done what it was asked."""

    def __init__(self, reason: str, *, was_asked: bool) -> None:
        super().__init__(reason)
        self.was_asked = was_asked


class Remote:
    """Of one event loop."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def ask(
        self,
        method: str,
        path: str,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes,
        *,
        within_s: float,
    ) -> Reply:
        """The region's answer. path: with its query, as it came.

        Raises:
            GoneError: it did not answer.
        """
        session = self._session
        if session is None:
            session = self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
        passed = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in headers if k not in _LEFT_OUT]
        timeout = aiohttp.ClientTimeout(total=within_s, sock_connect=min(_CONNECT_S, within_s))
        try:
            async with session.request(
                method, URL(self._url + path, encoded=True), headers=passed, data=body or None, timeout=timeout,
                allow_redirects=False,
            ) as answer:  # fmt: skip
                content = await answer.read()
        except aiohttp.ClientConnectorError as error:
            raise GoneError(str(error), was_asked=False) from error
        except aiohttp.ConnectionTimeoutError as error:
            raise GoneError(str(error), was_asked=False) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise GoneError(str(error) or type(error).__name__, was_asked=True) from error
        kept = tuple((k.lower(), v) for k, v in answer.raw_headers if k.lower() not in _LEFT_OUT)
        return Reply(answer.status, content, kept)

    async def probe(self, within_s: float) -> float:
        """Seconds that it took to say that it is ready.

        Raises:
            GoneError: it did not, or is not.
        """
        began = time.perf_counter()
        answer = await self.ask("GET", "/readyz", (), b"", within_s=within_s)
        if answer.status != 200:
            raise GoneError(f"answers {answer.status}", was_asked=True)
        return time.perf_counter() - began

    async def cut(self) -> None:
        """Close all connections; whoever waits for an answer hears that none will come."""
        session, self._session = self._session, None
        if session is not None:
            # Those in use, too: closing the session waits for nobody.
            await asyncio.shield(session.close())
