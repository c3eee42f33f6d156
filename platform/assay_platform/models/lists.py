"""Lists: rules that a business sets, chance for what is not known yet, and items that differ from one another.

Variety is maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) with a sum instead of a maximum: each place
goes to the item with the largest score - weight · how much it is like those chosen before. What was chosen is shown in
order of score, ten by ten, since that costs least.
"""

# N lists, C candidates, K places, V words

from collections.abc import Callable, Mapping

import numpy as np

from assay_platform.models.content import ItemFacts
from assay_platform.models.histories import Flags, Floats, Index

_SEEN_AT_ONCE = 10


def varied(score_NC: Floats, alike: Callable[[Index], Floats], *, weight: float, num: int) -> Index:
    """(N, num) places of candidates. alike: (N,) places, one of each list → (N, C) how much candidates are like it.

    Candidates with a score of -inf come last. weight 0 is the order of the scores; ties go to whoever comes first.
    """
    num = min(num, score_NC.shape[1])
    rows = np.arange(len(score_NC))
    # A score of -inf is still better than having been taken.
    worth = np.maximum(score_NC.astype(np.float64), -1e18)
    chosen = np.empty((len(worth), num), dtype=np.int64)
    for place in range(num):
        best = worth.argmax(axis=1)
        chosen[:, place] = best
        worth -= weight * alike(best)
        worth[rows, best] = -np.inf
    score_NK = np.take_along_axis(score_NC, chosen, axis=1)
    order = np.lexsort((-score_NK, np.broadcast_to(np.arange(num) // _SEEN_AT_ONCE, chosen.shape)), axis=1)
    return np.take_along_axis(chosen, order, axis=1)


class Limits:
    """Counts what a list has of each value, and says what still fits."""

    def __init__(self, facts: ItemFacts, at_most: Mapping[str, int]) -> None:
        self._facts, self._at_most = facts, at_most
        self._count: dict[int, int] = {}

    def _limited(self, item: int) -> list[tuple[int, int]]:
        """Words of an item that are limited, and their limits."""
        has, words = self._facts.has, self._facts.words
        found = has.indices[has.indptr[item] : has.indptr[item + 1]].tolist()
        limits = ((word, self._at_most.get(words[word].partition(":")[0])) for word in found)
        return [(word, most) for word, most in limits if most is not None]

    def fits(self, item: int) -> bool:
        """Whether a list may have this item too."""
        return not self._at_most or all(self._count.get(word, 0) < most for word, most in self._limited(item))

    def take(self, items: Index, num: int) -> list[int]:
        """Places of the first `num` that fit, which count from then on."""
        taken: list[int] = []
        for place, item in enumerate(items.tolist()):
            if len(taken) == num:
                break
            if self.fits(item):
                taken.append(place)
                for word, _ in self._limited(item) if self._at_most else ():
                    self._count[word] = self._count.get(word, 0) + 1
        return taken


def explored(pool: int, explore: float, chance: Callable[[], float]) -> tuple[int, float]:
    """Which of `pool` candidates, best first, has the last place, and how likely that was.

    With probability `explore` any of them, else the best. chance: a number from 0 to below 1.
    """
    uniform = explore / pool
    if chance() >= explore:
        return 0, 1.0 - explore + uniform
    drawn = min(pool - 1, int(chance() * pool))
    return drawn, uniform + (1.0 - explore if drawn == 0 else 0.0)


def banned(facts: ItemFacts, never: Mapping[str, tuple[str, ...]]) -> Flags:
    """(I,) the items that no list has."""
    out = np.zeros(facts.num_items, dtype=bool)
    for column, values in never.items():
        for value in values:
            if facts.knows(column, value):
                out |= facts.having(column, value)
    return out
