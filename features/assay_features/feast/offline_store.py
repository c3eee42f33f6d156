"""A Feast offline store with a columnar point-in-time join over Parquet, local or on object storage.

Named by class path in `feature_store.yaml`:

    offline_store:
      type: assay_features.feast.offline_store.ColumnarOfflineStore

For every entity row and feature view: the view's latest row of the same key with timestamp ≤ the entity row's timestamp
and, where the view has a TTL, at most that old (the age equal to the TTL still counts); among rows of one timestamp the
latest created one, then the last in the file. Every entity row comes back, in order, duplicates included; features
without a match are null. Keys that are null never match. Only the columns asked for are read, and of them the row
groups that may be old enough.

Without entity rows (`entity_df=None` and a range of dates) they are the distinct (keys, timestamp) of the views in it.
Not covered: SQL entity frames; sources other than Parquet files.
"""

import functools
import operator
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from assay_platform.errors import DataError
from assay_platform.storage import atomic_file
from feast.data_source import DataSource
from feast.errors import FeastJoinKeysDuringMaterialization, SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores.file_source import FileLoggingDestination, FileSource, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import (
    get_pyarrow_schema_from_batch_source,
    infer_event_timestamp_from_entity_df,
)
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.saved_dataset import SavedDatasetStorage, ValidationReference
from feast.utils import (
    _get_requested_feature_views_to_features_dict,
    _get_requested_on_demand_feature_views,
    compute_non_entity_date_range,
)
from numpy.typing import NDArray

from assay_features.point_in_time import MISSING_US, frame_of, gathered, key_codes, latest_rows, microseconds

CLASS_PATH = "assay_features.feast.offline_store.ColumnarOfflineStore"
TIMESTAMP = "event_timestamp"
# Of features; what a thread holds of a source beside the result, 32 MB of 64-bit numbers.
_CELLS_A_READ = 1_000_000


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
        repo_path: Path | None,
        full_feature_names: bool,
        entity_rows: pd.DataFrame | None = None,
        features: Sequence[str] = (),
        on_demand_feature_views: list[OnDemandFeatureView] | None = None,
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        self._compute = compute
        self._repo_path = repo_path
        self._full_feature_names = full_feature_names
        self._entity_rows = pd.DataFrame() if entity_rows is None else entity_rows
        self._features = features
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

    def to_df(
        self, validation_reference: ValidationReference | None = None, timeout: int | None = None
    ) -> pd.DataFrame:
        """The result as a data frame. Feast's own way copies it twice: out of Arrow, and for a new index."""
        table = self.to_arrow(validation_reference=validation_reference, timeout=timeout)
        return frame_of(table, self._entity_rows, gathered=() if self._on_demand_feature_views else self._features)

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return frame_of(self._to_arrow_internal(timeout), self._entity_rows, gathered=self._features)

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._compute()

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result as a saved data set: one file, or a folder if the path is not one of a Parquet file."""
        if not isinstance(storage, SavedDatasetFileStorage):
            raise DataError(f"a saved data set of this store is a file, not {type(storage).__name__}")
        options = storage.file_options
        filesystem, path = _located(self._repo_path, options.uri, options.s3_endpoint_override)
        exists = Path(path).exists() if filesystem is None else filesystem.get_file_info([path])[0].type != 0
        if exists and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=options.uri)
        table = self.to_arrow()
        if not path.endswith(".parquet"):
            pq.write_to_dataset(table, root_path=path, filesystem=filesystem)
        elif filesystem is None:
            with atomic_file(Path(path)) as part:
                pq.write_table(table, part)
        else:
            pq.write_table(table, path, filesystem=filesystem)

    def supports_remote_storage_export(self) -> bool:
        """Results are returned, not exported."""
        return False


class ColumnarOfflineStore(OfflineStore):
    """See the module's docstring for what the join promises."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        **kwargs: Any,
    ) -> RetrievalJob:
        """Join every requested view to the entity rows. See Feast's `OfflineStore` for the arguments."""
        if isinstance(entity_df, str):
            raise DataError("entity_df is SQL; this store takes a pandas DataFrame, or None and a range of dates")
        if entity_df is None:
            start, end = compute_non_entity_date_range(feature_views, kwargs.get("start_date"), kwargs.get("end_date"))
            entity_df = _rows_between(config, feature_views, start, end)
        timestamp = TIMESTAMP
        if timestamp not in entity_df.columns:
            try:
                timestamp = infer_event_timestamp_from_entity_df(dict(entity_df.dtypes))
            except Exception as error:  # Feast raises a bare ValueError or EntityTimestampInferenceException
                raise DataError(
                    f"entity_df has no column {TIMESTAMP!r} and not just one column of times; it has "
                    f"{', '.join(map(str, entity_df.columns))}"
                ) from error
        requested, _on_demand = _get_requested_feature_views_to_features_dict(
            feature_refs,
            feature_views,
            _get_requested_on_demand_feature_views(feature_refs, project, registry),
        )
        rows = entity_df
        names = [
            f"{_view_name(view)}__{name}" if full_feature_names else name
            for view, features in requested.items()
            for name in features
        ]

        def compute() -> pa.Table:
            table = pa.Table.from_pandas(rows, preserve_index=False)
            asked_us = microseconds(table[timestamp])
            encoded = _encoded_keys(table, requested)

            def join(view: FeatureView) -> list[pa.ChunkedArray]:
                features = requested[view]
                return _join(config, view, features, encoded, asked_us, only_created=filter_by_created_timestamp)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                joined = [column for columns in pool.map(join, requested) for column in columns]
            return pa.table([*table.columns, *joined], names=[*table.column_names, *names])

        times = entity_df[timestamp]
        return ColumnarRetrievalJob(
            compute,
            repo_path=config.repo_path,
            full_feature_names=full_feature_names,
            entity_rows=rows,
            features=names,
            on_demand_feature_views=OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in entity_df.columns if name != timestamp],
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
                return table.slice(max(0, len(table) - 1))
            codes, _, num_keys = key_codes(table, join_key_columns, table.slice(0, 0), join_key_columns)
            last = np.full(num_keys, -1)
            last[codes[codes >= 0]] = np.flatnonzero(codes >= 0)  # of several, the last one stays
            return table.take(pa.array(np.sort(last[last >= 0])))

        return ColumnarRetrievalJob(compute, repo_path=config.repo_path, full_feature_names=False)

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

        return ColumnarRetrievalJob(compute, repo_path=config.repo_path, full_feature_names=False)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Append rows to the view's file; the file is whole at any moment."""
        source = feature_view.batch_source
        assert source is not None
        expected, _ = get_pyarrow_schema_from_batch_source(config, source)
        if table.column_names != expected.names:
            raise DataError(
                f"feature view {feature_view.name!r}: the rows have columns {', '.join(table.column_names)}, "
                f"its source has {', '.join(expected.names)}"
            )
        filesystem, path = _path_of(config, source)
        before = pq.read_table(path, filesystem=filesystem)
        after = pa.concat_tables([before, table.cast(before.schema)])
        if filesystem is None:
            with atomic_file(Path(path)) as part:
                pq.write_table(after, part)
        else:
            pq.write_table(after, path, filesystem=filesystem)
        if progress is not None:
            progress(len(table))

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,
        logging_config: LoggingConfig,
        registry: BaseRegistry,
    ) -> None:
        """Add what a feature server served to a folder of Parquet files."""
        destination = logging_config.destination
        if not isinstance(destination, FileLoggingDestination):
            raise DataError(f"this store logs to files, not to {type(destination).__name__}")
        filesystem, path = _located(config.repo_path, destination.path, destination.s3_endpoint_override)
        pads.write_dataset(
            pq.read_table(data) if isinstance(data, Path) else data,
            base_dir=path,
            basename_template=f"{uuid.uuid4().hex}-{{i}}.parquet",
            partitioning=destination.partition_by,
            filesystem=filesystem,
            format="parquet",
            existing_data_behavior="overwrite_or_ignore",
        )


def _view_name(view: FeatureView) -> str:
    return str(view.projection.name_to_use())  # type: ignore[no-untyped-call]


def _located(repo_path: Path | None, uri: str, endpoint: str | None) -> tuple[Any, str]:
    """File system, None for the local one, and path."""
    path = FileSource.get_uri_for_file_path(repo_path=repo_path, uri=uri)
    filesystem, local = FileSource.create_filesystem_and_path(str(path), endpoint or "")
    return filesystem, str(local)


def _path_of(config: RepoConfig, source: DataSource) -> tuple[Any, str]:
    if not isinstance(source, FileSource):
        raise DataError(f"source {source.name!r} is a {type(source).__name__}; this store reads Parquet files")
    return _located(config.repo_path, source.path, source.s3_endpoint_override)


def _dataset(config: RepoConfig, source: DataSource) -> pads.Dataset:
    filesystem, path = _path_of(config, source)
    try:
        return pads.dataset(path, filesystem=filesystem, format="parquet")
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _read(
    dataset: pads.Dataset, columns: Sequence[str], timestamp: str, first_us: int | None, last_us: int | None
) -> pa.Table:
    """Columns of the rows with first ≤ timestamp ≤ last; row groups outside of it are not read."""
    _require_columns(dataset, columns)
    condition = _between(dataset, timestamp, first_us, last_us)
    try:
        return dataset.to_table(columns=list(dict.fromkeys(columns)), filter=condition)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{dataset.files[0]}: cannot be read as Parquet: {error}") from error


def _require_columns(dataset: pads.Dataset, columns: Sequence[str]) -> None:
    names = dict.fromkeys(dataset.schema.names)
    unknown = [name for name in columns if name not in names]
    if unknown:
        raise DataError(f"{dataset.files[0]}: has no column {unknown[0]!r}; it has {', '.join(names)}")


def _between(dataset: pads.Dataset, timestamp: str, first_us: int | None, last_us: int | None) -> pc.Expression | None:
    kind = dataset.schema.field(timestamp).type
    conditions = []
    # Bounds are taken a unit wider: a coarser type cuts them, and what is too early or late is filtered again.
    if first_us is not None:
        conditions.append(pc.field(timestamp) >= _moment(first_us - 1_000_000, kind))
    if last_us is not None:
        conditions.append(pc.field(timestamp) <= _moment(last_us + 1_000_000, kind))
    return functools.reduce(operator.and_, conditions) if conditions else None


def _pinned(
    dataset: pads.FileSystemDataset, condition: pc.Expression | None, dictionaries: Sequence[str]
) -> pads.FileSystemDataset:
    """The same files, held open, so that several reads see one version of them even if a writer replaces a file.

    Of them only the row groups that may fit the condition; columns of text in `dictionaries` are read encoded.
    """
    schema = dataset.schema
    for name in dictionaries:
        place = schema.get_field_index(name)
        if pa.types.is_string(schema.field(place).type):
            schema = schema.set(place, pa.field(name, pa.dictionary(pa.int32(), pa.string())))
    reading = pads.ParquetFileFormat(dictionary_columns=list(dictionaries))
    fragments = []
    for path in dataset.files:
        fragment = reading.make_fragment(dataset.filesystem.open_input_file(path))
        fragments.append(fragment if condition is None else fragment.subset(condition, schema=schema))
    return pads.FileSystemDataset(fragments, schema, reading)


def _moment(time_us: int, kind: pa.DataType) -> pa.Scalar:
    if not pa.types.is_timestamp(kind):
        return pa.scalar(time_us, pa.timestamp("us", tz="UTC"))
    # Within what nanoseconds can say, the years 1678 to 2261.
    bounded = min(max(time_us, -9_200_000_000_000_000), 9_200_000_000_000_000)
    return pa.scalar(bounded, pa.timestamp("us", tz=kind.tz)).cast(kind, safe=False)


def _sorted_by_time(table: pa.Table, timestamp: str, created: str | None) -> pa.Table:
    keys = [microseconds(table[timestamp])]
    if created:  # Feast writes '' for a source without one
        keys.insert(0, microseconds(table[created]))
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
    dataset = _dataset(config, source)
    names = dataset.schema.names
    if not set(join_keys) <= set(names):
        raise FeastJoinKeysDuringMaterialization(str(source.name), set(join_keys), set(names))
    others = {*join_keys, timestamp, created}
    # Feast names no feature for a view with a transformation: it takes every column.
    wanted = features or [name for name in names if name not in others and not name.startswith("__index")]
    columns = [*join_keys, *wanted, timestamp, *([created] if created else [])]
    first_us, last_us = (None if moment is None else _datetime_us(moment) for moment in (start, end))
    table = _sorted_by_time(_read(dataset, columns, timestamp, first_us, last_us), timestamp, created)
    time_us = microseconds(table[timestamp])
    keep = time_us != MISSING_US
    if first_us is not None:
        keep &= time_us >= first_us
    if last_us is not None:
        keep &= time_us <= last_us
    table = table.filter(pa.array(keep))
    if not join_keys:
        table = table.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * len(table), pa.string()))
    return table


def _datetime_us(moment: datetime) -> int:
    return int(pd.Timestamp(moment, tz=None if moment.tzinfo else "UTC").value // 1000)


def _rows_between(config: RepoConfig, views: list[FeatureView], start: datetime, end: datetime) -> pd.DataFrame:
    """The distinct (keys, timestamp) of the views in a range of dates."""
    frames = []
    for view in views:
        source = view.batch_source
        assert source is not None
        in_source = {new: old for old, new in (source.field_mapping or {}).items()}
        keys = [column.name for column in view.entity_columns if column.name != DUMMY_ENTITY_ID]
        timestamp = in_source.get(source.timestamp_field, source.timestamp_field)
        columns = [*(in_source.get(key, key) for key in keys), timestamp]
        first_us, last_us = _datetime_us(start), _datetime_us(end)
        table = _read(_dataset(config, source), columns, timestamp, first_us, last_us).select(columns)
        time_us = microseconds(table[timestamp])
        table = table.filter(pa.array((time_us >= first_us) & (time_us <= last_us)))
        names = [*(view.projection.join_key_map.get(key, key) for key in keys), TIMESTAMP]
        frame = table.rename_columns(names).to_pandas()
        frame[TIMESTAMP] = pd.to_datetime(frame[TIMESTAMP], utc=True)
        frames.append(frame)
    rows: pd.DataFrame = pd.concat(frames, ignore_index=True).drop_duplicates(ignore_index=True)
    return rows


def _encoded_keys(entity_rows: pa.Table, requested: Mapping[FeatureView, list[str]]) -> pa.Table:
    """Key columns encoded once, however many views look them up."""
    for view in requested:
        for column in view.entity_columns:
            name = view.projection.join_key_map.get(column.name, column.name)
            place = entity_rows.schema.get_field_index(name)
            if place >= 0 and not pa.types.is_dictionary(entity_rows.schema.field(place).type):
                entity_rows = entity_rows.set_column(place, name, pc.dictionary_encode(entity_rows[name]))
    return entity_rows


def _join(
    config: RepoConfig,
    view: FeatureView,
    features: list[str],
    entity_rows: pa.Table,
    asked_us: NDArray[np.int64],
    *,
    only_created: bool,
) -> list[pa.ChunkedArray]:
    source = view.batch_source
    assert source is not None  # Feast refuses a view without one
    # The source may call a column otherwise than the view does, also its times.
    in_source = {new: old for old, new in (source.field_mapping or {}).items()}
    timestamp = in_source.get(source.timestamp_field, source.timestamp_field)
    created = in_source.get(source.created_timestamp_column, source.created_timestamp_column) or None
    view_keys = [column.name for column in view.entity_columns if column.name != DUMMY_ENTITY_ID]
    asked_keys = [view.projection.join_key_map.get(name, name) for name in view_keys]
    source_keys = [in_source.get(name, name) for name in view_keys]
    source_features = [in_source.get(name, name) for name in features]
    for name in asked_keys:
        if name not in entity_rows.column_names:
            raise DataError(f"entity_df has no column {name!r}, the key of feature view {view.name!r}")
    valid_us = asked_us[asked_us != MISSING_US]
    ttl_us = int(view.ttl.total_seconds() * 1_000_000) if view.ttl else None
    last_us = int(valid_us.max()) if len(valid_us) else None
    first_us = int(valid_us.min()) - ttl_us if ttl_us is not None and len(valid_us) else None
    dataset = _dataset(config, source)
    others = [*source_keys, timestamp, *([created] if created else [])]
    _require_columns(dataset, [*source_features, *others])
    dataset = _pinned(dataset, _between(dataset, timestamp, first_us, last_us), source_keys)
    num_rows = dataset.count_rows()
    in_one_read = len(features) * num_rows <= _CELLS_A_READ
    table = dataset.to_table(columns=list(dict.fromkeys([*others, *(source_features if in_one_read else ())])))
    have, want, num_keys = key_codes(table, source_keys, entity_rows, asked_keys)
    rows = latest_rows(
        have,
        microseconds(table[timestamp]),
        want,
        asked_us,
        num_keys=num_keys,
        created_us=microseconds(table[created]) if created else None,
        ttl_us=ttl_us,
        only_created=only_created,
    )
    if in_one_read:
        return gathered(table, source_features, rows)
    del table, have, want
    width = max(1, min(-(-len(features) // (os.cpu_count() or 1)), _CELLS_A_READ // num_rows))
    groups = [source_features[first : first + width] for first in range(0, len(features), width)]

    def read(group: list[str]) -> list[pa.ChunkedArray]:
        return gathered(dataset.to_table(columns=list(dict.fromkeys(group)), use_threads=False), group, rows)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [column for group in pool.map(read, groups) for column in group]
