"""Search for features that lift a later period: candidates, a cheap screen, a hard confirmation, readable code.

1. *Candidates* come from the declared columns: windows, decays, distinct counts, filters, ratios to an entity's own
   past, crosses; of the entities and of their pairs. Labels are none of them, unless the caller says how long after its
   event a label is reported: then also what was reported of entities and of their combinations with categories.
2. *Screen.* A base model on the raw columns predicts each later block of time. A candidate scores by how much of that
   model's error a small table explains: bins of the candidate × bins of one partner column, Newton steps learned on
   earlier blocks, gain measured on later ones. The partner lets an interaction through that shows nothing alone.
   Shadows, candidates shuffled within short stretches of time, give the null distribution; Benjamini and Hochberg
   (1995) bound the share of false discoveries.
3. *Confirmation.* Survivors are ordered by the average precision lost on a later block when one is shuffled; the
   best few join the base model. A set is kept only if it lifts every later fold, and 95 % of resamples of time.

Nothing is kept where nothing is sure. Categories are numbered by their frequency in all events of the earliest
blocks: numbers taken from a sample that favours fraud, or from later rows, would leak the label.
"""

# N rows looked at, T stretches of time, K blocks, C candidates

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import lightgbm as lgb
import numpy as np
import pandas as pd
from assay_platform.errors import DataError
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from assay_features.batch import features_at
from assay_features.definitions import (
    DAY_S,
    HOUR_S,
    Calendar,
    Cross,
    Decay,
    Definition,
    Entity,
    FeaturePlan,
    Latest,
    Ratio,
    SinceLatest,
    Where,
    Window,
    as_code,
    entity_columns,
)
from assay_features.events import Events, Reports
from assay_features.reports import fraud_share
from assay_features.row_features import model_columns

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

_BINS, _PARTNER_BINS = 16, 6
# Stretches of a block over which a gain's mean and spread are taken, and within which shadows are shuffled.
_STRETCHES = 20
# A Newton step of a table's cell: at most so far, and held back as by 30 average rows that say nothing.
_MAX_STEP, _PRIOR_ROWS = 1.0, 30.0
# With fewer, one discovery among few candidates could not reach a small rate.
_MIN_SHADOWS = 600
# Fraud comes back to an account, which often only several columns together single out.
_MAX_REPORT_KEYS = 3
_RESAMPLES, _PARTS = 200, 40
_ALIKE = 0.95
_ROWS_A_THREAD = 10_000
_NIGHT = Where(column="calendar_hour", at_least=22.0, below=6.0)


@dataclass(frozen=True, kw_only=True)
class DiscoverySettings:
    """How wide to search. fdr: share of false discoveries that the screen may pass. max_rows: rows looked at, of the
    rarer class first; their history always comes from all events. num_folds: later periods that a set has to lift.
    """

    seed: int = 0
    fdr: float = 0.1
    max_rows: int = 60_000
    num_folds: int = 3
    num_shadows: int = 6
    num_partners: int = 8
    num_columns: int = 6
    max_survivors: int = 60
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    num_trees: int = 200
    num_seeds: int = 2


class Trial(NamedTuple):
    """One candidate: its score beside its best partner, how likely a shadow scores as high, and whether it stayed."""

    code: str
    partner: str
    score: float
    q: float
    kept: bool


class Confirmation(NamedTuple):
    """Average precision gained on each later fold by so many features; p: share of resamples of time without gain."""

    size: int
    lifts: tuple[float, ...]
    p: float


@dataclass(frozen=True)
class Discovery:
    """kept: definitions, each after those it names; empty if nothing was sure."""

    kept: tuple[Definition, ...]
    trials: tuple[Trial, ...]
    confirmations: tuple[Confirmation, ...]

    def as_code(self) -> str:
        """The kept definitions as Python source."""
        return "FeaturePlan(\n    (\n" + "".join(f"        {as_code(d)},\n" for d in self.kept) + "    )\n)"


def discover(
    events: Events,
    *,
    entities: Sequence[str],
    numeric: Sequence[str],
    categorical: Sequence[str],
    amount: str | None = None,
    reports: Reports | None = None,
    settings: DiscoverySettings | None = None,
    on_progress: Callable[[float, str], None] = lambda _done, _note: None,
) -> Discovery:
    """Search on labelled events sorted by time. Give it the training and validation period only.

    reports: how labels become known in production; without it no candidate looks at past labels.

    Raises:
        DataError: there are no labels, or a block of time has only one class.
    """
    chosen = settings or DiscoverySettings()
    rng = np.random.default_rng(chosen.seed)
    sample = _Sample.of(events, chosen, rng)
    judge = _Judge(events, sample, numeric, categorical, chosen)
    margin, best = judge.base()
    on_progress(0.15, "base model fitted")

    keys = list(dict.fromkeys((*entities, *(c for c in best if c in categorical))))[: chosen.num_columns]
    numbers = [c for c in best if c in numeric and c != amount][: chosen.num_columns]
    found = [*_candidates(events, entities, numbers, keys, amount)]
    if reports is not None:
        found += _candidates_of_reports(reports, entities, keys)
    definitions = tuple(dict.fromkeys(found))
    columns = _computed(definitions, events, sample, reports)
    on_progress(0.4, f"{len(definitions)} candidates computed")

    first = ([amount] if amount is not None else []) + best
    partners = {name: judge.column(name) for name in dict.fromkeys(first)}
    partners = dict(list(partners.items())[: chosen.num_partners]) | {
        d.name: columns[d.name] for d in definitions if isinstance(d, Calendar)
    }
    screen = _Screen(sample, margin, partners)
    scored = {d.name: screen.score(columns[d.name]) for d in definitions}
    # Hours and weekdays hardly change within a stretch, so shuffled there they are not shadows of themselves.
    shadowed = [columns[d.name] for d in definitions if not isinstance(d, Calendar)]
    q = _benjamini_hochberg(screen.p_values(shadowed, [scored[n][0] for n in columns], chosen, rng))
    q_of = dict(zip(columns, q, strict=True))
    order = sorted((d for d in definitions if q_of[d.name] <= chosen.fdr), key=lambda d: -scored[d.name][0])
    survivors = _unlike(order, columns)[: chosen.max_survivors]
    on_progress(0.7, f"{len(survivors)} passed the screen")

    ranked = judge.ranked(survivors, columns, rng)
    confirmations, size = judge.confirm([columns[d.name] for d in ranked], rng)
    by_name = {d.name: d for d in definitions}
    kept = tuple(dict.fromkeys(part for d in ranked[:size] for part in _with_needs(d, by_name)))
    names = {d.name for d in ranked[:size]}
    trials = tuple(
        Trial(as_code(d), scored[d.name][1], scored[d.name][0], float(q_of[d.name]), d.name in names)
        for d in definitions
    )
    on_progress(1.0, f"{size} kept")
    return Discovery(kept, trials, confirmations)


# ---------------------------------------------------------------------- rows and columns


@dataclass(frozen=True)
class _Sample:
    """The rows looked at. Block 0 only trains; the base model predicts from block 1, folds begin at block 2."""

    rows: Events
    index: Index  # of the rows among all events
    num_early: int  # events before the first fold
    labels: Floats
    weights: Floats  # a row stands for those of its class that were left out
    block: Index
    stretch: Index

    @staticmethod
    def of(events: Events, settings: DiscoverySettings, rng: np.random.Generator) -> "_Sample":
        if events.labels is None:
            raise DataError("the events have no labels to search with")
        labels, num_blocks = events.labels, settings.num_folds + 2
        is_rare = labels if labels.mean() < 0.5 else ~labels
        num_rare = max(1, int(is_rare.sum()))
        take_rare = min(1.0, settings.max_rows / 2 / num_rare)
        take_others = min(1.0, (settings.max_rows - take_rare * num_rare) / max(1, len(labels) - num_rare))
        chance = np.where(is_rare, take_rare, take_others)
        index = np.flatnonzero(rng.random(len(labels)) < chance)
        stretch = index * (num_blocks * _STRETCHES) // len(labels)
        block = stretch // _STRETCHES
        for k in range(num_blocks):
            if len(np.unique(labels[index[block == k]])) < 2:
                raise DataError(
                    f"the {k + 1}. of {num_blocks} blocks of time has rows of one class only; bring more rows"
                )
        return _Sample(
            rows=events.take(index), index=index, num_early=len(labels) * 2 // num_blocks,
            labels=labels[index].astype(np.float64), weights=1 / chance[index], block=block, stretch=stretch,
        )  # fmt: skip


def _numbered(values: Any, num_early: int) -> Floats:
    """Numbers as they are; categories by rank of frequency among the first rows, missing if not among them."""
    column = np.asarray(values)
    if column.dtype != object:
        return column.astype(np.float64)
    codes, uniques = pd.factorize(column, use_na_sentinel=True)
    early = codes[:num_early]
    counts = np.bincount(early[early >= 0], minlength=len(uniques))
    rank = np.full(len(uniques) + 1, np.nan)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(uniques))
    rank[:-1][counts == 0] = np.nan
    return rank[codes]  # -1, missing, is the last


def _candidates(
    events: Events, entities: Sequence[str], numbers: Sequence[str], keys: Sequence[str], amount: str | None
) -> Iterator[Definition]:
    yield from (Calendar(part="hour"), Calendar(part="weekday"))
    yield from (Cross(columns=pair) for pair in combinations(keys, 2))
    of_interest: list[Entity] = [*entities, *combinations(entities, 2)]
    for entity in of_interest:
        yield from _candidates_of(entity, events, numbers, keys, amount)


def _candidates_of(
    entity: Entity, events: Events, numbers: Sequence[str], keys: Sequence[str], amount: str | None
) -> Iterator[Definition]:
    for length_s in (HOUR_S, DAY_S, 7 * DAY_S, 30 * DAY_S):
        yield Window(entity=entity, aggregate="count", length_s=length_s)
    yield Window(entity=entity, aggregate="rate", length_s=DAY_S, against_s=30 * DAY_S)
    yield Window(entity=entity, aggregate="count", length_s=7 * DAY_S, where=_NIGHT)
    yield Decay(entity=entity, half_life_s=DAY_S)
    yield SinceLatest(entity=entity)
    for column in (c for c in keys if c not in entity_columns(entity)):
        for length_s in (DAY_S, 7 * DAY_S, 30 * DAY_S):
            yield Window(entity=entity, aggregate="distinct", column=column, length_s=length_s)
    if amount is not None:
        high = Where(column=amount, at_least=float(np.nanquantile(events.numbers[amount], 0.9)))
        yield Window(entity=entity, aggregate="count", length_s=7 * DAY_S, where=high)
        yield Window(entity=entity, aggregate="std", column=amount, length_s=30 * DAY_S)
        yield Window(entity=entity, aggregate="max", column=amount, length_s=30 * DAY_S)
        for length_s in (DAY_S, 7 * DAY_S):
            yield Window(entity=entity, aggregate="sum", column=amount, length_s=length_s)
    for column in (*([amount] if amount is not None else []), *numbers):
        mean = Window(entity=entity, aggregate="mean", column=column, length_s=30 * DAY_S)
        latest = Latest(entity=entity, column=column)
        yield from (mean, latest)
        yield from (Ratio(numerator=column, denominator=past.name) for past in (mean, latest))


def _candidates_of_reports(reports: Reports, entities: Sequence[str], keys: Sequence[str]) -> Iterator[Definition]:
    for order in range(1, _MAX_REPORT_KEYS + 1):
        for columns in combinations(keys, order):
            if not set(columns) & set(entities):
                continue
            entity: Entity = columns[0] if order == 1 else columns
            for length_s in (30 * DAY_S, 180 * DAY_S):
                yield from fraud_share(entity, reports, length_s)
            yield Decay(entity=entity, column=reports.column, half_life_s=30 * DAY_S)


def _with_needs(definition: Definition, known: Mapping[str, Definition]) -> Iterator[Definition]:
    if isinstance(definition, Ratio):
        parts = (definition.numerator, definition.denominator, definition.less)
        yield from (known[name] for name in parts if name is not None and name in known)
    yield definition


def _computed(
    definitions: Sequence[Definition], events: Events, sample: _Sample, reports: Reports | None
) -> dict[str, Floats]:
    plan = FeaturePlan(tuple(definitions))
    history = features_at(plan, events, sample.rows, reports=reports)
    of_rows = FeaturePlan((*plan.calendar, *plan.ratios))
    columns: dict[str, Any] = model_columns(of_rows, sample.rows, history)
    for cross in plan.crosses:
        category = model_columns(FeaturePlan((cross,)), events, {})[cross.name]
        columns[cross.name] = _numbered(category, sample.num_early)[sample.index]
    return {d.name: np.asarray(columns[d.name], dtype=np.float64) for d in definitions}


# ---------------------------------------------------------------------- screen


class _Screen:
    """How much of the base model's error a column explains on later blocks, beside a partner and beyond it."""

    def __init__(self, sample: _Sample, margin: Floats, partners: Mapping[str, Floats]) -> None:
        self._rows = sample.block >= 1
        probability = 1 / (1 + np.exp(-margin[self._rows]))
        weights = sample.weights[self._rows]
        self._gradient = weights * (probability - sample.labels[self._rows])
        self._hessian = weights * probability * (1 - probability)
        self._stretch = sample.stretch[self._rows] - _STRETCHES
        self._num_stretches = int(self._stretch.max()) + 1
        self._prior = _PRIOR_ROWS * float(self._hessian.mean())
        self._partners = {"": np.zeros(len(weights), dtype=np.int64)}
        self._partners |= {name: _binned(column[self._rows], _PARTNER_BINS) for name, column in partners.items()}
        self._alone = {name: self._gains(codes) for name, codes in self._partners.items()}

    def score(self, column: Floats) -> tuple[float, str]:
        """The largest t value over time of the gain beyond the partner's own, and that partner; '' is none."""
        return self._best(_binned(column[self._rows], _BINS))

    def p_values(
        self, columns: Sequence[Floats], scores: Sequence[float], settings: DiscoverySettings, rng: np.random.Generator
    ) -> Floats:
        """For each score, the share of shadows of the columns that are as high."""
        shadows = []
        num_each = max(settings.num_shadows, -(-_MIN_SHADOWS // max(1, len(columns))))
        for column in columns:
            codes = _binned(column[self._rows], _BINS)
            for _ in range(num_each):
                order = np.lexsort((rng.random(len(codes)), self._stretch))
                shadows.append(self._best(codes[order])[0])
        above = len(shadows) - np.searchsorted(np.sort(shadows), scores, side="left")
        return np.asarray((1 + above) / (1 + len(shadows)), dtype=np.float64)

    def _best(self, codes: Index) -> tuple[float, str]:
        found = []
        for name, partner in self._partners.items():
            gain = self._gains(codes * (_PARTNER_BINS + 2) + partner) - self._alone[name]
            found.append((float(gain.mean() / (gain.std() / np.sqrt(len(gain)) + 1e-9)), name))
        return max(found)

    def _gains(self, cells: Index) -> Floats:
        """(T,) log-likelihood gained in each stretch, by steps learned on the blocks before its own."""
        num_cells = int(cells.max()) + 1
        place, size = self._stretch * num_cells + cells, self._num_stretches * num_cells
        gradient = np.bincount(place, self._gradient, size).reshape(self._num_stretches, num_cells)
        hessian = np.bincount(place, self._hessian, size).reshape(self._num_stretches, num_cells)
        gains = []
        for start in range(_STRETCHES, self._num_stretches, _STRETCHES):
            step = -gradient[:start].sum(0) / (hessian[:start].sum(0) + self._prior)
            step = np.clip(step, -_MAX_STEP, _MAX_STEP)
            now = slice(start, start + _STRETCHES)
            gains.append(-(gradient[now] @ step + 0.5 * hessian[now] @ step**2))
        return np.concatenate(gains)


def _binned(column: Floats, num_bins: int) -> Index:
    """Quantile bins; missing values have the last one."""
    is_known = ~np.isnan(column)
    if not is_known.any():
        return np.zeros(len(column), dtype=np.int64)
    cuts = np.unique(np.quantile(column[is_known], np.arange(1, num_bins) / num_bins, method="lower"))
    return np.where(is_known, np.searchsorted(cuts, column, side="right"), num_bins + 1).astype(np.int64)


def _benjamini_hochberg(p: Floats) -> Floats:
    """The smallest false discovery rate at which each would be let through."""
    order = np.argsort(p, kind="stable")
    q = p[order] * len(p) / np.arange(1, len(p) + 1)
    out = np.empty(len(p))
    out[order] = np.minimum(1.0, np.minimum.accumulate(q[::-1])[::-1])
    return out


def _unlike(definitions: Sequence[Definition], columns: Mapping[str, Floats]) -> list[Definition]:
    """Best first, without those whose ranks follow a better one's."""
    kept: list[Definition] = []
    ranks: list[Floats] = []
    for definition in definitions:
        rank = pd.Series(np.nan_to_num(columns[definition.name], nan=-1e30)).rank().to_numpy()
        rank = (rank - rank.mean()) / max(float(rank.std()), 1e-9)
        if all(abs(float(np.mean(rank * other))) < _ALIKE for other in ranks):
            kept.append(definition)
            ranks.append(rank)
    return kept


# ---------------------------------------------------------------------- confirmation


class _Judge:
    """Models fitted on earlier blocks and measured on the next one, with and without new columns."""

    def __init__(
        self, events: Events, sample: _Sample, numeric: Sequence[str], categorical: Sequence[str],
        settings: DiscoverySettings,
    ) -> None:  # fmt: skip
        self._sample, self._settings = sample, settings
        self._names = (*numeric, *categorical)
        columns = [events.numbers[name][sample.index] for name in numeric]
        columns += [_numbered(events.keys[name], sample.num_early)[sample.index] for name in categorical]
        self._raw = np.column_stack(columns) if columns else np.zeros((len(sample.index), 1))
        self._folds = range(2, settings.num_folds + 2)

    def column(self, name: str) -> Floats:
        """A raw column at the rows looked at."""
        values: Floats = self._raw[:, self._names.index(name)]
        return values

    def base(self) -> tuple[Floats, list[str]]:
        """Margins of every block from the raw columns of earlier ones (block 0 missing), and columns by their gain."""
        margin = np.full(len(self._raw), np.nan)
        gain = np.zeros(self._raw.shape[1])
        for k in range(1, self._settings.num_folds + 2):
            model = self._fitted(self._raw, k, self._settings.seed)
            rows = self._sample.block == k
            margin[rows] = model.predict(self._raw[rows], raw_score=True)
            gain = model.feature_importance("gain")
        return margin, [self._names[i] for i in np.argsort(-gain, kind="stable") if gain[i] > 0]

    def ranked(
        self, definitions: Sequence[Definition], columns: Mapping[str, Floats], rng: np.random.Generator
    ) -> list[Definition]:
        """By the average precision lost on later blocks when a column is shuffled; those that lose none go."""
        if not definitions:
            return []
        matrix = np.column_stack([self._raw, *(columns[d.name] for d in definitions)])
        lost = np.zeros(len(definitions))
        for k in self._folds:
            model, rows = self._fitted(matrix, k, self._settings.seed), self._sample.block == k
            held = matrix[rows]
            whole = self._precision(np.asarray(model.predict(held)), rows)
            for j in range(len(definitions)):
                place = self._raw.shape[1] + j
                saved = held[:, place].copy()
                held[:, place] = rng.permutation(saved)
                lost[j] += whole - self._precision(np.asarray(model.predict(held)), rows)
                held[:, place] = saved
        return [definitions[j] for j in np.argsort(-lost, kind="stable") if lost[j] > 0]

    def confirm(self, columns: Sequence[Floats], rng: np.random.Generator) -> tuple[tuple[Confirmation, ...], int]:
        """Every size tried, and the one to keep: the smallest within half a standard error of the best, or 0."""
        if not columns:
            return (), 0
        before = self._scores(())
        tried: list[tuple[Confirmation, float]] = []
        for size in sorted({min(s, len(columns)) for s in self._settings.sizes}):
            lifts, draws = self._lifts(before, self._scores(columns[:size]), rng)
            tried.append((Confirmation(size, lifts, float(np.mean(draws <= 0))), float(draws.std())))
        best, error = max(tried, key=lambda t: np.mean(t[0].lifts))
        enough = next(c for c, _ in tried if np.mean(c.lifts) >= np.mean(best.lifts) - error / 2)
        is_sure = min(enough.lifts) > 0 and enough.p <= 0.05
        return tuple(c for c, _ in tried), enough.size if is_sure else 0

    def _lifts(
        self, before: Sequence[Floats], after: Sequence[Floats], rng: np.random.Generator
    ) -> tuple[tuple[float, ...], Floats]:
        """Lift of each fold; and of the mean, under resamples that draw whole parts of time."""
        lifts, draws = [], np.zeros(_RESAMPLES)
        for k, old, new in zip(self._folds, before, after, strict=True):
            rows = self._sample.block == k
            lifts.append(self._precision(new, rows) - self._precision(old, rows))
            part = np.arange(rows.sum()) * _PARTS // rows.sum()
            weights = rng.poisson(1.0, (_RESAMPLES, _PARTS))[:, part] * self._sample.weights[rows]
            labels = self._sample.labels[rows]
            draws += (_precisions(new, labels, weights) - _precisions(old, labels, weights)) / len(self._folds)
        return tuple(lifts), draws

    def _scores(self, columns: Sequence[Floats]) -> list[Floats]:
        matrix = np.column_stack([self._raw, *columns])
        out = []
        for k in self._folds:
            rows = matrix[self._sample.block == k]
            seeds = range(self._settings.seed, self._settings.seed + self._settings.num_seeds)
            out.append(np.mean([self._fitted(matrix, k, s).predict(rows, raw_score=True) for s in seeds], axis=0))
        return out

    def _fitted(self, matrix: Floats, k: int, seed: int) -> lgb.Booster:
        rows = self._sample.block < k
        params = {
            "objective": "binary", "verbosity": -1, "learning_rate": 0.1, "num_leaves": 31, "min_data_in_leaf": 40,
            "feature_fraction": 0.5, "bagging_freq": 1, "bagging_fraction": 0.8, "lambda_l2": 5.0, "max_bin": 127,
            "seed": seed, "deterministic": True, "force_row_wise": True,
            # Threads that share few rows mostly wait for each other, for minutes where cores are busy otherwise.
            "num_threads": max(1, min(os.cpu_count() or 1, int(rows.sum()) // _ROWS_A_THREAD)),
        }  # fmt: skip
        data = lgb.Dataset(matrix[rows], self._sample.labels[rows], weight=self._sample.weights[rows])
        return lgb.train(params, data, num_boost_round=self._settings.num_trees)

    def _precision(self, scores: Floats, rows: NDArray[np.bool_]) -> float:
        weights = self._sample.weights[rows]
        return float(average_precision_score(self._sample.labels[rows], scores, sample_weight=weights))


def _precisions(scores: Floats, labels: Floats, weights: Floats) -> Floats:
    """(B,) average precision under each of (B, N) weights."""
    order = np.argsort(-scores, kind="stable")
    hits = weights[:, order] * labels[order]
    precision = np.cumsum(hits, axis=1) / np.maximum(np.cumsum(weights[:, order], axis=1), 1e-12)
    total: Floats = np.sum(hits * precision, axis=1) / np.maximum(hits.sum(axis=1), 1e-12)
    return total
