"""The stream: events a second on one core, time of a read, and stream against batch.

One entity with 10 windows and 4 decays. Events go through `EventStream.push`, log and store included, in batches as a
consumer of a queue would take them, and one at a time as the REST route does. The limit is the compiled loop alone.

    assay bench features_stream [--json]
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from assay_features.batch import features_at
from assay_features.definitions import DAY_S, HOUR_S, Decay, Definition, FeaturePlan, Window
from assay_features.events import Events
from assay_features.state import StateLayout
from assay_features.stream import EventStream, StreamSettings
from assay_platform.storage.disk import DiskTier
from assay_platform.storage.tiered import TieredStore

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, median, row, spread

NUM_EVENTS, NUM_CARDS, BATCH, RUNS = 400_000, 20_000, 10_000, 3
NUM_SINGLE, NUM_READS = 3_000, 5_000


def plan() -> FeaturePlan:
    """10 windows and 4 decays of one entity."""
    windows: list[Definition] = [
        Window(entity="card", aggregate=a, column=c, length_s=s)
        for s in (HOUR_S, DAY_S, 7 * DAY_S)
        for a, c in (("count", None), ("sum", "amount"), ("mean", "amount"))
    ]
    windows.append(Window(entity="card", aggregate="max", column="amount", length_s=30 * DAY_S))
    decays = [Decay(entity="card", half_life_s=s, column=c) for s in (HOUR_S, DAY_S) for c in (None, "amount")]
    return FeaturePlan((*windows, *decays))


def table() -> Events:
    """A month of payments, few cards with many."""
    rng = np.random.default_rng(0)
    card = np.array([f"c{k}" for k in rng.zipf(1.2, NUM_EVENTS) % NUM_CARDS], dtype=object)
    times = np.sort(rng.integers(0, 30 * DAY_S, NUM_EVENTS)) * 1_000_000 + 1_700_000_000_000_000
    return Events(time_us=times, keys={"card": card}, numbers={"amount": rng.lognormal(size=NUM_EVENTS)})


def main() -> None:
    """Compare, then time."""
    events, features = table(), plan()
    layout = StateLayout(features.of_entity("card"))
    rates, kernel_rates = [], []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            store = TieredStore(DiskTier(folder / "warm"))
            stream = EventStream("bench", features, store, folder / "log", StreamSettings(allowed_lateness_s=HOUR_S))
            began = time.perf_counter()
            for first in range(0, len(events), BATCH):
                stream.push(events.take(slice(first, first + BATCH)))
            stream.checkpoint()
            rates.append(len(events) / (time.perf_counter() - began))
            codes = np.unique(events.keys["card"], return_inverse=True)[1].astype(np.int64)
            states, inputs = layout.empty(int(codes.max()) + 1), layout.inputs(events)
            began = time.perf_counter()
            layout.fold(states, codes, events.time_us, inputs)
            kernel_rates.append(len(events) / (time.perf_counter() - began))
            cards = sorted(set(events.keys["card"]))
            later = np.full(len(cards), events.time_us[-1] + 60_000_000)
            queries = Events(time_us=later, keys={"card": np.array(cards, dtype=object)})
            read, batch = stream.read({"card": cards}, later), features_at(features, events, queries)
            difference = max(float(np.nanmax(np.abs(read.values[n] - batch[n]))) for n in batch)
            assert difference <= 1e-9
            rng = np.random.default_rng(1)
            reads = []
            for card in rng.choice(events.keys["card"], NUM_READS):
                began = time.perf_counter()
                stream.read({"card": [card]}, later[:1])
                reads.append(time.perf_counter() - began)
            states_of = []
            one = stream.states("card", [cards[0]])
            for _ in range(NUM_READS):
                began = time.perf_counter()
                layout.apply(one, later[:1])
                states_of.append(time.perf_counter() - began)
            singles = []
            for i in range(NUM_SINGLE):
                event = events.take(slice(len(events) - 1, len(events)))
                began = time.perf_counter()
                stream.push(event)
                singles.append(time.perf_counter() - began)
                assert i >= 0
            stream.close()
            store.close()
    us = 1e6
    finish(
        "features_stream",
        [
            row(f"push, batches of {BATCH:,}, log and store", median(rates), "events/s", higher_is_better=True,
                limit=median(kernel_rates), limit_name="compiled loop alone", spread=spread(rates), runs=RUNS),
            row("push, one event, p50", median(singles) * us, "us", runs=NUM_SINGLE),
            row("push, one event, p99", float(np.quantile(singles, 0.99)) * us, "us", runs=NUM_SINGLE),
            row("read one card from the store, p50", median(reads) * us, "us", runs=NUM_READS),
            row("read one card from the store, p99", float(np.quantile(reads, 0.99)) * us, "us", runs=NUM_READS),
            row("features of a state at hand, p50", median(states_of) * us, "us", runs=NUM_READS),
            row("largest difference, stream and batch", difference, "", runs=len(cards)),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
