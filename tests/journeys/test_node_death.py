"""A cluster of several nodes on one machine runs a submitted job through the death of a node.

The cluster has a network of its own, with nothing but loopback, so that it meets no other cluster of this machine.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

BIN = Path(sys.executable).parent
WAIT_S = 240
TASKS = """\
import os, sys, time
from assay_platform.tasks.cluster import ray_cluster
from assay_platform.tasks.dispatch import Dispatcher
from assay_platform.tasks.task import Kind, Task
from assay_platform.tasks.workers import RayWorkers
import ray

def work(place, folder, number):
    node = ray.get_runtime_context().get_node_id()
    open(os.path.join(folder, f"{node}-{number}-{place.attempt}"), "w").close()
    time.sleep(1)
    return number * number

with ray_cluster(), Dispatcher(RayWorkers()) as dispatcher:
    tasks = [Task(work=work, args=(sys.argv[1], n), kind=Kind.FEATURE, retries=5) for n in range(40)]
    futures = [dispatcher.submit(task) for task in tasks]
    print("sum", sum(future.result() for future in futures))
"""


class Cluster:
    """A head and two more nodes, a core each, in a network namespace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
            "HOME": str(folder / "home"),
            "ASSAY_HOME": str(folder / "assay"),
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(folder / "ray"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a" * 64,  # of a cluster that nobody else can reach
            "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "3",
        }
        for name in ("home", "ray", "assay", "out"):
            (folder / name).mkdir()
        keep = ["unshare", "--net", "--map-root-user", "sh", "-c", "ip link set lo up && echo up && exec sleep 600"]
        self._namespace = subprocess.Popen(keep, stdout=subprocess.PIPE, text=True)
        assert self._namespace.stdout is not None
        if self._namespace.stdout.readline() != "up\n":
            pytest.skip("this machine gives tests no network namespace")
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.nodes.append(self._start("--head", "--port=6379", "--dashboard-host=127.0.0.1", "--dashboard-port=8265"))
        for number in (1, 2):
            ports = f"--min-worker-port={20000 + 1000 * number} --max-worker-port={20900 + 1000 * number}"
            more = f"--dashboard-agent-listen-port={52365 + number} --metrics-export-port={53365 + number} {ports}"
            self.nodes.append(self._start("--address=127.0.0.1:6379", *more.split()))

    def _enter(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self._namespace.pid), "--user", "--preserve-credentials", "--net", *command]

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        sizes = ["--num-cpus=1", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1"]
        command = self._enter(str(BIN / "ray"), "start", *options, *sizes, "--block", "--disable-usage-stats")
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("wb") as out:
            node = subprocess.Popen(command, env=self.env, stdout=out, stderr=out, start_new_session=True)
        # One after the other: two that start at once on one address take each other's files.
        until = time.monotonic() + WAIT_S
        while b"Ray runtime started" not in log.read_bytes():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        return node

    def assay(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = self._enter(str(BIN / "assay"), *arguments)
        return subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=self.folder
        )

    def kill(self, number: int) -> None:
        """All processes of a node at once."""
        node = psutil.Process(self.nodes[number].pid)
        for process in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes[number].wait()

    def close(self) -> None:
        for number, node in enumerate(self.nodes):
            if node.poll() is None:
                self.kill(number)
        self._namespace.kill()
        self._namespace.wait()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("this machine has no unshare")
    cluster = Cluster(tmp_path_factory.mktemp("c"))
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_job_outlives_a_node(cluster: Cluster) -> None:
    (cluster.folder / "tasks.py").write_text(TASKS)
    out = cluster.folder / "out"
    until = time.monotonic() + WAIT_S
    command = ["jobs", "submit", "--", sys.executable, str(cluster.folder / "tasks.py"), str(out)]
    while (job := cluster.assay(*command)).returncode != 0 and time.monotonic() < until:
        time.sleep(1)
    assert job.returncode == 0, job.stderr
    while len({path.name.split("-")[0] for path in out.iterdir()}) < 3 and time.monotonic() < until:
        time.sleep(0.2)
    cluster.kill(2)
    logs = cluster.assay("jobs", "logs", "--follow", job.stdout.strip())
    assert f"sum {sum(n * n for n in range(40))}" in logs.stdout, logs.stdout + logs.stderr
    assert any(path.name.endswith("-2") for path in out.iterdir())  # some were started again
