"""`assay jobs` against the run's Ray cluster."""

import json
import sys
import time
from pathlib import Path

import pytest
from assay_pipelines.cli import main
from assay_platform.errors import ClusterError
from assay_platform.tasks.jobs import submit_and_follow

pytestmark = pytest.mark.ray


def called(address: str, *words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["jobs", "--address", address, *words])
    return int(str(ended.value.code))


def said(capsys: pytest.CaptureFixture[str], address: str, *words: str) -> str:
    assert called(address, *words) == 0
    return capsys.readouterr().out


def test_a_job_is_submitted_followed_and_listed(
    ray_session: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "greet.py").write_text("print('hello from', __file__)")
    command = ["submit", "--working-dir", str(tmp_path), "--follow", "--", sys.executable, "greet.py"]
    job_id, *rest = said(capsys, ray_session, *command).splitlines()
    assert any(line.startswith("hello from") for line in rest)
    assert f"{job_id}: SUCCEEDED" in said(capsys, ray_session, "status", job_id)
    assert "hello from" in said(capsys, ray_session, "logs", job_id)
    listed = json.loads(said(capsys, ray_session, "list", "--json"))
    assert listed[0]["job_id"] == job_id
    assert listed[0]["ended_s"] >= listed[0]["started_s"]
    assert job_id in said(capsys, ray_session, "list")


def test_a_job_is_cancelled(ray_session: str, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = said(capsys, ray_session, "submit", "--", "sleep", "300").strip()
    until = time.monotonic() + 60
    while "RUNNING" not in said(capsys, ray_session, "status", job_id) and time.monotonic() < until:
        time.sleep(0.2)
    assert said(capsys, ray_session, "cancel", job_id).strip() == f"{job_id} is stopped"
    while "STOPPED" not in said(capsys, ray_session, "status", job_id) and time.monotonic() < until:
        time.sleep(0.2)
    assert said(capsys, ray_session, "cancel", job_id).strip() == f"{job_id} had ended"


def test_what_is_not_there_is_said(ray_session: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(ray_session, "status", "job-of-nobody") == 1
    assert "there is no job 'job-of-nobody'" in capsys.readouterr().err
    assert called("http://127.0.0.1:9", "list") == 1
    assert "cannot be reached" in capsys.readouterr().err
    assert called(ray_session, "submit") == 2
    assert "say what to run" in capsys.readouterr().err


def test_a_job_that_fails_is_an_error_with_its_message(ray_session: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(ray_session, "submit", "--follow", "--", "false") == 1
    assert "ended as FAILED" in capsys.readouterr().err


KILLED_ONCE = """\
import pathlib, psutil, time
marker = pathlib.Path({marker!r})
if marker.exists():
    print("went on")
else:
    marker.touch()
    for parent in psutil.Process().parents():
        if "JobSupervisor" in " ".join(parent.cmdline()):
            parent.kill()
            time.sleep(60)
"""


def test_a_job_that_is_lost_with_its_node_is_submitted_again(ray_session: str, tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text(KILLED_ONCE.format(marker=str(tmp_path / "marker")))
    written: list[str] = []
    command = [sys.executable, str(tmp_path / "once.py")]
    submit_and_follow(ray_session, command, environment={}, working_dir=None, write=written.append)
    text = "".join(written)
    assert "it is submitted again" in text
    assert "went on" in text


def test_a_job_that_fails_by_itself_is_not(ray_session: str, tmp_path: Path) -> None:
    count = tmp_path / "count"
    command = ["sh", "-c", f"echo ran >> {count}; exit 3"]
    with pytest.raises(ClusterError, match="FAILED"):
        submit_and_follow(ray_session, command, environment={}, working_dir=None, write=lambda _: None)
    assert count.read_text().split() == ["ran"]
