"""What a model does, for those who answer for it: which features matter, how it treats each segment, how its scores
hold week by week, and whether its reasons are true and stable. All of it on rows that the model has not seen.
"""

# N rows, G features

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from assay_features.definitions import Ratio, Window, duration_name, entity_columns
from assay_platform.models.decisions import DECISIONS
from assay_platform.models.encoding import EncodedRows
from assay_platform.models.fraud import FraudModel
from numpy.typing import NDArray

from assay_pipelines.fraud.evaluate import auc
from assay_pipelines.fraud.prepare import Prepared, as_slice

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
_EXPLAINED, _TESTED = 2_000, 500
_SHOWN_FEATURES, _SHOWN_VALUES, _MAX_VALUES = 25, 6, 50
# Fewer frauds say nothing of a segment's ranking.
_MIN_FRAUDS = 20
_DELETED, _COMPARED = 5, 6
_JITTER = 0.01
_WEEK_US = 7 * 86_400_000_000


class Segment(NamedTuple):
    """How a model treats a part of the rows. auc: NaN with too few frauds. surprise: observed minus expected frauds in
    standard deviations, if every score were true.
    """

    column: str
    value: str
    rows: int
    frauds: int
    mean_score: float
    auc: float
    recall: float
    fpr: float
    surprise: float


class ReasonTests(NamedTuple):
    """How far reasons can be trusted.

    deletion: share of declined events whose score falls further without their strongest reasons than without as many
    others. fall, fall_of_others: mean fall of the log-odds. stability: share of an event's strongest reasons that stay
    among them when its numbers move by a hundredth of their spread.
    """

    deletion: float
    fall: float
    fall_of_others: float
    stability: float


class FraudReport(NamedTuple):
    """features: mean |contribution| in log-odds and its mean among frauds, largest first. told: some, in words."""

    features: list[tuple[str, float, float]]
    segments: list[Segment]
    weeks: list[Segment]
    reasons: ReasonTests
    num_explained: int
    told: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "features": [
                {"name": n, "mean_absolute_contribution": a, "mean_among_frauds": f} for n, a, f in self.features
            ],
            "segments": [_plain(s) for s in self.segments],
            "weeks": [_plain(s) for s in self.weeks],
            "reasons": self.reasons._asdict(),
            "num_explained": self.num_explained,
        }

    def to_markdown(self) -> str:
        """For people."""
        lines = ["# How this model decides", "", f"Test period; contributions of {self.num_explained:,} events.", ""]
        lines += ["| feature | mean effect, log-odds | among frauds |", "|---|---|---|"]
        lines += [f"| {self.told.get(n, n)} | {a:.3f} | {f:+.3f} |" for n, a, f in self.features]
        for title, name, parts in (("Segments", "segment", self.segments), ("Weeks", "week", self.weeks)):
            lines += [
                "",
                f"## {title}",
                "",
                f"| {name} | events | frauds | mean score | AUC | recall | FPR | surprise |",
            ]
            lines += ["|---|---|---|---|---|---|---|---|"]
            lines += [
                f"| {s.column} {s.value} | {s.rows:,} | {s.frauds:,} | {s.mean_score:.4f} | "
                f"{_cell(s.auc, 3)} | {_cell(s.recall, 3)} | {_cell(s.fpr, 4)} | {s.surprise:+.1f} |"
                for s in parts
            ]
        tests = self.reasons
        lines += [
            "", "Surprise: frauds beyond what the scores expect, in standard deviations.", "",
            "## Are the reasons true?", "",
            f"Taking away an event's {_DELETED} strongest reasons lowers its log-odds by {tests.fall:.2f}, {_DELETED} "
            f"others by {tests.fall_of_others:.2f}; by more for {tests.deletion:.1%} of the declined events. "
            f"{tests.stability:.1%} of the {_COMPARED} strongest reasons stay so when all numbers move a little.",
        ]  # fmt: skip
        return "\n".join(lines) + "\n"


def fraud_report(model: FraudModel, prepared: Prepared, *, seed: int) -> FraudReport:
    """Look at the test rows."""
    generator = np.random.default_rng(seed)
    rows = prepared.rows.rows.rows(as_slice(prepared.test))
    labels = prepared.labels[prepared.test]
    probability, decided = model.score(rows)
    flagged = decided.decision == DECISIONS.index("decline")
    explained = np.sort(generator.choice(len(labels), min(_EXPLAINED, len(labels)), replace=False))
    _, explanation = model.explain(rows.rows(torch.from_numpy(explained)))
    effect_G = np.abs(explanation.contribution_NG).mean(axis=0)
    frauds = explanation.contribution_NG[labels[explained]]
    of_frauds_G = frauds.mean(axis=0) if len(frauds) else np.zeros(len(effect_G))
    order = np.argsort(-effect_G, kind="stable")[:_SHOWN_FEATURES]
    names = model.feature_names
    declined = np.flatnonzero(flagged)
    if len(declined) == 0:
        declined = np.argsort(-probability)[:1]
    tested = generator.choice(declined, min(_TESTED, len(declined)), replace=False)
    return FraudReport(
        [(names[i], float(effect_G[i]), float(of_frauds_G[i])) for i in order if effect_G[i] > 0],
        list(_segments(prepared, probability, labels, flagged)),
        list(_weeks(prepared, probability, labels, flagged)),
        check_reasons(model, rows.rows(torch.from_numpy(np.sort(tested))), generator),
        len(explained),
        {ratio.name: _told(ratio, prepared) for ratio in prepared.plan.ratios if ratio.less is not None},
    )


def _segment(column: str, value: str, inside: Flags, probability: Floats, labels: Flags, declined: Flags) -> Segment:
    p, y, flagged = probability[inside], labels[inside], declined[inside]
    frauds = int(y.sum())
    deviation = np.sqrt((p * (1 - p)).sum()) + 1e-12
    return Segment(
        column, value, len(p), frauds, float(p.mean()),
        auc(y, p) if _MIN_FRAUDS <= frauds <= len(y) - _MIN_FRAUDS else float("nan"),
        float(flagged[y].mean()) if frauds else float("nan"),
        float(flagged[~y].mean()) if frauds < len(y) else float("nan"),
        float((frauds - p.sum()) / deviation),
    )  # fmt: skip


def _segments(prepared: Prepared, probability: Floats, labels: Flags, declined: Flags) -> Iterator[Segment]:
    """The commonest values of columns with few, quarters of the amount, entities that are new."""

    def segment(column: str, value: str, inside: Flags) -> Iterator[Segment]:
        if inside.any():
            yield _segment(column, value, inside, probability, labels, declined)

    events, test = prepared.events, prepared.test
    for column in prepared.schema.categorical:
        found = events.keys[column][test]
        values, counts = np.unique(np.array(["" if v is None else v for v in found], dtype=object), return_counts=True)
        if len(values) <= _MAX_VALUES:
            for value in values[np.argsort(-counts, kind="stable")[:_SHOWN_VALUES]]:
                wanted = value or None
                yield from segment(column, value or "(missing)", np.array([v == wanted for v in found]))
    if prepared.schema.amount is not None:
        amount = events.numbers[prepared.schema.amount][test]
        cuts = np.nanquantile(amount, [0.25, 0.5, 0.75]) if np.isfinite(amount).any() else np.zeros(3)
        quarter = np.searchsorted(cuts, amount)
        for q, name in enumerate(("lowest quarter", "second quarter", "third quarter", "highest quarter")):
            yield from segment(prepared.schema.amount, name, (quarter == q) & np.isfinite(amount))
    for entity in prepared.schema.entities:
        known = {key for key in events.keys[entity][: test[0]].tolist() if key is not None}
        is_known = np.array([key in known for key in events.keys[entity][test].tolist()])
        yield from segment(entity, "seen before the test period", is_known)
        yield from segment(entity, "new or missing", ~is_known)


def _weeks(prepared: Prepared, probability: Floats, labels: Flags, declined: Flags) -> Iterator[Segment]:
    since_us = prepared.events.time_us[prepared.test] - prepared.events.time_us[prepared.test[0]]
    week = since_us // _WEEK_US
    for number in np.unique(week):
        yield _segment("week", str(number + 1), week == number, probability, labels, declined)


def check_reasons(model: FraudModel, rows: EncodedRows, generator: np.random.Generator) -> ReasonTests:
    """Deletion and stability of the reasons of these rows."""
    _, explanation = model.explain(rows)
    share_NG = explanation.contribution_NG
    num_rows, num_features = share_NG.shape
    num = max(1, min(_DELETED, num_features // 2))
    strongest = np.argsort(-share_NG, axis=1, kind="stable")[:, :num]
    others = np.empty((num_rows, min(num, num_features - num)), dtype=np.intp)
    for n in range(num_rows):
        rest = np.setdiff1d(np.arange(num_features), strongest[n])
        # Others that have an effect too: whatever has none cannot lower a score.
        rest = rest[np.argsort(share_NG[n, rest] == 0, kind="stable")]
        rest = rest[: max(others.shape[1], int((share_NG[n, rest] != 0).sum()))]
        others[n] = generator.choice(rest, others.shape[1], replace=False)
    at = model.logits(rows)
    fall = at - model.logits(_without(model, rows, strongest))
    fall_of_others = at - model.logits(_without(model, rows, others))
    spread = pd.DataFrame(rows.values_NF.numpy()).std(ddof=0).fillna(0.0).to_numpy()
    moved = rows.values_NF.numpy() + _JITTER * spread * generator.standard_normal(rows.values_NF.shape)
    _, again = model.explain(EncodedRows(torch.from_numpy(moved.astype(np.float32)), rows.codes_NC))
    kept = [
        len(set(a) & set(b)) / min(_COMPARED, num_features)
        for a, b in zip(_top(share_NG), _top(again.contribution_NG), strict=True)
    ]
    return ReasonTests(
        float(np.mean(fall > fall_of_others)), float(np.mean(fall)), float(np.mean(fall_of_others)),
        float(np.mean(kept)),
    )  # fmt: skip


def _top(share_NG: Floats) -> list[list[int]]:
    found: list[list[int]] = np.argsort(-np.abs(share_NG), axis=1, kind="stable")[:, :_COMPARED].tolist()
    return found


def _without(model: FraudModel, rows: EncodedRows, features_NK: NDArray[np.intp]) -> EncodedRows:
    """The rows with these features as the reference has them."""
    reference = model.parts.reference
    gone = torch.zeros(len(features_NK), len(model.feature_names), dtype=torch.bool)
    gone.scatter_(1, torch.from_numpy(features_NK), True)
    num_numeric = rows.values_NF.shape[1]
    return EncodedRows(
        torch.where(gone[:, :num_numeric], reference.values_NF, rows.values_NF),
        torch.where(gone[:, num_numeric:], reference.codes_NC, rows.codes_NC),
    )


def _told(ratio: Ratio, prepared: Prepared) -> str:
    """A share of reported frauds in words; its name is that of its three parts."""
    frauds = next(d for d in prepared.plan.definitions if d.name == ratio.numerator)
    assert isinstance(frauds, Window)
    who = " with ".join(entity_columns(frauds.entity))
    return f"share of reported frauds of this {who}, {duration_name(frauds.length_s)}"


def _cell(value: float, digits: int) -> str:
    return "" if np.isnan(value) else f"{value:.{digits}f}"


def _plain(segment: Segment) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in segment._asdict().items()}
