"""One place that points MLflow at our store and shuts what must be shut before it is imported."""

import fcntl
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


def configure_mlflow() -> None:
    """Refuse pickled models, send no telemetry, draw no progress bars. Safe to repeat."""
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(name).setLevel(logging.WARNING)


def open_client(tracking_uri: str) -> "MlflowClient":
    """A client of tracking and registry; creates an SQLite store that is not there yet."""
    configure_mlflow()
    import mlflow
    from mlflow import MlflowClient

    # SQLAlchemy deprecates what MLflow uses, and MLflow asks for an example that our signatures make needless.
    warnings.filterwarnings("ignore", message=".*noload.*loader strategy.*")
    warnings.filterwarnings("ignore", message=".*input example was not provided.*")
    if tracking_uri.startswith("sqlite:///"):
        _create_store(Path(tracking_uri.removeprefix("sqlite:///")))
    # The fluent functions (log_model) read the global URI; client and global must agree.
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _create_store(path: Path) -> None:
    """MLflow makes its tables in some fifty migrations; a store that Ctrl-C caught between two would never open again.

    So they happen in a file aside, which gets its name when they are done.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        aside = Path(folder) / path.name
        uri = f"sqlite:///{aside}"
        MlflowClient(tracking_uri=uri, registry_uri=uri).search_experiments(max_results=1)
        with path.with_name(f".{path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():  # another process may have been faster, and have written to it since
                aside.rename(path)
