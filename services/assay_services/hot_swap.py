"""Follow an alias: load and warm the new version aside, then swap one reference.

Requests take the reference once and keep what they took, so a swap fails none of them. If a version cannot
be loaded, the old one keeps answering and the failure is counted, logged, and tried again.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from assay_platform.monitoring.metrics import ServiceMetrics
from assay_platform.tracking import CHAMPION, ModelRegistry

from assay_services.problems import ProblemError

Model = TypeVar("Model")
_log = logging.getLogger("assay.service")
_RETRY_AFTER_S = 5
_BACK_OFF_S = 30.0


@dataclass(frozen=True)
class Loaded(Generic[Model]):
    """A version that answers."""

    name: str
    version: int
    model: Model
    loaded_at: datetime


class Slot(Generic[Model]):
    """The place of one application's model."""

    def __init__(
        self,
        application: str,
        load: Callable[[str, Path], Model],
        metrics: ServiceMetrics,
        *,
        pinned_name: str | None = None,
    ) -> None:
        """load: (model name, artifact folder) → a model that has answered once. pinned_name: else the
        application's newest champion is chosen when there is one, and kept.
        """
        self.application = application
        self._load, self._metrics = load, metrics
        self._name = pinned_name
        self._current: Loaded[Model] | None = None
        self._failed: tuple[int, float] | None = None

    @property
    def current(self) -> Loaded[Model] | None:
        """What answers now."""
        return self._current

    def require(self) -> Loaded[Model]:
        """What answers now, or a 503 that says when to come back."""
        if self._current is None:
            raise ProblemError(
                503,
                f"no {self.application} model is loaded; `assay run {self.application}` trains one",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            )
        return self._current

    def refresh(self, registry: ModelRegistry) -> bool:
        """Look at the alias once; True if another version was swapped in."""
        if self._name is None:
            self._name = registry.newest_champion(self.application)
        if self._name is None:
            return False
        version = registry.version_of(self._name, CHAMPION)
        if version is None or (self._current is not None and self._current.version == version):
            return False
        if self._failed and self._failed[0] == version and time.monotonic() - self._failed[1] < _BACK_OFF_S:
            return False
        try:
            model = self._load(self._name, registry.download(self._name, version))
        except Exception:  # noqa: BLE001 - a broken version of whatever kind must never stop the one that answers
            self._failed = (version, time.monotonic())
            self._metrics.swaps.labels(self.application, "failed").inc()
            _log.exception("%s version %s could not be loaded; the old one keeps answering", self._name, version)
            return False
        self._current = Loaded(self._name, version, model, datetime.now(UTC))
        self._metrics.swaps.labels(self.application, "loaded").inc()
        self._metrics.model_version.labels(self.application, self._name).set(version)
        _log.info("%s version %s answers now", self._name, version)
        return True


class Follower:
    """A thread that keeps slots up to date until stopped."""

    def __init__(self, registry: Callable[[], ModelRegistry], slots: Sequence[Slot[Any]], *, poll_s: float) -> None:
        """registry: opened in the thread, since MLflow takes seconds to import."""
        self._open, self._slots, self._poll_s = registry, slots, poll_s
        self._stop = threading.Event()
        self.first_look = threading.Event()
        self._thread = threading.Thread(target=self._run, name="assay-follower", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait for the thread."""
        self._stop.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        registry: ModelRegistry | None = None
        while not self._stop.is_set():
            try:
                registry = registry or self._open()
                for slot in self._slots:
                    slot.refresh(registry)
            except Exception:  # noqa: BLE001 - the registry may be away for a while; what is loaded keeps answering
                _log.exception("the registry could not be read; trying again")
            self.first_look.set()
            self._stop.wait(self._poll_s)
