"""Searches for a feasible transaction that a model scores lower.

`evolve` needs nothing but scores, so it works on whatever is deployed: trees, a net, a blend, with features looked up
anew for every candidate. `descend` also needs slopes, which a net has: it goes down along its numbers and takes the
categories whose embeddings point down, from several starts. Both only ever propose feasible rows, and both return the
row itself if they find nothing better. Training uses `swap_with_donors` and a short `evolve`.
"""

# N rows, P candidates a row, F numeric columns, C key columns

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from assay_platform.errors import ConfigError
from assay_platform.robustness.constraints import FeasibleSet, Transactions

# Row numbers (M,) and their changed form → logits (M,). The numbers say which event each candidate is a form of.
Score = Callable[[NDArray[np.intp], Transactions], NDArray[np.float64]]


class Slopes(NamedTuple):
    """Where the logits of M forms fall, to first order."""

    numbers: NDArray[np.float64]  # (M, F) dlogit / dnumber
    values: tuple[NDArray[np.float64], ...]  # of each key column (M, allowed values): what taking the value would add


# The same arguments as `Score`.
Slope = Callable[[NDArray[np.intp], Transactions], Slopes]


class Attacked(NamedTuple):
    """The best form found of each row."""

    transactions: Transactions
    logits: NDArray[np.float64]  # (N,)
    num_scores: int  # rows scored to find them


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """population: candidates a row and generation. num_elite: of them, how many live on."""

    num_generations: int = 20
    population: int = 12
    num_elite: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.num_elite <= self.population or self.num_generations < 1:
            raise ConfigError(
                f"num_generations {self.num_generations}, population {self.population}, num_elite {self.num_elite}: "
                "each must be at least 1, and the elite no larger than the population"
            )


@dataclass(frozen=True, kw_only=True)
class DescentConfig:
    """num_starts: the row itself, then the row in the clothes of donors. num_steps: from each."""

    num_starts: int = 4
    num_steps: int = 10

    def __post_init__(self) -> None:
        if self.num_starts < 1 or self.num_steps < 1:
            raise ConfigError(f"num_starts {self.num_starts}, num_steps {self.num_steps}: each must be at least 1")


def swap_with_donors(
    original: Transactions,
    donors: Transactions,
    feasible: FeasibleSet,
    generator: np.random.Generator,
    *,
    share: float = 0.5,
) -> Transactions:
    """Each movable column taken from a donor with a chance of `share`, then repaired: a row in another's clothes."""
    picked = donors.take(generator.integers(0, len(donors.numbers), len(original.numbers)))
    numbers = np.where(
        feasible.movable_F & (generator.random(original.numbers.shape) < share), picked.numbers, original.numbers
    )
    keys = np.where(feasible.movable_C & (generator.random(original.keys.shape) < share), picked.keys, original.keys)
    return feasible.repair(original, Transactions(numbers, keys))


def evolve(
    score: Score,
    original: Transactions,
    donors: Transactions,
    feasible: FeasibleSet,
    generator: np.random.Generator,
    config: EvolutionConfig = EvolutionConfig(),
) -> Attacked:
    """Evolutionary search through scores alone, all rows side by side.

    donors: rows that the model takes for harmless. A candidate descends from one of the row's elite: columns of a
    donor, columns of another of the elite, numbers moved by a random step and categories drawn anew, or columns set
    back to the row's own.
    """
    rows = np.arange(len(original.numbers))
    elite = [(original, score(rows, original))]
    num_scores = len(rows)
    for generation in range(config.num_generations):
        step = 0.5 ** (1 + 4 * generation / config.num_generations)
        children = [
            _child([t for t, _ in elite], original, donors, feasible, generator, None if generation == 0 else step)
            for _ in range(config.population)
        ]
        # All at once: looking up features costs more by the call than by the row.
        everyone = Transactions(
            np.concatenate([c.numbers for c in children]), np.concatenate([c.keys for c in children])
        )
        logits = score(np.tile(rows, len(children)), everyone).reshape(len(children), len(rows))
        num_scores += logits.size
        elite = _best([*elite, *zip(children, logits, strict=True)], config.num_elite)
    return Attacked(*_best(elite, 1)[0], num_scores)


def descend(
    score: Score,
    slope: Slope,
    original: Transactions,
    donors: Transactions,
    feasible: FeasibleSet,
    generator: np.random.Generator,
    config: DescentConfig = DescentConfig(),
) -> Attacked:
    """Projected gradient descent with restarts (Madry et al., arXiv:1706.06083), over numbers and categories at once.

    A step moves every number by a share of its range against the sign of its slope, and takes in some columns, or in
    all, the category of the steepest fall; of these forms the one with the lowest score is gone on from. `score` may be
    of a larger model than `slope` is, such as a blend whose net has slopes and whose trees have none.
    """
    rows = np.arange(len(original.numbers))
    best = [(original, score(rows, original))]
    num_scores = len(rows)
    low, high = feasible.limits(original)
    span = np.where(feasible.movable_F & np.isfinite(high - low), high - low, 0.0)
    for start in range(config.num_starts):
        at, reached = best[0]
        if start:
            at = swap_with_donors(original, donors, feasible, generator, share=0.5)
            reached = score(rows, at)
            num_scores += len(rows)
        for step in range(config.num_steps):
            slopes, size = slope(rows, at), 0.5 ** (1 + 4 * step / config.num_steps)
            numbers = at.numbers - size * span * np.sign(slopes.numbers)
            moved = [
                feasible.repair(original, Transactions(numbers, _fallen(at.keys, slopes, feasible, generator, share)))
                for share in (0.5, 1.0)
            ]
            scored = [(form, score(rows, form)) for form in moved]
            num_scores += len(rows) * len(moved)
            [(at, reached)] = _best([(at, reached), *scored], 1)
        best = _best([*best, (at, reached)], 1)
    return Attacked(*best[0], num_scores)


def _fallen(
    keys: NDArray[np.object_], slopes: Slopes, feasible: FeasibleSet, generator: np.random.Generator, share: float
) -> NDArray[np.object_]:
    """Each movable category replaced, with a chance of `share`, by the one of the steepest fall; where none falls or
    nothing is known, by any.
    """
    keys = keys.copy()
    for c in np.flatnonzero(feasible.movable_C):
        if not feasible.allowed[c]:
            continue
        allowed, falls = np.array(feasible.allowed[c], dtype=object), slopes.values[c]
        steepest = falls.argmin(axis=1)
        known = falls[np.arange(len(keys)), steepest] < 0
        taken = np.where(known, steepest, generator.integers(0, len(allowed), len(keys)))
        chosen = generator.random(len(keys)) < share
        keys[chosen, c] = allowed[taken[chosen]]
    return keys


def _child(
    elite: list[Transactions],
    original: Transactions,
    donors: Transactions,
    feasible: FeasibleSet,
    generator: np.random.Generator,
    step: float | None,
) -> Transactions:
    parent, other = (elite[generator.integers(len(elite))] for _ in range(2))
    kind = generator.integers(4)
    if step is None or kind == 0:
        child = swap_with_donors(parent, donors, feasible, generator, share=generator.choice([0.1, 0.3, 0.6, 1.0]))
    elif kind == 1:
        low, high = feasible.limits(original)
        span = np.where(np.isfinite(high - low), high - low, 1.0)
        chosen_F = feasible.movable_F & (generator.random(span.shape) < 0.4)
        moved = parent.numbers + generator.normal(size=span.shape) * span * step
        keys = parent.keys.copy()
        for c in np.flatnonzero(feasible.movable_C & (generator.random(keys.shape[1]) < 0.3)):
            if feasible.allowed[c]:
                keys[:, c] = generator.choice(np.array(feasible.allowed[c], dtype=object), len(keys))
        child = Transactions(np.where(chosen_F, moved, parent.numbers), keys)
    else:
        source = other if kind == 2 else original
        chosen_F = feasible.movable_F & (generator.random(original.numbers.shape) < 0.4)
        chosen_C = feasible.movable_C & (generator.random(original.keys.shape) < 0.4)
        child = Transactions(
            np.where(chosen_F, source.numbers, parent.numbers), np.where(chosen_C, source.keys, parent.keys)
        )
    return feasible.repair(original, child)


def _best(
    candidates: list[tuple[Transactions, NDArray[np.float64]]], num: int
) -> list[tuple[Transactions, NDArray[np.float64]]]:
    """For each row its `num` lowest candidates."""
    logits = np.stack([score for _, score in candidates])
    order = np.argsort(logits, axis=0, kind="stable")[:num]
    rows = np.arange(logits.shape[1])
    numbers = np.stack([t.numbers for t, _ in candidates])
    keys = np.stack([t.keys for t, _ in candidates])
    return [(Transactions(numbers[place, rows], keys[place, rows]), logits[place, rows]) for place in order]
