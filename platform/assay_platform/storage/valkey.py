"""The hot tier that processes share: Valkey or Redis.

The server evicts by itself: give it `maxmemory` and `maxmemory-policy allkeys-lfu`. What it forgets is still in the
warm tier, since `TieredStore` writes through a shared hot tier and never leaves the only copy in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import redis

from assay_platform.errors import StorageError

_BATCH = 1000


class ValkeyTier:
    """Values on a server. See `Tier` for the contract; MSET writes a batch at once."""

    def __init__(self, url: str, *, prefix: str = "assay:", timeout_s: float = 1.0) -> None:
        """url: such as redis://127.0.0.1:6379/0. prefix: of every key, so that a server can be shared."""
        self._prefix = prefix.encode()
        try:
            self._client = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
            self._client.ping()
        except (redis.RedisError, ValueError) as error:
            raise StorageError(f"{_without_password(url)}: cannot be reached ({error})") from error
        self._where = _without_password(url)

    @property
    def size_bytes(self) -> int:
        """What the server says that it uses for data, other prefixes included."""
        return int(self._call(lambda: self._client.info("memory"))["used_memory_dataset"])

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Tier`. One round trip."""
        if not keys:
            return []
        prefixed = [self._prefix + key for key in keys]
        return list(self._call(lambda: self._client.mget(prefixed)))

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        """See `Tier`. One round trip."""
        if items:
            prefixed = {self._prefix + key: value for key, value in items.items()}
            self._call(lambda: self._client.mset(prefixed))

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        if keys:
            self._call(lambda: self._client.delete(*(self._prefix + key for key in keys)))

    def keys(self, prefix: bytes = b"") -> Iterator[bytes]:
        """See `Tier`."""
        pattern = _literal(self._prefix + prefix) + b"*"
        found = self._call(lambda: list(self._client.scan_iter(match=pattern, count=_BATCH)))
        return iter([key[len(self._prefix) :] for key in set(found)])

    def close(self) -> None:
        """See `Tier`."""
        self._client.close()

    def _call(self, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except redis.RedisError as error:
            raise StorageError(f"{self._where}: {error}") from error


def _literal(text: bytes) -> bytes:
    """Escape what means something in a key pattern."""
    out = bytearray()
    for byte in text:
        if byte in b"*?[]\\":
            out += b"\\"
        out.append(byte)
    return bytes(out)


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
