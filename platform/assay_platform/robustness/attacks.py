"""Searches for a feasible transaction that a model scores lower.

`evolve` needs nothing but scores, so it works on whatever is deployed: trees, a net, a blend, with features looked up
anew for every candidate. `GradientSearch` needs a net: it descends the logit along its numbers and takes the category
whose embedding points down, from several starts. Both only ever propose feasible rows, and both return the row itself
if they find nothing better. Training uses `swap_with_donors` alone, which is weaker than either.
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
