"""Discovery finds what was planted and nothing in noise."""

import numpy as np
import pytest
from assay_features import definitions
from assay_features.definitions import FeaturePlan, Window
from assay_features.discovery import DiscoverySettings, discover
from assay_features.events import Events
from assay_platform.errors import DataError

DAY_US = 86_400_000_000


def payments(num_rows: int, seed: int, *, planted: bool) -> Events:
    """Cards that pay with one device or, for an evening now and then, with many. Labels depend on nothing; planted: on
    'at night, a high amount, and three devices or more within a day', all three together.
    """
    rng = np.random.default_rng(seed)
    card = rng.integers(0, 60, num_rows)
    times = np.sort(rng.integers(0, 20 * DAY_US, num_rows))
    hopping = rng.random((60, 21)) < 0.15
    hops = hopping[card, times // DAY_US]
    device = np.where(hops, rng.integers(0, 2000, num_rows), card)
    amount = rng.lognormal(3.0, 1.0, num_rows)
    chance = np.full(num_rows, 0.03)
    if planted:
        recent = np.zeros(num_rows)
        for c in range(60):
            rows = np.flatnonzero(card == c)
            for i, row in enumerate(rows):
                window = rows[:i][times[rows[:i]] >= times[row] - DAY_US]
                recent[row] = len(set(device[window]))
        hour = times % DAY_US / 3_600_000_000
        chance = np.where(((hour >= 22) | (hour < 6)) & (amount > 20) & (recent >= 3), 0.7, 0.01)

    def keys(prefix: str, codes: np.ndarray) -> np.ndarray:
        return np.array([f"{prefix}{c}" for c in codes], dtype=object)

    return Events(
        time_us=times,
        keys={"card": keys("c", card), "device": keys("d", device), "shop": keys("s", rng.integers(0, 900, num_rows))},
        numbers={"amount": amount, "noise": rng.normal(size=num_rows)},
        labels=rng.random(num_rows) < chance,
    )


def search(events: Events, **changes: int) -> object:
    settings = DiscoverySettings(**{"num_trees": 60, "num_shadows": 4, "num_seeds": 1, **changes})  # type: ignore[arg-type]
    return discover(
        events, entities=["card"], numeric=["amount", "noise"], categorical=["device", "shop"], amount="amount",
        settings=settings,
    )  # fmt: skip


def test_a_planted_interaction_is_found_and_written_as_code() -> None:
    found = search(payments(12_000, 0, planted=True))
    kept = [d for d in found.kept if isinstance(d, Window) and d.aggregate == "distinct" and d.column == "device"]  # type: ignore[attr-defined]
    assert kept, found.confirmations  # type: ignore[attr-defined]
    assert len(found.kept) <= 8  # type: ignore[attr-defined]
    best = max(found.confirmations, key=lambda c: min(c.lifts))  # type: ignore[attr-defined]
    assert min(best.lifts) > 0.05
    plan = eval(found.as_code(), vars(definitions))  # type: ignore[attr-defined] # noqa: S307 - our own rendering
    assert plan == FeaturePlan(found.kept)  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_yields_nothing_also_where_only_a_part_of_it_is_looked_at(seed: int) -> None:
    """A sample that favours fraud must not tell which of many shops had it."""
    found = search(payments(8_000, seed, planted=False), max_rows=3_000, seed=seed)
    assert found.kept == ()  # type: ignore[attr-defined]


def test_what_cannot_be_searched_is_refused() -> None:
    events = payments(500, 0, planted=False)
    with pytest.raises(DataError, match="no labels"):
        search(Events(events.time_us, events.keys, events.numbers))
    one_class = Events(events.time_us, events.keys, events.numbers, labels=np.zeros(500, dtype=bool))
    with pytest.raises(DataError, match="one class only"):
        search(one_class)
