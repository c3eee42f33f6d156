"""Features of a table of any size: partitions by entity, computed by Ray Data, resumed after a kill.

Two passes. *Scatter* reads the table in chunks and writes each chunk's events once an entity, one record batch a
partition of its keys. *Replay* reads one partition from all chunks, replays it through the engine, and writes the
features at every event and the final states. Memory is bounded by a chunk and by a partition. Every output file is
whole or absent, so a second call does only what is missing; a table, plan or number of partitions that has changed
starts anew.
"""

# C chunks, P partitions

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from assay_platform.errors import DataError, WorkError
from assay_platform.storage import atomic_file, write_json

from assay_features.batch import EntityStates, features_at, final_states
from assay_features.definitions import Entity, FeaturePlan, entity_columns, entity_name
from assay_features.events import Events, key_column
from assay_features.state import Floats, entity_keys

TIMESTAMP = "event_timestamp"
_ROWS_A_PARTITION = 500_000


@dataclass(frozen=True)
class Source:
    """A table in chunks. Sent to workers, so `read` must be a function of a module, or a partial of one.

    read: chunk number → its events, in the order of the file; called in workers. identity: changes with the content.
    """

    num_rows: int
    num_chunks: int
    identity: str
    read: Callable[[int], Events]


@dataclass(frozen=True)
class Backfilled:
    """Where the results lie: a folder of Parquet files an entity."""

    folder: Path
    num_rows: int
    num_partitions: int

    def features(self, entity: Entity) -> Path:
        """Keys, event_timestamp and every feature, one row a (key, time)."""
        return self.folder / "features" / entity_name(entity)

    def states_folder(self, entity: Entity) -> Path:
        """Keys, event_timestamp, state and sequence, one row a key."""
        return self.folder / "states" / entity_name(entity)

    def states(self, entity: Entity) -> Iterator[EntityStates]:
        """Final states, a partition at a time."""
        for path in sorted(self.states_folder(entity).glob("*.parquet")):
            table = pq.read_table(path)
            if len(table):
                yield EntityStates.from_arrow(entity, table)


def backfill(
    plan: FeaturePlan,
    source: Source,
    folder: Path,
    *,
    num_partitions: int | None = None,
    on_progress: Callable[[float, str], None] | None = None,
) -> Backfilled:
    """Compute features at every event and the final states. Ray must be running.

    Raises:
        DataError: the table has a value that does not fit.
        WorkError: a worker failed.
    """
    say = on_progress or (lambda _done, _note: None)
    partitions = num_partitions or max(1, -(-source.num_rows // _ROWS_A_PARTITION))
    identity = {"plan": plan.version, "table": source.identity, "partitions": partitions, "chunks": source.num_chunks}
    manifest = folder / "manifest.json"
    if not manifest.is_file() or json.loads(manifest.read_text()) != identity:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(manifest, identity)
    result = Backfilled(folder, source.num_rows, partitions)
    replays = [
        (entity, partition)
        for entity in plan.entities
        for partition in range(partitions)
        if not _states_path(folder, entity, partition).is_file()
    ]
    if not replays:
        say(1.0, "nothing left to do")
        return result
    chunks = [c for c in range(source.num_chunks) if not all(_spill(folder, e, c).is_file() for e in plan.entities)]
    num_steps = len(chunks) + len(replays)
    steps = over_tasks(chunks, _Scatter(plan, source, folder, partitions))
    for done, _ in enumerate(steps, start=1):
        say(done / num_steps, f"{done} of {len(chunks)} chunks read")
    steps = over_tasks(
        [(plan.entities.index(entity), partition) for entity, partition in replays],
        _Replay(plan, source.num_chunks, folder),
    )
    for done, _ in enumerate(steps, start=1):
        say((len(chunks) + done) / num_steps, f"{done} of {len(replays)} partitions computed")
    shutil.rmtree(folder / "spill", ignore_errors=True)
    return result


def over_tasks(items: list[Any], work: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[Any]:
    """Ray Data over items, one task each; yields what `work` makes of them as they finish. Ray must be running.

    work: {"item": one of them} → a row.

    Raises:
        DataError: `work` raised one.
        WorkError: a worker failed.
    """
    if not items:
        return
    import ray
    from ray.exceptions import RayError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's about its own defaults
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray.data", "ray.data._internal.execution.streaming_executor"):
        logging.getLogger(name).setLevel(logging.ERROR)  # progress is ours to show
    try:
        dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
        for row in dataset.map(_Answering(work)).iter_rows():
            if row["problem"]:
                raise DataError(row["problem"])
            yield row
    except RayError as error:
        raise WorkError(f"a worker failed: {error}") from error


@dataclass(frozen=True)
class _Answering:
    """Says what is wrong with the data as an answer rather than an exception, which Ray would bury in its own."""

    work: Callable[[dict[str, Any]], dict[str, Any]]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"problem": "", **self.work(row)}
        except DataError as error:
            return {"problem": str(error)}


@dataclass(frozen=True)
class _Scatter:
    plan: FeaturePlan
    source: Source
    folder: Path
    num_partitions: int

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = int(row["item"])
        events = self.source.read(chunk)
        for entity in self.plan.entities:
            path = _spill(self.folder, entity, chunk)
            if not path.is_file():
                self._write(path, entity, events)
        return {}

    def _write(self, path: Path, entity: Entity, events: Events) -> None:
        own = _own_plan(self.plan, entity)
        codes, values = pd.factorize(entity_keys(entity, events), use_na_sentinel=True)
        partition_of = np.array([_partition(str(v), self.num_partitions) for v in values] or [0])
        partition = np.where(codes >= 0, partition_of[codes], -1)
        table = pa.table(
            {"time_us": pa.array(events.time_us)}
            | {name: pa.array(key_column(events, name), pa.string()) for name in own.key_columns()}
            | {name: pa.array(events.numbers[name]) for name in own.number_columns()}
        ).combine_chunks()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            atomic_file(path) as part,
            pa.OSFile(str(part), "wb") as sink,
            pa.ipc.new_file(sink, table.schema, options=options) as writer,
        ):
            for number in range(self.num_partitions):
                batches = table.take(pa.array(np.flatnonzero(partition == number))).combine_chunks().to_batches()
                writer.write_batch(batches[0] if batches else _no_rows(table.schema))


@dataclass(frozen=True)
class _Replay:
    plan: FeaturePlan
    num_chunks: int
    folder: Path

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        place, partition = (int(value) for value in row["item"])
        entity = self.plan.entities[place]
        own = _own_plan(self.plan, entity)
        parts = []
        for chunk in range(self.num_chunks):
            with pa.OSFile(str(_spill(self.folder, entity, chunk))) as file:
                parts.append(pa.ipc.open_file(file).get_batch(partition))
        table = pa.Table.from_batches(parts)
        events = Events(
            time_us=table["time_us"].to_numpy(),
            keys={name: np.asarray(table[name].to_pandas(), dtype=object) for name in own.key_columns()},
            numbers={name: table[name].to_numpy() for name in own.number_columns()},
        )
        if own.of_entity(entity):
            path = self.folder / "features" / entity_name(entity) / f"part-{partition:05d}.parquet"
            _write_features(path, own, entity, events, features_at(own, events, events))
        # Last, since its presence says that the partition is done.
        with atomic_file(_states_path(self.folder, entity, partition)) as part:
            pq.write_table(final_states(own, entity, events).to_arrow(entity), part, compression="zstd")
        return {}


def _own_plan(plan: FeaturePlan, entity: Entity) -> FeaturePlan:
    return FeaturePlan(tuple(d for d in plan.definitions if getattr(d, "entity", None) == entity))


def _partition(key: str, num_partitions: int) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % num_partitions


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def _spill(folder: Path, entity: Entity, chunk: int) -> Path:
    return folder / "spill" / entity_name(entity) / f"chunk-{chunk:05d}.arrow"


def _states_path(folder: Path, entity: Entity, partition: int) -> Path:
    return folder / "states" / entity_name(entity) / f"part-{partition:05d}.parquet"


def _write_features(path: Path, plan: FeaturePlan, entity: Entity, events: Events, values: dict[str, Floats]) -> None:
    """One row a (key, time): at one instant all events of a key have the same features."""
    table = pa.table(
        {name: pa.array(key_column(events, name), pa.string()) for name in entity_columns(entity)}
        | {TIMESTAMP: pa.array(events.time_us, pa.timestamp("us", tz="UTC"))}
        | {d.name: pa.array(values[d.name]) for d in plan.of_entity(entity)}
    )
    pairs = pd.DataFrame({"time": events.time_us, "key": entity_keys(entity, events)})
    first = np.flatnonzero(~pairs.duplicated().to_numpy())
    order = first[np.argsort(events.time_us[first], kind="stable")]
    with atomic_file(path) as part:
        pq.write_table(table.take(pa.array(order)), part, compression="zstd")
