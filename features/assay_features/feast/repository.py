"""The Feast repository of one model's features.

Every entity of a plan has two feature views:

    <entity>_values_<version>   offline: features at the (key, time) pairs that training asks for
    <entity>_state_<version>    online: the entity's state, from which features are read at any later time

Training retrieves values through `get_historical_features`; serving reads states from the online store's tiers and
applies them at the time of the request. Both come from the same definitions, and the plan's version in the name
keeps a model with the definitions it was trained on.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from assay_platform.storage import atomic_file, write_bytes, write_json
from assay_platform.storage.tiered import TieredStore
from feast import Entity as FeastEntity
from feast import FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Bytes, Float64

from assay_features.batch import EntityStates, final_states
from assay_features.definitions import Entity, FeaturePlan, as_code, entity_columns, entity_name
from assay_features.embeddings import EmbeddingTable, load_tables
from assay_features.events import Events, key_column
from assay_features.feast.offline_store import CLASS_PATH as OFFLINE
from assay_features.feast.offline_store import TIMESTAMP
from assay_features.feast.online_store import CLASS_PATH as ONLINE
from assay_features.feast.online_store import FAMILY_TAG, open_store
from assay_features.state import Floats, entity_keys
from assay_features.stream import EventStream, StreamSettings, state_view


class FeatureRepository:
    """Feast objects, files and stores of one model name. Thread-safe."""

    def __init__(
        self,
        folder: Path,
        *,
        online: Mapping[str, Any] | None = None,
        stream: StreamSettings | None = None,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        """folder: where `feature_store.yaml`, registry, online store and Parquet files live; named as the model.

        online: further settings of the online store, such as `cold` or `valkey`; kept in the file. may_write: see
        `EventStream`.
        """
        self.folder = folder
        self._stream_settings, self._may_write = stream or StreamSettings(), may_write
        self._lock = RLock()
        self._streams: dict[str, EventStream] = {}
        file = folder / "feature_store.yaml"
        config = {
            # Feast allows letters, digits and underscores.
            "project": "".join(c if c.isalnum() else "_" for c in folder.name),
            "provider": "local",
            "registry": {"path": "registry.db", "cache_ttl_seconds": 0},
            "offline_store": {"type": OFFLINE},
            "online_store": {"type": ONLINE, "path": "online", **(_given_online(file) if online is None else online)},
            "entity_key_serialization_version": 3,
        }
        text = yaml.safe_dump(config, sort_keys=False)
        if not file.is_file() or file.read_text() != text:
            write_bytes(file, text.encode())
        self.store = FeatureStore(repo_path=str(folder))
        self.project: str = self.store.project

    @property
    def writes(self) -> bool:
        """Whether this process writes the streams."""
        return self._may_write()

    @property
    def tiers(self) -> TieredStore:
        """The tiers of the online store."""
        return open_store(self.store.config)

    def publish(
        self,
        plan: FeaturePlan,
        values: Mapping[Entity, pd.DataFrame],
        states: Mapping[Entity, EntityStates],
        *,
        schema: Mapping[str, Any] | None = None,
        tables: Mapping[str, EmbeddingTable] | None = None,
        ids: Mapping[str, int] | None = None,
    ) -> None:
        """Write the files, register all objects, load the states into the online store.

        values: entity → frame of keys, event_timestamp and the entity's features. states: entity → states.
        schema: the schema document, kept beside the plan. tables: those of the plan's embeddings.
        ids: event id → µs of the table's events, so that one sent again is known.
        """
        for table in (tables or {}).values():
            table.save(self.folder)
        value_paths = {
            entity: self._write(
                f"{_values_view(plan, entity)}.parquet", [pa.Table.from_pandas(frame, preserve_index=False)]
            )
            for entity, frame in values.items()
            if plan.of_entity(entity)
        }
        state_paths = {
            entity: self._write(
                f"{state_view(plan, entity)}.parquet", (part.to_arrow(entity) for part in states[entity].parts())
            )
            for entity in plan.entities
        }
        self.register(plan, value_paths, state_paths, schema=schema)
        newest = [int(s.time_us.max()) for s in states.values() if len(s.time_us)]
        self.online(plan).load(states, until_us=max(newest, default=0), ids=ids)

    def publish_links(
        self, plan: FeaturePlan, left: Events, *, schema: Mapping[str, Any], ids: Mapping[str, int] | None
    ) -> None:
        """What the payments of a table leave for those of the same account that follow; see `AccountLinks`."""
        self.publish(plan, {}, {e: final_states(plan, e, left) for e in plan.entities}, schema=schema, ids=ids)

    def register(
        self,
        plan: FeaturePlan,
        values: Mapping[Entity, Path],
        states: Mapping[Entity, Path],
        *,
        schema: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the plan's Feast objects over Parquet files or folders of them."""
        objects: dict[str, Any] = {}
        value_views, state_views = [], []
        for entity in plan.entities:
            keys = [
                FeastEntity(name=name, join_keys=[name], value_type=ValueType.STRING) for name in entity_columns(entity)
            ]
            objects.update({key.name: key for key in keys})
            if entity in values:
                name = _values_view(plan, entity)
                fields = [Field(name=d.name, dtype=Float64, description=as_code(d)) for d in plan.of_entity(entity)]
                source = _source(name, values[entity])
                value_views.append(FeatureView(name=name, entities=keys, schema=fields, source=source, online=False))
            name = state_view(plan, entity)
            state_views.append(
                FeatureView(
                    name=name,
                    entities=keys,
                    schema=[Field(name="state", dtype=Bytes), Field(name="sequence", dtype=Bytes)],
                    source=_source(name, states[entity]),
                    online=True,
                    tags={FAMILY_TAG: name},
                )
            )
        services = [FeatureService(name=f"online_{plan.version}", features=list[Any](state_views))]
        if value_views:
            services.append(FeatureService(name=_training_service(plan), features=list[Any](value_views)))
        with self._lock:
            self.store.apply([*objects.values(), *value_views, *state_views, *services])
            write_json(self.folder / "plans" / f"{plan.version}.json", {"plan": plan.to_dict(), "schema": schema})

    def plans(self) -> dict[str, tuple[FeaturePlan, Mapping[str, Any] | None]]:
        """Every plan registered here with its schema document, by version, oldest first."""
        files = sorted((self.folder / "plans").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        documents = {path.stem: json.loads(path.read_text()) for path in files}
        return {name: (FeaturePlan.from_dict(d["plan"]), d["schema"]) for name, d in documents.items()}

    def training_features(self, plan: FeaturePlan, spine: Events) -> dict[str, Floats]:
        """Point-in-time features of every spine row, in order, through Feast's `get_historical_features`."""
        if not plan.numeric_names:
            return {}
        columns = {name for entity in plan.entities for name in entity_columns(entity)}
        has = {*spine.keys, *spine.numbers}
        frame = pd.DataFrame({name: key_column(spine, name) for name in columns if name in has})
        frame[TIMESTAMP] = pd.to_datetime(spine.time_us, unit="us", utc=True)
        service = self.store.get_feature_service(_training_service(plan))
        table = self.store.get_historical_features(entity_df=frame, features=service).to_arrow()
        return {
            name: table[name].to_numpy().astype(np.float64) for name in plan.numeric_names if name in table.column_names
        }

    def online(self, plan: FeaturePlan) -> EventStream:
        """The serving side of a plan; one a plan and repository, however many models use it."""
        with self._lock:
            if plan.version not in self._streams:
                folder = self.folder / "log" / plan.version
                self._streams[plan.version] = EventStream(
                    self.project, plan, self.tiers, folder, self._stream_settings, may_write=self._may_write
                )
            return self._streams[plan.version]

    def take_over(self) -> None:
        """Recover what a process has left that wrote the streams, if it has gone and this one may write."""
        with self._lock:
            for stream in self._streams.values():
                stream.take_over()

    def embedding_tables(self, plan: FeaturePlan) -> dict[str, EmbeddingTable]:
        """The trained tables of a plan's embeddings, by digest; see `load_tables`."""
        return load_tables(self.folder, plan)

    def close(self) -> None:
        """Write what is in memory; let other processes write the streams."""
        with self._lock:
            for stream in self._streams.values():
                stream.close()
            self._streams = {}

    def _write(self, name: str, tables: Iterable[pa.Table]) -> Path:
        """One file of at least one table."""
        path, rest = self.folder / "offline" / name, iter(tables)
        first = next(rest)
        with (
            atomic_file(path) as part,
            pq.ParquetWriter(part, first.schema, coerce_timestamps="us", compression="zstd") as writer,
        ):
            for table in chain([first], rest):
                writer.write_table(table)
        return path


def value_frames(plan: FeaturePlan, spine: Events, values: Mapping[str, Floats]) -> dict[Entity, pd.DataFrame]:
    """Feature values at spine rows as the frames that `publish` takes: one row a (key, time), no null keys."""
    frames: dict[Entity, pd.DataFrame] = {}
    for entity in plan.entities:
        names = [d.name for d in plan.of_entity(entity)]
        if not names:
            continue
        columns = entity_columns(entity)
        frame = pd.DataFrame({c: key_column(spine, c) for c in columns} | {name: values[name] for name in names})
        frame[TIMESTAMP] = pd.to_datetime(spine.time_us, unit="us", utc=True)
        has_key = np.array([key is not None for key in entity_keys(entity, spine)], dtype=bool)
        frames[entity] = frame[has_key].drop_duplicates([*columns, TIMESTAMP])
    return frames


def _given_online(file: Path) -> dict[str, Any]:
    """Settings of the online store that somebody wrote into the file."""
    if not file.is_file():
        return {}
    given = yaml.safe_load(file.read_text()).get("online_store", {})
    return given if given.get("type") == ONLINE else {}


def _values_view(plan: FeaturePlan, entity: Entity) -> str:
    return f"{entity_name(entity)}_values_{plan.version}"


def _training_service(plan: FeaturePlan) -> str:
    return f"training_{plan.version}"


def _source(name: str, path: Path) -> FileSource:
    return FileSource(name=name, path=str(path), timestamp_field=TIMESTAMP)
