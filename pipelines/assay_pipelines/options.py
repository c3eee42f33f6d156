"""What both applications are run with, and what they report."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assay_features.definitions import FeaturePlan
from assay_features.rules import Rule
from assay_features.schema import Schema, TableSchema
from assay_platform.config import Config
from assay_platform.errors import ConfigError
from assay_platform.storage import write_json

if TYPE_CHECKING:
    from assay_platform.training import Checkpoint, UpdateOn, Workers


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """One run of a pipeline.

    data: name of the data set or path, as the user gave it. budget_s: seconds for the search. max_trials: an
    upper limit besides. num_held_back: newest rows that the run must not see at all (the demo replays them).
    search_name: a search that is remembered, and gone on with where it stopped, as is the training after it (fraud).
    plan: features instead of those that the schema gives by itself (fraud). rules: decide before the model (fraud).
    update: the champion learns on instead of being trained anew (fraud). recalibrate: only its probabilities move.
    update_on: where the weights of nets on the backbone are updated, see `TrainConfig`. num_workers: how many train a
    net together, on Ray; 1: this process.
    """

    config: Config
    application: str
    data: str
    table: Path
    schema: Schema | TableSchema
    schema_folder: Path
    model_name: str
    seed: int = 42
    budget_s: float = 120.0
    max_trials: int = 30
    search_name: str | None = None
    max_rows: int | None = None
    num_held_back: int = 0
    refit_on_all: bool = True
    plan: FeaturePlan | None = None
    rules: tuple[Rule, ...] = ()
    update: bool = False
    update_on: "UpdateOn" = "device"
    recalibrate: bool = False
    num_workers: int = 1

    def __post_init__(self) -> None:
        if not self.budget_s > 0:
            raise ConfigError(f"--budget is {self.budget_s}; it must be above 0 seconds")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"--seed is {self.seed}; allowed are 0 to {2**31 - 1}")
        if self.num_workers < 1:
            raise ConfigError(f"--workers is {self.num_workers}; it must be at least 1")

    @property
    def workers(self) -> "Workers":
        """That train a net."""
        from assay_platform.training import Workers

        return Workers(num=self.num_workers, folder=self.config.paths.training)

    def checkpoint(self, part: str, identity: str) -> "Checkpoint | None":
        """How far the training of a part is, in a run that has a name. identity: of data and hyperparameters."""
        from assay_platform.training import Checkpoint

        return None if self._checkpoints is None else Checkpoint(self._checkpoints / f"{part}.pt", identity)

    def searched(self, identity: str, search: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a search finds, or found before a run of this name was cut off. identity: of data and seed."""
        if self._checkpoints is None:
            return search()
        path = self._checkpoints / "search.json"
        with suppress(OSError, ValueError, KeyError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                best: dict[str, Any] = kept["best"]
                return best
        found = search()
        write_json(path, {"identity": identity, "best": found})
        return found

    def forget_checkpoints(self) -> None:
        """The run is done."""
        if self._checkpoints is not None:
            shutil.rmtree(self._checkpoints, ignore_errors=True)

    @property
    def _checkpoints(self) -> Path | None:
        return (
            None if self.search_name is None else self.config.paths.searches / f"{self.model_name}-{self.search_name}"
        )

    @property
    def event_schema(self) -> Schema:
        """The schema of a table of events: every one but `assay automl`'s own kind."""
        assert not isinstance(self.schema, TableSchema)  # no other command reads that kind
        return self.schema

    @property
    def feature_repository(self) -> Path:
        """Folder of the model's Feast repository."""
        return self.config.paths.feature_repositories / self.model_name


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a run came to; `to_dict` is the object that `--json` prints."""

    application: str
    data: str
    rows: int
    model_name: str
    version: int
    alias: str
    gate: str
    metrics: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]]
    timings_s: Mapping[str, float]
    mlflow_run_id: str
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, as the contract has it."""
        return {
            "application": self.application,
            "data": self.data,
            "rows": self.rows,
            "model": {"name": self.model_name, "version": self.version, "alias": self.alias},
            "gate": self.gate,
            "metrics": dict(self.metrics),
            "baselines": {name: dict(values) for name, values in self.baselines.items()},
            "timings_s": {name: round(value, 2) for name, value in self.timings_s.items()},
            "mlflow_run_id": self.mlflow_run_id,
        }
