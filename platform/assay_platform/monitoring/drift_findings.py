"""Whether a window of requests still looks like the training rows: one line a column that does not.

| kind      | test of                                               | finds                                |
|-----------|-------------------------------------------------------|--------------------------------------|
| missing   | missing, present                                      | feeds that stop, joins that fail     |
| unseen    | outside the range of training, or texts it never had  | outliers, new categories, encodings  |
| values    | quantile cells, frequent values alone                 | shift, spread, sign, units, shares   |
| grain     | the largest power of ten that divides a number        | rounding, truncation                 |
| one value | the value whose G against all others is largest       | filled in, a hot key                 |
| constant  | the same, where it is the only value                  | stuck sensors                        |
| clipped   | rows that share the largest number of their half      | limits, saturation                   |
| relation  | 5 × 5 groups of two columns that hang together        | columns joined to the wrong rows     |
| repeat    | events that came before in the window                 | replays                              |

Where undoing a known fault makes a column fit again, the finding says so instead (`drift_causes`).

**Chance.** `alarm_rate` is the probability that a clean window has any finding. It is divided by the number of tests
(Bonferroni), and a finding has to hold in both halves of the window: p = max(p₁, p₂)². So tails are needed to about
1e-3 only, which hundreds of blocks know. `Alarms` then waits for the next window; of independent rows that squares the
chance of each test once more, so findings may be less rare than alarms have to be.

Not covered: drift slower than what training itself did, relations of three columns, and events replayed from an earlier
window.
"""

# N rows, H halves of the window, C cells, V distinct values

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.stats import chi2

from assay_platform.errors import DataError
from assay_platform.monitoring.alarms import Finding, check_shares
from assay_platform.monitoring.drift_causes import explained
from assay_platform.monitoring.drift_cells import (
    GRAINS,
    Cells,
    Codes,
    Column,
    Rows,
    at_top,
    distinct,
    is_numeric,
    read_columns,
)
from assay_platform.monitoring.drift_reference import (
    ColumnReference,
    Largest,
    Reference,
    counted_once,
    joint_groups,
    one_sided_g,
    repeated,
)
from assay_platform.monitoring.g_test import HALVES, Ints, block_counts, moved

_MORE = {"unseen", "clipped"}  # kinds of which less than usual is no news
_TELLING = ("constant", "missing", "unseen", "clipped", "one value", "grain", "values")
_MOST = 0.7  # of the largest share that moved; kinds that tell as much as that are told apart by the order above
_GRAIN_NAMES = ("zero", *(f"multiples of {grain:g}" for grain in GRAINS), f"finer than {GRAINS[-1]:g}")
_EULER = 0.5772156649  # the mean of the standard Gumbel law


def findings(
    reference: Reference, window: Mapping[str, Column], *, alarm_rate: float = 0.03, min_moved: float = 0.005
) -> list[Finding]:
    """What a window has that training had not: at most one finding a column, the surest first.

    window: the columns of the reference, (N,) each, in the order in which the events came; others are ignored. At most
    `window_rows` rows; with fewer than two nothing is found. min_moved: share of rows that would have to change for the
    window to look like training; less is too little to say.

    Raises:
        ConfigError: a setting is not between 0 and 1.
        DataError: a column is not there, is text where it was numbers or the other way, or there are too many rows.
    """
    check_shares(alarm_rate=alarm_rate, min_moved=min_moved)
    read = _checked(reference, window)
    if len(next(iter(read.values()), ())) < HALVES:
        return []
    rows = counted_once({name: read[name] for name in reference.columns}, reference.entity, HALVES)
    bound = math.log(alarm_rate / reference.num_tests)

    def passes(one: Finding) -> bool:
        return one.log_p < bound and one.moved >= min_moved

    codes = {name: column.cells.codes(rows[name]) for name, column in reference.columns.items()}
    found: dict[str, Finding] = {}
    for name, column in reference.columns.items():
        signs = [*_of_cells(name, column, rows[name], codes[name]), *_of_one_value(name, column, rows[name])]
        signs = [one for one in signs if passes(one)]
        if signs:
            # One fault shows in several tests: the kind is the most telling of those that say most of what moved.
            most = max(one.moved for one in signs)
            found[name] = min(signs, key=lambda one: (one.moved < _MOST * most, _TELLING.index(one.kind)))
    broken = _of_pairs(reference, codes, set(found))
    out = [
        *explained(reference, rows, found),
        *_blamed(reference, {k: one for k, one in broken.items() if passes(one)}),
    ]
    if reference.event_id is not None:
        out += [one for one in _of_repeats(reference, read[reference.event_id]) if passes(one)]
    return sorted(out, key=lambda one: one.log_p)


def _checked(reference: Reference, window: Mapping[str, Column]) -> dict[str, Column]:
    """The newest rows that make two equal halves, of the columns of the reference."""
    needed = [*reference.columns, *([] if reference.event_id is None else [reference.event_id])]
    lacking = next((name for name in needed if name not in window), None)
    if lacking is not None:
        raise DataError(f"the window has no column {lacking!r}; needed are {', '.join(needed)}")
    read = read_columns({name: window[name] for name in needed})
    num_rows = len(read[needed[0]])
    if num_rows > reference.window_rows:
        raise DataError(f"the window has {num_rows} rows: need at most window_rows, {reference.window_rows}")
    for name, column in reference.columns.items():
        if is_numeric(read[name]) != column.cells.numeric and num_rows:
            had = "numbers" if column.cells.numeric else "text"
            raise DataError(f"column {name!r} is {read[name].dtype}: training had {had}")
    return {name: values[num_rows % HALVES :] for name, values in read.items()}


def _of_cells(name: str, column: ColumnReference, rows: Rows, codes: Codes) -> list[Finding]:
    of_test = {"missing": codes.missing_N, "unseen": codes.unseen_N, "values": codes.values_N, "grain": codes.grain_N}
    if column.cells.numeric:
        of_test["clipped"] = at_top(rows.values, HALVES)
    out = []
    for kind, test in column.tests.items():
        before_C = np.asarray(test.counts)
        count_HC = block_counts(of_test[kind], len(before_C), HALVES)
        count_C, log_p = count_HC.sum(0), test.log_p_of_halves(count_HC)
        if log_p >= 0 or (kind in _MORE and count_C[1] * before_C.sum() <= before_C[1] * count_C.sum()):
            continue
        # Of all rows, though some tests are about those that are not missing.
        share = moved(count_C, before_C) * int(count_C.sum()) / max(int((codes.missing_N >= 0).sum()), 1)
        text = f"{name}: {_text(kind, column.cells, count_C, before_C)}"
        g = float(test.distance(count_C))
        out.append(Finding(column=name, kind=kind, statistic=g, log_p=log_p, moved=share, text=text))
    return out


def _text(kind: str, cells: Cells, count_C: Ints, before_C: Ints) -> str:
    now_C, was_C = count_C / max(count_C.sum(), 1), before_C / max(before_C.sum(), 1)
    i = 1 if kind in {"missing", *_MORE} else int(np.argmax(now_C - was_C))
    if kind == "missing":
        what = "of the rows are missing"
    elif kind == "unseen" and cells.numeric:
        what = f"of the values lie outside of {cells.low:g} … {cells.high:g}"
    elif kind == "unseen":
        what = f"of the values are {'rare or ' if cells.rest else ''}unknown in training"
    elif kind == "clipped":
        what = "of the values share the largest one"
    elif kind == "grain":
        what = f"of the values are {_GRAIN_NAMES[i]}"
    elif cells.numeric:
        low, high = (cells.low, *cells.edges, cells.high)[i : i + 2]
        alone = np.nextafter(low, np.inf) == high
        what = f"of the values are {low:g}" if alone else f"of the values lie in {low:g} … {high:g}"
    else:
        what = f"of the values are {repr(cells.known[i]) if i < cells.num_own else 'rarer ones'}"
    return f"{now_C[i]:.1%} {what}, {was_C[i]:.1%} in training"


def _of_one_value(name: str, column: ColumnReference, rows: Rows) -> list[Finding]:
    """The value that became most more frequent, in both halves."""
    names, code_N = distinct(rows.values)
    if not names:
        return []
    known, cells = column.cells.counts, column.cells
    num_before = column.tests["missing"].counts[0]
    count_HV = block_counts(code_N, len(names), HALVES)
    count_V, before_V = count_HV.sum(0), np.array([known.get(v, cells.rest) for v in names], dtype=np.int64)
    g_V = np.min([one_sided_g(half_V, int(half_V.sum()), before_V, num_before) for half_V in count_HV], axis=0)
    i, num_rows = int(np.argmax(g_V)), int(count_V.sum())
    log_p = HALVES * _log_p_of_largest(column.largest, float(g_V[i]), len(names))
    if log_p >= 0:
        return []
    now, was = count_V[i] / num_rows, before_V[i] / max(num_before, 1)
    less = "less than " if names[i] not in known and cells.rest else ""
    return [
        Finding(
            column=name,
            kind="constant" if count_V[i] == num_rows and len(known) > 1 else "one value",
            statistic=float(g_V[i]),
            log_p=log_p,
            moved=float(now - was) * num_rows / int(rows.counted_N.sum()),
            text=f"{name}: {now:.1%} of the values are {names[i]!r}, {less}{was:.2%} in training",
            value=str(names[i]),
        )
    ]


def _log_p_of_largest(largest: Largest, g: float, num_values: int) -> float:
    """log p of the largest G of one of V values: by χ² of so many, or by the Gumbel law of blocks; the larger."""
    if g <= largest.most:
        return 0.0
    log_p = min(float(chi2.logsf(g, 1)) + math.log(num_values), 0.0)
    if largest.deviation > 0:
        width = largest.deviation * math.sqrt(6.0) / math.pi
        log_p = max(log_p, -max((g - largest.mean) / width + _EULER, 0.0))
    return log_p


def _of_pairs(reference: Reference, codes: Mapping[str, Codes], found: set[str]) -> dict[tuple[str, str], Finding]:
    """Pairs that no longer hang together, of columns that each by itself is as it was."""
    groups = {name: column.groups(codes[name]) for name, column in reference.columns.items()}
    out = {}
    for (a, b), test in reference.pairs.items():
        if {a, b} & found:
            continue
        code_N, num_cells = joint_groups(groups[a], groups[b])
        count_HC = block_counts(code_N, num_cells, HALVES)
        count_C = count_HC.sum(0)
        out[a, b] = Finding(
            column=a,
            kind="relation",
            statistic=float(test.distance(count_C)),
            log_p=test.log_p_of_halves(count_HC),
            moved=moved(count_C, np.asarray(test.counts)),
            text="",
        )
    return out


def _blamed(reference: Reference, broken: Mapping[tuple[str, str], Finding]) -> list[Finding]:
    """One finding a column to blame: it is in most of the broken pairs, of two alike in fewer sound ones."""
    out, left = [], dict(broken)
    num_pairs = Counter(name for pair in reference.pairs for name in pair)
    while left:
        num_broken = Counter(name for pair in left for name in pair)
        name = max(num_broken, key=lambda one: (num_broken[one], -num_pairs[one]))
        mine = {pair: left.pop(pair) for pair in list(left) if name in pair}
        others = ", ".join(sorted(b if a == name else a for a, b in mine))
        worst = min(mine.values(), key=lambda one: one.log_p)
        text = f"{name}: no longer goes with {others} as in training; joined to the wrong rows?"
        out.append(replace(worst, column=name, text=text))
    return out


def _of_repeats(reference: Reference, ids: Column) -> list[Finding]:
    test = reference.repeats
    if test is None:
        return []
    count_C, before_C = block_counts(repeated(ids, 1), 2, 1)[0], np.asarray(test.counts)
    now, was, g = count_C[1] / len(ids), before_C[1] / before_C.sum(), float(test.distance(count_C))
    text = f"events: {now:.1%} came before in this window, {was:.1%} in training: a replay?"
    # Fewer than usual give a share below 0, which is never enough.
    share = float(now - was)
    return [Finding(column="events", kind="repeat", statistic=g, log_p=test.log_p(g), moved=share, text=text)]
