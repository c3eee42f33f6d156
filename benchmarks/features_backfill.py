"""Backfill of ten million events over Ray Data: time, memory of all processes, and the same values as in memory.

One process starts Ray, computes ten windows and a decay of 200,000 cards at every event and the final states, and
writes them; this one watches the memory of it and all its children, Ray's own included (proportional set size, so that
shared pages count once). Then 2,000 cards are computed in memory and compared, value for value.

    assay bench features_backfill [--json]
"""

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from assay_features.backfill import Backfilled, Source, backfill
from assay_features.batch import features_at, final_states
from assay_features.definitions import DAY_S, HOUR_S, Decay, FeaturePlan, Window
from assay_features.events import Events

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

NUM_ROWS, NUM_CARDS, NUM_CHUNKS = 10_000_000, 200_000, 40
NUM_COMPARED = 2_000
AGGREGATES = ("count", "sum", "mean", "max")
PLAN = FeaturePlan(
    (
        *(
            Window(entity="card", aggregate=a, column=None if a == "count" else "amount", length_s=length_s)
            for a, length_s in [(a, s) for s in (HOUR_S, DAY_S, 7 * DAY_S) for a in AGGREGATES][:10]
        ),
        Decay(entity="card", column="amount", half_life_s=30 * DAY_S),
    )
)


def write_table(path: Path) -> None:
    """Payments of half a year in order of time, a row group a chunk."""
    rng = np.random.default_rng(0)
    writer = None
    for chunk in range(NUM_CHUNKS):
        rows = NUM_ROWS // NUM_CHUNKS
        span = 180 * DAY_S * 1_000_000 // NUM_CHUNKS
        table = pa.table(
            {
                "time_us": np.sort(rng.integers(chunk * span, (chunk + 1) * span, rows)),
                "card": pc.binary_join_element_wise("c", pa.array(rng.integers(0, NUM_CARDS, rows)).cast("string"), ""),
                "amount": rng.lognormal(3.0, 1.0, rows).round(2),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=rows)
    assert writer is not None
    writer.close()


class Chunks:
    """Reads one row group."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, chunk: int) -> Events:
        """The events of a chunk."""
        return events_of(pq.ParquetFile(self.path).read_row_group(chunk))


def events_of(table: pa.Table) -> Events:
    """The same columns."""
    return Events(
        time_us=table["time_us"].to_numpy(),
        keys={"card": np.asarray(table["card"].to_pandas(), dtype=object)},
        numbers={"amount": table["amount"].to_numpy()},
    )


def child(path: Path, folder: Path) -> None:
    """The backfill alone."""
    from assay_platform.tasks.cluster import ray_cluster

    source = Source(num_rows=NUM_ROWS, num_chunks=NUM_CHUNKS, identity="bench", read=Chunks(path))
    began = time.perf_counter()
    with ray_cluster():
        started = time.perf_counter()
        backfill(PLAN, source, folder)
        print(started - began, time.perf_counter() - started)


class MemoryWatch(threading.Thread):
    """The largest sum over a process and its children, twice a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.done = psutil.Process(pid), 0, threading.Event()

    def run(self) -> None:
        """Until done."""
        while not self.done.wait(0.5):
            total = 0
            for process in [self.root, *self.root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            self.peak = max(self.peak, total)


def compare(path: Path, result: Backfilled) -> float:
    """The largest difference over the compared cards; states must be equal to the byte."""
    cards = pa.array([f"c{k}" for k in range(NUM_COMPARED)])
    mine = pads.dataset(path).to_table(filter=pc.field("card").isin(cards))
    events = events_of(mine)
    expected = features_at(PLAN, events, events)
    stored = pads.dataset(result.features("card")).to_table(filter=pc.field("card").isin(cards)).to_pandas()
    stored["time_us"] = stored["event_timestamp"].astype("datetime64[us, UTC]").astype(np.int64)
    stored = stored.set_index(["card", "time_us"]).sort_index()
    assert stored.index.is_unique
    found = stored.loc[list(zip(events.keys["card"], events.time_us, strict=True))]
    largest = 0.0
    for name, values in expected.items():
        difference = np.abs(found[name].to_numpy() - values)
        both_missing = np.isnan(found[name].to_numpy()) & np.isnan(values)
        largest = max(largest, float(np.where(both_missing, 0.0, difference).max()))
    states = final_states(PLAN, "card", events)
    wanted = {k: s.tobytes() for k, s in zip(states.keys, states.states, strict=True)}
    kept = {
        k: s.tobytes()
        for part in result.states("card")
        for k, s in zip(part.keys, part.states, strict=True)
        if k in wanted
    }
    assert kept == wanted, "a final state differs from the one computed in memory"
    return largest


def measure() -> list[dict[str, Any]]:
    """One backfill, watched."""
    with tempfile.TemporaryDirectory() as scratch:
        path, folder = Path(scratch) / "events.parquet", Path(scratch) / "out"
        write_table(path)
        process = subprocess.Popen([sys.executable, __file__, "--child", scratch], stdout=subprocess.PIPE, text=True)
        watch = MemoryWatch(process.pid)
        watch.start()
        output, _ = process.communicate()
        watch.done.set()
        watch.join()
        if process.returncode:
            raise SystemExit(f"the backfill failed with exit code {process.returncode}")
        start_s, seconds = map(float, output.splitlines()[-1].split())
        result = Backfilled(folder, NUM_ROWS, 0)
        num_rows = sum(pq.ParquetFile(p).metadata.num_rows for p in result.features("card").glob("*.parquet"))
        largest = compare(path, result)
    assert largest == 0.0, f"differs by {largest} from the features computed in memory"
    return [
        row(f"{NUM_ROWS:,} events, {len(PLAN.definitions)} features", seconds, "s"),
        row("events a second", NUM_ROWS / seconds, "events/s", higher_is_better=True),
        row("peak memory of all processes, Ray's included", watch.peak / 1e9, "GB", limit=8.0, limit_name="the demo's"),
        row("start of Ray, not counted above", start_s, "s"),
        row("rows written", num_rows, "rows", higher_is_better=True),
        row(f"largest difference over {NUM_COMPARED:,} cards", largest, ""),
    ]


def main() -> None:
    """Run, or be the watched process."""
    if "--child" in sys.argv:
        scratch = Path(sys.argv[2])
        child(scratch / "events.parquet", scratch / "out")
        return
    finish("features_backfill", measure())


if __name__ == "__main__":
    main()
