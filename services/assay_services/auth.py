"""API keys: shown once when made, kept as hashes.

A key is 256 random bits, so one SHA-256 is enough to make the stored value useless; slow hashes are for
passwords that people choose.
"""

import hashlib
import hmac
import json
import secrets
from datetime import UTC, datetime
from pathlib import Path

from assay_platform.errors import ConfigError
from assay_platform.storage import write_json


class KeyStore:
    """The keys of one deployment. With no key, the service is open (and must stay on loopback)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hashes = [entry["sha256"] for entry in self._entries()]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def create(self, who: str) -> str:
        """Make a key for somebody; this is the only time that it can be seen."""
        key = secrets.token_urlsafe(32)
        entry = {
            "who": who,
            "sha256": _digest(key),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self._path, {"keys": [*self._entries(), entry]})
        self._path.chmod(0o600)
        self._hashes.append(entry["sha256"])
        return key

    def accepts(self, key: str) -> bool:
        """Whether a presented key is known; takes the same time for any wrong key."""
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]  # all of them: no early exit
        return any(matches)

    def _entries(self) -> list[dict[str, str]]:
        if not self._path.is_file():
            return []
        try:
            entries: list[dict[str, str]] = json.loads(self._path.read_text(encoding="utf-8"))["keys"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._path}: not a readable key file ({error}); restore or delete it") from error
        return entries


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
