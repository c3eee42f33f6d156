"""Hot, warm and cold tiers as one store: values move by how often and how lately they are read.

Every key in use has one number, log2 Σ 2^(t / half-life) over the times t of its accesses (LRFU, Lee et al. 2001): it
only grows, and comparing two of them at any later time compares their decayed counts, so nothing is ever rescaled.

- A read looks in hot, then warm, then cold. What was found lower moves into memory if there is room or if it is worth
  more than what it would push out, so one scan of rare keys cannot empty the hot tier. What is read from cold a second
  time moves to the disk too, with others in one batch, so reading writes little.
- `put_many` is done when warm has it; with `durable=False` it is done in memory, for callers that keep a log: such
  values are written together by `flush`, by many of them, or when the hot tier needs their room.
- When warm outgrows its bytes, the values worth least move to cold: written there first, then removed, so a kill in
  between leaves two equal copies, of which warm holds.

Another process may write the same warm tier: its commits are noticed at the next read, and what is clean in memory is
read anew. Two processes that write one key at once: the later write holds.
"""

import heapq
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from assay_platform.errors import StorageError
from assay_platform.storage.disk import DiskTier
from assay_platform.storage.memory import MemoryTier
from assay_platform.storage.objects import ObjectTier
from assay_platform.storage.valkey import ValkeyTier

_MAX_DIRTY = 10_000
_DEMOTION_BATCH = 1000
_PROMOTION_BATCH = 256
_MAX_COUNTS = 5_000_000
_MAX_THAWED = 1_000_000
# Demotion goes on until this part of the budget is used, so that it is rare.
_REFILL = 0.9


@dataclass
class TierStatistics:
    """Counts since the store was opened; for `/metrics`."""

    hot_hits: int = 0
    hot_errors: int = 0
    warm_hits: int = 0
    cold_hits: int = 0
    misses: int = 0
    promotions: int = 0
    evictions: int = 0
    demotions: int = 0
    flushes: int = 0
    written_values: int = 0
    written_bytes: int = 0


class _Worth:
    """How much each key is worth keeping, and which is worth least. A key may be on offer more than once."""

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._of: dict[bytes, float] = {}
        self._heap: list[tuple[float, bytes]] = []

    def touch(self, key: bytes, now_s: float) -> None:
        moment = now_s / self._half_life_s
        old = self._of.get(key)
        if old is None:
            self._of[key] = moment
        else:
            # log2(2^a + 2^b); far apart, the larger one.
            self._of[key] = max(moment, old) + math.log2(1.0 + 2.0 ** -abs(moment - old))

    def of(self, key: bytes) -> float:
        return self._of.get(key, -math.inf)

    def offer(self, key: bytes) -> None:
        """Let `take_least` consider a key."""
        heapq.heappush(self._heap, (self.of(key), key))

    def take_least(self, holds: Callable[[bytes], bool]) -> bytes | None:
        """The key worth least of those offered that the tier still holds; it is not on offer any more."""
        while self._heap:
            worth, key = self._heap[0]
            if worth != self.of(key) and holds(key):  # it was read meanwhile
                heapq.heapreplace(self._heap, (self.of(key), key))
                continue
            heapq.heappop(self._heap)
            if holds(key):
                return key
        return None

    def forget(self, key: bytes) -> None:
        self._of.pop(key, None)

    def prune(self, limit: int) -> None:
        """Forget the lesser half of the counts when there are too many."""
        if len(self._of) > limit:
            middle = sorted(self._of.values())[len(self._of) // 2]
            self._of = {key: worth for key, worth in self._of.items() if worth >= middle}


class TieredStore:
    """See the module's docstring. Thread-safe; iterate and close from one thread."""

    def __init__(
        self,
        warm: DiskTier,
        *,
        hot: MemoryTier | ValkeyTier | None = None,
        cold: ObjectTier | None = None,
        hot_bytes: int = 256 * 1024 * 1024,
        warm_bytes: int | None = None,
        half_life_s: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """hot: a MemoryTier by default. warm_bytes: without a cold tier or a limit, warm grows with the data."""
        self._hot = hot if hot is not None else MemoryTier()
        self._warm, self._cold = warm, cold
        self._hot_bytes, self._warm_bytes = hot_bytes, warm_bytes
        self._worth = _Worth(half_life_s)
        self._dirty: dict[bytes, None] = {}
        self._clock = clock
        self._lock = threading.RLock()
        self._seen_commit = warm.last_commit
        self._deletions = 0
        self._demoted_up_to = b""
        self._thawed: set[bytes] = set()  # read from cold once since they were last in warm
        self._promoted: dict[bytes, bytes] = {}  # to be written to warm with the next batch
        self.statistics = TierStatistics()

    @property
    def sizes_bytes(self) -> dict[str, int]:
        """Bytes held by each tier."""
        sizes = {"hot": self._hot.size_bytes, "warm": self._warm.size_bytes}
        return sizes if self._cold is None else {**sizes, "cold": self._cold.size_bytes}

    @property
    def last_commit(self) -> int:
        """A number that grows with every batch that any process writes to warm."""
        return self._warm.last_commit

    # ------------------------------------------------------------------ reading

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """One value a key, in order, None where there is none.

        Raises:
            StorageError: a tier cannot be read.
        """
        with self._lock:
            self._notice_other_writers()
            found = self._read_hot(keys)
            now_s = self._clock()
            missing: list[int] = []
            for i, key in enumerate(keys):
                if found[i] is None:
                    missing.append(i)
                else:
                    self._worth.touch(key, now_s)
            self.statistics.hot_hits += len(keys) - len(missing)
            if missing:
                missing = self._read_warm(keys, missing, found, now_s)
            deletions = self._deletions
        if missing and self._cold is not None:
            # Not under the lock: what is far away must not keep others from what is near.
            thawed = self._cold.get_many([keys[i] for i in missing])
            with self._lock:
                self._take_in(keys, missing, thawed, found, may_move=deletions == self._deletions)
        self.statistics.misses += sum(found[i] is None for i in missing)
        return found

    def _read_hot(self, keys: Sequence[bytes]) -> list[bytes | None]:
        try:
            return self._hot.get_many(keys)
        except StorageError:
            # A shared server that is away costs speed, not answers: warm has everything.
            self.statistics.hot_errors += 1
            return [None] * len(keys)

    def _read_warm(
        self, keys: Sequence[bytes], missing: Sequence[int], found: list[bytes | None], now_s: float
    ) -> list[int]:
        """Fill in what warm has; returns what is still missing."""
        near: dict[bytes, bytes] = {}
        far: list[int] = []
        for i, value in zip(missing, self._warm.get_many([keys[i] for i in missing]), strict=True):
            if value is None:
                far.append(i)
            else:
                found[i] = near[keys[i]] = value
        self.statistics.warm_hits += len(missing) - len(far)
        for key in near:
            self._worth.touch(key, now_s)
        self._admit(near)
        return far

    def _take_in(
        self,
        keys: Sequence[bytes],
        missing: Sequence[int],
        thawed: Sequence[bytes | None],
        found: list[bytes | None],
        *,
        may_move: bool,
    ) -> None:
        """Answer with what cold had, and move it up, unless it was written or deleted meanwhile."""
        newer = self._warm.get_many([keys[i] for i in missing])
        moved: dict[bytes, bytes] = {}
        now_s = self._clock()
        for i, value, now in zip(missing, thawed, newer, strict=True):
            held = self._hot.get_many([keys[i]])[0] if isinstance(self._hot, MemoryTier) else None
            current = held or now
            if current is not None:
                found[i] = current
            elif value is not None:
                found[i] = moved[keys[i]] = value
                self._worth.touch(keys[i], now_s)
        self.statistics.cold_hits += sum(found[i] is not None for i in missing)
        if moved and may_move:
            self._admit(moved)
            for key, value in moved.items():
                # One read brings a value into memory; a second one from cold, onto the disk too, with others.
                if key in self._thawed:
                    self._promoted[key] = value
                self._thawed.add(key)
            if len(self._promoted) >= _PROMOTION_BATCH:
                self._promote()

    def _promote(self) -> None:
        """Write what was read from cold again and again to warm, in one batch."""
        items, self._promoted = self._promoted, {}
        if items:
            self._write_warm(items)
            self._thawed.difference_update(items)
            self._demote()
        if len(self._thawed) > _MAX_THAWED:
            self._thawed.clear()

    def keys(self, prefix: bytes = b"") -> Iterator[bytes]:
        """All keys that begin with a prefix, each once, in no promised order."""
        self.flush()
        seen: set[bytes] = set()
        for tier in (self._warm, self._cold):
            if tier is not None:
                for key in tier.keys(prefix):
                    if key not in seen:
                        seen.add(key)
                        yield key

    # ------------------------------------------------------------------ writing

    def put_many(self, items: Mapping[bytes, bytes], *, durable: bool = True) -> None:
        """Write all or none.

        durable=False: in memory for now. The caller can make the values again after a crash.

        Raises:
            StorageError: the disk cannot be written.
        """
        if not items:
            return
        with self._lock:
            now_s = self._clock()
            for key in items:
                self._worth.touch(key, now_s)
            if self._promoted:
                for key in items:
                    self._promoted.pop(key, None)
            if durable or isinstance(self._hot, ValkeyTier):
                if isinstance(self._hot, ValkeyTier):
                    # First, so that a server that fails later on cannot answer with what was before.
                    self._hot.delete_many(list(items))
                self._write_warm(items)
                for key in items:
                    self._dirty.pop(key, None)
                self._admit(items)
                self._demote()
                return
            self._take_hot(self._hot, items)
            self._dirty.update(dict.fromkeys(items))
            if len(self._dirty) >= _MAX_DIRTY:
                self.flush()
            self._shrink_hot()

    def flush(self) -> None:
        """Write what is only in memory, in one batch."""
        with self._lock:
            self._promote()
            if self._dirty and isinstance(self._hot, MemoryTier):
                values = {key: self._hot.get(key) for key in self._dirty}
                self._write_warm({key: value for key, value in values.items() if value is not None})
                self._dirty = {}
                self.statistics.flushes += 1
                self._demote()

    def discard_unwritten(self) -> None:
        """Forget what is only in memory: for a caller that makes it again from its log."""
        with self._lock:
            self._hot.delete_many(list(self._dirty))
            self._dirty = {}

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Forget keys in every tier, the coldest first, so that a kill in between brings nothing old back."""
        with self._lock:
            self._deletions += 1
            if self._cold is not None:
                self._cold.delete_many(keys)
            self._warm.delete_many(keys)
            self._hot.delete_many(keys)
            for key in keys:
                self._dirty.pop(key, None)
                self._promoted.pop(key, None)
                self._worth.forget(key)
            self._seen_commit = self._warm.last_commit

    def close(self) -> None:
        """Flush, then close every tier."""
        self.flush()
        for tier in (self._hot, self._warm, self._cold):
            if tier is not None:
                tier.close()

    # ------------------------------------------------------------------ moving

    def _write_warm(self, items: Mapping[bytes, bytes]) -> None:
        self._notice_other_writers()
        self._warm.put_many(items)
        self._seen_commit = self._warm.last_commit
        self.statistics.written_values += len(items)
        self.statistics.written_bytes += sum(len(key) + len(value) for key, value in items.items())

    def _notice_other_writers(self) -> None:
        commit = self._warm.last_commit
        if commit != self._seen_commit and isinstance(self._hot, MemoryTier):
            held = self._hot.keys()
            self._hot.delete_many([key for key in held if key not in self._dirty])
            self._promoted = {}
        self._seen_commit = commit

    def _admit(self, items: Mapping[bytes, bytes]) -> None:
        """Take values into the hot tier if there is room or they are worth more than what would leave."""
        if not isinstance(self._hot, MemoryTier):
            with suppress(StorageError):
                self._hot.put_many(items)
            return
        self.statistics.promotions += len(items)
        self._take_hot(self._hot, items)
        self._shrink_hot()

    def _take_hot(self, hot: MemoryTier, items: Mapping[bytes, bytes]) -> None:
        for key in items:
            if hot.get(key) is None:  # else it is on offer already
                self._worth.offer(key)
        hot.put_many(items)

    def _shrink_hot(self) -> None:
        hot = self._hot
        if not isinstance(hot, MemoryTier):
            return
        passed: list[bytes] = []  # not written yet: they stay as long as others can go
        while hot.size_bytes > self._hot_bytes:
            key = self._worth.take_least(lambda k: hot.get(k) is not None)
            if key in self._dirty:
                passed.append(key)
                continue
            if key is None:
                if not passed:
                    return
                self.flush()
                for waiting in passed:
                    self._worth.offer(waiting)
                passed = []
                continue
            hot.delete_many([key])
            self.statistics.evictions += 1
        for waiting in passed:
            self._worth.offer(waiting)

    def _demote(self) -> None:
        if self._cold is None or self._warm_bytes is None or self._warm.size_bytes <= self._warm_bytes:
            return
        target = int(self._warm_bytes * _REFILL)
        # A hand goes round the keys as on a clock: of each stretch the half worth least is moved.
        rounds = 0
        while self._warm.size_bytes > target and rounds < 3:
            stretch = self._warm.keys_after(self._demoted_up_to, 2 * _DEMOTION_BATCH)
            self._demoted_up_to = stretch[-1] if len(stretch) == 2 * _DEMOTION_BATCH else b""
            rounds += not self._demoted_up_to
            movable = sorted((key for key in stretch if key not in self._dirty), key=self._worth.of)
            batch = movable[: -(-len(movable) // 2)]
            if not batch:
                continue
            values = dict(zip(batch, self._warm.get_many(batch), strict=True))
            self._cold.put_many({key: value for key, value in values.items() if value is not None})
            self._warm.delete_many(batch)
            self._seen_commit = self._warm.last_commit
            self.statistics.demotions += len(batch)
        self._worth.prune(_MAX_COUNTS)
