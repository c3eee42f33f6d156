"""Models beside those that a service follows: read when a request names one, a few in memory, the least used one goes.

A bank has a model for cards, one for transfers and one for claims, each with little traffic; a process for each would
wait most of the time. Here they share processes: whoever asks first for one waits until it is read, in a thread of its
own, so that nobody else waits. Features of a model that goes stay open: they cost little, and events still come.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from assay_services.named_models import model_of
from assay_services.problems import ProblemError
from assay_services.replies import Reply, refusal, send_reply

if TYPE_CHECKING:
    from assay_services.dependencies import Dependencies
    from assay_services.hot_swap import Slot

# After which a model that could not be had is looked for again.
_AGAIN_S = 5.0
_MOST_FAILED, _MOST_WAITING = 1000, 16
_log = logging.getLogger("assay.service")
# What whoever holds requests until a model is read knows it by.
BEING_READ = refusal(ProblemError(503, "the model is being read; come back in a second", headers={"Retry-After": "1"}))


@dataclass(frozen=True)
class Tenant:
    """A model in memory. app: answers what is no score and no list."""

    slot: "Slot[Any]"
    deps: "Dependencies"
    app: Any


class Tenants:
    """Models by name. Thread-safe."""

    def __init__(
        self,
        read: Callable[[str], Tenant],
        let_go: Callable[[Tenant], None],
        *,
        most: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """read: takes seconds; ProblemError where there is no such model. let_go: of one that nobody asks any more.
        most: in memory at once.
        """
        self._read, self._let_go, self._most, self._clock = read, let_go, most, clock
        self._lock = threading.Lock()
        self._here: OrderedDict[str, Tenant] = OrderedDict()
        self._failed: dict[str, tuple[float, ProblemError]] = {}
        self._coming: dict[str, threading.Event] = {}
        self._is_closed = False
        # One model is read at a time: two would take twice as long.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="assay-tenants")

    def here(self) -> list[Tenant]:
        """Those in memory."""
        with self._lock:
            return list(self._here.values())

    def get(self, name: str) -> Tenant | None:
        """One in memory; None while it is being read, which begins now if it has not.

        Raises:
            ProblemError: there is none, or too many are being read.
        """
        with self._lock:
            tenant = self._here.get(name)
            if tenant is not None:
                self._here.move_to_end(name)
                return tenant
            failed = self._failed.get(name)
            if failed is not None and self._clock() < failed[0]:
                raise ProblemError(failed[1].status, failed[1].detail, headers=failed[1].headers)
            if self._is_closed:
                raise ProblemError(503, "the service is being stopped", headers={"Retry-After": "5"})
            if name not in self._coming:
                if len(self._coming) >= _MOST_WAITING:
                    raise ProblemError(503, "too many models are being read", headers={"Retry-After": "5"})
                self._coming[name] = threading.Event()
                self._reader.submit(self._bring, name)
            return None

    def wait_for(self, name: str) -> Tenant:
        """One in memory, as soon as it is read.

        Raises:
            ProblemError: there is none, or too many are being read.
        """
        while (tenant := self.get(name)) is None:
            with self._lock:
                coming = self._coming.get(name)
            if coming is not None:
                coming.wait()
        return tenant

    def let_go(self, name: str) -> None:
        """Of one, if it is there."""
        with self._lock:
            tenant = self._here.pop(name, None)
        if tenant is not None:
            self._let_go(tenant)

    def close(self) -> None:
        """None is read any more."""
        with self._lock:
            self._is_closed = True
            for coming in self._coming.values():
                coming.set()
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _bring(self, name: str) -> None:
        try:
            tenant = self._read(name)
        except Exception as error:  # noqa: BLE001 - whoever waits has to hear of it
            if not isinstance(error, ProblemError):
                _log.exception("model %s could not be read", name)
                error = ProblemError(503, f"model {name!r} could not be read", headers={"Retry-After": "5"})
            with self._lock:
                if len(self._failed) >= _MOST_FAILED:
                    self._failed.clear()
                self._failed[name] = (self._clock() + _AGAIN_S, error)
                self._coming.pop(name).set()
            return
        with self._lock:
            too_many = len(self._here) + 1 - self._most
            gone = [self._here.popitem(last=False)[1] for _ in range(max(0, too_many))]
            self._here[name] = tenant
            self._failed.pop(name, None)
            self._coming.pop(name).set()
        for one in gone:
            self._let_go(one)


class ByModel:
    """ASGI: a request goes to the application of the model that it names, which is read first if need be."""

    def __init__(self, app: Any, tenants: Callable[[str], Tenant | None]) -> None:
        """app: of the models that are followed. tenants: name → the model; None where it is one of those."""
        self._app, self._tenants = app, tenants

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        name = model_of(scope)
        app = self._app
        if name:
            try:
                tenant = await asyncio.to_thread(self._tenants, name)
            except ProblemError as error:
                await send_reply(send, refusal(error))
                return
            app = app if tenant is None else tenant.app
        await app(scope, receive, send)


def is_being_read(reply: Reply) -> bool:
    """Whether a reply says that the model will be there in a moment."""
    return reply.status == BEING_READ.status and reply.body == BEING_READ.body
