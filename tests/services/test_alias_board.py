"""One process asks the registry, the others look at what it saw; who knows better asks again."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from assay_platform.errors import RegistryError
from assay_platform.tracking import CHAMPION, AliasesOf
from assay_services.alias_board import Board, Seen, WatchedRegistry, board_of, keep_up_to_date


class Registry:
    """Counts how often it is asked."""

    def __init__(self, version: int = 1) -> None:
        self.version, self.asked, self.is_away = version, 0, False

    def version_of(self, name: str, alias: str) -> int | None:
        self.asked += 1
        return self.version

    def newest_champion(self, application: str) -> str | None:
        self.asked += 1
        return "payments"

    def replace(self, name: str, wrong: int, right: int, *, reason: str) -> None:
        self.version = right

    def aliases(self) -> dict[str, AliasesOf]:
        if self.is_away:
            raise RegistryError("away")
        return {"payments": AliasesOf("fraud", {CHAMPION: self.version})}


class Clock:
    """Time that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(tmp_path: Path, registry: Any, clock: Any) -> tuple[Board, WatchedRegistry]:
    board = board_of(tmp_path / "1.front")
    return board, WatchedRegistry(registry, board, poll_s=1.0, clock=clock)


def seen(at_s: float, version: int) -> Seen:
    return Seen(at_s, {"payments": AliasesOf("fraud", {CHAMPION: version})})


def test_as_long_as_the_board_is_fresh_the_registry_is_not_asked(tmp_path: Path) -> None:
    registry, clock = Registry(), Clock()
    board, aliases = watched(tmp_path, registry, clock)
    assert (aliases.version_of("payments"), registry.asked) == (1, 1)
    board.write(seen(clock.now, 7))
    assert aliases.has_news()
    assert aliases.version_of("payments") == 7
    assert not aliases.has_news()
    assert aliases.version_of("payments", "challenger") is None
    assert aliases.version_of("lists") is None
    assert aliases.newest_champion("recommend") is None
    assert registry.asked == 1
    assert aliases.newest_champion("fraud") == "payments"  # which is newest, the registry and its audit log know
    clock.now += 3.5
    assert not aliases.has_news()
    assert (aliases.version_of("payments"), registry.asked) == (1, 3)


def test_who_has_changed_something_believes_no_board_from_before(tmp_path: Path) -> None:
    registry, clock = Registry(2), Clock()
    board, aliases = watched(tmp_path, registry, clock)
    board.write(seen(clock.now - 0.1, 2))
    assert aliases.version_of("payments") == 2
    aliases.replace("payments", 2, 1, reason="it fails")
    assert aliases.version_of("payments") == 1
    clock.now += 0.5
    board.write(seen(clock.now, 1))
    assert (aliases.version_of("payments"), registry.asked) == (1, 1)


@pytest.mark.parametrize("content", [b"", b"{", b'{"at_s": "now", "models": {}}', b'{"at_s": 1e9, "models": {}}'])
def test_a_board_that_is_damaged_or_of_another_boot_is_not_believed(tmp_path: Path, content: bytes) -> None:
    registry, clock = Registry(), Clock()
    _, aliases = watched(tmp_path, registry, clock)
    (tmp_path / "1.aliases").write_bytes(content)
    assert not aliases.has_news()
    assert (aliases.version_of("payments"), registry.asked) == (1, 1)


def test_a_registry_that_is_away_for_a_while_is_looked_at_again(tmp_path: Path) -> None:
    registry, board = Registry(), Board(tmp_path / "board")
    registry.is_away = True
    opened: Any = lambda: registry  # noqa: E731
    thread = threading.Thread(target=keep_up_to_date, args=(board, opened), kwargs={"poll_s": 0.01}, daemon=True)
    thread.start()
    time.sleep(0.05)
    assert board.read() is None
    registry.is_away = False
    deadline = time.monotonic() + 10
    while board.read() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = board.read()
    assert found is not None
    assert found.models == registry.aliases()
