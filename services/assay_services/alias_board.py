"""Where aliases point, looked at by one process for all that score.

To ask MLflow's registry takes 10 ms of an interpreter, once a second: a process that scores would be late with a
request in a hundred for it. One process asks, and writes what it saw to a file; the others look at that. As soon as the
file is old, or they have changed something themselves, they ask the registry again.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from assay_platform.tracking import CHAMPION, AliasesOf, ModelRegistry

# After so many looks that did not come, whoever looks has gone, or the registry does not answer it.
_MISSED = 3.0
_log = logging.getLogger("assay.service")


class Seen(msgspec.Struct):
    """at_s: when the registry was asked, by the clock that all processes of this machine share."""

    at_s: float
    models: dict[str, AliasesOf]


_seen = msgspec.json.Decoder(Seen)


class Board:
    """The file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = (0, 0)  # of the file that was read last
        self._read: Seen | None = None

    def write(self, seen: Seen) -> None:
        """Instead of what it says now."""
        made = self._path.with_suffix(".new")
        made.write_bytes(msgspec.json.encode(seen))
        made.replace(self._path)

    def read(self) -> Seen | None:
        """What it says; None where there is nothing that can be read."""
        try:
            about = self._path.stat()
            stamp = (about.st_mtime_ns, about.st_ino)
            if stamp != self._stamp:  # it is looked at far more often than written
                self._read, self._stamp = _seen.decode(self._path.read_bytes()), stamp
        except (OSError, msgspec.MsgspecError):
            return None
        return self._read


def keep_up_to_date(board: Board, open_registry: Callable[[], ModelRegistry], *, poll_s: float) -> None:
    """Look at the registry for ever; what cannot be read is looked at again."""
    registry: ModelRegistry | None = None
    while True:
        try:
            registry = registry or open_registry()
            asked_at_s = time.monotonic()
            board.write(Seen(asked_at_s, registry.aliases()))
        except Exception:  # noqa: BLE001 - a registry that is away for a while must not end this
            _log.exception("the registry could not be looked at; trying again")
        time.sleep(poll_s)


class WatchedRegistry:
    """What slots ask of the registry. Aliases come from the board as long as that is newer than what was done here."""

    def __init__(
        self,
        registry: ModelRegistry,
        board: Board | None,
        *,
        poll_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """board: None where nobody writes one. poll_s: how often it is written."""
        self._registry, self._board, self._clock = registry, board, clock
        self._old_s = max(_MISSED * poll_s, 1.0)
        self._not_before = -1.0
        self._known: dict[str, AliasesOf] | None = None

    def has_news(self) -> bool:
        """Whether the board says other than when it was last believed."""
        seen = self._fresh()
        return seen is not None and seen != self._known

    def ask_yourself(self) -> None:
        """The registry has changed just now: what the board says from before does not count."""
        self._not_before = self._clock()

    def version_of(self, name: str, alias: str = CHAMPION) -> int | None:
        """See `ModelRegistry`."""
        seen = self._fresh()
        if seen is None:
            return self._registry.version_of(name, alias)
        self._known = seen
        return seen[name].aliases.get(alias) if name in seen else None

    def newest_champion(self, application: str) -> str | None:
        """See `ModelRegistry`."""
        seen = self._fresh()
        if seen is not None:
            self._known = seen
            if not any(one.application == application and CHAMPION in one.aliases for one in seen.values()):
                return None
        return self._registry.newest_champion(application)

    def application_of(self, name: str) -> str | None:
        """What a model is for; None where there is no such model."""
        seen = self._fresh()
        if seen is not None and name in seen:
            return seen[name].application
        return self._registry.application_of(name)

    def is_unchecked(self, name: str, version: int) -> bool:
        """See `ModelRegistry`."""
        return self._registry.is_unchecked(name, version)

    def download(self, name: str, version: int) -> Path:
        """See `ModelRegistry`."""
        return self._registry.download(name, version)

    def replace(self, name: str, wrong: int, right: int, *, reason: str) -> None:
        """See `ModelRegistry`."""
        try:
            self._registry.replace(name, wrong, right, reason=reason)
        finally:  # also if somebody else was first: the board may not know of it yet
            self.ask_yourself()

    def _fresh(self) -> dict[str, AliasesOf] | None:
        if self._board is None:
            return None
        seen, now = self._board.read(), self._clock()
        if seen is None or seen.at_s <= self._not_before or not 0 <= now - seen.at_s <= self._old_s:
            return None
        return seen.models


def board_of(front: Path) -> Board:
    """Of a service whose front listens on this socket, and of no other."""
    return Board(front.with_suffix(".aliases"))
