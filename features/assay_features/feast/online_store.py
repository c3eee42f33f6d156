"""A Feast online store with hot, warm and cold tiers, and one look-up a request however many views it names.

Named by class path in `feature_store.yaml`:

    online_store:
      type: assay_features.feast.online_store.TieredOnlineStore
      path: online                       # folder of the warm tier, relative to the repository
      hot_bytes: 268435456               # memory of this process
      warm_bytes: 10737418240            # optional; above it the values read least go to `cold`
      cold: s3://bucket/prefix           # optional, any fsspec URL
      cold_options: {endpoint_url: ...}  # optional, for the file system
      valkey: redis://127.0.0.1:6379/0   # optional, a hot tier that processes share

Requests for plain features of entities with string or integer keys are answered in columns and become protobuf only
if somebody asks for it (`response.proto`, the feature server); all others take Feast's own way over the same records.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any, Literal
from weakref import WeakValueDictionary, ref

import numpy as np
from assay_platform.storage.disk import DiskTier
from assay_platform.storage.objects import ObjectTier
from assay_platform.storage.tiered import TieredStore
from assay_platform.storage.valkey import ValkeyTier
from feast import Entity, FeatureView, utils
from feast.feature_service import FeatureService
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.online_response import OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.type_map import feast_value_type_to_python_type
from feast.value_type import ValueType
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray
from pydantic import Field

from assay_features.vectors import (
    EXPIRED,
    NEVER_US,
    NOT_FOUND,
    NULL,
    PRESENT,
    Kind,
    RecordKeys,
    VectorReader,
    Vectors,
    ViewLayout,
    ViewRows,
    read_rows,
    record_prefix,
    segment_times,
    with_segment,
    without_view,
)

CLASS_PATH = "assay_features.feast.online_store.TieredOnlineStore"
# Views with this tag share records with each other and not with plain ones.
FAMILY_TAG = "assay_family"
_WRITE_BATCH = 5000
_MAX_VIEWS = 10_000
_KINDS: dict[ValueType, tuple[Kind, str]] = {
    ValueType.DOUBLE: ("float", "double_val"),
    ValueType.FLOAT: ("float", "float_val"),
    ValueType.INT64: ("int", "int64_val"),
    ValueType.INT32: ("int", "int32_val"),
    ValueType.BOOL: ("bool", "bool_val"),
    ValueType.UNIX_TIMESTAMP: ("time", "unix_timestamp_val"),
    ValueType.STRING: ("str", "string_val"),
    ValueType.BYTES: ("bytes", "bytes_val"),
}
# An expired value is given with its status, as Feast's own precomputed vectors do.
_HELD = (PRESENT, EXPIRED)
# What `tolist` already turns into what Feast would give.
_FAST = ("double_val", "float_val", "int64_val", "int32_val", "bool_val")
_STATUS = {
    PRESENT: FieldStatus.PRESENT,
    NULL: FieldStatus.PRESENT,
    NOT_FOUND: FieldStatus.NOT_FOUND,
    EXPIRED: FieldStatus.OUTSIDE_MAX_AGE,
}

# LMDB lets a process open a file once, so stores of one folder are shared; they live as long as somebody uses them.
_OPEN: WeakValueDictionary[Path, TieredStore] = WeakValueDictionary()
_OPENING = Lock()


class TieredOnlineStoreConfig(FeastConfigBaseModel):
    """Settings; see the module's docstring."""

    type: Literal["assay_features.feast.online_store.TieredOnlineStore"] = (
        "assay_features.feast.online_store.TieredOnlineStore"
    )
    path: str = "online"
    hot_bytes: int = 256 * 1024 * 1024
    warm_bytes: int | None = None
    max_disk_bytes: int = 64 << 30
    cold: str | None = None
    cold_options: dict[str, Any] = Field(default_factory=dict)
    valkey: str | None = None
    sync: bool = True
    half_life_s: float = 3600.0


def open_store(config: RepoConfig) -> TieredStore:
    """The tiers that a repository's settings name; one store a folder and process.

    Raises:
        StorageError: a tier cannot be opened.
    """
    settings = config.online_store
    folder = (Path(config.repo_path or ".") / settings.path).resolve()
    with _OPENING:
        store = _OPEN.get(folder)
        if store is None:
            store = _OPEN[folder] = TieredStore(
                DiskTier(folder, sync=settings.sync, max_bytes=settings.max_disk_bytes),
                hot=None if settings.valkey is None else ValkeyTier(settings.valkey, prefix=f"assay:{config.project}:"),
                cold=None if settings.cold is None else ObjectTier(settings.cold, settings.cold_options),
                hot_bytes=settings.hot_bytes,
                warm_bytes=settings.warm_bytes,
                half_life_s=settings.half_life_s,
            )
        return store


class TieredOnlineStore(OnlineStore):
    """See the module's docstring. Thread-safe."""

    def __init__(self) -> None:
        self._store: TieredStore | None = None
        self._layouts: dict[int, ViewLayout] = {}
        self._of_view: dict[int, tuple[ref[FeatureView], ViewLayout]] = {}
        self._readers: dict[tuple[tuple[int, tuple[str, ...]], ...], VectorReader] = {}
        self._writing = Lock()

    def tiers(self, config: RepoConfig) -> TieredStore:
        """The store behind; opened at first use."""
        if self._store is None:
            self._store = open_store(config)
        return self._store

    # ------------------------------------------------------------------ from event loops

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        """Reads and writes, in threads: they take microseconds in memory, and wait for disks otherwise."""
        return SupportedAsyncMethods(read=True, write=True)

    async def online_read_async(self, *args: Any, **kwargs: Any) -> list[Any]:
        """`online_read` beside the event loop."""
        return await asyncio.to_thread(self.online_read, *args, **kwargs)

    async def online_write_batch_async(self, *args: Any, **kwargs: Any) -> None:
        """`online_write_batch` beside the event loop."""
        await asyncio.to_thread(self.online_write_batch, *args, **kwargs)

    async def get_online_features_async(self, *args: Any, **kwargs: Any) -> OnlineResponse:
        """`get_online_features` beside the event loop."""
        return await asyncio.to_thread(self.get_online_features, *args, **kwargs)

    # ------------------------------------------------------------------ writing

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows, durably. A row that is older than what is there, by event and created time, changes nothing."""
        layout, family = self._remembered(config, table), _family(table)
        kinds = dict(layout.fields)
        for first in range(0, len(data), _WRITE_BATCH):
            keyed: dict[bytes, list[tuple[int, int, bytes]]] = {}
            for entity_key, values, event, created in data[first : first + _WRITE_BATCH]:
                row = {name: _stored(value, kinds[name]) for name, value in values.items() if name in kinds}
                times = (_microseconds(event), NEVER_US if created is None else _microseconds(created))
                keyed.setdefault(_record_key(config, family, entity_key), []).append((*times, layout.pack(row, *times)))
            self._merge(config, table, keyed)
            if progress is not None:
                progress(min(_WRITE_BATCH, len(data) - first))

    def write_segments(
        self, config: RepoConfig, table: FeatureView, keys: Sequence[bytes], segments: Sequence[bytes],
        event_us: NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Write packed rows: the way without protobuf, for bulk loads. keys: of the records."""
        self._remembered(config, table)
        for first in range(0, len(keys), _WRITE_BATCH):
            part = slice(first, first + _WRITE_BATCH)
            keyed = {
                key: [(event, NEVER_US, segment)]
                for key, segment, event in zip(keys[part], segments[part], event_us[part].tolist(), strict=True)
            }
            self._merge(config, table, keyed)

    def _merge(
        self, config: RepoConfig, table: FeatureView, keyed: Mapping[bytes, list[tuple[int, int, bytes]]]
    ) -> None:
        store = self.tiers(config)
        with self._writing:
            items: dict[bytes, bytes] = {}
            for (key, rows), record in zip(keyed.items(), store.get_many(list(keyed)), strict=True):
                newest = max(rows, key=lambda row: row[:2])
                # Of equal times the later write holds, which is what makes a repeated push harmless.
                newest = [row for row in rows if row[:2] == newest[:2]][-1]
                if newest[:2] >= segment_times(record, table.name):
                    items[key] = with_segment(record, newest[2])
            store.put_many(items)

    # ------------------------------------------------------------------ reading

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """One row a key, in Feast's form."""
        keys = [_record_key(config, _family(table), entity_key) for entity_key in entity_keys]
        records = self.tiers(config).get_many(keys)
        return self._as_protos(config, table, records, requested_features)

    def _as_protos(
        self, config: RepoConfig, table: FeatureView, records: Sequence[bytes | None], wanted: list[str] | None
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        layout = _layout(table)
        names = [name for name, _ in layout.fields if wanted is None or name in wanted]
        rows = read_rows(records, layout, names, self._known(config))
        attributes = {field.name: _value_attribute(field.dtype.to_value_type()) for field in table.features}
        out: list[tuple[datetime | None, dict[str, Value] | None]] = []
        for i in range(len(records)):
            if rows.event_us[i] == NEVER_US:
                out.append((None, None))
                continue
            values = {
                name: _proto(rows.columns[name][i], attributes[name]) if rows.status[i, f] == PRESENT else Value()
                for f, name in enumerate(names)
                if rows.status[i, f] != NOT_FOUND
            }
            out.append((datetime.fromtimestamp(rows.event_us[i] / 1e6, tz=UTC), values))
        return out

    def get_online_features(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: list[dict[str, Any]] | Mapping[str, Any],
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """Feast's call, answered from one look-up a key."""
        columns = None if include_feature_view_version_metadata else _columnar(entity_rows)
        context = utils._get_cached_request_context(registry, project, features, full_feature_names)
        _, on_demand, _, _, _, grouped, _, request_data, entityless = context
        is_plain = (
            columns is not None
            and not on_demand
            and not request_data
            and not entityless
            and set(columns) == {name for view, _ in grouped for name in view.join_keys}
            and all(_is_plain(view) for view, _ in grouped)
        )
        if columns is None or not is_plain:
            return super().get_online_features(
                config, features, entity_rows, registry, project, full_feature_names,
                include_feature_view_version_metadata,
            )  # fmt: skip
        return self._columnar_response(config, grouped, columns, full_feature_names)

    def _columnar_response(
        self, config: RepoConfig, grouped: list[tuple[FeatureView, list[str]]], keys: dict[str, list[Any]],
        full_feature_names: bool,
    ) -> "ColumnarResponse":  # fmt: skip
        asked: list[bytes] = []
        spans: dict[tuple[str, tuple[str, ...]], slice] = {}
        for view, _ in grouped:
            kind = (_family(view), tuple(sorted(view.join_keys)))
            if kind not in spans:
                own = _record_keys(config.project, kind[0], {name: keys[name] for name in kind[1]})
                spans[kind] = slice(len(asked), len(asked) + len(own))
                asked += own
        found = self.tiers(config).get_many(asked)
        response = ColumnarResponse(keys)
        for kind, span in spans.items():
            views = [(v, names) for v, names in grouped if (_family(v), tuple(sorted(v.join_keys))) == kind]
            numbers = [(v, names) for v, names in views if not self._layout(v).variable]
            if numbers:
                reader = self._reader(numbers)
                response.add_vectors(numbers, reader.read(found[span], self._known(config)), full_feature_names)
            for view, names in views:
                if self._layout(view).variable:
                    rows = read_rows(found[span], self._layout(view), names, self._known(config))
                    response.add(view, names, full_feature_names, rows)
        return response

    def _layout(self, view: FeatureView) -> ViewLayout:
        """The view's layout, worked out once an object: Feast hands out the same one until its registry changes."""
        known = self._of_view.get(id(view))
        if known is None or known[0]() is not view:
            if len(self._of_view) > _MAX_VIEWS:
                self._of_view.clear()
            known = self._of_view[id(view)] = (ref(view), _layout(view))
        return known[1]

    def _reader(self, wanted: Sequence[tuple[FeatureView, list[str]]]) -> VectorReader:
        what = tuple((self._layout(view).id, tuple(names)) for view, names in wanted)
        if what not in self._readers:
            if len(self._readers) > _MAX_VIEWS:
                self._readers.clear()
            self._readers[what] = VectorReader([(self._layout(view), names) for view, names in wanted])
        return self._readers[what]

    def _read_features_per_fv(
        self, config: RepoConfig, grouped_refs: list[Any], join_key_values: dict[str, Any],
        entity_name_to_join_key_map: dict[str, str], online_features_response: Any, full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:  # fmt: skip
        """All views of a request in one round trip, for requests that need Feast's own form."""
        asked: dict[bytes, None] = {}
        parts = []
        for table, requested in grouped_refs:
            entities, indexes, length = utils._get_unique_entities(table, join_key_values, entity_name_to_join_key_map)
            keys = [_record_key(config, _family(table), key) for key in utils._get_entity_key_protos(entities)]
            parts.append((table, requested, indexes, length, keys))
            asked.update(dict.fromkeys(keys))
        found = dict(zip(asked, self.tiers(config).get_many(list(asked)), strict=True))
        for table, requested, indexes, length, keys in parts:
            utils._populate_response_from_feature_data(
                requested, self._as_protos(config, table, [found[key] for key in keys], requested), indexes,
                online_features_response, full_feature_names, table, length, include_feature_view_version_metadata,
            )  # fmt: skip

    # ------------------------------------------------------------------ views

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Remember the layouts of views that are kept, remove the rows of those that are not."""
        for table in tables_to_keep:
            self._remembered(config, table)
        self._remove(config, tables_to_delete)

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Remove the rows of these views."""
        self._remove(config, tables)

    def _remove(self, config: RepoConfig, tables: Sequence[FeatureView]) -> None:
        store = self.tiers(config)
        for table in tables:
            keys = list(store.keys(record_prefix(config.project, _family(table))))
            for first in range(0, len(keys), _WRITE_BATCH):
                batch = keys[first : first + _WRITE_BATCH]
                left = {
                    key: without_view(record, table.name)
                    for key, record in zip(batch, store.get_many(batch), strict=True)
                    if record is not None
                }
                store.put_many({key: record for key, record in left.items() if record})
                store.delete_many([key for key, record in left.items() if not record])

    def _remembered(self, config: RepoConfig, table: FeatureView) -> ViewLayout:
        """The view's layout, kept in the store too, so that its rows can be read when the view has changed."""
        layout = _layout(table)
        if layout.id not in self._layouts:
            self.tiers(config).put_many({_layout_key(layout.id): layout.to_json()})
            self._layouts[layout.id] = layout
        return layout

    def _known(self, config: RepoConfig) -> Callable[[int], ViewLayout | None]:
        def find(layout_id: int) -> ViewLayout | None:
            if layout_id not in self._layouts:
                [content] = self.tiers(config).get_many([_layout_key(layout_id)])
                if content is None:
                    return None
                self._layouts[layout_id] = ViewLayout.from_json(content)
            return self._layouts[layout_id]

        return find


class ColumnarResponse(OnlineResponse):
    """Columns that become protobuf when `proto` is asked for.

    status: feature → (N,) PRESENT, NULL, NOT_FOUND or EXPIRED (older than the view's TTL). event_us: feature → (N,).
    """

    def __init__(self, keys: dict[str, list[Any]]) -> None:
        self._keys = keys
        self._feature_types: dict[str, ValueType] = {}
        self._proto: GetOnlineFeaturesResponse | None = None
        self._values: dict[str, tuple[NDArray[Any], str]] = {}
        self._held: dict[str, NDArray[np.bool_] | None] = {}  # None: all are
        self.status: dict[str, NDArray[np.uint8]] = {}
        self.event_us: dict[str, NDArray[np.int64]] = {}

    def add(self, view: FeatureView, names: list[str], full_feature_names: bool, rows: ViewRows) -> None:
        """Take in the fields of one view."""
        self._add(view, names, full_feature_names, [rows.columns[n] for n in names], rows.status, rows.event_us)

    def add_vectors(
        self, views: Sequence[tuple[FeatureView, list[str]]], vectors: Vectors, full_feature_names: bool
    ) -> None:
        """Take in the numbers of several views, in their order."""
        first = 0
        for v, (view, names) in enumerate(views):
            kinds = {field.name: _KINDS[field.dtype.to_value_type()][0] for field in view.features}
            columns = [vectors.column(first + f, kinds[name]) for f, name in enumerate(names)]
            status = vectors.status[:, first : first + len(names)]
            self._add(view, names, full_feature_names, columns, status, vectors.event_us[:, v])
            first += len(names)

    def _add(
        self, view: FeatureView, names: list[str], full_feature_names: bool, columns: Sequence[NDArray[Any]],
        status: NDArray[np.uint8], event_us: NDArray[np.int64],
    ) -> None:  # fmt: skip
        prefix = f"{_view_name(view)}__" if full_feature_names else ""
        types = {field.name: field.dtype.to_value_type() for field in view.features}
        if view.ttl:
            is_old = event_us < int((time.time() - view.ttl.total_seconds()) * 1e6)
            status = np.where(is_old[:, None] & (status == PRESENT), EXPIRED, status)
        is_held = (status == PRESENT) | (status == EXPIRED)
        all_held = is_held.all(axis=0)
        for f, name in enumerate(names):
            shown = prefix + name
            self._feature_types[shown] = types[name]
            self._values[shown] = (columns[f], _value_attribute(types[name]))
            self._held[shown] = None if all_held[f] else is_held[:, f]
            self.status[shown] = status[:, f]
            self.event_us[shown] = event_us

    def column(self, name: str) -> NDArray[Any]:
        """Numbers of one feature as they are stored, 0 where the status is not PRESENT."""
        return self._values[name][0]

    @property
    def proto(self) -> GetOnlineFeaturesResponse:  # type: ignore[override]  # built when it is asked for
        """Feast's message."""
        if self._proto is None:
            self._proto = self._built()
        return self._proto

    def _built(self) -> GetOnlineFeaturesResponse:
        response = GetOnlineFeaturesResponse()
        vector = GetOnlineFeaturesResponse.FeatureVector
        for name, values in self._keys.items():
            response.metadata.feature_names.val.append(name)
            attribute = "string_val" if any(isinstance(v, str) for v in values) else "int64_val"
            present = [FieldStatus.PRESENT] * len(values)
            protos = [Value(**{attribute: value}) for value in values]
            response.results.append(
                vector(values=protos, statuses=present, event_timestamps=[Timestamp()] * len(values))
            )
        for name, (column, attribute) in self._values.items():
            response.metadata.feature_names.val.append(name)
            status = self.status[name]
            response.results.append(
                vector(
                    values=[
                        _proto(value, attribute) if present in _HELD else Value()
                        for value, present in zip(column, status, strict=True)
                    ],
                    statuses=[_STATUS[int(value)] for value in status],
                    event_timestamps=[_timestamp(int(us)) for us in self.event_us[name]],
                )
            )
        return response

    def to_dict(self, include_event_timestamps: bool = False) -> dict[str, Any]:
        """Lists by name; None where there is no value."""
        out: dict[str, Any] = {name: list(values) for name, values in self._keys.items()}
        if include_event_timestamps:
            out.update({f"{name}__ts": [0] * len(values) for name, values in self._keys.items()})
        for name, (column, attribute) in self._values.items():
            held = self._held[name]
            if attribute not in _FAST:
                values = [
                    feast_value_type_to_python_type(_proto(value, attribute), self._feature_types[name])
                    if held is None or held[i]
                    else None
                    for i, value in enumerate(column)
                ]
            else:
                values = column.tolist()
                if held is not None:
                    values = [value if there else None for value, there in zip(values, held, strict=True)]
            out[name] = values
            if include_event_timestamps:
                seen = self.event_us[name]
                out[f"{name}__ts"] = np.where(seen == NEVER_US, 0, seen // 1_000_000).tolist()
        return out


def _view_name(view: FeatureView) -> str:
    return str(view.projection.name_to_use())  # type: ignore[no-untyped-call]


def _family(view: FeatureView) -> str:
    return str((view.tags or {}).get(FAMILY_TAG, ""))


def _layout(view: FeatureView) -> ViewLayout:
    kinds = ((field.name, field.dtype.to_value_type()) for field in view.features)
    return ViewLayout(view.name, tuple((name, _KINDS[kind][0] if kind in _KINDS else "proto") for name, kind in kinds))


def _layout_key(layout_id: int) -> bytes:
    return b"\0layout\0%016x" % layout_id


def _value_attribute(value_type: ValueType) -> str:
    return _KINDS[value_type][1] if value_type in _KINDS else ""


def _stored(value: Value, kind: Kind) -> Any:
    """What a segment holds of a value; None for null."""
    attribute = value.WhichOneof("val")
    if attribute is None:
        return None
    if kind == "proto":
        return value.SerializeToString()
    plain = getattr(value, attribute)
    return plain.encode() if kind == "str" else plain


def _proto(value: Any, attribute: str) -> Value:
    if attribute == "":
        out = Value()
        out.ParseFromString(value)
        return out
    if attribute == "string_val":
        return Value(string_val=value.decode())
    return Value(**{attribute: value.item() if isinstance(value, np.generic) else value})


def _microseconds(moment: datetime) -> int:
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)


def _timestamp(time_us: int) -> Timestamp:
    return (
        Timestamp()
        if time_us == NEVER_US
        else Timestamp(seconds=time_us // 1_000_000, nanos=time_us % 1_000_000 * 1000)
    )


def _record_key(config: RepoConfig, family: str, key: EntityKey) -> bytes:
    return record_prefix(config.project, family) + bytes(serialize_entity_key(key, 3))


def _record_keys(project: str, family: str, keys: Mapping[str, list[Any]]) -> list[bytes]:
    """Keys of the records of N requests, without protobuf."""
    if all(type(value) is str for values in keys.values() for value in values):
        made = RecordKeys(project, family, list(keys))
        if len(keys) == 1:
            return [made.of(value) for value in next(iter(keys.values()))]
        return [made.of_parts(parts) for parts in zip(*keys.values(), strict=True)]
    prefix = record_prefix(project, family)
    rows = zip(*keys.values(), strict=True)
    return [
        prefix + bytes(serialize_entity_key(EntityKey(
            join_keys=list(keys), entity_values=[Value(**{_key_attribute(v): v}) for v in row]
        ), 3))
        for row in rows
    ]  # fmt: skip


def _key_attribute(value: Any) -> str:
    return "string_val" if isinstance(value, str) else "int64_val"


def _columnar(entity_rows: Any) -> dict[str, list[Any]] | None:
    """Keys as lists, or None where they are not plain strings and integers."""
    if isinstance(entity_rows, list):
        if not entity_rows or any(row.keys() != entity_rows[0].keys() for row in entity_rows):
            return None
        columns = {name: [row[name] for row in entity_rows] for name in entity_rows[0]}
    else:
        columns = {
            name: list(values) if isinstance(values, Sequence) else [None] for name, values in entity_rows.items()
        }
    for values in columns.values():
        if (
            not values
            or len({type(value) for value in values} | {str, int}) != 2
            or len({type(v) for v in values}) != 1
        ):
            return None
    return columns if columns and len({len(values) for values in columns.values()}) == 1 else None


def _is_plain(view: FeatureView) -> bool:
    """Whether the join keys are the entities' own, strings or 64-bit integers."""
    plain = all(column.dtype.to_value_type() in (ValueType.STRING, ValueType.INT64) for column in view.entity_columns)
    return plain and not view.projection.join_key_map and getattr(view.projection, "version_tag", None) is None
