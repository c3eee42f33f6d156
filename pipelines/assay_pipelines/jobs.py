"""`assay jobs`: what runs on a Ray cluster, from a terminal."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime

from assay_platform.errors import InputError
from assay_platform.tasks.jobs import Jobs

from assay_pipelines.console import say

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def run_action(call: argparse.Namespace) -> int:
    """One action of the command; returns the exit code.

    Raises:
        InputError: nothing to run, or no such folder.
        ClusterError: the cluster or the job is not there, or the job that is followed failed.
    """
    actions: dict[str, Callable[[argparse.Namespace, Jobs], None]] = {
        "submit": _submit,
        "list": _list,
        "status": _status,
        "logs": _logs,
        "cancel": _cancel,
    }
    actions[call.jobs_command](call, Jobs(call.address or os.environ.get("RAY_API_SERVER_ADDRESS") or _DEFAULT_ADDRESS))
    return 0


def _submit(call: argparse.Namespace, jobs: Jobs) -> None:
    command = call.entrypoint[1:] if call.entrypoint[:1] == ["--"] else call.entrypoint
    if not command:
        raise InputError("jobs submit: say what to run, as in `assay jobs submit -- python train.py`")
    if call.working_dir is not None and not call.working_dir.is_dir():
        raise InputError(f"--working-dir {call.working_dir}: no such folder")
    job_id = jobs.submit(command, working_dir=call.working_dir)
    say(job_id)
    if call.follow:
        try:
            jobs.follow(job_id, _write)
        except KeyboardInterrupt:
            jobs.cancel(job_id)
            raise


def _list(call: argparse.Namespace, jobs: Jobs) -> None:
    found = jobs.all()
    if call.json:
        say(json.dumps([job._asdict() for job in found]))
        return
    for job in found:
        say(f"{job.job_id}  {job.state:<9}  {_when(job.started_s)}  {job.command}")


def _status(call: argparse.Namespace, jobs: Jobs) -> None:
    job = jobs.one(call.job)
    ended = "" if job.ended_s is None else f", ended {_when(job.ended_s)}"
    say(f"{job.job_id}: {job.state}, started {_when(job.started_s)}{ended}")
    say(job.message)


def _logs(call: argparse.Namespace, jobs: Jobs) -> None:
    if call.follow:
        jobs.follow(call.job, _write)
    else:
        _write(jobs.logs(call.job))


def _cancel(call: argparse.Namespace, jobs: Jobs) -> None:
    say(f"{call.job} is stopped" if jobs.cancel(call.job) else f"{call.job} had ended")


def _write(lines: str) -> None:
    sys.stdout.write(lines)
    sys.stdout.flush()


def _when(seconds: float | None) -> str:
    return "not yet" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
