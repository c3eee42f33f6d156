"""`assay doctor`: is everything there that a run needs, and if not, how to mend it."""

import shutil
import socket
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from assay_platform.config import Config
from assay_platform.errors import AssayError

from assay_pipelines.console import say

_PACKAGES = ("ray", "feast", "torch", "torch-geometric", "mlflow", "fastapi", "optuna", "lightgbm")
_NEEDED_GIB = 3.0


class Finding(NamedTuple):
    """One check. mend: what to do, where it is not fine."""

    fine: bool
    text: str
    mend: str = ""


def examine(config: Config) -> int:
    """Run all checks and print them; 0 if all are fine."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _packages,
        lambda: _disk(config),
        lambda: _port(config),
        _gpu,
        _ray,
        lambda: _store(config),
        lambda: _registry(config),
    ]
    findings = [check() for check in checks]
    for finding in findings:
        say(f"{'ok  ' if finding.fine else 'FAIL'}  {finding.text}")
        if not finding.fine:
            say(f"      mend: {finding.mend}")
    return 0 if all(finding.fine for finding in findings) else 1


def _python() -> Finding:
    return Finding(sys.version_info >= (3, 11), f"Python {sys.version.split()[0]}", "use Python 3.11 or newer")


def _packages() -> Finding:
    missing = []
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    return Finding(not missing, "packages: " + ", ".join(found), f"`make run` installs {', '.join(missing)}")


def _disk(config: Config) -> Finding:
    folder = config.paths.home
    while not folder.exists():
        folder = folder.parent
    free_gib = shutil.disk_usage(folder).free / 2**30
    return Finding(
        free_gib >= _NEEDED_GIB,
        f"disk: {free_gib:.1f} GiB free for {config.paths.home}",
        f"free at least {_NEEDED_GIB:.0f} GiB, or set ASSAY_HOME to another disk",
    )


def _port(config: Config) -> Finding:
    host, port = config.service.host, config.service.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return Finding(False, f"port {host}:{port} ({error.strerror})", "stop what holds it, or use --port")
    return Finding(True, f"port {host}:{port} is free")


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding(True, f"GPU: {torch.cuda.get_device_name(0)}")
    return Finding(True, f"GPU: none, everything runs on {torch.get_num_threads()} CPU threads")


def _ray() -> Finding:
    from assay_platform.tasks.cluster import ray_cluster

    try:
        with ray_cluster(num_cpus=1):
            return Finding(True, "Ray starts and stops")
    except AssayError as error:
        return Finding(False, f"Ray: {error}", "look for old clusters with `ray status`; unset RAY_ADDRESS")


def _store(config: Config) -> Finding:
    from assay_features.feast.repository import FeatureRepository

    folder = config.paths.feature_repositories
    names = sorted(path.parent.name for path in folder.glob("*/feature_store.yaml"))
    for name in names:
        try:
            FeatureRepository(folder / name).store.list_feature_views()
        except (AssayError, OSError, ValueError) as error:
            return Finding(False, f"feature store {name}: {error}", f"delete {folder / name} and run again")
    return Finding(True, f"feature store: {len(names)} repositories opened" if names else "feature store: empty yet")


def _registry(config: Config) -> Finding:
    from assay_platform.tracking import AuditLog

    from assay_pipelines.tracking import open_registry

    try:
        models = len({row.name for row in open_registry(config).versions()})
        entries = AuditLog(config.paths.audit_log).verify()
    except AssayError as error:
        return Finding(False, f"registry: {error}", "restore the home folder from a backup")
    return Finding(True, f"registry: {models} models, audit log of {entries} entries is whole")
