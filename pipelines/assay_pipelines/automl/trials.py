"""One trial of the search: a family with its parameters learns on each fold, and what it says of rows that it has not
seen is kept. Those answers are all that an ensemble, and the model that learns from it, are made of.
"""

# N rows that may be learned from, in their order

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from assay_platform.storage import write_bytes
from assay_platform.tuning.search import TrialResult
from assay_platform.tuning.space import Space, active
from numpy.typing import NDArray

from assay_pipelines.automl.families import Known, Params, fit, flags
from assay_pipelines.fraud.evaluate import auc
from assay_pipelines.fraud.train import LabelledRows

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Rows = NDArray[np.intp]

# Up to so many rows every one is held once, in five parts; of more, the validation part is enough.
_CROSSED_ROWS, _PARTS = 60_000, 5
# Of so few rows in time, two more periods before the validation part are held too.
_FEW_IN_TIME, _PERIODS = 20_000, 3


class Fold(NamedTuple):
    """Rows to learn from and rows to be asked about."""

    fit: Rows
    held: Rows

    def at_most(self, num_rows: int) -> "Fold":
        """With fewer rows to learn from: the last ones, which are the newest where there is time."""
        return Fold(self.fit[-num_rows:], self.held)


def folds_of(
    num_train: int, num_validation: int, *, in_time: bool, starts: Flags | None = None, labels: Flags | None = None
) -> tuple[Fold, ...]:
    """How rows, in the order that the table is split in, are learned from and asked about.

    In time only earlier rows are learned from: the validation part is held, of a small table also periods before it.
    Without time every row of a small table is held once. starts: where groups begin, which no fold cuts. labels: given,
    folds that would learn or hold one class only are left out, all but the one that holds the validation part.
    """
    found = _cut_folds(num_train, num_validation, in_time, starts)
    if labels is None:
        return found
    both = tuple(fold for fold in found if all(0 < labels[part].sum() < len(part) for part in fold))
    rows = np.arange(num_train + num_validation)
    return both or (Fold(rows[:num_train], rows[num_train:]),)


def _cut_folds(num_train: int, num_validation: int, in_time: bool, starts: Flags | None) -> tuple[Fold, ...]:
    num_rows = num_train + num_validation
    rows = np.arange(num_rows)
    if in_time:
        wanted = _PERIODS if num_rows <= _FEW_IN_TIME else 1
        ends = [num_rows - step * num_validation for step in range(wanted) if (step + 2) * num_validation < num_rows]
        folds = [(end - num_validation, end) for end in reversed(ends)] or [(num_train, num_rows)]
        cuts = [(_at_group(begin, starts), _at_group(end, starts)) for begin, end in folds]
        return tuple(Fold(rows[:begin], rows[begin:end]) for begin, end in cuts if 0 < begin < end)
    if num_rows > _CROSSED_ROWS:
        return (Fold(rows[:num_train], rows[num_train:]),)
    places = [_at_group(part * num_rows // _PARTS, starts) for part in range(_PARTS + 1)]
    return tuple(
        Fold(np.r_[rows[:begin], rows[end:]], rows[begin:end]) for begin, end in pairwise(places) if begin < end
    )


def _at_group(place: int, starts: Flags | None) -> int:
    """The place itself, or where the next group begins."""
    if starts is None or place >= len(starts):
        return place
    later = np.flatnonzero(starts[place:])
    return place + int(later[0]) if len(later) else len(starts)


@dataclass(frozen=True, kw_only=True)
class TrialData:
    """What every trial gets. folder: where answers are kept. fit_s: seconds that one training may take."""

    known: Known
    rows: LabelledRows
    folds: tuple[Fold, ...]
    folder: Path
    fit_s: float
    seed: int


class Candidate(NamedTuple):
    """A trial that was held against every fold. logits (N,): NaN for rows that no fold held. sizes: see `Fitted`."""

    params: dict[str, Any]
    logits: Floats
    sizes: tuple[int, ...]
    score: float
    seconds: float


def objective(params: dict[str, Any], data: TrialData, report: Callable[[int, float], None]) -> None:
    """Train on each fold, keep the answers, report their mean AUC: once, since folds differ more than trials do."""
    labels = flags(data.rows)
    logits = np.full(len(labels), np.nan)
    sizes: list[int] = []
    began = time.monotonic()
    for fold in data.folds:
        fitted = fit(
            params,
            data.known,
            data.rows.take(_index(fold.fit)),
            data.rows.take(_index(fold.held)),
            seed=data.seed,
            until=time.monotonic() + data.fit_s,
        )
        logits[fold.held] = fitted.logits
        sizes.append(fitted.size)
    _keep(data.folder, params, logits, sizes, time.monotonic() - began)
    report(1, score(labels, logits, data.folds))


def score(labels: Flags, logits: Floats, folds: Sequence[Fold]) -> float:
    """The mean AUC of folds, each by itself: models of different folds need not agree on a level."""
    return float(np.mean([auc(labels[fold.held], logits[fold.held]) for fold in folds]))


def candidates(trials: Sequence[TrialResult], space: Space, folder: Path, num_rows: int) -> list[Candidate]:
    """The trials that answered every fold, best first. num_rows: that there are to answer."""
    found = []
    for trial in trials:
        kept = _kept(folder, trial.params) if trial.state == "done" else None
        if kept is not None and len(kept[0]) == num_rows:
            logits, sizes, seconds = kept
            found.append(Candidate(active(space, trial.params), logits, sizes, trial.metric, seconds))
    return sorted(found, key=lambda one: -one.score)


def _index(rows: Rows) -> Any:
    """Rows beside each other as a slice, which copies nothing."""
    import torch

    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)


def _file(folder: Path, params: Params) -> Path:
    text = json.dumps(dict(params), sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


def _keep(folder: Path, params: Mapping[str, Any], logits: Floats, sizes: Sequence[int], seconds: float) -> None:
    held = io.BytesIO()
    np.savez(held, logits=logits.astype(np.float32), sizes=np.array(sizes), seconds=np.array(seconds))
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(_file(folder, params), held.getvalue())


def _kept(folder: Path, params: Params) -> tuple[Floats, tuple[int, ...], float] | None:
    path = _file(folder, params)
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as kept:
        return kept["logits"].astype(np.float64), tuple(int(n) for n in kept["sizes"]), float(kept["seconds"])
