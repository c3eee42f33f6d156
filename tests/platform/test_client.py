"""A store that is made is whole, whoever interrupts."""

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from assay_platform.tracking.client import open_client

_PROGRAM = "import sys; from assay_platform.tracking.client import open_client; open_client(sys.argv[1])"


def test_a_store_that_ctrl_c_caught_being_made_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "state" / "mlflow.db"
    making = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, f"sqlite:///{path}"],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    until = time.monotonic() + 60
    while not _has_a_table(path.parent) and time.monotonic() < until:
        time.sleep(0.02)
    making.send_signal(signal.SIGINT)
    assert making.wait(timeout=60) != 0
    assert not path.exists()
    assert list(path.parent.glob(".mlflow.db-*")) == []
    assert open_client(f"sqlite:///{path}").search_experiments()


def test_two_processes_may_make_one_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    processes = [subprocess.Popen([sys.executable, "-c", _PROGRAM, uri]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    client = open_client(uri)
    client.create_experiment("one")
    open_client(uri)
    assert {experiment.name for experiment in client.search_experiments()} == {"one", "Default"}


def _has_a_table(folder: Path) -> bool:
    for path in folder.glob(".mlflow.db-*/mlflow.db"):
        try:
            with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.0) as store:
                return bool(store.execute("select 1 from sqlite_master").fetchone())
        except sqlite3.OperationalError:
            return False
    return False
