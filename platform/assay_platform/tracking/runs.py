"""Runs in MLflow: parameters, metrics, tags, and nested runs for the trials of a search."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from assay_platform.tracking.client import open_client

_PARAM_LIMIT, _BATCH_LIMIT, _MOST_RUNS = 500, 1000, 200


class RunLog:
    """Writes one MLflow run and its children."""

    def __init__(self, tracking_uri: str, artifact_root: Path) -> None:
        """artifact_root: where artifacts go with an SQLite store; a tracking server has its own."""
        self._client = open_client(tracking_uri)
        self._artifact_root = artifact_root if tracking_uri.startswith("sqlite:") else None
        self.run_id, self.tags, self.params = "", dict[str, str](), dict[str, Any]()

    @contextmanager
    def run(self, experiment: str, tags: Mapping[str, str]) -> Iterator["RunLog"]:
        """Start a run; it ends FINISHED, FAILED on an error, KILLED on Ctrl-C."""
        found = self._client.get_experiment_by_name(experiment)
        if found is not None:
            experiment_id = found.experiment_id
        else:
            location = None if self._artifact_root is None else (self._artifact_root / experiment).as_uri()
            experiment_id = self._client.create_experiment(experiment, artifact_location=location)
        all_tags = {"assay.version": version("assay"), **tags}
        self.run_id, self.tags, self.params = (
            self._client.create_run(experiment_id, tags=all_tags).info.run_id,
            all_tags,
            {},
        )
        self._experiment_id = experiment_id
        try:
            yield self
        except KeyboardInterrupt:
            self._client.set_terminated(self.run_id, "KILLED")
            raise
        except BaseException:
            self._client.set_terminated(self.run_id, "FAILED")
            raise
        self._client.set_terminated(self.run_id, "FINISHED")

    def log(self, *, params: Mapping[str, Any] | None = None, metrics: Mapping[str, float] | None = None) -> None:
        """Record parameters and metrics of the run."""
        self.params |= params or {}
        self._log(self.run_id, params or {}, metrics or {})

    def log_steps(self, name: str, values: list[float]) -> None:
        """Record a metric once an epoch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, [Metric(name, v, now, step) for step, v in enumerate(values, start=1)])

    def log_history(self, history: Mapping[str, list[float]]) -> None:
        """Record many metrics once an epoch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, v, now, step) for name, values in history.items() for step, v in enumerate(values, 1)]
        for start in range(0, len(metrics), _BATCH_LIMIT):
            self._client.log_batch(self.run_id, metrics[start : start + _BATCH_LIMIT])

    def log_figure(self, name: str, draw: Callable[[Path], None]) -> None:
        """Attach a figure to the run. draw: writes it to a path."""
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder) / name)
            self._client.log_artifact(self.run_id, str(Path(folder) / name))

    def log_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Attach a JSON document to the run."""
        self._client.log_dict(self.run_id, dict(value), name)

    def log_text(self, name: str, text: str) -> None:
        """Attach a text to the run."""
        self._client.log_text(self.run_id, text, name)

    def earlier_searches(self, names: Sequence[str], *, tag: str, param: str) -> list[dict[str, str]]:
        """Parameters of finished runs of this experiment that found a best point with these names, newest first.

        tag: the same as this run's. param: one that they must have too.
        """
        runs = self._client.search_runs(
            [self._experiment_id],
            filter_string=f"tags.`{tag}` = '{self.tags[tag]}' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=_MOST_RUNS,
        )
        wanted = {param, *(f"best.{name}" for name in names)}
        return [dict(run.data.params) for run in runs if wanted <= set(run.data.params)]

    def log_trial(self, name: str, params: Mapping[str, Any], metrics: Mapping[str, float], *, ok: bool) -> None:
        """Record one trial of a search as a child run."""
        tags = {"mlflow.parentRunId": self.run_id, "mlflow.runName": name}
        child = self._client.create_run(self._experiment_id, tags=tags).info.run_id
        self._log(child, params, metrics)
        self._client.set_terminated(child, "FINISHED" if ok else "FAILED")

    def _log(self, run_id: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, float(value), now, 0) for name, value in metrics.items()],
            params=[Param(name, str(value)[:_PARAM_LIMIT]) for name, value in params.items()],
        )
