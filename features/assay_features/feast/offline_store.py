"""A Feast offline store with a columnar point-in-time join over Parquet.

Named by class path in `feature_store.yaml`:

    offline_store:
      type: assay_features.feast.offline_store.ColumnarOfflineStore

For every entity row and feature view: the view's latest row of the same key with timestamp ≤ the entity row's
timestamp and, where the view has a TTL, > timestamp - TTL (the age equal to the TTL still counts); among
rows of one timestamp the latest created one, then the last in the file. Every entity row comes back, in
order, duplicates included; features without a match are null. Keys that are null never match.

Not covered yet: SQL entity frames, sources other than Parquet files, persisting results, writing.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from assay_platform.errors import DataError
from feast.data_source import DataSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.utils import (
    _get_requested_feature_views_to_features_dict,
    _get_requested_on_demand_feature_views,
)
from numpy.typing import NDArray

CLASS_PATH = "assay_features.feast.offline_store.ColumnarOfflineStore"
TIMESTAMP = "event_timestamp"
_MICROSECONDS = pa.timestamp("us", tz="UTC")


class ColumnarOfflineStoreConfig(FeastConfigBaseModel):
    """Settings: none besides the type."""

    type: Literal["assay_features.feast.offline_store.ColumnarOfflineStore"] = (
        "assay_features.feast.offline_store.ColumnarOfflineStore"
    )


class ColumnarRetrievalJob(RetrievalJob):
    """A retrieval that runs when its result is asked for."""

    def __init__(
        self,
        compute: Callable[[], pa.Table],
        *,
        full_feature_names: bool,
        on_demand_feature_views: list[OnDemandFeatureView] | None = None,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        self._compute = compute
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = on_demand_feature_views or []
        self._metadata = metadata

    @property
    def full_feature_names(self) -> bool:
        """Whether columns are named view__feature."""
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """Transformations that Feast applies to the result."""
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """What was asked for."""
        return self._metadata

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._to_arrow_internal(timeout).to_pandas()
        return frame

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._compute()


class ColumnarOfflineStore(OfflineStore):
    """See the module's docstring for what the join promises."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        **_: Any,
    ) -> RetrievalJob:
        """Join every requested view to the entity rows. See Feast's `OfflineStore` for the arguments."""
        if not isinstance(entity_df, pd.DataFrame):
            raise DataError(f"entity_df is {type(entity_df).__name__}; this store takes a pandas DataFrame")
        if TIMESTAMP not in entity_df.columns:
            raise DataError(f"entity_df has no column {TIMESTAMP!r}; it has {', '.join(entity_df.columns)}")
        requested, _on_demand = _get_requested_feature_views_to_features_dict(
            feature_refs,
            feature_views,
            _get_requested_on_demand_feature_views(feature_refs, project, registry),
        )

        def compute() -> pa.Table:
            table = pa.Table.from_pandas(entity_df, preserve_index=False)
            asked_us = _microseconds(table[TIMESTAMP])
            for view, features in requested.items():
                for name, column in _join(config, view, features, table, asked_us).items():
                    prefixed = f"{_view_name(view)}__{name}" if full_feature_names else name
                    table = table.append_column(prefixed, column)
            return table

        times = entity_df[TIMESTAMP]
        return ColumnarRetrievalJob(
            compute,
            full_feature_names=full_feature_names,
            on_demand_feature_views=OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in entity_df.columns if name != TIMESTAMP],
                min_event_timestamp=times.min() if len(times) else None,
                max_event_timestamp=times.max() if len(times) else None,
            ),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """The latest row of every key within [start_date, end_date]; what materialisation reads."""

        def compute() -> pa.Table:
            table = _read_between(
                config, data_source, join_key_columns, feature_name_columns, timestamp_field,
                created_timestamp_column, start_date, end_date,
            )  # fmt: skip
            if not join_key_columns:
                return table.slice(len(table) - 1)
            codes, _ = pd.factorize(_key_rows(table, join_key_columns), use_na_sentinel=True)
            last = pd.Series(np.arange(len(table))).groupby(codes).last()
            return table.take(pa.array(last[last.index >= 0].to_numpy()))

        return ColumnarRetrievalJob(compute, full_feature_names=False)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Every row within [start_date, end_date], in order of time."""

        def compute() -> pa.Table:
            return _read_between(
                config, data_source, join_key_columns, feature_name_columns, timestamp_field,
                created_timestamp_column, start_date, end_date,
            )  # fmt: skip

        return ColumnarRetrievalJob(compute, full_feature_names=False)


def _view_name(view: FeatureView) -> str:
    return str(view.projection.name_to_use())  # type: ignore[no-untyped-call]


def _read(config: RepoConfig, source: DataSource, columns: list[str]) -> pa.Table:
    if not isinstance(source, FileSource):
        raise DataError(f"source {source.name!r} is a {type(source).__name__}; this store reads Parquet files")
    path = FileSource.get_uri_for_file_path(repo_path=config.repo_path, uri=source.path)
    filesystem, local = FileSource.create_filesystem_and_path(str(path), source.s3_endpoint_override or "")
    try:
        return pq.read_table(local, columns=columns, filesystem=filesystem)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{Path(str(path))}: cannot be read as Parquet: {error}") from error


def _microseconds(column: pa.ChunkedArray) -> NDArray[np.int64]:
    if pa.types.is_timestamp(column.type) and column.type.tz is None:
        column = pc.assume_timezone(column, "UTC")
    # A cast that would cut nanoseconds is allowed: Feast itself compares microseconds.
    return np.asarray(column.cast(_MICROSECONDS, safe=False).cast(pa.int64()).to_numpy())


def _key_rows(table: pa.Table, names: list[str]) -> NDArray[np.object_]:
    """One hashable value a row; None where any part of the key is null."""
    if len(names) == 1:
        return np.asarray(table[names[0]].to_pandas(), dtype=object)
    columns = [table[name].to_pylist() for name in names]
    rows = np.empty(len(table), dtype=object)
    for i, parts in enumerate(zip(*columns, strict=True)):
        rows[i] = None if None in parts else parts
    return rows


def _sorted_by_time(table: pa.Table, timestamp: str, created: str | None) -> pa.Table:
    keys = [_microseconds(table[timestamp])]
    if created:  # Feast writes '' for a source without one
        keys.insert(0, _microseconds(table[created]))
    return table.take(pa.array(np.lexsort(keys)))


def _read_between(
    config: RepoConfig,
    source: DataSource,
    join_keys: list[str],
    features: list[str],
    timestamp: str,
    created: str | None,
    start: datetime | None,
    end: datetime | None,
) -> pa.Table:
    columns = [*join_keys, *features, timestamp, *([created] if created else [])]
    table = _sorted_by_time(_read(config, source, columns), timestamp, created)
    time_us = _microseconds(table[timestamp])
    keep = np.ones(len(table), dtype=bool)
    if start is not None:
        keep &= time_us >= _datetime_us(start)
    if end is not None:
        keep &= time_us <= _datetime_us(end)
    table = table.filter(pa.array(keep))
    if not join_keys:
        table = table.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * len(table), pa.string()))
    return table


def _datetime_us(moment: datetime) -> int:
    return int(pd.Timestamp(moment, tz=None if moment.tzinfo else "UTC").value // 1000)


def _join(
    config: RepoConfig,
    view: FeatureView,
    features: list[str],
    entity_rows: pa.Table,
    asked_us: NDArray[np.int64],
) -> dict[str, pa.ChunkedArray]:
    source = view.batch_source
    assert source is not None  # Feast refuses a view without one
    created = source.created_timestamp_column or None
    # The source may call a column otherwise than the view does.
    in_source = {new: old for old, new in (source.field_mapping or {}).items()}
    view_keys = [column.name for column in view.entity_columns if column.name != DUMMY_ENTITY_ID]
    asked_keys = [view.projection.join_key_map.get(name, name) for name in view_keys]
    source_keys = [in_source.get(name, name) for name in view_keys]
    source_features = [in_source.get(name, name) for name in features]
    columns = [*source_keys, *source_features, source.timestamp_field, *([created] if created else [])]
    for name in asked_keys:
        if name not in entity_rows.column_names:
            raise DataError(f"entity_df has no column {name!r}, the key of feature view {view.name!r}")
    table = _sorted_by_time(_read(config, source, list(dict.fromkeys(columns))), source.timestamp_field, created)
    match = _latest_at_or_before(
        source_key=_codes(table, source_keys, entity_rows, asked_keys),
        source_us=_microseconds(table[source.timestamp_field]),
        asked_us=asked_us,
        ttl=view.ttl,
    )
    index = pa.array(match, mask=match < 0)
    return {name: table[column].take(index) for name, column in zip(features, source_features, strict=True)}


def _codes(
    left: pa.Table, left_keys: list[str], right: pa.Table, right_keys: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keys of both tables as the same integers; -1 for null."""
    if not left_keys:
        return np.zeros(len(left), dtype=np.int64), np.zeros(len(right), dtype=np.int64)
    both = np.concatenate([_key_rows(left, left_keys), _key_rows(right, right_keys)])
    codes = pd.factorize(both, use_na_sentinel=True)[0].astype(np.int64)
    return codes[: len(left)], codes[len(left) :]


def _latest_at_or_before(
    *,
    source_key: tuple[NDArray[np.int64], NDArray[np.int64]],
    source_us: NDArray[np.int64],
    asked_us: NDArray[np.int64],
    ttl: timedelta | None,
) -> NDArray[np.int64]:
    """Row of the source, sorted by time, for each asked row; -1 where there is none.

    (key, time) pairs become one integer, so one binary search over all rows replaces a merge of keys.
    """
    have, want = source_key
    times = np.unique(source_us)
    stride = len(times) + 1
    position = have * stride + np.searchsorted(times, source_us)
    order = np.argsort(position, kind="stable")  # stable: ties keep (time, created, file) order
    sorted_position = position[order]
    upto = want * stride + np.searchsorted(times, asked_us, side="right")
    found = np.searchsorted(sorted_position, upto, side="left") - 1
    safe = np.maximum(found, 0)
    if not len(order):
        return np.full(len(want), -1, dtype=np.int64)
    row = order[safe]
    good = (found >= 0) & (have[row] == want) & (want >= 0)
    if ttl:
        good &= asked_us - source_us[row] <= int(ttl.total_seconds() * 1_000_000)
    return np.where(good, row, -1)
