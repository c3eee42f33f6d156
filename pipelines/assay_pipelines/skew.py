"""`assay features skew`: what was served, against the same features computed in batch afterwards, cell by cell.

A decision that is on record has the features that it was made from. Once its event is in a table with all that happened
before it, batch says what they should have been. Whatever differs was late, lost, counted twice or computed otherwise.
What is found is left where the service looks for it: it shows with its drift, and in `/metrics`.
"""

import argparse
import heapq
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from assay_features.definitions import FeaturePlan
from assay_features.embeddings import load_tables
from assay_features.row_features import model_columns
from assay_features.schema import FraudSchema, schema_from_dict
from assay_platform.errors import InputError, WorkError
from assay_platform.models.artifact import read_json
from assay_platform.monitoring.skew import SKEW_FILE, cell_skew
from assay_platform.storage import write_json
from assay_platform.tracking import CHAMPION
from assay_platform.tracking.records import DecisionRecords, Record

from assay_pipelines.console import Reporter, say
from assay_pipelines.fraud.prepare import sources_of
from assay_pipelines.options import RunOptions
from assay_pipelines.tracking import open_registry


def run_skew(options: RunOptions, call: argparse.Namespace, reporter: Reporter) -> int:
    """Compare the newest decisions of the champion with batch.

    Raises:
        InputError: there is no champion, or the table has none of the events that were decided of.
        WorkError: a cell differs.
    """
    from assay_features.batch import features_at

    from assay_pipelines.datasets.table import load_table

    registry = open_registry(options.config)
    version = registry.version_of(options.model_name, CHAMPION)
    if version is None:
        raise InputError(f"{options.model_name} has no champion; `assay models` shows what there is")
    companion = read_json(registry.download(options.model_name, version), "features")
    schema, plan = schema_from_dict(companion["schema"]), FeaturePlan.from_dict(companion["plan"])
    assert isinstance(schema, FraudSchema)
    if schema.id is None:
        raise InputError(f"{options.model_name}: events of its schema have no id, so no decision is on record")
    with reporter.stage("load", "Read and check the table"):
        events = load_table(options.table, schema).events
    assert events.ids is not None
    row_of = {name: i for i, name in enumerate(events.ids.tolist())}
    with reporter.stage("records", "Read decisions"):
        records = DecisionRecords(options.feature_repository / "records")
        served = _newest(records, version, row_of, call.rows)
        records.close()
    if not served:
        raise InputError(
            f"{options.table}: none of its events was decided by version {version} of {options.model_name}, with an id"
        )
    with reporter.stage("batch", "Compute in batch"):
        asked = events.take(np.array([row_of[name] for name, _ in served], dtype=np.intp))
        history: dict[str, Any] = {}
        for part, source in sources_of(plan, schema, events):
            history |= features_at(part, source, asked)
        batch = model_columns(plan, asked, history, load_tables(options.feature_repository, plan))
    names = served[0][1]["decision"]["features"]
    online = {name: _column([one["decision"]["features"][name] for _, one in served], batch[name]) for name in names}
    found = cell_skew(online, {name: np.asarray(batch[name]) for name in names}, [name for name, _ in served],
                      tolerance=call.tolerance)  # fmt: skip
    write_json(options.feature_repository / SKEW_FILE, {
        "at": time.time(), "version": version, "rows": len(served), "findings": [asdict(one) for one in found],
    })  # fmt: skip
    say(f"{len(served):,} decisions of version {version}, {len(served) * len(names):,} cells")
    for one in found:
        say(one.text)
    if found:
        raise WorkError(f"{len(found)} of {len(names)} features were served otherwise than batch computes them")
    say("served and batch agree")
    return 0


def _newest(records: DecisionRecords, version: int, row_of: dict[str, int], num: int) -> list[tuple[str, Record]]:
    """Decisions of a version on events of the table."""
    decided = (
        (record["decision"]["decided_at"], name, record)
        for name, record in records.items()
        if name in row_of and record.get("decision", {}).get("model", {}).get("version") == version
    )
    return [(name, record) for _, name, record in heapq.nlargest(num, decided, key=lambda one: one[:2])]


def _column(values: list[Any], like: Any) -> Any:
    """As batch has it; records are JSON, which has no NaN."""
    if np.asarray(like).dtype == object:
        return np.array(values, dtype=object)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
