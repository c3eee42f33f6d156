"""What every storage tier promises: bytes by key.

    MemoryTier   hot    a dictionary of this process; lost with it
    ValkeyTier   hot    shared by many processes, through Valkey or Redis
    DiskTier     warm   LMDB on the local disk; a batch is written whole or not at all, and survives a kill
    ObjectTier   cold   Parquet objects on any fsspec file system; large batches, slow reads

`TieredStore` puts them together. One conformance suite (`tests/platform/test_storage_tiers.py`) runs on each.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol


class Tier(Protocol):
    """Bytes by key. Thread-safe. A write is done, as durably as the tier can, when the call returns."""

    @property
    def size_bytes(self) -> int:
        """Keys and values held, without what the tier itself needs around them."""

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """One value a key, in order, None where there is none.

        Raises:
            StorageError: the tier cannot be read.
        """

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        """Write all or, after an error or a kill, none. Replaces what is there.

        Raises:
            StorageError: the tier cannot be written; nothing of the batch was.
        """

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """Forget keys; those not there are ignored."""

    def keys(self, prefix: bytes = b"") -> Iterator[bytes]:
        """All keys that begin with a prefix, in no promised order."""

    def close(self) -> None:
        """Give back files and connections. Safe to repeat."""
