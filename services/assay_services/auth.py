"""API keys: shown once when made, kept as hashes, with what each may do, how often and until when.

A key is 256 random bits, so one SHA-256 is enough to make the stored value useless; slow hashes are for passwords that
people choose. A running service notices a changed key file within a second, so keys are rotated without a restart:
make the new one, move callers over, revoke the old one.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from assay_platform.errors import ConfigError, InputError
from assay_platform.storage import write_json

SCORE, WRITE, READ, ADMIN = SCOPES = ("score", "write", "read", "admin")
_USUAL = (SCORE, WRITE, READ)
_LOOK_AGAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Whom a key belongs to. id: by which it is revoked. scopes: what it may do; see docs/security.md.

    rate: requests a second, None for no limit of its own. expires: ISO 8601. models: which it has to name and may ask;
    None for all.
    """

    id: str
    who: str
    sha256: str
    created: str
    scopes: tuple[str, ...] = _USUAL
    rate: float | None = None
    expires: str | None = None
    models: tuple[str, ...] | None = None

    def has_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.fromisoformat(self.expires) <= now


class KeyStore:
    """The keys of one deployment. With no key, the service is open (and must stay on loopback); once it has seen one,
    it stays closed, whatever is revoked.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path, self._clock, self._now = path, clock, now
        self._looked_at, self._stamp = -_LOOK_AGAIN_S, (0, 0)
        self._callers: dict[str, Caller] = {}
        self._callers = {caller.sha256: caller for caller in self._read()}
        self._stamp = self._stamp_now()
        self._closed = bool(self._callers)

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        self._look()
        return self._closed

    def create(
        self,
        who: str,
        *,
        scopes: Sequence[str] = _USUAL,
        rate: float | None = None,
        days: float | None = None,
        models: Sequence[str] | None = None,
    ) -> str:
        """Make a key for somebody; this is the only time that it can be seen.

        Raises:
            InputError: a scope is unknown, or rate or days are not above 0, or a key for some models may administrate.
        """
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown or not scopes:
            raise InputError(f"scopes: {', '.join(unknown) or 'none given'}; allowed are {', '.join(SCOPES)}")
        for name, value in (("rate", rate), ("days", days)):
            if value is not None and not value > 0:
                raise InputError(f"{name}: {value} is not above 0")
        if models is not None and (ADMIN in scopes or not models):
            raise InputError("models: name one at least; a key for some models alone cannot have the scope admin")
        key, now = secrets.token_urlsafe(32), self._now()
        caller = Caller(
            id=secrets.token_hex(4),
            who=who,
            sha256=_digest(key),
            created=now.isoformat(timespec="seconds"),
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            rate=rate,
            expires=None if days is None else (now + timedelta(days=days)).isoformat(timespec="seconds"),
            models=None if models is None else tuple(models),
        )
        self._write([*self._read(), caller])
        return key

    def revoke(self, key_id: str) -> Caller:
        """End a key; services refuse it within a second.

        Raises:
            InputError: there is none of this id.
        """
        callers = self._read()
        found = next((caller for caller in callers if caller.id == key_id), None)
        if found is None:
            raise InputError(f"no key has the id {key_id!r}; `assay keys list` shows them")
        self._write([caller for caller in callers if caller.id != key_id])
        return found

    def callers(self) -> list[Caller]:
        """All keys, without the keys."""
        return self._read()

    def caller(self, key: str) -> Caller | None:
        """Whose key this is; None if it is unknown, revoked or expired. What is looked up is its hash: how long that
        takes says nothing of other keys.
        """
        self._look()
        found = self._callers.get(_digest(key))
        return None if found is None or found.has_expired(self._now()) else found

    def _look(self) -> None:
        """Read the file again if it has changed; one that cannot be read leaves the keys that are known."""
        if self._clock() - self._looked_at < _LOOK_AGAIN_S:
            return
        self._looked_at = self._clock()
        stamp = self._stamp_now()
        if stamp != self._stamp:
            try:
                self._callers = {caller.sha256: caller for caller in self._read()}
                self._stamp, self._closed = stamp, self._closed or bool(self._callers)
            except ConfigError:
                return

    def _stamp_now(self) -> tuple[int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0
        return found.st_mtime_ns, found.st_ino

    def _write(self, callers: Sequence[Caller]) -> None:
        previous = os.umask(0o077)
        try:
            write_json(self._path, {"keys": [asdict(caller) for caller in callers]})
            self._path.chmod(0o600)
        finally:
            os.umask(previous)
        self._callers, self._stamp = {caller.sha256: caller for caller in callers}, self._stamp_now()
        self._closed = self._closed or bool(callers)

    def _read(self) -> list[Caller]:
        if not self._path.is_file():
            return []
        try:
            entries: list[dict[str, Any]] = json.loads(self._path.read_text(encoding="utf-8"))["keys"]
            # Keys made before there were ids are known by the beginning of their hash.
            return [caller_of({"id": e["sha256"][:8], "scopes": _USUAL, **e}) for e in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._path}: not a readable key file ({error}); restore or delete it") from error


def caller_of(said: Mapping[str, Any]) -> Caller:
    """From JSON."""
    models = said.get("models")
    return Caller(**{**said, "scopes": tuple(said["scopes"]), "models": None if models is None else tuple(models)})


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
