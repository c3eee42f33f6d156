"""The warm tier: LMDB, a memory-mapped B+ tree with transactions.

A batch is one transaction: after a kill or a power cut it is there whole or not at all. Many processes may read and
write; writers take turns. Reads copy nothing but the value.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import lmdb

from assay_platform.errors import StorageError

_MAX_KEY_BYTES = 480  # LMDB takes 511
_LONG = b"\xff"
_LENGTH = struct.Struct("<I")


class DiskTier:
    """Values on the local disk. See `Tier` for the contract."""

    def __init__(self, folder: Path, *, sync: bool = True, max_bytes: int = 64 << 30) -> None:
        """folder: made if it is not there. sync: wait for the disk at every batch, so that it survives a power cut too;
        without, a batch survives the end of the process, and a power cut loses the newest ones. max_bytes: room in the
        address space, and how far the file may grow; it takes only what it holds.
        """
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._environment = lmdb.open(
                str(folder), map_size=max_bytes, max_readers=512, sync=sync, metasync=sync, readahead=False
            )
        except (OSError, lmdb.Error) as error:
            raise StorageError(f"{folder}: cannot be opened as a store ({error})") from error
        self._closed = False

    @property
    def size_bytes(self) -> int:
        """Pages in use, the free ones left out."""
        stat = self._environment.stat()
        pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return int(pages * stat["psize"])

    @property
    def last_commit(self) -> int:
        """A number that grows with every batch that any process writes."""
        return int(self._environment.info()["last_txnid"])

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See `Tier`."""
        try:
            with self._environment.begin() as transaction:
                return [_value(transaction.get(_stored_key(key)), key) for key in keys]
        except lmdb.Error as error:
            raise StorageError(f"{self.folder}: cannot be read ({error})") from error

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        """See `Tier`."""
        if not items:
            return
        try:
            with self._environment.begin(write=True) as transaction:
                for key, value in items.items():
                    transaction.put(_stored_key(key), _stored_value(key, value))
        except lmdb.Error as error:
            raise StorageError(f"{self.folder}: cannot be written ({error}); nothing of the batch was") from error

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """See `Tier`."""
        try:
            with self._environment.begin(write=True) as transaction:
                for key in keys:
                    transaction.delete(_stored_key(key))
        except lmdb.Error as error:
            raise StorageError(f"{self.folder}: cannot be written ({error})") from error

    def keys(self, prefix: bytes = b"") -> Iterator[bytes]:
        """See `Tier`. In order, as they were when the iteration began."""
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            found = cursor.set_range(prefix) if prefix else cursor.first()
            while found:
                stored = bytes(cursor.key())
                if stored.startswith(_LONG):
                    break
                if not stored.startswith(prefix):
                    break
                yield stored
                found = cursor.next()
            found = cursor.set_range(_LONG)
            while found:
                key, _ = _split_long(bytes(cursor.value()))
                if key.startswith(prefix):
                    yield key
                found = cursor.next()

    def keys_after(self, key: bytes, limit: int) -> list[bytes]:
        """At most so many keys that come after one, in order; long keys are left out."""
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            found = cursor.set_range(key + b"\0")
            out: list[bytes] = []
            while found and len(out) < limit and not (stored := bytes(cursor.key())).startswith(_LONG):
                out.append(stored)
                found = cursor.next()
            return out

    def close(self) -> None:
        """See `Tier`."""
        if not self._closed:
            self._closed = True
            self._environment.close()


def _stored_key(key: bytes) -> bytes:
    """The key itself, or a digest of one that is too long for LMDB (or would look like a digest)."""
    if len(key) <= _MAX_KEY_BYTES and not key.startswith(_LONG):
        return key
    return _LONG + hashlib.blake2b(key, digest_size=32).digest()


def _stored_value(key: bytes, value: bytes) -> bytes:
    if len(key) <= _MAX_KEY_BYTES and not key.startswith(_LONG):
        return value
    return _LENGTH.pack(len(key)) + key + value


def _split_long(stored: bytes) -> tuple[bytes, bytes]:
    (length,) = _LENGTH.unpack_from(stored)
    return stored[_LENGTH.size : _LENGTH.size + length], stored[_LENGTH.size + length :]


def _value(stored: bytes | None, key: bytes) -> bytes | None:
    if stored is None or (len(key) <= _MAX_KEY_BYTES and not key.startswith(_LONG)):
        return stored
    return _split_long(stored)[1]
