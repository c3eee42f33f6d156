"""Models beside those that a service follows: read when a request names one, a few in memory, the least used one goes.

A bank has a model for cards, one for transfers and one for claims, each with little traffic; a process for each would
wait most of the time. Here they share processes: whoever asks first for one waits until it is read, by a thread of its
own, so that nobody else waits. Features of a model that goes stay open: they cost little, and events still come.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from assay_services.named_models import model_of
from assay_services.problems import ProblemError
from assay_services.replies import Reply, refusal, send_reply

if TYPE_CHECKING:
    from assay_services.dependencies import Dependencies
    from assay_services.hot_swap import Slot

# Who waits for a model waits so long, and looks so often.
PATIENCE_S, LOOK_S = 30.0, 0.05
# After which a model that could not be had is looked for again.
_AGAIN_S = 5.0
_MOST_FAILED, _MOST_WAITING = 1000, 16
_log = logging.getLogger("assay.service")
_BEING_READ = ProblemError(503, "the model is being read; come back in a second", headers={"Retry-After": "1"})
# What whoever holds requests until a model is read knows it by.
BEING_READ = refusal(_BEING_READ)


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
        self._coming: set[str] = set()
        self._to_do: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_closed = False
        # Models come and go one at a time: two that are read at once take twice as long, and one that goes must not be
        # taken from under the same one that comes back. A reading that hangs does not hold up the end.
        self._thread: threading.Thread | None = None

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
                self._coming.add(name)
                self._to_do.put(partial(self._bring, name))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="assay-tenants", daemon=True)
                    self._thread.start()
            return None

    def let_go(self, name: str) -> None:
        """Of one, soon, if it is there."""
        self._to_do.put(partial(self._forget, name))

    def close(self) -> None:
        """None is read any more."""
        with self._lock:
            self._is_closed = True

    def _run(self) -> None:
        while not self._is_closed:
            self._to_do.get()()

    def _bring(self, name: str) -> None:
        try:
            tenant = self._read(name)
        except Exception as error:  # noqa: BLE001 - whoever waits has to hear of it
            if not isinstance(error, ProblemError):
                _log.exception("model %s could not be read", name)
                error = ProblemError(503, f"model {name!r} could not be read", headers={"Retry-After": "5"})
            self._not_there(name, error)
        else:
            self._there(name, tenant)

    def _forget(self, name: str) -> None:
        with self._lock:
            tenant = self._here.pop(name, None)
        if tenant is not None:
            self._let_go(tenant)

    def _not_there(self, name: str, why: ProblemError) -> None:
        with self._lock:
            if len(self._failed) >= _MOST_FAILED:
                self._failed.clear()
            self._failed[name] = (self._clock() + _AGAIN_S, why)
            self._coming.discard(name)

    def _there(self, name: str, tenant: Tenant) -> None:
        with self._lock:
            too_many = len(self._here) + 1 - self._most
            gone = [self._here.popitem(last=False)[1] for _ in range(max(0, too_many))]
        for one in gone:
            self._let_go(one)
        with self._lock:
            self._here[name] = tenant
            self._failed.pop(name, None)
            self._coming.discard(name)


async def arrived(get: Callable[[str], Tenant | None], name: str) -> Tenant:
    """A model by its name, as soon as it is in memory. Takes no thread: those that wait must not take all there are.

    Raises:
        ProblemError: there is none, or it took too long.
    """
    until = time.monotonic() + PATIENCE_S
    while (tenant := get(name)) is None:
        if time.monotonic() > until:
            raise _BEING_READ
        await asyncio.sleep(LOOK_S)
    return tenant


class ByModel:
    """ASGI: a request goes to the application of the model that it names, which is read first if need be."""

    def __init__(self, app: Any, get: Callable[[str], Tenant | None]) -> None:
        """app: of the models that are followed, for requests that name none. get: see `arrived`."""
        self._app, self._get = app, get

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection."""
        app = self._app
        if name := model_of(scope):
            try:
                app = (await arrived(self._get, name)).app
            except ProblemError as error:
                await send_reply(send, refusal(error))
                return
        await app(scope, receive, send)


def is_being_read(reply: Reply) -> bool:
    """Whether a reply says that the model will be there in a moment."""
    return reply.status == BEING_READ.status and reply.body == BEING_READ.body
