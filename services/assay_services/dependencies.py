"""The parts of a process that holds models, wired: slots, their follower, feature repositories, records."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from assay_features.feast.repository import FeatureRepository
from assay_features.stream import StreamSettings
from assay_platform.config import Config
from assay_platform.monitoring.metrics import ServiceMetrics
from assay_platform.storage.tiered import TieredStore
from assay_platform.tracking import AuditLog, ModelRegistry
from assay_platform.tracking.records import DecisionRecords

from assay_services.alias_board import Board, WatchedRegistry
from assay_services.answering import ListAnswering, ScoreAnswering
from assay_services.fast_path import COUNTERFACTUALS, LISTS, SCORES
from assay_services.fraud import FraudScorer
from assay_services.hot_swap import Follower, Slot
from assay_services.recommend import ItemRecommender
from assay_services.replies import Reply
from assay_services.siblings import Siblings

_FIRST_LOOK_S = 60.0
# Old records are looked for at every so many looks at the registry: reading them takes milliseconds.
_SWEEP_LOOKS = 10
_CLOCK_OFF_S = 3600.0
_log = logging.getLogger("assay.service")
# A shape and bodies of it → a reply to each.
Answers = Callable[[Hashable, Sequence[bytes]], list[Reply]]
# What one process writes the others read within this.
_STREAM = StreamSettings(checkpoint_s=0.25)


@dataclass(frozen=True)
class Dependencies:
    """All that the application needs from outside. slots: of all models in memory. open_slot: application and model
    name → a slot for it. open_registry: what slots ask. scores, lists: what answers bodies.
    """

    config: Config
    metrics: ServiceMetrics
    fraud: Slot[FraudScorer]
    recommend: Slot[ItemRecommender]
    slots: list[Slot[Any]]
    open_slot: Callable[[str, str | None], Slot[Any]]
    open_registry: Callable[[], WatchedRegistry]
    follower: Follower
    siblings: Siblings
    audit: AuditLog
    scores: ScoreAnswering
    lists: ListAnswering
    close_stores: Callable[[], None] = lambda: None

    def by_lane(self) -> dict[str, Answers]:
        """What answers the bodies of each queue."""
        return {SCORES: self.scores, COUNTERFACTUALS: self.scores, LISTS: self.lists}

    def for_model(self, slot: Slot[Any]) -> "Dependencies":
        """The same for one model alone, which is in this slot."""
        fraud = slot if slot.application == "fraud" else self.open_slot("fraud", "")
        recommend = slot if slot.application == "recommend" else self.open_slot("recommend", "")
        # What was shown is known by the model that showed it.
        lists = self.lists if recommend is self.recommend else ListAnswering(recommend, self.metrics)
        scores = replace(self.scores, slot=fraud)
        return replace(self, fraud=fraud, recommend=recommend, slots=[slot], scores=scores, lists=lists)

    def start(self, app: Any) -> None:
        """Follow the registry, and listen to other processes. Returns when the registry was looked at once: until then
        others on a port answer, or requests wait for the first model instead of being sent away.
        """
        self.siblings.start(app)
        self.follower.start()
        self.follower.first_look.wait(_FIRST_LOOK_S)

    def stop(self) -> None:
        """Write what is in memory. Nobody may ask any more. A registry that hangs holds this up for seconds."""
        self.follower.stop()
        self.close_stores()
        self.siblings.stop()


class WallClock:
    """Whether the time of day has gone on as it should since this process began."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._offset_s = wall() - steady()
        self._was_steady = True

    def is_steady(self) -> bool:
        """False while it is more than an hour off: what is old by such a clock may not be."""
        off_s = self._wall() - self._steady() - self._offset_s
        is_steady = abs(off_s) <= _CLOCK_OFF_S
        if is_steady != self._was_steady:
            self._was_steady = is_steady
            _log.error("the clock is %g s off what it was when this process began; no old decisions are forgotten "
                       "until it is back, or the process starts again", off_s)  # fmt: skip
        return is_steady


@dataclass
class _Repositories:
    """Feature repositories, one a model name, shared by its versions: one connection, one lock. Thread-safe."""

    root: Path
    may_write: Callable[[], bool]
    _open: dict[str, FeatureRepository] = field(default_factory=dict)
    _records: dict[str, DecisionRecords] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, name: str) -> FeatureRepository:
        with self._lock:
            if name not in self._open:
                self._open[name] = FeatureRepository(self.root / name, stream=_STREAM, may_write=self.may_write)
            return self._open[name]

    def records(self, name: str) -> DecisionRecords:
        """Where decisions of a model name are kept."""
        with self._lock:
            if name not in self._records:
                self._records[name] = DecisionRecords(self.root / name / "records")
            return self._records[name]

    def take_over(self) -> None:
        """Recover what a process that wrote the features has left, if this one writes now."""
        if self.may_write():
            for repository in list(self._open.values()):
                repository.take_over()

    def forget_old(self, before_s: float) -> None:
        """Some of the records of decisions that are older than this, if this process writes."""
        if self.may_write():
            for records in list(self._records.values()):
                records.erase_old(before_s)

    def tiers(self) -> dict[str, TieredStore]:
        """The tiers of those in use."""
        return {name: repository.tiers for name, repository in list(self._open.items())}

    def close(self) -> None:
        """Write what is in memory."""
        with self._lock:
            for repository in self._open.values():
                repository.close()
            for records in self._records.values():
                records.close()


def make_dependencies(
    config: Config,
    *,
    fraud: str | None = None,
    recommend: str | None = None,
    board: Board | None = None,
    busy: Callable[[], AbstractContextManager[None]] = nullcontext,
    writes: bool = True,
) -> Dependencies:
    """Wire the real ones. fraud, recommend: model names to follow instead of the newest champion. board: where another
    process says where aliases point. busy: see `Slot`. writes: see `Siblings`.
    """
    metrics = ServiceMetrics()
    siblings = Siblings(config.paths.home, writes=writes)
    repositories = _Repositories(config.paths.feature_repositories, siblings.is_writer)
    metrics.watch_tiers(repositories.tiers)
    metrics.watch_tasks(config.paths.tasks)
    service, audit = config.service, AuditLog(config.paths.audit_log)
    loads: dict[str, Callable[[str, Path], Any]] = {
        "fraud": lambda name, folder: FraudScorer.load(folder, repositories.get(name), repositories.records(name)),
        "recommend": lambda name, folder: ItemRecommender.load(folder, repositories.get(name)),
    }

    def open_slot(application: str, name: str | None) -> Slot[Any]:
        return Slot(
            application, loads[application], metrics, pinned_name=name, rollout=config.rollout, audit=audit, busy=busy
        )

    def open_registry() -> WatchedRegistry:
        return WatchedRegistry(ModelRegistry(config.tracking_uri, audit), board, poll_s=service.poll_registry_s)

    fraud_slot: Slot[FraudScorer] = open_slot("fraud", fraud)
    recommend_slot: Slot[ItemRecommender] = open_slot("recommend", recommend)
    followed = (fraud_slot, recommend_slot)
    slots: list[Slot[Any]] = [*followed]
    metrics.watch_experts(lambda: {s.application: s.current.model.fences for s in followed if s.current is not None})

    sweeps, clock = itertools.count(), WallClock()

    def each_time() -> None:
        repositories.take_over()
        if next(sweeps) % _SWEEP_LOOKS == 0 and clock.is_steady():
            repositories.forget_old(time.time() - service.keep_decisions_days * 86_400)
        for slot in slots:
            if slot.current is None:
                continue
            model = slot.current.model
            if isinstance(model, ItemRecommender):
                model.catch_up()
            if model.look():
                metrics.drifted(slot.current.name, *model.seen())

    follower = Follower(open_registry, slots, poll_s=service.poll_registry_s, each_time=each_time)
    return Dependencies(
        config,
        metrics,
        fraud_slot,
        recommend_slot,
        slots,
        open_slot,
        open_registry,
        follower,
        siblings,
        audit,
        ScoreAnswering(fraud_slot, metrics, service.max_batch),
        ListAnswering(recommend_slot, metrics),
        repositories.close,
    )
