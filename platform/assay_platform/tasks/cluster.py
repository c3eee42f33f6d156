"""Ray for the length of one command: a local cluster of this machine, or the one we run inside of.

A local cluster keeps its files in a folder of its own and leaves nothing behind. Inside a Ray job, or where
RAY_ADDRESS names a cluster, that cluster is used and left running.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from assay_platform.errors import ClusterError

_OBJECT_STORE_BYTES = 400 * 1024 * 1024


def quiet_ray_environment() -> None:
    """Settings that Ray reads at import: no usage report, no warnings that a user cannot act on."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


def may_be_shared() -> bool:
    """Whether other programs can be on the cluster too; a local one is this program's alone."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def ray_cluster(num_cpus: int | None = None) -> Iterator[None]:
    """Make Ray usable inside the block.

    num_cpus: cores of a local cluster, default all.

    Raises:
        ClusterError: Ray could not be started or the named cluster not be reached.
    """
    quiet_ray_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    folder = None if address else tempfile.mkdtemp(prefix="assay-ray-")
    try:
        try:
            if address:
                ray.init(address="auto" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else address,
                         log_to_driver=False, logging_level=logging.ERROR)  # fmt: skip
            else:
                ray.init(
                    address="local",
                    num_cpus=num_cpus or os.cpu_count(),
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=folder,
                    _node_ip_address="127.0.0.1",
                )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
            where = f"the cluster at {address}" if address else "a local cluster"
            raise ClusterError(f"{where} could not be used: {error}; `assay doctor` checks Ray") from error
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
