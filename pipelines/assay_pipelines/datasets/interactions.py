"""Interactions of a table that is too large to be read at once: chunks of it are read, checked and coded by Ray Data.

What comes back is as large as the numbers in it: a user or an item is one string for all its events.
"""

# N rows of a chunk, V different values

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from assay_features.backfill import Source, over_tasks
from assay_features.events import Events, Keys
from assay_features.items import item_plan
from assay_features.schema import RecommendSchema
from assay_platform.errors import DataError
from assay_platform.tasks.cluster import ray_cluster
from numpy.typing import NDArray

from assay_pipelines.datasets.table import LoadedTable, all_known, chunked_source, fingerprint, none_missing

Codes = NDArray[np.int32]


def load_interactions(
    path: Path, schema: RecommendSchema, *, on_progress: Callable[[float, str], None] = lambda done, text: None
) -> LoadedTable:
    """The same as `load_table`, of any CSV or Parquet file whose columns fit into memory as codes.

    Raises:
        DataError: the file cannot be read, a column is missing, or a value does not fit.
        WorkError: a worker failed.
    """
    with tempfile.TemporaryDirectory(prefix="assay-table-") as scratch, ray_cluster():
        source = chunked_source(path, schema, item_plan(schema), Path(scratch))
        names = (*schema.keys, *schema.numbers)
        values: dict[str, dict[str, int]] = {name: {} for name in schema.keys}
        columns: list[dict[str, NDArray[Any]]] = [{} for _ in range(source.num_chunks)]
        for done, row in enumerate(over_tasks(list(range(source.num_chunks)), _Coded(source, schema)), start=1):
            found = {name: np.asarray(row[name]) for name in (schema.timestamp, *names)}
            for name in schema.keys:
                known, theirs = values[name], row[f"values of {name}"]
                places = [known.setdefault(str(value), len(known)) for value in theirs]
                # One place more for -1, what is missing.
                found[name] = np.array([*places, -1], dtype=np.int32)[found[name]]
            columns[int(row["chunk"])] = found
            on_progress(done / source.num_chunks, f"{done} of {source.num_chunks} chunks")
    time_us, *rest = (np.concatenate([part[name] for part in columns]) for name in (schema.timestamp, *names))
    order = np.argsort(time_us, kind="stable")
    keys = {}
    for name, codes in zip(schema.keys, rest, strict=False):
        keys[name] = _decoded(codes, list(values[name]))
        none_missing(keys[name], name, path)
        if name == schema.action:
            all_known(keys[name], name, schema.actions, path)
        keys[name] = keys[name][order]
    numbers = {name: column[order] for name, column in zip(schema.numbers, rest[len(schema.keys) :], strict=True)}
    events = Events(time_us=time_us[order], keys=keys, numbers=numbers)
    if not len(events):
        raise DataError(f"{path}: has no rows")
    return LoadedTable(events, path, fingerprint(path), events)


def _decoded(codes: Codes, values: list[str]) -> Keys:
    names = np.empty(len(values) + 1, dtype=object)
    names[:-1], names[-1] = values, None
    return names[codes]


@dataclass(frozen=True)
class _Coded:
    """A chunk with codes instead of strings; what is missing has -1."""

    source: Source
    schema: RecommendSchema

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = int(row["item"])
        events = self.source.read(chunk)
        found: dict[str, Any] = {"chunk": chunk, self.schema.timestamp: events.time_us}
        for name in self.schema.keys:
            codes, values = pd.factorize(events.keys[name], use_na_sentinel=True)
            found |= {name: codes.astype(np.int32), f"values of {name}": [str(value) for value in values]}
        return found | {name: events.numbers[name] for name in self.schema.numbers}
