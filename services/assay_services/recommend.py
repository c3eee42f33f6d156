"""Recommendation: history and fresh item features → candidates → ranking → titles and reasons."""

import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from assay_features.definitions import Decay, FeaturePlan
from assay_features.events import KEY_SEPARATOR, Events, canonical_key, events_from_records, timestamp_us
from assay_features.feast.repository import FeatureRepository
from assay_features.items import ranker_columns
from assay_features.schema import RecommendSchema, schema_from_dict
from assay_features.state import last_times
from assay_features.stream import PushReport
from assay_platform.errors import ArtifactError, DataError, InputError
from assay_platform.models.artifact import read_json
from assay_platform.models.recommender import Ranked, Recommender
from assay_platform.models.sentences import encode
from assay_platform.monitoring.alarms import Finding
from assay_platform.monitoring.drift_reference import Reference
from numpy.typing import NDArray

from assay_services.bodies import RecommendBody
from assay_services.new_items import SharedLines, parse_items
from assay_services.rehearsal import Answer
from assay_services.schemas import ModelRef, RecommendedItem, Record
from assay_services.watch import DriftWatch

# Catching up takes a twentieth of the time at most.
_CATCH_UP_PAUSE = 20
_NOTHING: NDArray[np.int64] = np.zeros(0, dtype=np.int64)


class ItemFeatures:
    """Features of items from their states in the store, held in memory and folded anew when an event came in.

    Events that reach this process show at once; those that another process has written show after `catch_up`.
    """

    def __init__(
        self, plan: FeaturePlan, item_column: str, items: tuple[str, ...], repository: FeatureRepository
    ) -> None:
        self._plan, self._entity, self._repository = plan, item_column, repository
        self._seen_commit, self._not_before = repository.tiers.last_commit, 0.0
        self._online = repository.online(plan)
        self._decay = next(
            (i for i, d in enumerate(plan.of_entity(item_column)) if isinstance(d, Decay) and d.column is None),
            None,
        )
        self._lock = threading.Lock()
        self._states = self._online.states(item_column, list(items))
        self._newest_us = max(0, int(last_times(self._states).max(initial=0)))
        self._popularity: tuple[int, NDArray[np.float32]] | None = None
        self._row = {item: i for i, item in enumerate(items)}

    @property
    def newest_us(self) -> int:
        """The time of the newest event known."""
        return self._newest_us

    def catch_up(self) -> None:
        """Take in what another process has written since; often called, seldom done where there are many items."""
        commit, began = self._repository.tiers.last_commit, time.monotonic()
        if self._repository.writes or commit == self._seen_commit or began < self._not_before:
            return
        with self._lock:
            items = list(self._row)
        states = self._online.states(self._entity, items)
        with self._lock:
            self._states[: len(states)] = states
            self._newest_us = max(self._newest_us, int(last_times(states).max(initial=0)))
            self._popularity = None
        self._seen_commit = commit
        self._not_before = time.monotonic() + _CATCH_UP_PAUSE * (time.monotonic() - began)

    def extend(self, items: list[str]) -> None:
        """With more items behind those there."""
        states = self._online.states(self._entity, items)
        with self._lock:
            self._row |= {item: len(self._states) + i for i, item in enumerate(items)}
            self._states = np.concatenate([self._states, states])
            self._popularity = None

    def of(self, items: NDArray[np.int64], time_us: int | None = None) -> NDArray[np.float32]:
        """(n, S) on the ranker's scale; None: as of the newest event."""
        with self._lock:
            states = self._states[items]
            moment = self._newest_us + 1 if time_us is None else time_us
        return ranker_columns(self._plan, self._online.apply(self._entity, states, np.full(len(items), moment)))

    def popularity(self, time_us: int | None) -> NDArray[np.float32] | None:
        """(I,) decayed demand, if the plan has it and anything was seen."""
        if self._decay is None:
            return None
        with self._lock:
            held, newest_us = self._popularity, self._newest_us
        if time_us is None and held is not None and held[0] == newest_us:
            found = held[1]
        else:
            found = self.of(np.arange(len(self._states)), time_us)[:, self._decay]
            if time_us is None:
                self._popularity = newest_us, found
        return found if found.any() else None

    def add(self, events: Events) -> PushReport:
        """Fold events into the store and into what is cached."""
        report = self._online.push(events)
        touched = [item for item in dict.fromkeys(events.keys[self._entity]) if item in self._row]
        fresh = self._online.states(self._entity, touched) if touched else None
        with self._lock:
            if fresh is not None:
                self._states[[self._row[item] for item in touched]] = fresh
            self._newest_us = max(self._newest_us, int(events.time_us.max()))
            self._popularity = None
        return report

    def recent(self, schema: RecommendSchema, user: str) -> list[tuple[int, str, float]]:
        """Time, item and strength of a user's newest events, oldest first."""
        found = self._online.read({schema.user: [user]}, [0]).sequences.get(schema.user, [])
        events = (pair for recent in found for pair in zip(recent.time_us, recent.values, strict=True))
        if schema.action is None:
            # What is known of a newer event is when and what, so it counts as liked.
            return [(time_us, item, 1.0) for time_us, item in events]
        strength = {action: place / (len(schema.actions) - 1) for place, action in enumerate(schema.actions)}
        parts = ((time_us, *value.rpartition(KEY_SEPARATOR)) for time_us, value in events)
        return [(time_us, item, strength[action]) for time_us, item, _, action in parts]


class ItemRecommender:
    """One loaded recommender version."""

    # No labels: what became of a list is counted, not held against its scores.
    label_windows = 0

    def __init__(
        self,
        model: Recommender,
        schema: RecommendSchema,
        plan: FeaturePlan,
        repository: FeatureRepository,
        *,
        watch: DriftWatch | None = None,
    ) -> None:
        """watch: what looks for drift of events."""
        self.schema, self.plan, self.watch = schema, plan, watch
        self._model = model
        self.fences = model.fences
        self._features = ItemFeatures(plan, schema.item, model.items, repository)
        self._new_items, self._read = SharedLines(repository.folder / "new_items.jsonl"), 0
        self._lists = SharedLines(repository.folder / "lists.jsonl", sync=False)
        self._growing = threading.Lock()
        self._grow()

    @staticmethod
    def load(folder: Path, repository: FeatureRepository) -> "ItemRecommender":
        """Read the artifact and answer once.

        Raises:
            ArtifactError: the artifact is damaged, or it reads titles and their encoder is not installed.
        """
        companion = read_json(folder, "features")
        schema = schema_from_dict(companion["schema"])
        if not isinstance(schema, RecommendSchema):
            raise ArtifactError(f"{folder}: features.json holds a schema for {schema.kind!r}")
        model = Recommender.load(folder)
        if model.sources.content.takes_sentences:
            try:
                encode([""])  # weights are read now and not in a request
            except InputError as error:
                raise ArtifactError(f"{folder}: {error}") from error
        # Artifacts of before have none.
        known = read_json(folder, "drift") if (folder / "drift.json").is_file() else {}
        watch = DriftWatch(Reference.from_dict(known), entities=(schema.user, schema.item)) if known else None
        plan = FeaturePlan.from_dict(companion["plan"])
        loaded = ItemRecommender(model, schema, plan, repository, watch=watch)
        history = model.history("", [(0, model.items[0], 1.0)])
        model.recommend(history, k=1, exclude=_NOTHING, store=loaded._features.of)
        return loaded

    def recommend(
        self, user_id: str | int, *, k: int, exclude_seen: bool | None, context: Record
    ) -> tuple[list[RecommendedItem], bool]:
        """Items for a user, and whether nothing was known of them.

        context: timestamp, the moment of the request; exclude, item ids to leave out, such as what is not in stock;
        only, columns of the item table with one value or several, of which an item must have one.

        Raises:
            DataError: the user id or a field of the context does not fit.
        """
        try:
            user = canonical_key(user_id)
        except ValueError as error:
            raise DataError(f"user_id: {error}") from error
        if user is None:
            raise DataError("user_id: is empty")
        time_us = None
        if context.get("timestamp") is not None:
            try:
                time_us = timestamp_us(context["timestamp"])
            except ValueError as error:
                raise DataError(f"context.timestamp: {error}") from error
        self._grow()
        model = self._model
        recent = self._features.recent(self.schema, user)
        history = model.history(user, recent, now_us=time_us)
        taken = np.unique(history.item)
        excluded, allowed = _filtered(model, context)
        if exclude_seen is not False:
            excluded = np.union1d(model.had(history) if exclude_seen is None else taken, excluded)
        if not len(taken):
            popularity_I = self._features.popularity(time_us)
            if popularity_I is not None:
                popularity_I = popularity_I[: len(model.items)]
            ranked = model.popular(k, excluded, allowed=allowed, popularity_I=popularity_I, rules=self.schema.rules)
            return _items(model, ranked, _NOTHING), True

        def store(items: NDArray[np.int64]) -> NDArray[np.float32]:
            return self._features.of(items, time_us)

        ranked = model.recommend(history, k=k, exclude=excluded, allowed=allowed, store=store, rules=self.schema.rules)
        return _items(model, ranked, taken), False

    def rehearse(self, requests: Sequence[RecommendBody]) -> list[Answer | DataError]:
        """See `Rehearsed`."""
        return [self._rehearsed(request) for request in requests]

    def _rehearsed(self, request: RecommendBody) -> Answer | DataError:
        try:
            items, _ = self.recommend(
                request.user_id, k=request.k, exclude_seen=request.exclude_seen, context=request.context
            )
        except DataError as error:
            return error
        return Answer(frozenset(item.item_id for item in items))

    def keep_list(self, shown_by: ModelRef, user_id: str | int, items: list[RecommendedItem]) -> str | None:
        """Put a list on record with its propensities, where rules leave something to chance; its id."""
        if not self.schema.rules.explore:
            return None
        record = {
            "list_id": uuid.uuid4().hex, "time": time.time(), "user": str(user_id),
            "model": msgspec.to_builtins(shown_by), "items": [item.item_id for item in items],
            "propensity": [item.propensity for item in items],
        }  # fmt: skip
        self._lists.add([record])
        return str(record["list_id"])

    def add_items(self, records: list[Record]) -> tuple[int, list[int]]:
        """Items that can be recommended from now on: how many, and the places of those that were known already.

        Raises:
            DataError: a record does not fit the item table, or the schema has none.
        """
        if self.schema.items is None:
            raise DataError("items: the model's schema has no [items] table, so nothing is known of an item but its id")
        rows = parse_items(records, self.schema.items)
        self._grow()
        known = [i for i, row in enumerate(rows) if row[self.schema.items.id] in self._model.item_index]
        new = [row for i, row in enumerate(rows) if i not in set(known)]
        if new:
            self._new_items.add(new)
            self._grow()
        return len(new), known

    def _grow(self) -> None:
        """Take in the items that this process or another one was told of."""
        if self._new_items.size() == self._read or self.schema.items is None:
            return
        with self._growing:
            rows, end = self._new_items.since(self._read)
            new = {row[self.schema.items.id]: row for row in rows}
            new = {item: row for item, row in new.items() if item not in self._model.item_index}
            if new:
                first, items = len(self._model.items), list(new)
                self._features.extend(items)
                store_NF = self._features.of(np.arange(first, first + len(items)))
                now_us = self._features.newest_us
                self._model = self._model.extended(items, list(new.values()), now_us=now_us, store_features_NF=store_NF)
            self._read = end

    id_column = "id"

    @property
    def num_items(self) -> int:
        """Of the catalogue."""
        return len(self._model.items)

    def catch_up(self) -> None:
        """Take in what other processes have written."""
        self._features.catch_up()
        self._grow()

    def parse_events(self, records: list[Record]) -> Events:
        """Events with what features need of them."""
        events = events_from_records(
            records,
            timestamp=self.schema.timestamp,
            keys=self.schema.keys,
            numbers=self.schema.numbers,
            id_column=self.id_column,
        )
        for name in self.schema.keys:
            for i, value in enumerate(events.keys[name]):
                if value is None:
                    raise DataError(f"events[{i}].{name}: is empty; an interaction needs {', '.join(self.schema.keys)}")
                if name == self.schema.action and value not in self.schema.actions:
                    known = ", ".join(self.schema.actions)
                    raise DataError(f"events[{i}].{name}: {value!r} is unknown; allowed are {known}")
        return events

    def add(self, events: Events) -> PushReport:
        """Fold events into the online features."""
        report = self._features.add(events)
        if self.watch is not None:
            again = set(report.duplicates)
            new = [i for i in range(len(events)) if i not in again]
            self.watch.add(events.take(np.array(new, dtype=np.intp)) if again else events)
        return report

    def seen(self) -> tuple[list[Finding], list[Finding]]:
        """Findings and alarms of the newest window of events."""
        return ([], []) if self.watch is None else (list(self.watch.seen.findings), list(self.watch.seen.alarms))

    def look(self) -> bool:
        """Look at a window if there is one; whether something is to be told."""
        return self.watch is not None and self.watch.look()


def _filtered(model: Recommender, context: Record) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Items that the request does not want, and those, if it says so, of which alone it wants some."""
    exclude = context.get("exclude") or []
    if not isinstance(exclude, list):
        raise DataError(f"context.exclude: {exclude!r} is not a list of item ids")
    index = model.item_index
    unwanted = sorted({index[str(item)] for item in exclude if str(item) in index})
    only = context.get("only") or {}
    if not isinstance(only, dict):
        raise DataError(f"context.only: {only!r} is not an object of columns and values")
    allowed = None
    for column, values in only.items():
        of_column = np.zeros(len(model.items), dtype=bool)
        for value in values if isinstance(values, list) else [values]:
            try:
                of_column |= model.having(column, str(value))
            except InputError as error:
                raise DataError(f"context.only: {error}") from error
        allowed = of_column if allowed is None else allowed & of_column
    return np.array(unwanted, dtype=np.int64), allowed


def _items(model: Recommender, ranked: Ranked, taken: NDArray[np.int64]) -> list[RecommendedItem]:
    out, known = [], set(taken.tolist())
    for item, score, propensity in zip(*ranked, strict=True):
        because = None if item in known else model.because(item, taken)
        if item in known:
            reason = "taken before"
        elif because is None:
            reason = "much in demand now"
        else:
            reason = f"because of {model.title(because)} in this user's history"
        out.append(
            RecommendedItem(
                item_id=model.items[item], score=score, title=model.title(item), reason=reason, propensity=propensity
            )
        )
    return out
