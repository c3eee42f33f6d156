"""The command line as a user meets it: exit codes, one line of error, no traceback."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from assay_pipelines.console import Reporter, heeding_ctrl_c
from assay_platform.config import Config
from assay_platform.tracking import AuditLog


def assay(*arguments: str, home: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASSAY_HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    command = [sys.executable, "-m", "assay_pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


def test_help_teaches_and_is_quick(tmp_path: Path) -> None:
    fastest_s = 9.0
    for _ in range(5):
        began = time.perf_counter()
        done = assay("--help", home=tmp_path)
        fastest_s = min(fastest_s, time.perf_counter() - began)
    assert done.returncode == 0
    assert "assay run fraud --data card.csv --schema card.toml" in done.stdout
    assert fastest_s < 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["run", "fraud"], "--data"),
        (["run", "chess", "--data", "x"], "'chess'"),
        (["run", "fraud", "--data", "nothing.csv"], "neither a file nor a data set"),
        (["data", "get", "imagenet"], "unknown data set 'imagenet'"),
        (["bench", "nothing"], "unknown benchmark 'nothing'"),
        (["promote", "fraud-x", "two"], "invalid int value: 'two'"),
        (["serve", "--host", "0.0.0.0"], "there is no API key"),
        (["serve", "--port", "99999"], "service.port is 99999"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], named: str) -> None:
    done = assay(*arguments, home=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_bad_tables_and_options_are_exit_code_2(tmp_path: Path, fraud_files: tuple[Path, Path]) -> None:
    table, schema = fraud_files
    run = ["run", "fraud", "--data", str(table)]
    without = assay(*run, home=tmp_path)
    other_kind = assay("run", "recommend", "--data", str(table), "--schema", str(schema), home=tmp_path)
    budget = assay(*run, "--schema", str(schema), "--budget", "-1", home=tmp_path)
    named = assay(*run, "--schema", str(schema), "--name", "../x", home=tmp_path)
    table.write_text(table.read_text().replace("datetime", "when", 1))
    column = assay(*run, "--schema", str(schema), home=tmp_path)
    for done, text in (
        (without, "--schema FILE.toml is needed"), (other_kind, "kind = 'fraud'"), (budget, "--budget is -1"),
        (named, "--name '../x'"), (column, "has no column 'datetime'"),
    ):  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
        assert "Traceback" not in done.stderr


def test_an_unknown_model_fails_with_exit_code_1(tmp_path: Path) -> None:
    for arguments in (["promote", "nothing", "1"], ["rollback", "nothing"]):
        done = assay(*arguments, home=tmp_path)
        assert done.returncode == 1
        assert "nothing" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("after", ["Encode"])
def test_ctrl_c_stops_cleanly_with_exit_code_130(tmp_path: Path, fraud_files: tuple[Path, Path], after: str) -> None:
    table, schema = fraud_files
    command = [
        sys.executable,
        "-m",
        "assay_pipelines.cli",
        "run",
        "fraud",
        "--data",
        str(table),
        "--schema",
        str(schema),
    ]
    environment = {**os.environ, "ASSAY_HOME": str(tmp_path)}
    # A terminal sends Ctrl-C to the whole foreground group; a shell's background job would ignore it.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(after):
            break
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, rest[-4000:]
    assert "assay: stopped" in rest
    assert "Traceback" not in rest


def test_a_cleanup_that_fails_on_the_way_out_of_ctrl_c_does_not_hide_it() -> None:
    program = """
import sys
from assay_pipelines import cli, wiring

def stopped_within_a_transaction(call):
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError("the transaction cannot be rolled back")

wiring.dispatch = stopped_within_a_transaction
cli.main(["models"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "assay: stopped\n")


@pytest.fixture
def sigint() -> Iterator[Callable[[Any], Any]]:
    """Sets what SIGINT does; what it did comes back. A shell's background job, as a test run may be, ignores it."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_a_ctrl_c_that_python_dropped_ends_the_next_stage(sigint: Callable[[Any], Any]) -> None:
    sigint(signal.default_int_handler)
    reporter = Reporter(io.StringIO())
    with heeding_ctrl_c():
        with contextlib.suppress(KeyboardInterrupt):  # as Python does in callbacks of weak references
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), reporter.stage("load", "Read"):
            pytest.fail("the stage began")
    with heeding_ctrl_c(), reporter.stage("load", "Read"):
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_python_prints_of_a_ctrl_c_that_it_dropped_is_left_out(
    sigint: Callable[[Any], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Thing:
        """Can be referred to weakly."""

    def drop(raises: Callable[[], None]) -> None:
        thing = Thing()
        _held = weakref.ref(thing, lambda _: raises())
        del thing

    def fail() -> None:
        raise ValueError("a real one")

    sigint(signal.default_int_handler)
    told = sys.unraisablehook
    sys.unraisablehook = lambda what: sys.stderr.write(f"{what.exc_value}\n")
    try:
        with heeding_ctrl_c():
            drop(lambda: signal.raise_signal(signal.SIGINT))
            drop(fail)
    finally:
        sys.unraisablehook = told
    assert capsys.readouterr().err == "a real one\n"


def test_who_ignores_ctrl_c_goes_on_ignoring_it(sigint: Callable[[Any], Any]) -> None:
    sigint(signal.SIG_IGN)
    with heeding_ctrl_c(), Reporter(io.StringIO()).stage("load", "Read"):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_audit_shows_who_changed_what_and_notices_a_changed_line(config: Config) -> None:
    def audit(*arguments: str) -> tuple[int, str, str]:
        done = assay("audit", *arguments, home=config.paths.home)
        return done.returncode, done.stdout, done.stderr

    assert audit() == (0, "0 of 0 entries; none was changed or removed (hashes follow from one another)\n", "")
    log = AuditLog(config.paths.audit_log)
    log.append("promote", actor="ann", model="a", alias="champion", version=2, from_version=1, reason="better")
    log.append("swap", model="a", alias="champion", version=2, evidence={"requests": 64, "changed": 0.015625})
    log.append("promote", actor="bob", model="b", alias="champion", version=1, from_version=None, reason="first")
    code, out, _ = audit("a")
    assert code == 0
    assert "ann        promote    a champion 1 → 2: better" in out
    assert "(changed 0.0156, requests 64)" in out
    assert "bob" not in out
    assert "2 of 3 entries" in out
    assert len(audit("--last", "1")[1].splitlines()) == 2
    lines = config.paths.audit_log.read_text()
    config.paths.audit_log.write_text(lines.replace("better", "worse!"))
    code, _, err = audit()
    assert code == 1
    assert "line 2 does not follow" in err


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    def keys(*arguments: str) -> tuple[int, str]:
        done = assay("keys", *arguments, home=tmp_path)
        return done.returncode, done.stdout

    code, key = keys("new", "shop", "--scopes", "score", "--rate", "5")
    assert code == 0
    assert len(key.strip()) == 43
    listed = keys("list")[1]
    assert "shop" in listed
    assert key.strip() not in listed
    assert keys("new", "shop", "--scopes", "fly")[0] == 2
    assert keys("revoke", listed.splitlines()[1].split()[0])[0] == 0
    assert "there is no key" in keys("list")[1]
