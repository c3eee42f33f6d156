"""Who changed an alias, when, from which version to which, and why: an append-only log.

One JSON object a line. Each line carries the SHA-256 of the line before it, so a removed or edited line shows
in `verify`. Appending takes a lock on the file, so two processes cannot interleave.
"""

import fcntl
import getpass
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from assay_platform.errors import RegistryError, StorageError

_FIRST = "0" * 64


def _now() -> datetime:
    return datetime.now(UTC)


class AuditLog:
    """The log of one deployment."""

    def __init__(self, path: Path, *, clock: Callable[[], datetime] = _now) -> None:
        self._path = path
        self._clock = clock

    def append(self, action: str, *, actor: str | None = None, **details: Any) -> dict[str, Any]:
        """Add one entry and flush it to disk before returning. actor: the user of this process by default.

        Raises:
            StorageError: the log cannot be written; the change that it records must then not happen.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                handle.seek(0)
                lines = handle.read().splitlines()
                previous = hashlib.sha256(lines[-1]).hexdigest() if lines else _FIRST
                entry = {
                    "time": self._clock().isoformat(timespec="milliseconds"),
                    "actor": actor or _actor(),
                    "action": action,
                    **details,
                    "previous_sha256": previous,
                }
                handle.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written ({error.strerror})") from error
        return entry

    def entries(self) -> Iterator[dict[str, Any]]:
        """All entries, oldest first."""
        if self._path.is_file():
            for line in self._path.read_bytes().splitlines():
                yield json.loads(line)

    def verify(self) -> int:
        """Check the chain of hashes; the number of entries.

        Raises:
            RegistryError: an entry was changed or removed; the message says which line breaks the chain.
        """
        previous, number = _FIRST, 0
        lines = self._path.read_bytes().splitlines() if self._path.is_file() else []
        for number, line in enumerate(lines, start=1):
            if json.loads(line)["previous_sha256"] != previous:
                raise RegistryError(f"{self._path}: line {number} does not follow from the line before it")
            previous = hashlib.sha256(line).hexdigest()
        return number


def _actor() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user id without a name
        return str(os.getuid())
