"""Follow aliases: load and warm a version aside, let it rehearse, swap one reference, watch it, go back if it fails.

Requests take the reference once and keep what they took, so a swap fails none of them. A version that cannot be loaded,
or whose rehearsal says that it should not answer, changes nothing: the old one keeps answering. For `watch_s` after a
swap the old version stays in memory; if the new one fails requests, or its scores leave the bands of risk that the old
one's were in, the old one answers again at once and the registry's alias goes back to it.

`challenger`, where it is followed, answers a share of requests (a canary: the same user or event always meets the same
version) or all of them aside (shadow), and is compared with the champion.

Every change, and every refusal to change, is in the audit log with what was seen.
"""

import gc
import hashlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from assay_platform.config import Rollout
from assay_platform.errors import RegistryError
from assay_platform.monitoring.drift import band_distance
from assay_platform.monitoring.metrics import ServiceMetrics
from assay_platform.tracking import CHALLENGER, CHAMPION, AuditLog

from assay_services.alias_board import WatchedRegistry
from assay_services.problems import ProblemError
from assay_services.rehearsal import Evidence, Rehearsed, rehearse
from assay_services.schemas import Refused

Model = TypeVar("Model", bound=Rehearsed)
_log = logging.getLogger("assay.service")
_RETRY_AFTER_S = 5
# After which a version that could not be loaded, or did not do well in rehearsal, is tried again.
_BACK_OFF_S, _REFUSED_S = 30.0, 300.0
_REHEARSED, _SCORES_KEPT = 64, 2000
# Well within what a process that scores is given to end in.
_STOP_S = 5.0
# To look whether another process has seen that the registry changed costs nothing.
_NEWS_S = 0.1
# A version is judged by so many requests at least.
_FEWEST_REQUESTS, _FEWEST_SCORES = 20, 200


@dataclass
class Outcomes:
    """How a version does. scores: its newest. Counted without a lock: a lost count changes nothing that is decided."""

    answered: int = 0
    failed: int = 0
    scores: deque[float] = field(default_factory=lambda: deque(maxlen=_SCORES_KEPT))

    @property
    def failed_share(self) -> float:
        """Of all requests."""
        return self.failed / max(1, self.answered + self.failed)


@dataclass(frozen=True, eq=False)
class Loaded(Generic[Model]):
    """A version that answers."""

    name: str
    version: int
    model: Model
    loaded_at: datetime
    alias: str = CHAMPION
    outcomes: Outcomes = field(default_factory=Outcomes)


@dataclass(frozen=True)
class _Watched(Generic[Model]):
    """The version before, while the one after it has to prove itself. scores: of the old one, when it was replaced."""

    before: Loaded[Model]
    until: float
    scores: tuple[float, ...]


class Slot(Generic[Model]):
    """The place of one application's model."""

    def __init__(
        self,
        application: str,
        load: Callable[[str, Path], Model],
        metrics: ServiceMetrics,
        *,
        pinned_name: str | None = None,
        rollout: Rollout | None = None,
        audit: AuditLog | None = None,
        busy: Callable[[], AbstractContextManager[None]] = nullcontext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """load: (model name, artifact folder) → a model that has answered once. pinned_name: else the
        application's newest champion is chosen when there is one, and kept; empty for none. busy: around what takes the
        interpreter.
        """
        self.application = application
        self._load, self._metrics, self._busy, self._clock = load, metrics, busy, clock
        self._name, self._rollout, self._audit = pinned_name, rollout or Rollout(), audit
        self._current: Loaded[Model] | None = None
        self._challenger: Loaded[Model] | None = None
        self._watched: _Watched[Model] | None = None
        self._failed: dict[str, tuple[int, float]] = {}  # alias → version, and when to try it again
        self.refused: Refused | None = None
        self._recent: deque[Any] = deque(maxlen=_REHEARSED)
        self._aside: deque[Any] = deque(maxlen=_REHEARSED)
        # Held by whoever answers real requests in a thread of this process.
        self.turn = threading.Lock()
        self._refreshing = threading.Lock()

    @property
    def current(self) -> Loaded[Model] | None:
        """What answers now."""
        return self._current

    @property
    def challenger(self) -> Loaded[Model] | None:
        """What is compared with it."""
        return self._challenger

    def require(self) -> Loaded[Model]:
        """What answers now, or a 503 that says when to come back."""
        if self._current is None:
            raise ProblemError(
                503,
                f"no {self.application} model is loaded; `assay run {self.application}` trains one",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            )
        return self._current

    def chosen(self, key: str) -> Loaded[Model]:
        """What answers a user or event: the challenger, if there is one, a share of them."""
        challenger = self._challenger
        if challenger is not None and _share_of(key) < self._rollout.canary_share:
            return challenger
        return self.require()

    def instead_of(self, loaded: Loaded[Model]) -> Loaded[Model] | None:
        """What answers a request that a version on trial has failed."""
        current, watched = self._current, self._watched
        if loaded is not current:
            return current
        return watched.before if watched is not None else None

    def remember(self, request: Any) -> None:
        """A request that was answered; a version that comes next rehearses with the newest of them."""
        self._recent.append(request)
        if self._rollout.shadow and self._challenger is not None:
            self._aside.append(request)

    def follow(self, name: str) -> None:
        """Another model, from the next look on."""
        self._name = name

    def let_go(self) -> str:
        """Hold and follow no model any more; the name of the one before. Requests keep what they have taken."""
        with self._refreshing:
            name, self._name = self._name or "", ""
            self._current = self._challenger = self._watched = self.refused = None
            for kept in (self._recent, self._aside, self._failed):
                kept.clear()
        return name

    # ------------------------------------------------------------------ what the follower does, in its thread

    def refresh(self, registry: WatchedRegistry) -> bool:
        """Look at the aliases once; True if another version was swapped in."""
        with self._refreshing:
            return self._refreshed(registry)

    def _refreshed(self, registry: WatchedRegistry) -> bool:
        if self._name is None:
            self._name = registry.newest_champion(self.application)
        if not self._name:
            return False
        self._watch(registry)
        swapped = self._follow_champion(registry, self._name)
        if self._rollout.shadow or self._rollout.canary_share:
            self._follow_challenger(registry, self._name)
            self._ask_aside()
        return swapped

    def _follow_champion(self, registry: WatchedRegistry, name: str) -> bool:
        version, current = registry.version_of(name, CHAMPION), self._current
        if version is None or (current is not None and current.version == version):
            self.refused = None
            return False
        if self.refused is not None and self.refused.version == version and registry.is_unchecked(name, version):
            self._failed.pop(
                CHAMPION, None
            )  # whoever promotes it again, unchecked, does not wait until it is tried again
        loaded = self._loaded(registry, name, version, CHAMPION)
        if loaded is None:
            return False
        evidence = Evidence(requests=0)
        if current is not None and self._rollout.rehearse and not registry.is_unchecked(name, version):
            with self._busy():
                evidence = rehearse(current.model, loaded.model, list(self._recent), self._rollout, self.turn)
        if evidence.objections:
            self._refuse(loaded, evidence)
            return False
        # A model and the libraries it needs are millions of objects that stay. Looked through again and again by the
        # collector, they stopped every request for a third of a second several times a minute.
        gc.freeze()
        if current is not None and self._rollout.watch_s:
            until = self._clock() + self._rollout.watch_s
            self._watched = _Watched(current, until, tuple(current.outcomes.scores))
        self._current, self.refused = loaded, None
        self._record("swap", loaded, from_version=current and current.version, evidence=asdict(evidence))
        self._metrics.swaps.labels(self.application, "loaded").inc()
        self._metrics.model_version.labels(self.application, name).set(version)
        _log.info("%s version %s answers now", name, version)
        return True

    def _follow_challenger(self, registry: WatchedRegistry, name: str) -> None:
        version, held = registry.version_of(name, CHALLENGER), self._challenger
        if version is None or (self._current is not None and version == self._current.version):
            self._challenger = None
            return
        if held is not None and held.version == version:
            return
        loaded = self._loaded(registry, name, version, CHALLENGER)
        if loaded is not None:
            self._aside.clear()
            self._challenger = loaded
            self._record("challenge", loaded, share=self._rollout.canary_share, shadow=self._rollout.shadow)

    def _loaded(self, registry: WatchedRegistry, name: str, version: int, alias: str) -> Loaded[Model] | None:
        """One that is in memory already, or read now; None if that fails, which is tried again later."""
        watched = self._watched
        for held in (self._challenger, watched.before if watched else None):
            if held is not None and held.version == version:
                return Loaded(name, version, held.model, datetime.now(UTC), alias)
        failed = self._failed.get(alias)
        if failed is not None and failed[0] == version and self._clock() < failed[1]:
            return None
        try:
            folder = registry.download(name, version)
            with self._busy():
                model = self._load(name, folder)
        except Exception:  # noqa: BLE001 - a broken version of whatever kind must never stop the one that answers
            self._failed[alias] = (version, self._clock() + _BACK_OFF_S)
            self._metrics.swaps.labels(self.application, "failed").inc()
            _log.exception("%s version %s could not be loaded; the old one keeps answering", name, version)
            return None
        return Loaded(name, version, model, datetime.now(UTC), alias)

    def _refuse(self, loaded: Loaded[Model], evidence: Evidence) -> None:
        self._failed[CHAMPION] = (loaded.version, self._clock() + _REFUSED_S)
        why = "; ".join(evidence.objections)
        if self.refused is None or self.refused.version != loaded.version:
            self._record("refuse", loaded, reason=why, evidence=asdict(evidence))
            _log.error("%s version %s does not answer: it %s", loaded.name, loaded.version, why)
        self.refused = Refused(version=loaded.version, reason=why)
        self._metrics.swaps.labels(self.application, "refused").inc()

    def _watch(self, registry: WatchedRegistry) -> None:
        """Go back to the version before, if the new one does not do as it did."""
        watched, current = self._watched, self._current
        if watched is None or current is None:
            return
        why = self._complaint(watched, current.outcomes)
        if why is None:
            if self._clock() > watched.until:
                self._watched = None
            return
        self._current, self._watched = watched.before, None
        self._metrics.swaps.labels(self.application, "rolled_back").inc()
        self._metrics.model_version.labels(self.application, current.name).set(watched.before.version)
        _log.error("%s goes back to version %s: %s", current.name, watched.before.version, why)
        reason = f"by the service: version {current.version} {why}"
        try:
            registry.replace(current.name, current.version, watched.before.version, reason=reason)
        except RegistryError:
            # Somebody else has moved the alias; what it says is followed.
            _log.exception("the alias was not moved back")

    def _complaint(self, watched: _Watched[Model], seen: Outcomes) -> str | None:
        if seen.answered + seen.failed >= _FEWEST_REQUESTS and seen.failed_share > self._rollout.max_failed:
            return f"failed {seen.failed} of {seen.answered + seen.failed} requests"
        if min(len(seen.scores), len(watched.scores)) < _FEWEST_SCORES:
            return None
        moved = band_distance(watched.scores, tuple(seen.scores))
        if moved > self._rollout.max_moved:
            return f"moved {moved:.0%} of scores to other bands of risk"
        return None

    def _ask_aside(self) -> None:
        """Let the challenger answer what the champion was asked since."""
        challenger, champion = self._challenger, self._current
        if challenger is None or champion is None:
            return
        requests = [self._aside.popleft() for _ in range(len(self._aside))]
        if not requests:
            return
        evidence = rehearse(champion.model, challenger.model, requests, self._rollout, self.turn)
        self._metrics.shadowed.labels(self.application).inc(evidence.requests)
        self._metrics.shadow_changed.labels(self.application).set(evidence.changed)
        self._metrics.shadow_refused.labels(self.application).inc(evidence.refused)

    def _record(self, action: str, loaded: Loaded[Model], **details: Any) -> None:
        if self._audit is not None:
            where = f"{socket.gethostname()}:{os.getpid()}"
            self._audit.append(
                action, model=loaded.name, alias=loaded.alias, version=loaded.version, service=where, **details
            )


class Follower:
    """A thread that keeps slots up to date until stopped."""

    def __init__(
        self,
        registry: Callable[[], WatchedRegistry],
        slots: Sequence[Slot[Any]],
        *,
        poll_s: float,
        each_time: Callable[[], None] = lambda: None,
    ) -> None:
        """registry: opened in the thread, since MLflow takes seconds to import. slots: others may come and go.
        each_time: what else is looked at.
        """
        self._open, self._slots, self._poll_s, self._each_time = registry, slots, poll_s, each_time
        self._stop, self._wake = threading.Event(), threading.Event()
        self.first_look = threading.Event()
        self._thread = threading.Thread(target=self._run, name="assay-follower", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def look_now(self) -> None:
        """Somebody says that the registry has changed."""
        self._wake.set()

    def stop(self) -> None:
        """Stop, and wait a little for the thread: it may hang on a registry that does not answer."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=_STOP_S)

    def _run(self) -> None:
        registry: WatchedRegistry | None = None
        while not self._stop.is_set():
            try:
                self._each_time()
            except Exception:  # noqa: BLE001 - a store that is away for a while must not end the thread
                _log.exception("what other processes have written could not be read; trying again")
            try:
                registry = registry or self._open()
                for slot in list(self._slots):
                    slot.refresh(registry)
            except Exception:  # noqa: BLE001 - the registry may be away for a while; what is loaded keeps answering
                _log.exception("the registry could not be read; trying again")
            self.first_look.set()
            self._rest(registry)

    def _rest(self, registry: WatchedRegistry | None) -> None:
        """Until the next look is due, or somebody says that it is."""
        until = time.monotonic() + self._poll_s
        while (left_s := until - time.monotonic()) > 0:
            if self._wake.wait(min(_NEWS_S, left_s)):
                self._wake.clear()
                if registry is not None:
                    registry.ask_yourself()
                return
            if registry is not None and registry.has_news():
                return


def _share_of(key: str) -> float:
    """From 0 to 1, the same for the same key in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
