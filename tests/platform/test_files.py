"""Writes are whole or absent."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from assay_platform.errors import StorageError
from assay_platform.storage import atomic_file, atomic_folder, write_bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("a small tmpfs needs the right to mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_leaves_the_old_content_and_says_so(small_disk: Path) -> None:
    target = small_disk / "value"
    write_bytes(target, b"old")
    with pytest.raises(StorageError, match="disk is full"):
        write_bytes(target, b"x" * 1024 * 1024)
    assert target.read_bytes() == b"old"
    assert [path.name for path in small_disk.iterdir()] == ["value"]


def test_a_full_disk_leaves_the_old_folder(small_disk: Path) -> None:
    folder = small_disk / "data"
    with atomic_folder(folder) as part:
        (part / "a").write_bytes(b"old")
    with pytest.raises(StorageError, match="disk is full"), atomic_folder(folder) as part:
        (part / "a").write_bytes(b"x" * 1024 * 1024)
    assert (folder / "a").read_bytes() == b"old"
    assert [path.name for path in small_disk.iterdir()] == ["data"]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_file(tmp_path / "value") as part:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_other_write_errors_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/below"):
        write_bytes(tmp_path / "file" / "below", b"")
