"""How often discovery keeps a feature where there is none to find.

Tables of payments whose labels are drawn at random, searched without and with reported labels; and tables in which a
fifth of the cards is bad for ever, whatever they do: there a window can only tell the cards apart. The limit is the
share that the screen may let through.

    assay bench features_noise [--json]
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from assay_features.definitions import DAY_S
from assay_features.discovery import Discovery, DiscoverySettings, discover
from assay_features.events import Events, Reports

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row
from features_lift import payments

NUM_TABLES, NUM_ROWS = 20, 8_000
SETTINGS = DiscoverySettings(num_trees=60, num_shadows=4, num_seeds=1, max_rows=3_000)


def search(events: Events, seed: int, reports: Reports | None = None) -> Discovery:
    """As small as the tests' searches."""
    return discover(
        events, entities=["card"], numeric=["amount", "noise"], categorical=["device"], amount="amount",
        reports=reports, settings=replace(SETTINGS, seed=seed),
    )  # fmt: skip


def main() -> None:
    """Every table three times."""
    kept = {"noise": 0, "noise, reports after a day": 0, "cards that are bad for ever": 0}
    screened = 0
    for seed in range(NUM_TABLES):
        events = payments(seed).take(slice(0, NUM_ROWS))
        rng = np.random.default_rng(seed)
        at_random = replace(events, labels=rng.random(NUM_ROWS) < 0.03)
        _, card = np.unique(events.keys["card"].astype(str), return_inverse=True)
        chance = np.where(rng.random(card.max() + 1) < 0.2, 0.15, 0.01)[card]
        found = search(at_random, seed)
        screened += any(trial.q <= SETTINGS.fdr for trial in found.trials)
        kept["noise"] += bool(found.kept)
        kept["noise, reports after a day"] += bool(search(at_random, seed, Reports("fraud", DAY_S)).kept)
        by_card = search(replace(events, labels=rng.random(NUM_ROWS) < chance), seed)
        kept["cards that are bad for ever"] += bool(by_card.kept)
        print(f"table {seed}: {kept}, something passed the screen: {screened}", file=sys.stderr)
    common = {"limit": SETTINGS.fdr, "limit_name": "rate of the screen", "runs": NUM_TABLES}
    rows = [row(f"{name}: tables with a feature kept", n / NUM_TABLES, "share", **common) for name, n in kept.items()]
    rows.append(row("noise: tables where something passed the screen", screened / NUM_TABLES, "share", **common))
    finish("features_noise", rows)


if __name__ == "__main__":
    main()
