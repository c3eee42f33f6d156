"""The model card: what a model is for, what it learned from, how good it is and where not to trust it (Mitchell et al.,
arXiv:1810.03993). Written for the person who has to answer for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from assay_features.schema import FraudSchema, TableSchema
from assay_platform.models.fraud import FraudModel
from assay_platform.tracking import GateReport

from assay_pipelines.automl.ensemble import Ensemble
from assay_pipelines.automl.families import FAMILIES, flags
from assay_pipelines.automl.prepare import Learnable
from assay_pipelines.automl.student import Studied
from assay_pipelines.automl.trials import Candidate
from assay_pipelines.fraud.evaluate import auc

_EXPLAINED, _SHOWN, _RESAMPLES = 1_000, 15, 200


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that a card tells."""

    name: str
    data: str
    schema: object
    learnable: Learnable
    found: Sequence[Candidate]
    ensemble: Ensemble | None
    studied: Studied
    num_fit_rows: int
    model: FraudModel
    metrics: Mapping[str, float]
    gate: GateReport
    budget_s: float
    seed: int


def model_card(card: Card) -> str:
    """As Markdown."""
    return "\n".join([*_head(card), *_data(card), *_quality(card), *_choice(card), *_columns(card), *_limits(card)])


def _head(card: Card) -> Iterator[str]:
    label = card.schema.label if isinstance(card.schema, FraudSchema | TableSchema) else ""
    yield f"# {card.name}"
    yield ""
    yield f"How likely `{label}` is, as a calibrated probability, from {len(card.learnable.encoder.names)} columns."
    yield f"Boosted trees, distilled from a search within {card.budget_s:g} seconds on {card.data}, seed {card.seed}."
    yield f"Gate: {card.gate.summary}."
    yield ""


def _data(card: Card) -> Iterator[str]:
    table = card.learnable
    labels = flags(table.rows)
    group = card.schema.group if isinstance(card.schema, TableSchema) else None
    order = "time" if table.in_time else "chance"
    order += "" if group is None else f", with the rows of one `{group}` together"
    yield "## Data"
    yield ""
    yield f"Split by {order}:"
    yield ""
    yield "| part | rows | positive |"
    yield "|---|---|---|"
    bounds = (0, table.num_train, table.learned.stop, len(labels))
    for name, start, end in zip(("train", "validation", "test"), bounds[:-1], bounds[1:], strict=True):
        yield f"| {name} | {end - start:,} | {labels[start:end].mean():.2%} |"
    yield ""
    yield from (f"- {note}" for note in table.notes)
    yield ""


def _quality(card: Card) -> Iterator[str]:
    table = card.learnable
    tested = table.rows.take(table.tested)
    labels, scores = flags(tested), card.model.logits(tested.rows)
    generator = np.random.default_rng(card.seed)
    drawn = []
    for _ in range(_RESAMPLES):
        rows = generator.integers(0, len(labels), len(labels))
        if 0 < labels[rows].sum() < len(rows):
            drawn.append(auc(labels[rows], scores[rows]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    yield "## Quality on the test part, which nothing was chosen by"
    yield ""
    yield f"AUC {card.metrics['auc']:.4f} (95 % of resamples: {low:.4f} to {high:.4f})."
    yield ""
    yield "| metric | |"
    yield "|---|---|"
    yield from (f"| {name} | {value:.5g} |" for name, value in card.metrics.items())
    yield ""


def _choice(card: Card) -> Iterator[str]:
    yield "## How it was chosen"
    yield ""
    yield f"{len(card.found)} trials, each of up to {card.num_fit_rows:,} rows. The best of each family on rows"
    yield "that it had not seen:"
    yield ""
    yield "| family | trials | AUC | seconds |"
    yield "|---|---|---|---|"
    for family in FAMILIES:
        of = [one for one in card.found if one.params["family"] == family]
        if of:
            yield f"| {family} | {len(of)} | {of[0].score:.4f} | {of[0].seconds:.0f} |"
    yield ""
    if card.ensemble is not None:
        members = ", ".join(
            f"{one.params['family']} {weight:.2f}"
            for one, weight in zip(card.ensemble.members, card.ensemble.weights, strict=True)
        )
        yield f"The ensemble ({members}) reaches {card.ensemble.score:.4f} there; the model learned from it."
    yield f"The model's trees by labels alone reach {card.studied.score:.4f} there."
    yield ""


def _columns(card: Card) -> Iterator[str]:
    table = card.learnable
    some = table.rows.rows.rows(table.tested).rows(slice(0, _EXPLAINED))
    _, explanation = card.model.explain(some)
    weight = np.abs(explanation.contribution_NG).mean(axis=0)
    yield f"## What it looks at, mean contribution to the log-odds over {len(some.values_NF):,} test rows"
    yield ""
    yield "| column | |"
    yield "|---|---|"
    for place in np.argsort(-weight)[:_SHOWN]:
        if weight[place] > 0:
            yield f"| {card.model.feature_names[place]} | {weight[place]:.3f} |"
    yield ""


def _limits(card: Card) -> Iterator[str]:
    yield "## Where not to trust it"
    yield ""
    if card.learnable.in_time:
        yield "- It was measured on rows right after those it learned from; how it holds later has to be watched."
    else:
        yield "- It was measured on rows drawn like those it learned from; it may do worse on others, or later."
    yield "- It orders and calibrates; it does not say what would happen if a column were changed."
    yield "- No segment was looked at by itself: see how it treats the groups that matter to you before it decides."
    if isinstance(card.schema, TableSchema):
        yield "- It was not attacked: do not let people whose gain depends on the answer send its columns."
    yield ""
