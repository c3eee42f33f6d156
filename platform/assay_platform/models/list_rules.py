"""What a business asks of every list; apart from `lists`, so that reading a schema imports no arrays."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ListRules:
    """What every list keeps to.

    at_most: a category of the item table and how many items of one value of it a list may have. never: a category and
    the values that no list has. new_share: the part of the places, rounded down, that items have which were first taken
    in the last new_days days, or never. explore: how often the last place is given by chance, with its propensity.
    """

    at_most: Mapping[str, int] = field(default_factory=dict)
    never: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    new_share: float = 0.0
    new_days: float = 14.0
    explore: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.at_most or self.never or self.new_share or self.explore)

    def num_new(self, k: int) -> int:
        """Places of a list that are kept for new items."""
        return math.floor(self.new_share * k + 1e-9)


NO_RULES = ListRules()
