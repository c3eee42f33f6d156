"""`assay replay MODEL EVENT`: make a kept decision again from its stored features, with the version that made it."""

import argparse
import json
from typing import Any

import numpy as np
from assay_platform.config import Config
from assay_platform.errors import InputError, WorkError
from assay_platform.models.fraud import FraudModel
from assay_platform.tracking.records import DecisionRecords

from assay_pipelines.console import say
from assay_pipelines.tracking import open_registry

_TOLERANCE = 1e-6


def run_replay(call: argparse.Namespace, config: Config) -> int:
    """Print the decision and the contributions; fail if the score is another one.

    Raises:
        InputError: there is no such decision.
        WorkError: the score that comes out is not the one on record.
    """
    folder = config.paths.feature_repositories / call.model / "records"
    if not folder.is_dir():
        raise InputError(f"{call.model!r} has no decisions on record")
    records = DecisionRecords(folder)
    record = records.get(call.event)
    records.close()
    made: dict[str, Any] | None = (record or {}).get("decision")
    if record is None or made is None:
        raise InputError(f"{call.model!r} has no decision on event {call.event!r}")
    version = int(made["model"]["version"])
    model = FraudModel.load(open_registry(config).download(made["model"]["name"], version))
    numeric = model.parts.encoder.numeric
    columns = {n: [np.nan if v is None and n in numeric else v] for n, v in made["features"].items()}
    scores, explanation = model.explain(model.encode(columns))
    again = float(scores.probability[0])
    contributions = dict(zip(model.feature_names, explanation.contribution_NG[0].tolist(), strict=True))
    agrees = abs(again - made["score"]) <= _TOLERANCE
    if call.json:
        say(json.dumps({**record, "replayed": {"score": again, "base": explanation.base, "agrees": agrees,
                                               "contributions": contributions}}))  # fmt: skip
    else:
        _show(call.event, record, made, again, explanation.base, contributions)
    if not agrees:
        raise WorkError(f"version {version} scores {again:.9f}, the record says {made['score']:.9f}")
    return 0


def _show(
    event: str, record: dict[str, Any], made: dict[str, Any], again: float, base: float, contributions: dict[str, float]
) -> None:
    say(f"event {event}: {made['decision']} by {made['model']['name']} version {made['model']['version']}, "
        f"score {made['score']:.6f}, declined from {made['threshold']:.6f}")  # fmt: skip
    for name in made["rules"]:
        say(f"rule that held: {name}")
    if record.get("label"):
        kind = "fraud" if record["label"]["fraud"] else "legitimate"
        say(f"reported as {kind} at {record['label']['reported_at']:.0f}")
    say(f"made again from the stored features: {again:.6f}")
    say(f"{'log-odds':>10}  {base:+.4f} for a typical legitimate event")
    for name in sorted(contributions, key=lambda n: -abs(contributions[n])):
        if contributions[name]:
            say(f"{contributions[name]:>+10.4f}  {name} = {made['features'][name]}")
