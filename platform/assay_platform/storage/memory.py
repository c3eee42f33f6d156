"""The hot tier of one process."""

from collections.abc import Iterator, Mapping, Sequence


class MemoryTier:
    """A dictionary that knows how many bytes it holds. See `Tier` for the contract."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Keys and values."""
        return self._size_bytes

    def get(self, key: bytes) -> bytes | None:
        """One value: the path that has no list around it."""
        return self._values.get(key)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Tier`."""
        return [self._values.get(key) for key in keys]

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        """See `Tier`."""
        for key, value in items.items():
            old = self._values.get(key)
            self._size_bytes += len(value) - len(old) if old is not None else len(key) + len(value)
            self._values[key] = value

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        for key in keys:
            old = self._values.pop(key, None)
            if old is not None:
                self._size_bytes -= len(key) + len(old)

    def keys(self, prefix: bytes = b"") -> Iterator[bytes]:
        """See `Tier`. A snapshot, so that the tier may change meanwhile."""
        return iter([key for key in list(self._values) if key.startswith(prefix)])

    def close(self) -> None:
        """Forget everything."""
        self._values, self._size_bytes = {}, 0
