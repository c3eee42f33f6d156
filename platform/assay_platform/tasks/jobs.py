"""Jobs of a Ray cluster: commands that are sent to it, run there, and are followed from here.

A cluster that asks for a token is given the one that Ray itself looks for (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH).
"""

import asyncio
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from assay_platform.errors import ClusterError, JobLostError
from assay_platform.tasks.cluster import quiet_ray_environment

_READY_S, _POLL_S = 120.0, 1.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_MAX_RESUBMITTED = 2
# What Ray says where the command ran to an end that was none of Ray's.
_COMMAND_FAILED = "entrypoint command failed"


class Job(NamedTuple):
    """state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. started_s, ended_s: since 1970; None: not yet."""

    job_id: str
    state: str
    command: str
    started_s: float | None
    ended_s: float | None
    message: str


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str) -> None:
        """address: of the cluster's job server, such as http://127.0.0.1:8265.

        Raises:
            ClusterError: the cluster cannot be reached.
        """
        quiet_ray_environment()
        from ray.job_submission import JobSubmissionClient

        self._address = address
        with self._told("the cluster cannot be reached"):
            self._client = JobSubmissionClient(address)

    def submit(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, working_dir: Path | None = None
    ) -> str:
        """Run a command on the cluster; returns the job's id.

        working_dir: files that the command needs, sent along; the command runs inside of it.

        Raises:
            ClusterError: it was not taken.
        """
        runtime_env: dict[str, Any] = {"env_vars": dict(environment or {})}
        if working_dir is not None:
            runtime_env["working_dir"] = str(working_dir)
        until = time.monotonic() + _READY_S
        while True:
            try:
                with self._told("no job could be submitted"):
                    return str(self._client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env))
            except ClusterError as error:
                # A cluster that has just started answers before it can take jobs.
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.5)

    def all(self) -> list[Job]:
        """Every job that was submitted, newest first."""
        with self._told("its jobs cannot be listed"):
            details = self._client.list_jobs()
        jobs = [_job(found) for found in details if found.submission_id]
        return sorted(jobs, key=lambda job: -(job.started_s or float("inf")))

    def one(self, job_id: str) -> Job:
        """Raises:
        ClusterError: there is no such job.
        """
        with self._told(f"there is no job {job_id!r}"):
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """What it has written so far."""
        with self._told(f"there is no job {job_id!r}"):
            text: str = self._client.get_job_logs(job_id)
        return text

    def follow(self, job_id: str, write: Callable[[str], None]) -> None:
        """Pass its log on as it grows, until it succeeded.

        Raises:
            JobLostError: the node that it ran on was lost.
            ClusterError: it failed or was stopped.
        """

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(job_id):
                write(lines)

        with suppress(ConnectionError, RuntimeError):  # the node that has the log can be lost; what counts comes next
            asyncio.run(tail())
        while (job := self.one(job_id)).state not in _ENDED:
            time.sleep(_POLL_S)  # Ray learns of a lost node later than of its log
        if job.state != "SUCCEEDED":
            lost = job.state == "FAILED" and _COMMAND_FAILED not in job.message
            error = JobLostError if lost else ClusterError
            raise error(f"job {job_id} on {self._address} ended as {job.state}: {job.message}")

    def cancel(self, job_id: str) -> bool:
        """Stop a job; False where it had ended."""
        with self._told(f"there is no job {job_id!r}"):
            return bool(self._client.stop_job(job_id))

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ConnectionError, RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines()
            raise ClusterError(f"{self._address}: {what}: {lines[-1] if lines else type(error).__name__}") from error


def submit_and_follow(
    address: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    working_dir: Path | None,
    write: Callable[[str], None],
) -> str:
    """Run `command` on the cluster and pass its log on as it grows; returns the job's id when it succeeded.

    Ctrl-C stops the job on the cluster too. A job whose node is lost is submitted again, twice at most.

    Raises:
        ClusterError: the cluster cannot be reached, or the job failed or was stopped.
    """
    jobs = Jobs(address)
    for again in range(_MAX_RESUBMITTED, -1, -1):
        job_id = jobs.submit(command, environment=environment, working_dir=working_dir)
        try:
            jobs.follow(job_id, write)
        except KeyboardInterrupt:
            jobs.cancel(job_id)
            raise
        except JobLostError as error:
            if not again:
                raise
            write(f"{error}; it is submitted again\n")
        else:
            break
    return job_id


def _job(found: Any) -> Job:
    started, ended = (None if ms is None else ms / 1000 for ms in (found.start_time, found.end_time))
    state = str(getattr(found.status, "value", found.status))
    return Job(str(found.submission_id), state, str(found.entrypoint), started, ended, str(found.message or ""))
