"""What a changed column may have been through: where undoing it makes the column look like training, it has a name.

Kinds: sign, units, encoding (text written otherwise), exchanged (two columns that fit each other's place). Only columns
that a test has found already are looked at, so a wrong guess names a fault badly and never raises one.
"""

# N rows, H halves of the window

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import numpy as np

from assay_platform.monitoring.alarms import Finding
from assay_platform.monitoring.drift_cells import Column, Rows
from assay_platform.monitoring.drift_reference import ColumnReference, Reference
from assay_platform.monitoring.g_test import HALVES, block_counts

_FACTORS = (10.0, 100.0, 1000.0, 1e6, 60.0, 3600.0, 86400.0)  # decimals, and seconds of a minute, an hour, a day
_FITS_LOG_P = math.log(1e-3)


def explained(reference: Reference, window: Mapping[str, Rows], found: Mapping[str, Finding]) -> list[Finding]:
    """The findings of columns, by column, with the kind and text of a known fault where there is one."""
    out = dict(found)
    # A column that still looks like training in its values has nothing to undo.
    odd = [
        name for name, one in found.items()
        if one.kind not in {"missing", "constant"} and not _fits(reference.columns[name], window[name].values)
    ]  # fmt: skip
    for name in odd:
        column = reference.columns[name]
        cause = (_number_cause if column.cells.numeric else _text_cause)(column, window[name].values)
        if cause is not None:
            out[name] = replace(found[name], kind=cause[0], text=f"{name}: {cause[1]}")
    left = [name for name in odd if out[name] is found[name]]
    for a, b in combinations(left, 2):
        column_a, column_b = reference.columns[a], reference.columns[b]
        alike = column_a.cells.numeric == column_b.cells.numeric and out[a] is found[a] and out[b] is found[b]
        if alike and _fits(column_a, window[b].values) and _fits(column_b, window[a].values):
            for one, other in ((a, b), (b, a)):
                text = f"{one}: has the values of {other}, and {other} those of {one}: exchanged?"
                out[one] = replace(found[one], kind="exchanged", text=text)
    return list(out.values())


def _fits(column: ColumnReference, values: Column) -> bool:
    codes = column.cells.codes(Rows.of(values, np.ones(len(values), dtype=bool)))
    return all(
        column.tests[kind].log_p_of_halves(block_counts(code_N, len(column.tests[kind].counts), HALVES)) > _FITS_LOG_P
        for kind, code_N in (("unseen", codes.unseen_N), ("values", codes.values_N))
    )


def _number_cause(column: ColumnReference, values: Column) -> tuple[str, str] | None:
    if _fits(column, -values):
        return "sign", "the sign is the other one than in training"
    for factor in _FACTORS:
        if _fits(column, values / factor):
            return "units", f"values are {factor:g} times those of training: other units?"
        if _fits(column, values * factor):
            return "units", f"values are 1/{factor:g} of those of training: other units?"
    return None


def _text_cause(column: ColumnReference, values: Column) -> tuple[str, str] | None:
    """Other case or blanks than in training."""
    counts, plain = column.cells.counts, dict[str, str]()
    for known in column.cells.known:
        # Of two that differ in case only, the more frequent.
        plain.setdefault(_plain(str(known)), str(known))
    back = [None if v is None else v if v in counts else plain.get(_plain(v), v) for v in values.tolist()]
    changed = next(((v, w) for v, w in zip(values.tolist(), back, strict=True) if v != w), None)
    if changed is None or not _fits(column, np.array(back, dtype=object)):
        return None
    return "encoding", f"{changed[0]!r} and others are written unlike in training, {changed[1]!r}"


def _plain(text: str) -> str:
    return text.strip().casefold()
