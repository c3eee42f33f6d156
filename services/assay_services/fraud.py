"""Fraud scoring: columns → features from the store → model → decision and reasons."""

from pathlib import Path
from typing import Any

import numpy as np
from assay_features.definitions import FeaturePlan
from assay_features.events import Events, events_from_records
from assay_features.feast.repository import FeatureRepository
from assay_features.row_features import model_columns
from assay_features.schema import FraudSchema, schema_from_dict
from assay_features.state import entity_keys
from assay_features.stream import PushReport
from assay_platform.errors import ArtifactError
from assay_platform.models.artifact import read_json
from assay_platform.models.fraud import FraudModel

from assay_services.reasons import ReasonWriter
from assay_services.schemas import FraudScore, Record


class FraudScorer:
    """One loaded fraud version with the features it was trained on."""

    def __init__(
        self, model: FraudModel, schema: FraudSchema, plan: FeaturePlan, repository: FeatureRepository
    ) -> None:
        self.schema, self.plan = schema, plan
        self._model = model
        self.fences = model.fences
        self._online = repository.online(plan)
        self._tables = repository.embedding_tables(plan)
        self._reasons = ReasonWriter(plan, model.feature_names)

    @staticmethod
    def load(folder: Path, repository: FeatureRepository) -> "FraudScorer":
        """Read the artifact and answer once, so that the first request finds everything warm."""
        companion = read_json(folder, "features")
        schema = schema_from_dict(companion["schema"])
        if not isinstance(schema, FraudSchema):
            raise ArtifactError(f"{folder}: features.json holds a schema for {schema.kind!r}")
        scorer = FraudScorer(FraudModel.load(folder), schema, FeaturePlan.from_dict(companion["plan"]), repository)
        record: Record = dict.fromkeys((*schema.keys, *schema.numbers))
        for explain in (True, False):  # they take different paths through the net
            scorer.score([{**record, schema.timestamp: 0}], explain=explain)
        return scorer

    def score(self, records: list[Record], *, explain: bool) -> list[FraudScore]:
        """Score events as of their own timestamps.

        Raises:
            DataError: an event lacks a column or has a value that does not fit.
        """
        schema = self.schema
        events = events_from_records(
            records,
            timestamp=schema.timestamp,
            keys=schema.keys,
            numbers=schema.numbers,
            id_column=schema.id or "id",
        )
        keys = {entity: list(entity_keys(entity, events)) for entity in self.plan.entities}
        history = self._online.read(keys, events.time_us)
        columns = model_columns(self.plan, events, history.values, self._tables)
        rows = self._model.encode(columns)
        base, contribution_NG = None, None
        if explain:
            scores, explanation = self._model.explain(rows)
            base, contribution_NG = explanation.base, explanation.contribution_NG
        else:
            scores = self._model.score(rows)
        out = []
        for i in range(len(events)):
            reasons = []
            if contribution_NG is not None:
                reasons = self._reasons.write(contribution_NG[i], _row(columns, i))
            out.append(
                FraudScore(
                    id=None if events.ids is None else events.ids[i],
                    score=float(scores.probability[i]),
                    decision="decline" if scores.decline[i] else "approve",
                    threshold=self._model.threshold,
                    base=base,
                    reasons=reasons,
                )
            )
        return out

    def parse_events(self, records: list[Record]) -> Events:
        """Events with what features need of them."""
        return events_from_records(
            records,
            timestamp=self.schema.timestamp,
            keys=self.plan.key_columns(),
            numbers=self.plan.number_columns(),
            id_column=self.schema.id or "id",
        )

    def add(self, events: Events) -> PushReport:
        """Fold events into the online features."""
        return self._online.push(events)


def _row(columns: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: np.asarray(column, dtype=object)[i] for name, column in columns.items()}
