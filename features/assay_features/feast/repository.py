"""The Feast repository of one model's features.

Every entity of a plan has two feature views:

    <entity>_values_<version>   offline: features at the (key, time) pairs that training asks for
    <entity>_state_<version>    online: the entity's state, from which features are read at any later time

Training retrieves values through `get_historical_features`; serving reads states through
`get_online_features` and calls `StateLayout.apply` with the time of the request. Both come from the same
definitions, and the plan's version in the name keeps a model with the definitions it was trained on.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from assay_platform.storage import atomic_file, write_bytes
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Bytes, Float64, String

from assay_features.batch import EntityStates
from assay_features.definitions import FeaturePlan
from assay_features.events import Events
from assay_features.feast.offline_store import CLASS_PATH, TIMESTAMP
from assay_features.state import Floats, StateLayout, Times

_STATE, _SEQUENCE = "state", "sequence"
# Feast refuses an empty key; canonical keys are never empty, so this one is never found.
_NO_KEY = " "


class FeatureRepository:
    """Feast objects, files and stores of one model name.

    Thread-safe: reads and writes of the online store are serialised, as Feast shares one SQLite connection.
    """

    def __init__(self, folder: Path) -> None:
        """folder: where `feature_store.yaml`, registry, online store and Parquet files live; named as the model."""
        self.folder = folder
        self._lock = RLock()
        config = {
            # Feast allows letters, digits and underscores.
            "project": "".join(c if c.isalnum() else "_" for c in folder.name),
            "provider": "local",
            "registry": {"path": "registry.db", "cache_ttl_seconds": 0},
            "offline_store": {"type": CLASS_PATH},
            "online_store": {"type": "sqlite", "path": "online.db"},
            "materialization": {"pull_latest_features": True},
            "entity_key_serialization_version": 3,
        }
        text = yaml.safe_dump(config, sort_keys=False)
        file = folder / "feature_store.yaml"
        if not file.is_file() or file.read_text() != text:
            write_bytes(file, text.encode())
        self.store = FeatureStore(repo_path=str(folder))

    def publish(
        self, plan: FeaturePlan, values: Mapping[str, pd.DataFrame], states: Mapping[str, EntityStates]
    ) -> None:
        """Write the files, register all objects, materialise the states.

        values: entity → frame of key, event_timestamp and the entity's features. states: entity → states.
        """
        objects: list[Any] = []
        value_views, state_views = [], []
        for entity in plan.entities:
            feast_entity = Entity(name=entity, join_keys=[entity], value_type=ValueType.STRING)
            objects.append(feast_entity)
            if entity in values:
                path = self._write(
                    f"{_values_view(plan, entity)}.parquet",
                    pa.Table.from_pandas(values[entity], preserve_index=False),
                )
                value_views.append(
                    FeatureView(
                        name=_values_view(plan, entity),
                        entities=[feast_entity],
                        schema=[Field(name=d.name, dtype=Float64, description=repr(d)) for d in plan.of_entity(entity)],
                        source=_source(_values_view(plan, entity), path),
                        online=False,
                    )
                )
            path = self._write(f"{_state_view(plan, entity)}.parquet", _state_table(entity, states[entity]))
            state_views.append(
                FeatureView(
                    name=_state_view(plan, entity),
                    entities=[feast_entity],
                    schema=[Field(name=_STATE, dtype=Bytes), Field(name=_SEQUENCE, dtype=Array(String))],
                    source=_source(_state_view(plan, entity), path),
                    online=True,
                )
            )
        services = [FeatureService(name=_online_service(plan), features=list[Any](state_views))]
        if value_views:
            services.append(FeatureService(name=_training_service(plan), features=list[Any](value_views)))
        with self._lock:
            self.store.apply([*objects, *value_views, *state_views, *services])
            times = np.concatenate([s.time_us for s in states.values()])
            if len(times):
                first, last = (datetime.fromtimestamp(int(t) / 1e6, tz=UTC) for t in (times.min(), times.max()))
                # Feast prints its progress; ours is shown by whoever called.
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    self.store.materialize(
                        first - timedelta(seconds=1),
                        last + timedelta(seconds=1),
                        [view.name for view in state_views],
                    )

    def training_features(self, plan: FeaturePlan, spine: Events) -> dict[str, Floats]:
        """Point-in-time features of every spine row, in order, through Feast's `get_historical_features`."""
        frame = pd.DataFrame({entity: spine.keys[entity] for entity in plan.entities if entity in spine.keys})
        frame[TIMESTAMP] = pd.to_datetime(spine.time_us, unit="us", utc=True)
        service = self.store.get_feature_service(_training_service(plan))
        table = self.store.get_historical_features(entity_df=frame, features=service).to_arrow()
        return {
            name: table[name].to_numpy().astype(np.float64) for name in plan.numeric_names if name in table.column_names
        }

    def online(self, plan: FeaturePlan) -> "OnlineFeatures":
        """The serving side of a plan that was published here."""
        return OnlineFeatures(self, plan)

    def read_states(
        self, plan: FeaturePlan, entity_keys: Mapping[str, Sequence[str | None]]
    ) -> dict[str, list[tuple[bytes | None, list[str]]]]:
        """Raw states of N rows of keys, one call to `get_online_features` for all entities."""
        names = [name for name in plan.entities if name in entity_keys]
        num_rows = len(entity_keys[names[0]])
        rows = [{name: entity_keys[name][i] or _NO_KEY for name in names} for i in range(num_rows)]
        refs = [f"{_state_view(plan, name)}:{feature}" for name in names for feature in (_STATE, _SEQUENCE)]
        with self._lock:
            response = self.store.get_online_features(features=refs, entity_rows=rows, full_feature_names=True)
        found = response.to_dict()
        return {
            name: list(
                zip(
                    found[f"{_state_view(plan, name)}__{_STATE}"],
                    [list(v or ()) for v in found[f"{_state_view(plan, name)}__{_SEQUENCE}"]],
                    strict=True,
                )
            )
            for name in names
        }

    def write_state(
        self, plan: FeaturePlan, entity: str, key: str, time_us: int, state: Floats, sequence: list[str]
    ) -> None:
        """Replace one entity's state in the online store."""
        frame = pd.DataFrame(
            {
                entity: [key],
                TIMESTAMP: [pd.Timestamp(time_us, unit="us", tz="UTC")],
                _STATE: [state.astype("<f8").tobytes()],
                _SEQUENCE: [sequence],
            }
        )
        with self._lock:
            self.store.write_to_online_store(_state_view(plan, entity), frame, allow_registry_cache=True)

    def locked(self) -> RLock:
        """Held around read-modify-write of states."""
        return self._lock

    def _write(self, name: str, table: pa.Table) -> Path:
        path = self.folder / "offline" / name
        with atomic_file(path) as part:
            pq.write_table(table, part, coerce_timestamps="us", compression="zstd")
        return path


class OnlineRows(NamedTuple):
    """What the online store knows about N requests."""

    values: dict[str, Floats]  # feature name → (N,)
    sequences: dict[str, list[list[str]]]  # entity → N sequences, oldest first


class OnlineFeatures:
    """Reads features for scoring, and folds new events into states."""

    def __init__(self, repository: FeatureRepository, plan: FeaturePlan) -> None:
        self.plan = plan
        self._repository = repository
        self._layouts = {entity: StateLayout(plan.of_entity(entity)) for entity in plan.entities}

    def read(
        self, keys: Mapping[str, Sequence[str | None]], time_us: Sequence[int] | np.ndarray[Any, Any]
    ) -> OnlineRows:
        """Features of N rows, each at its own time; entities not in `keys` are left out."""
        moments = np.asarray(time_us, dtype=np.int64)
        values: dict[str, Floats] = {}
        sequences: dict[str, list[list[str]]] = {}
        for entity, rows in self._repository.read_states(self.plan, keys).items():
            layout = self._layouts[entity]
            states = _unpack(layout, rows)
            features = layout.apply(states, moments)
            missing = np.array([key is None for key in keys[entity]], dtype=bool)
            features[missing] = np.nan
            values.update(zip(layout.names, features.T, strict=True))
            sequences[entity] = [sequence for _, sequence in rows]
        return OnlineRows(values, sequences)

    def states(self, entity: str, keys: Sequence[str]) -> Floats:
        """(N, S) raw states of N keys, for those who keep them at hand; empty states for unknown keys."""
        return _unpack(self._layouts[entity], self._repository.read_states(self.plan, {entity: keys})[entity])

    def apply(self, entity: str, states: Floats, time_us: Times) -> dict[str, Floats]:
        """Features of states that `states` returned, by name."""
        layout = self._layouts[entity]
        return dict(zip(layout.names, layout.apply(states, time_us).T, strict=True))

    def add(self, events: Events) -> None:
        """Fold events into the states of their entities, in the order given.

        Atomic for each entity, serialised within this process. Two processes that write one entity at the same
        time can lose one update: run one writer a store.
        """
        with self._repository.locked():
            for i in range(len(events)):
                self._add_one(events, i)

    def _add_one(self, events: Events, i: int) -> None:
        time_us = int(events.time_us[i])
        keys = {entity: [events.keys[entity][i]] for entity in self.plan.entities}
        current = self._repository.read_states(self.plan, keys)
        for entity, layout in self._layouts.items():
            key = events.keys[entity][i]
            if key is None:
                continue
            [(raw, recent)] = current[entity]
            state = layout.empty()[0] if raw is None else np.frombuffer(raw, dtype="<f8")
            after = layout.update(state, time_us, {name: events.numbers[name][i] for name in layout.columns})
            sequence = self.plan.sequence_of(entity)
            if sequence is not None and events.keys[sequence.column][i] is not None:
                recent = [*recent, events.keys[sequence.column][i]][-sequence.length :]
            newest_us = int(after[0])
            self._repository.write_state(self.plan, entity, key, newest_us, after, recent)


def _unpack(layout: StateLayout, rows: list[tuple[bytes | None, list[str]]]) -> Floats:
    states = layout.empty(len(rows))
    for i, (state, _) in enumerate(rows):
        if state is not None:
            states[i] = np.frombuffer(state, dtype="<f8")
    return states


def value_frames(plan: FeaturePlan, spine: Events, values: Mapping[str, Floats]) -> dict[str, pd.DataFrame]:
    """Feature values at spine rows as the frames that `publish` takes: one row a (key, time), no null keys."""
    frames = {}
    for entity in plan.entities:
        names = [d.name for d in plan.of_entity(entity)]
        if not names:
            continue
        frame = pd.DataFrame({entity: spine.keys[entity]} | {name: values[name] for name in names})
        frame[TIMESTAMP] = pd.to_datetime(spine.time_us, unit="us", utc=True)
        frames[entity] = frame[frame[entity].notna()].drop_duplicates([entity, TIMESTAMP])
    return frames


def _values_view(plan: FeaturePlan, entity: str) -> str:
    return f"{entity}_values_{plan.version}"


def _state_view(plan: FeaturePlan, entity: str) -> str:
    return f"{entity}_state_{plan.version}"


def _training_service(plan: FeaturePlan) -> str:
    return f"training_{plan.version}"


def _online_service(plan: FeaturePlan) -> str:
    return f"online_{plan.version}"


def _source(name: str, path: Path) -> FileSource:
    return FileSource(name=name, path=str(path), timestamp_field=TIMESTAMP)


def _state_table(entity: str, states: EntityStates) -> pa.Table:
    return pa.table(
        {
            entity: pa.array(states.keys.tolist(), pa.string()),
            TIMESTAMP: pa.array(states.time_us, pa.timestamp("us", tz="UTC")),
            _STATE: pa.array([row.astype("<f8").tobytes() for row in states.states], pa.binary()),
            _SEQUENCE: pa.array(states.sequences, pa.list_(pa.string())),
        }
    )
