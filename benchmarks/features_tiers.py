"""Tiers against one tier only: purchase sequences of real households, read as a shop reads them.

Sequences of Complete Journey in shards of at most 200 purchases, ten times larger in all than the hot tier; reads
follow Zipf's law, and every fourth call appends a purchase. All sides answer the same calls, and their answers are
compared. One tier only: the disk tier alone (whose file lies in the page cache, memory that the tiers do not count as
theirs), or the cold tier alone, one object a batch. All are safe against a power cut when a call returns.

    assay bench features_tiers [--json]
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from assay_platform.config import load_config
from assay_platform.storage.disk import DiskTier
from assay_platform.storage.log import EventLog
from assay_platform.storage.objects import ObjectTier
from assay_platform.storage.tiered import TieredStore

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

NUM_CALLS, KEYS_A_CALL, WRITE_EVERY, CHECKPOINT_EVERY = 20_000, 4, 4, 5_000
NUM_COLD_CALLS = 1_000
ZIPF = 1.1


def sequences() -> dict[bytes, bytes]:
    """Key → a household's purchases in order, as JSON; each household in shards of at most 200 purchases."""
    from assay_pipelines.datasets import get_dataset

    folder = get_dataset("complete-journey", load_config().paths.data)
    table = pq.read_table(folder / "events.parquet").to_pandas()
    user, item = table.columns[table.columns.str.contains("household")][0], "product_id"
    out: dict[bytes, bytes] = {}
    for name, bought in table.groupby(user, sort=True)[item]:
        values = bought.astype(str).tolist()
        for shard, first in enumerate(range(0, len(values), 200)):
            out[f"{name}/{shard}".encode()] = json.dumps(values[first : first + 200]).encode()
    return out


def written_bytes() -> int:
    """Bytes that this process has sent to the disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"])


def replay(
    store: Any, log: EventLog | None, keys: list[bytes], chosen: np.ndarray
) -> tuple[list[int], np.ndarray, float]:
    """The calls: lengths of what was read, seconds a read, seconds in all."""
    lengths, reads = [], []
    began = time.perf_counter()
    for call in range(len(chosen)):
        asked = [keys[k] for k in chosen[call]]
        start = time.perf_counter()
        found = store.get_many(asked)
        reads.append(time.perf_counter() - start)
        lengths.append(sum(len(value) for value in found))
        if call % WRITE_EVERY == 0:
            event = b'"%d"' % (900_000 + call)
            value = found[0][:-1] + b", " + event + b"]"
            if log is None:
                store.put_many({asked[0]: value})
            else:  # the event is safe in the log, the value follows with a batch
                log.append(asked[0] + event, 1)
                store.put_many({asked[0]: value}, durable=False)
        if log is not None and call % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1:
            store.flush()
            log.drop(log.next_position)
    if log is not None:
        store.flush()
    return lengths, np.array(reads), time.perf_counter() - began


def main() -> None:
    """Compare and time."""
    held = sequences()
    total = sum(len(k) + len(v) for k, v in held.items())
    rng = np.random.default_rng(0)
    keys = [list(held)[i] for i in rng.permutation(len(held))]
    weights = 1.0 / np.arange(1, len(keys) + 1) ** ZIPF
    chosen = rng.choice(len(keys), (NUM_CALLS, KEYS_A_CALL), p=weights / weights.sum())
    out: dict[str, dict[str, Any]] = {}
    for name in ("disk", "cold", "tiers"):
        calls = chosen[:NUM_COLD_CALLS] if name == "cold" else chosen
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
            folder = Path(scratch)
            warm = DiskTier(folder / "warm")
            if name == "tiers":
                cold = ObjectTier((folder / "cold").as_uri())
                store: Any = TieredStore(warm, cold=cold, hot_bytes=total // 10, warm_bytes=total // 2)
            else:
                store = warm if name == "disk" else ObjectTier((folder / "cold").as_uri())
            items = list(held.items())
            for first in range(0, len(items), 1000):
                store.put_many(dict(items[first : first + 1000]))
            log = EventLog(folder / "log", sync=True) if name == "tiers" else None
            before = written_bytes()
            lengths, reads, seconds = replay(store, log, keys, calls)
            out[name] = {"lengths": lengths, "reads": reads, "seconds": seconds, "written": written_bytes() - before}
            if name == "tiers":
                out[name]["statistics"] = store.statistics
            store.close()
    assert out["tiers"]["lengths"] == out["disk"]["lengths"]
    assert out["tiers"]["lengths"][:NUM_COLD_CALLS] == out["cold"]["lengths"]
    ours, peer, cold = out["tiers"], out["disk"], out["cold"]
    s = ours["statistics"]
    print(s, file=sys.stderr)
    num_reads = NUM_CALLS * KEYS_A_CALL
    common = {"peer_name": "disk tier alone", "runs": 1}
    per_cold, per_call = cold["seconds"] / NUM_COLD_CALLS * 1e3, ours["seconds"] / NUM_CALLS * 1e3
    finish(
        "features_tiers",
        [
            row(f"{NUM_CALLS:,} calls, {total / 1e6:.0f} MB held, hot {total / 1e7:.0f} MB", ours["seconds"], "s",
                peer=peer["seconds"], **common),
            row("bytes written to disk", ours["written"] / 1e6, "MB", peer=peer["written"] / 1e6, **common),
            row(f"read of {KEYS_A_CALL} sequences, p50", float(np.median(ours["reads"])) * 1e3, "ms",
                peer=float(np.median(peer["reads"])) * 1e3, **common),
            row(f"read of {KEYS_A_CALL} sequences, p99", float(np.quantile(ours["reads"], 0.99)) * 1e3, "ms",
                peer=float(np.quantile(peer["reads"], 0.99)) * 1e3, limit=5.0, limit_name="target", **common),
            row("a call, reads and writes", per_call, "ms", peer=per_cold, peer_name="cold tier alone", runs=1),
            row(f"read of {KEYS_A_CALL} sequences, p99 ", float(np.quantile(ours["reads"], 0.99)) * 1e3, "ms",
                peer=float(np.quantile(cold["reads"], 0.99)) * 1e3, peer_name="cold tier alone", runs=1),
            row("bytes written a call", ours["written"] / NUM_CALLS / 1e3, "kB",
                peer=cold["written"] / NUM_COLD_CALLS / 1e3, peer_name="cold tier alone", runs=1),
            row("answered from hot", s.hot_hits / num_reads, "share", higher_is_better=True, runs=1),
            row("answered from warm", s.warm_hits / num_reads, "share", runs=1),
            row("answered from cold", s.cold_hits / num_reads, "share", runs=1),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
