"""Several processes that serve one home folder: one of them writes, all of them are counted.

Features have one writer (`EventStream`). The process that holds `writer.lock` is it; the others hand events and labels
over to it and read what it has written within a moment. When it ends, however it ends, the system gives the lock free,
and whoever notices first takes over: states that it had in memory are made again from the log.

Every process also listens on a Unix socket of its own, in a folder that this user alone can open. What comes in there
was checked by the process that it came to (`inner`).
"""

import asyncio
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import httpx
import uvicorn
from assay_platform.errors import StorageError
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from assay_services.inner import InnerClient, Trusting
from assay_services.named_models import NamedByPath
from assay_services.problems import ProblemError
from assay_services.replies import Reply, refusal, send_reply
from assay_services.whole_body import given_again, read_body

_WRITERS = {"POST": ("/v1/events", "/v1/labels", "/v1/admin/erase"), "GET": ("/v1/drift",)}
_TRY_LOCK_S, _PATIENCE_S, _PAUSE_S = 0.2, 5.0, 0.05
_OWN = "/metrics?own"
_log = logging.getLogger("assay.service")


def sockets_of(home: Path) -> Path:
    """The folder of the sockets of a home folder's processes, made if it is not there.

    Raises:
        StorageError: it belongs to somebody else.
    """
    name = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:16]
    # Paths of sockets are short, and home folders need not be.
    folder = Path(tempfile.gettempdir()) / f"assay-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise StorageError(f"{folder}: is not this user's alone; remove it")
    return folder


class Siblings:
    """The processes of one home folder on this machine. Thread-safe."""

    def __init__(self, home: Path, *, writes: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        """writes: false for a process that never takes over: it does not follow the models that others follow, which a
        request means that names none.
        """
        self._home, self.writes, self._clock = home, writes, clock
        self._folder = sockets_of(home)
        self.socket = self._folder / f"{os.getpid()}.sock"
        self._mutex = threading.Lock()
        self._lock: IO[str] | None = None
        self._tried_at = -_TRY_LOCK_S
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def is_writer(self) -> bool:
        """Whether this process writes; it does from now on if nobody else does."""
        if not self.writes:
            return False
        with self._mutex:
            now = self._clock()
            if self._lock is None and now - self._tried_at >= _TRY_LOCK_S:
                self._tried_at = now
                self._home.mkdir(parents=True, exist_ok=True)
                lock = (self._home / "writer.lock").open("a+")
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    lock.close()
                    return False
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
                self._lock = lock
                _log.info("this process writes events from now on")
            return self._lock is not None

    def start(self, app: Any) -> None:
        """Listen to the others. app: without keys and limits."""
        self.socket.unlink(missing_ok=True)
        config = uvicorn.Config(
            NamedByPath(Trusting(app)), uds=str(self.socket), lifespan="off", log_level="warning", access_log=False
        )
        self._server = uvicorn.Server(config)
        # In a thread of its own: uvicorn leaves signals alone there.
        self._thread = threading.Thread(target=self._server.run, name="assay-siblings", daemon=True)
        self._thread.start()
        self.is_writer()

    def stop(self) -> None:
        """Stop listening, and let another process write. Safe to repeat."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=15)
            self.socket.unlink(missing_ok=True)
            self._server = None
        with self._mutex:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    async def hand_over(self, client: InnerClient, scope: dict[str, Any], body: bytes) -> Reply | None:
        """The writer's answer; None if this process writes now. 503 if the writer went while it was answering."""
        until = self._clock() + _PATIENCE_S
        while not self.is_writer():
            try:
                return await client.ask(self._folder / f"{self._writer()}.sock", scope, body)
            except httpx.ConnectError:
                if self._clock() > until:
                    break
                await asyncio.sleep(_PAUSE_S)
            except httpx.TransportError:
                break
        else:
            return None
        detail = "the process that writes events has gone; send the same again"
        return refusal(ProblemError(503, detail, headers={"Retry-After": "1"}))

    def others_metrics(self) -> dict[str, list[Metric]]:
        """What the other processes count, by process id."""
        return metrics_in(self._folder, but=self.socket)

    def _writer(self) -> str:
        try:
            return (self._home / "writer.lock").read_text() or "nobody"
        except OSError:
            return "nobody"


def metrics_in(folder: Path, *, but: Path | None = None) -> dict[str, list[Metric]]:
    """What the processes that listen in a folder count, by process id. but: a socket that is not asked."""
    found: dict[str, list[Metric]] = {}
    for socket in folder.glob("*.sock"):
        if socket == but:
            continue
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket), verify=False), timeout=5.0) as client:
                text = client.get(f"http://sibling{_OWN}").text
        except httpx.ConnectError:
            socket.unlink(missing_ok=True)  # of a process that was killed
            continue
        except httpx.TransportError:
            continue
        found[socket.stem] = list(text_string_to_metric_families(text))
    return found


class HandOver:
    """ASGI middleware: what writes is answered by the process that writes, and what it alone has seen all of."""

    def __init__(self, app: Any, *, siblings: Siblings) -> None:
        self._app, self._siblings, self._client = app, siblings, InnerClient()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        is_its = scope["type"] == "http" and scope["path"] in _WRITERS.get(scope["method"], ())
        if is_its and scope["method"] == "GET" and not self._siblings.writes:
            is_its = False  # what such a process scores, no other one does
        if not is_its or self._siblings.is_writer():
            await self._app(scope, receive, send)
            return
        body = await read_body(receive)
        if body is None:
            return
        answer = await self._siblings.hand_over(self._client, scope, body)
        if answer is not None:
            await send_reply(send, answer)
            return
        await self._app(scope, given_again(body, receive), send)


def merged(own: Iterable[Metric], others: dict[str, list[Metric]], own_name: str) -> list[Metric]:
    """Families of all processes, each sample with the process that counts it as `worker`."""
    families: dict[str, Metric] = {}
    for worker, metrics in {own_name: own, **others}.items():
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            for sample in metric.samples:
                family.add_sample(sample.name, {**sample.labels, "worker": worker}, sample.value)
    return list(families.values())
