"""Discovery finds what was planted and nothing in noise."""

import numpy as np
import pytest
from assay_features import definitions
from assay_features.definitions import FeaturePlan, Window
from assay_features.discovery import Discovery, DiscoverySettings, discover
from assay_features.events import Events, Reports
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


def search(events: Events, *, reports: Reports | None = None, **changes: int) -> Discovery:
    settings = DiscoverySettings(**{"num_trees": 60, "num_shadows": 4, "num_seeds": 1, **changes})  # type: ignore[arg-type]
    return discover(
        events, entities=["card"], numeric=["amount", "noise"], categorical=["device", "shop"], amount="amount",
        reports=reports, settings=settings,
    )  # fmt: skip


def test_a_planted_interaction_is_found_and_written_as_code() -> None:
    found = search(payments(12_000, 0, planted=True))
    kept = [d for d in found.kept if isinstance(d, Window) and d.aggregate == "distinct" and d.column == "device"]
    assert kept, found.confirmations
    assert len(found.kept) <= 8
    best = max(found.confirmations, key=lambda c: min(c.lifts))
    assert min(best.lifts) > 0.05
    plan = eval(found.as_code(), vars(definitions))  # noqa: S307 - our own rendering
    assert plan == FeaturePlan(found.kept)


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_yields_nothing_also_where_only_a_part_of_it_is_looked_at(seed: int) -> None:
    """A sample that favours fraud must not tell which of many shops had it."""
    events = payments(8_000, seed, planted=False)
    assert search(events, max_rows=3_000, seed=seed).kept == ()
    assert search(events, max_rows=3_000, seed=seed, reports=Reports("fraud", 86_400)).kept == ()


def test_what_was_reported_of_a_shop_is_found_once_labels_may_be_looked_at() -> None:
    """Shops go bad for some days, and come right again: only reports tell which, and only after their delay."""
    events = payments(12_000, 2, planted=False)
    rng = np.random.default_rng(2)
    shops, shop = np.unique(events.keys["shop"].astype(str), return_inverse=True)
    shop %= 40
    is_bad = rng.random((len(shops), 5)) < 0.15
    chance = np.where(is_bad[shop, events.time_us // (5 * DAY_US)], 0.5, 0.01)
    keys = dict(events.keys) | {"shop": np.array([f"s{k}" for k in shop], dtype=object)}
    events = Events(events.time_us, keys, events.numbers, labels=rng.random(len(events)) < chance)
    of_shop = {"entities": ["shop"], "numeric": ["amount", "noise"], "categorical": ["device", "card"]}
    settings = DiscoverySettings(num_trees=60, num_shadows=4, num_seeds=1)
    found = discover(events, **of_shop, reports=Reports("fraud", 86_400 / 2), settings=settings)  # type: ignore[arg-type]
    assert any(getattr(d, "column", None) == "fraud" for d in found.kept), found.confirmations
    without = discover(events, **of_shop, settings=settings)  # type: ignore[arg-type]
    assert not any(getattr(d, "column", None) == "fraud" for d in without.kept)


def test_what_cannot_be_searched_is_refused() -> None:
    events = payments(500, 0, planted=False)
    with pytest.raises(DataError, match="no labels"):
        search(Events(events.time_us, events.keys, events.numbers))
    one_class = Events(events.time_us, events.keys, events.numbers, labels=np.zeros(500, dtype=bool))
    with pytest.raises(DataError, match="one class only"):
        search(one_class)
