"""Submit a command to a Ray cluster as a job and follow its log to the end."""

import asyncio
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from assay_platform.errors import ClusterError
from assay_platform.tasks.cluster import quiet_ray_environment


def submit_and_follow(
    address: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    working_dir: Path | None,
    write: Callable[[str], None],
) -> str:
    """Run `command` on the cluster and pass its log on as it grows; returns the job's id when it succeeded.

    address: of the cluster's job server, such as http://127.0.0.1:8265. working_dir: files that the command
    needs, sent along; the command runs inside of it. Ctrl-C stops the job on the cluster too.

    Raises:
        ClusterError: the cluster cannot be reached, or the job failed or was stopped.
    """
    quiet_ray_environment()
    from ray.job_submission import JobStatus, JobSubmissionClient

    runtime_env: dict[str, object] = {"env_vars": dict(environment)}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    try:
        client = JobSubmissionClient(address)
        job_id: str = client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no job could be submitted to {address}: {error}") from error

    async def follow() -> None:
        async for lines in client.tail_job_logs(job_id):
            write(lines)

    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        client.stop_job(job_id)
        raise
    status = client.get_job_status(job_id)
    if status != JobStatus.SUCCEEDED:
        raise ClusterError(f"job {job_id} on {address} ended as {status}: {client.get_job_info(job_id).message}")
    return job_id
