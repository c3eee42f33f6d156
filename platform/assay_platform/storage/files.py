"""Files and folders that are either whole or absent, whatever happens while they are written.

The new content goes to a sibling, is flushed to disk, and takes the name by a rename, which POSIX makes
atomic. A full disk, a kill or Ctrl-C leaves the old content. Not covered: several writers of one file; the
last rename wins.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from assay_platform.errors import StorageError


def _as_storage_error(error: OSError, path: Path) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{path}: the disk is full; nothing was written. Free some space and repeat.")
    return StorageError(f"{path}: cannot be written ({error.strerror or error})")


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it becomes `path` when the block ends without an error.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    part = _sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
    except OSError as error:
        raise _as_storage_error(error, path) from error
    finally:
        with suppress(OSError):  # what went wrong first is what is reported
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path`, replacing an old one, when the block succeeds.

    Raises:
        StorageError: the disk is full or the parent cannot be written.
    """
    part, old = _sibling(path), _sibling(path)
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            path.rename(old)
        part.rename(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise _as_storage_error(error, path) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    with atomic_file(path) as part:
        part.write_bytes(content)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
