"""Fraud scoring: columns → features from the store → model → decision and reasons."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from assay_features.accounts import AccountStream, columns_read
from assay_features.definitions import Entity, FeaturePlan
from assay_features.events import Events, canonical_key, events_from_records, timestamp_us
from assay_features.feast.repository import FeatureRepository
from assay_features.reports import plan_parts
from assay_features.row_features import model_columns
from assay_features.rules import Rule, rules_from_dict
from assay_features.schema import FraudSchema, schema_from_dict
from assay_features.state import entity_keys
from assay_features.stream import PushReport
from assay_platform.errors import ArtifactError, DataError
from assay_platform.models.artifact import read_json
from assay_platform.models.decisions import DECISIONS, Decision
from assay_platform.models.fraud import FraudModel
from assay_platform.monitoring.alarms import Finding
from assay_platform.monitoring.calibration import Calibration
from assay_platform.monitoring.drift_reference import Reference
from assay_platform.monitoring.skew import SKEW_FILE
from assay_platform.robustness.constraints import Transactions
from assay_platform.robustness.counterfactual import Choices, counterfactual
from assay_platform.tracking.records import DecisionRecords
from numpy.typing import NDArray

from assay_services.reasons import ReasonWriter, rule_reason, would_have_been
from assay_services.rehearsal import Answer
from assay_services.schemas import (
    ColumnChange,
    Counterfactual,
    FraudScore,
    Label,
    LabelsResponse,
    ModelRef,
    RecentDecision,
    Record,
)
from assay_services.stages import Laps
from assay_services.watch import SCORE, CalibrationWatch, DriftWatch, SkewWatch

_MANY_ROWS = 16
# Decisions that are shown as the newest.
_RECENT = 100


class Judged(NamedTuple):
    """A decision of which it is known what came true. delay_s: from it to its label."""

    decision: Decision
    score: float
    delay_s: float
    fraud: bool


class FraudScorer:
    """One loaded fraud version with the features it was trained on."""

    def __init__(
        self,
        model: FraudModel,
        schema: FraudSchema,
        plan: FeaturePlan,
        repository: FeatureRepository,
        *,
        choices: Choices,
        rules: tuple[Rule, ...] = (),
        records: DecisionRecords | None = None,
        watch: DriftWatch | None = None,
        calibration: CalibrationWatch | None = None,
    ) -> None:
        """records: where decisions are kept; without it none are. watch, calibration: what looks for drift."""
        self.skew = SkewWatch(repository.folder / SKEW_FILE)
        self.schema, self.plan = schema, plan
        self._model = model
        self.fences = model.fences
        parts = plan_parts(plan, schema)
        self._streams = [(part, repository.online(part)) for part, _ in parts]
        self._accounts = AccountStream.open(repository, schema, plan)
        self._reports = parts[1][1] if len(parts) > 1 else None
        self._tables = repository.embedding_tables(plan)
        self._reasons = ReasonWriter(plan, model.feature_names, usual=model.reference_columns())
        self._rules, self._records, self.watch, self.calibration = rules, records, watch, calibration
        self._choices = choices
        self._recent: deque[tuple[float, Record, FraudScore]] = deque(maxlen=_RECENT)
        self._feasible = choices.feasible(schema.limits, schema.numeric, schema.keys)

    @staticmethod
    def load(folder: Path, repository: FeatureRepository, records: DecisionRecords | None = None) -> "FraudScorer":
        """Read the artifact and answer once, so that the first request finds everything warm."""
        companion = read_json(folder, "features")
        schema = schema_from_dict(companion["schema"])
        if not isinstance(schema, FraudSchema):
            raise ArtifactError(f"{folder}: features.json holds a schema for {schema.kind!r}")
        plan = FeaturePlan.from_dict(companion["plan"])
        rules = rules_from_dict(read_json(folder, "rules"))
        choices = Choices.from_dict(read_json(folder, "choices"))
        model = FraudModel.load(folder)
        # Artifacts of before have none.
        known = read_json(folder, "drift") if (folder / "drift.json").is_file() else {}
        entities = dict.fromkeys(e for part, _ in plan_parts(plan, schema) for e in part.entities if isinstance(e, str))
        watch = DriftWatch(Reference.from_dict(known), entities=tuple(entities)) if known else None
        meant = read_json(folder, "calibration") if (folder / "calibration.json").is_file() else {}
        calibration = CalibrationWatch(Calibration.from_dict(meant)) if meant else None
        scorer = FraudScorer(
            model, schema, plan, repository, choices=choices, rules=rules, records=records, watch=watch,
            calibration=calibration,
        )  # fmt: skip
        record: Record = dict.fromkeys((*schema.keys, *schema.numbers))
        for explain in (True, False):  # they take different paths through the net
            for num_rows in (1, _MANY_ROWS):
                event = {**record, schema.timestamp: 0}
                scorer.score([event] * num_rows, explain=explain)
        return scorer

    def score(self, records: list[Record], *, explain: bool, keep_as: ModelRef | None = None) -> list[FraudScore]:
        """Score events as of their own timestamps. keep_as: given, decisions on events with an id are kept under it.

        Raises:
            DataError: an event lacks a column or has a value that does not fit.
        """
        return self._scored(records, self._events(records), None, explain=explain, keep_as=keep_as)

    def score_together(
        self, requests: Sequence[list[Record]], *, explain: bool, keep_as: ModelRef | None = None
    ) -> list[list[FraudScore] | DataError]:
        """What `score` says of each of several requests, in one call. One that does not fit spoils no other."""
        answers: list[list[FraudScore] | DataError] = [[] for _ in requests]
        fit = list(range(len(requests)))
        records = list(chain.from_iterable(requests))
        try:
            events = self._events(records)
        except DataError:
            fit = []
            for i, request in enumerate(requests):
                try:
                    self._events(request)
                    fit.append(i)
                except DataError as error:
                    answers[i] = error
            if not fit:
                return answers
            records = [record for i in fit for record in requests[i]]
            events = self._events(records)
        apart = [i for i in fit for _ in requests[i]]
        scores = iter(self._scored(records, events, apart, explain=explain, keep_as=keep_as))
        for i in fit:
            answers[i] = list(islice(scores, len(requests[i])))
        return answers

    def key_of(self, record: Record) -> str:
        """What stands for an event when a canary is chosen: its id, or all of it."""
        return self._id_of(record) or repr(sorted(record.items(), key=lambda pair: pair[0]))

    def rehearse(self, requests: Sequence[list[Record]]) -> list[Answer | DataError]:
        """See `Rehearsed`. requests: events, as `score` takes them."""
        return [
            said if isinstance(said, DataError)
            else Answer(frozenset((i, s.decision) for i, s in enumerate(said)), tuple(s.score for s in said))
            for said in self.score_together(requests, explain=False)
        ]  # fmt: skip

    def _scored(
        self,
        records: list[Record],
        events: Events,
        apart: list[int] | None,
        *,
        explain: bool,
        keep_as: ModelRef | None,
    ) -> list[FraudScore]:
        """apart: (N,) a number an event; events of different numbers know nothing of one another."""
        lap = Laps()
        if self._accounts is not None:
            events = self._accounts.assign(events, apart)
        history: dict[str, Any] = {}
        key_of: dict[Entity, list[str | None]] = {}
        for part, stream in self._streams:
            key_of |= {entity: list(entity_keys(entity, events)) for entity in part.entities if entity not in key_of}
            keys = {entity: key_of[entity] for entity in part.entities}
            history |= stream.read(keys, events.time_us).values
        lap("read features")
        columns = model_columns(self.plan, events, history, self._tables)
        rows = self._model.encode(columns)
        lap("encode")
        base, contribution_NG = None, None
        if explain:
            scores, explanation = self._model.explain(rows)
            base, contribution_NG = explanation.base, explanation.contribution_NG
        else:
            scores = self._model.score(rows)
        lap("score and explain" if explain else "score")
        hits = [(rule, rule.holds(columns)) for rule in self._rules]
        reasons = None if contribution_NG is None else self._reasons.write(contribution_NG, columns)
        out = []
        for i in range(len(events)):
            held = [rule for rule, holds in hits if holds[i]]
            out.append(
                FraudScore(
                    id=None if events.ids is None else events.ids[i],
                    score=float(scores.probability[i]),
                    decision=held[0].action if held else DECISIONS[scores.decided.decision[i]],
                    threshold=float(scores.decided.threshold[i]),
                    rules=[rule.name for rule in held],
                    base=base,
                    reasons=[] if reasons is None else [*(rule_reason(rule) for rule in held), *reasons[i]],
                )
            )
        lap("decide and write reasons")
        if keep_as is not None:
            now_s = time.time()
            self._recent.extend((now_s, *pair) for pair in zip(records, out, strict=True))
        if keep_as is not None and self.watch is not None:
            self.watch.add(events, {SCORE: scores.probability})
        if keep_as is not None and self._records is not None:
            self._records.remember(self._kept(records, columns, out, keep_as))
        lap("keep on record")
        return out

    def _kept(
        self, records: list[Record], columns: dict[str, Any], scores: list[FraudScore], model: ModelRef
    ) -> dict[str, Record]:
        now_s = time.time()
        lists = {name: np.asarray(columns[name]).tolist() for name in self._model.feature_names}
        kept = {}
        for i, (record, score) in enumerate(zip(records, scores, strict=True)):
            if score.id is not None:
                features = {name: _plain(lists[name][i]) for name in self._model.feature_names}
                decision = {
                    "model": msgspec.to_builtins(model),
                    "decided_at": now_s,
                    "features": features,
                    **msgspec.to_builtins(score),
                }
                kept[score.id] = {"event": record, "decision": decision}
        return kept

    def counterfactual(self, record: Record, score: FraudScore) -> Counterfactual | None:
        """A few changes that would have had an event approved; None where it was, or where none are found."""
        if score.decision == "approve":
            return None
        schema = self.schema
        events = self._events([record])

        def forms(written: Transactions) -> list[Record]:
            numbers = [dict(zip(schema.numeric, map(_plain, row), strict=True)) for row in written.numbers.tolist()]
            keys = [dict(zip(schema.keys, row, strict=True)) for row in written.keys.tolist()]
            return [{**record, **n, **k} for n, k in zip(numbers, keys, strict=True)]

        def judge(written: Transactions) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
            made = self.score(forms(written), explain=False)
            return np.array([m.score for m in made]), np.array([m.decision == "approve" for m in made])

        original = Transactions(
            np.array([[float(events.numbers[name][0]) for name in schema.numeric]]).reshape(1, -1),
            np.array([[events.keys[name][0] for name in schema.keys]], dtype=object).reshape(1, -1),
        )
        found = counterfactual(judge, original, self._feasible, self._choices)
        if found is None:
            return None
        changes = [ColumnChange(feature=c.column, was=c.was, would_be=c.would_be) for c in found.changes]
        return Counterfactual(changes=changes, score=found.score, text=would_have_been(changes))

    def seen(self) -> tuple[list[Finding], list[Finding]]:
        """Findings and alarms of the newest windows of events and of labels, and of what was served otherwise."""
        seen = [watch.seen for watch in (self.watch, self.calibration) if watch is not None]
        skew = self.skew.found
        return [*skew, *(f for one in seen for f in one.findings)], [*skew, *(f for one in seen for f in one.alarms)]

    @property
    def label_windows(self) -> int:
        """Windows of labels that were looked at."""
        return 0 if self.calibration is None else self.calibration.seen.windows

    def look(self) -> bool:
        """Look at a window if there is one; whether something is to be told."""
        has_looked = self.watch is not None and self.watch.look()
        return self.skew.look() or has_looked

    @property
    def id_column(self) -> str:
        """Of an event, by which it is known again."""
        return self.schema.id or "id"

    def parse_events(self, records: list[Record]) -> Events:
        """Events with what features need of them."""
        return self._parsed(self._streams[0][0], records)

    def add(self, events: Events) -> PushReport:
        """Fold events into the online features."""
        return self._streams[0][1].push(events if self._accounts is None else self._accounts.push(events))

    def keep_events(self, records: list[Record]) -> None:
        """Keep events that may be reported later, as they came."""
        if self._records is not None:
            now_s = time.time()
            named = {self._id_of(record): {"event": record, "kept_at": now_s} for record in records}
            self._records.remember({name: fields for name, fields in named.items() if name is not None})

    def recent(self, limit: int) -> list[RecentDecision]:
        """The newest decisions of this process, the newest first."""
        newest = islice(reversed(list(self._recent)), limit)
        return [
            RecentDecision(
                id=one.id, decided_at=at, event=record, score=one.score, decision=one.decision, threshold=one.threshold,
                reasons=[msgspec.to_builtins(reason) for reason in one.reasons],
            )
            for at, record, one in newest
        ]  # fmt: skip

    def erase(self, column: str, value: str) -> int:
        """Forget events of which a column has this value, what was decided of them, and the features that are kept
        under it; how many events there were.

        Raises:
            DataError: events have no such column.
            StorageError: another process writes the features; nothing was forgotten.
        """
        if column not in (self.id_column, *self.schema.keys):
            allowed = ", ".join((self.id_column, *self.schema.keys))
            raise DataError(f"column: {column!r} names nobody; allowed are {allowed}")
        for _, stream in self._streams:
            stream.forget(column, value)
        self._recent = deque((one for one in self._recent if not _has(one[1], column, value)), maxlen=_RECENT)
        return 0 if self._records is None else self._records.erase(lambda r: _has(r.get("event") or {}, column, value))

    def record(self, event_id: str) -> Record | None:
        """What is kept of an event."""
        return None if self._records is None else self._records.get(event_id)

    def report(self, labels: list[Label], *, now_s: float) -> tuple[LabelsResponse, list[Judged]]:
        """Take in what became of events; a fraud counts in the features of all that it has in common with others.
        Also returns what is now known of decisions that were made here.

        Raises:
            DataError: an event that came along, or a time, does not fit; nothing was taken in.
        """
        answer = LabelsResponse(accepted=0)
        frauds: list[tuple[int, str, Record, int]] = []
        known: dict[str, Record] = {}
        judged: list[Judged] = []
        for i, label in enumerate(labels):
            try:
                name = canonical_key(label.id)
            except ValueError as error:
                raise DataError(f"labels[{i}].id: {error}") from error
            if name is None:
                raise DataError(f"labels[{i}].id: is empty")
            record = known.get(name) or (self._records.get(name) if self._records is not None else None) or {}
            event = label.event if label.event is not None else record.get("event")
            if event is None:
                answer.unknown.append(i)
                continue
            if record.get("label", {}).get("fraud") == label.fraud:
                answer.duplicates.append(i)
                continue
            try:
                time_us = timestamp_us(now_s if label.reported_at is None else label.reported_at)
            except ValueError as error:
                raise DataError(f"labels[{i}].reported_at: {error}") from error
            known[name] = {**record, "event": event, "label": {"fraud": label.fraud, "reported_at": time_us / 1e6}}
            if (made := record.get("decision")) is not None and "label" not in record:
                delay_s = time_us / 1e6 - made["decided_at"]
                judged.append(Judged(made["decision"], made["score"], delay_s, label.fraud))
            if label.fraud and not record.get("label", {}).get("fraud"):
                frauds.append((i, name, event, time_us))
        if frauds and self._reports is not None:
            answer.late = self._push_reports(frauds)
        if self._records is not None:
            self._records.remember({n: {k: r[k] for k in ("event", "label")} for n, r in known.items()})
        answer.accepted = len(labels) - len(answer.duplicates) - len(answer.unknown)
        return answer, judged

    def _push_reports(self, frauds: list[tuple[int, str, Record, int]]) -> list[int]:
        """Places of the labels whose reports are too old for the features."""
        assert self._reports is not None
        part, stream = self._streams[1]
        column = self._reports.column
        records = [{**event, column: 1, self.id_column: name} for _, name, event, _ in frauds]
        events = self._parsed(part, records, [f"labels[{i}].event" for i, *_ in frauds])
        if self._accounts is not None:
            events = self._accounts.assign(events)
        times = np.array([time_us for *_, time_us in frauds], dtype=np.int64)
        order = np.argsort(times, kind="stable")
        pushed = stream.push(replace(events, time_us=times).take(order))
        return sorted(frauds[int(order[place])][0] for place in pushed.late)

    def _events(self, records: list[Record]) -> Events:
        schema = self.schema
        return events_from_records(
            records, timestamp=schema.timestamp, keys=schema.keys, numbers=schema.numbers, id_column=self.id_column
        )

    def _parsed(self, plan: FeaturePlan, records: list[Record], places: list[str] | None = None) -> Events:
        keys, numbers = columns_read(plan, self.schema)
        return events_from_records(
            records, timestamp=self.schema.timestamp, keys=keys, numbers=numbers, id_column=self.id_column,
            places=places,
        )  # fmt: skip

    def _id_of(self, record: Record) -> str | None:
        return canonical_key(record.get(self.id_column))


def _has(event: Record, column: str, value: str) -> bool:
    try:
        return canonical_key(event.get(column)) == value
    except ValueError:
        return False


def _plain(value: Any) -> float | str | None:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value
