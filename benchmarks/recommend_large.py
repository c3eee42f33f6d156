"""A made-up table of many interactions through the whole pipeline: read in chunks, trained, compared, registered.

A user has three tastes out of as many as there are; a taste is 200 items, the first taken far more often than the
last, and a tenth of what is taken comes from anywhere. A user has 50 interactions on average, a few have thousands;
there is an item for each 1,000 interactions. The newest tenth is the test part. EASE and popularity stand beside ours,
as in every run. Memory is the peak of the largest process.

    assay bench recommend_large [--json] [--rows N] [--keep FOLDER]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from assay_platform.storage import atomic_file

sys.path.insert(0, str(Path(__file__).parent))
from _report import finish, row

DAYS, TASTE, TASTES_A_USER, FROM_ANYWHERE = 180, 200, 3, 0.1
CHUNK = 1_000_000
SCHEMA = """\
kind = "recommend"
[columns]
user = "user"
item = "item"
timestamp = "time"
[split]
protocol = "temporal"
train = 0.8
validation = 0.1
"""


def write_table(path: Path, num_rows: int, seed: int = 0) -> None:
    """Interactions in no order, a row group each 250,000."""
    generator = np.random.default_rng(seed)
    num_users, num_tastes = max(100, num_rows // 50), max(5, num_rows // 1000 // TASTE)
    tastes = generator.integers(0, num_tastes, (num_users, TASTES_A_USER))
    with atomic_file(path) as part:
        writer = None
        for first in range(0, num_rows, CHUNK):
            num = min(CHUNK, num_rows - first)
            user = (num_users * generator.random(num) ** 1.5).astype(np.int64)
            taste = tastes[user, generator.integers(0, TASTES_A_USER, num)]
            anywhere = generator.random(num) < FROM_ANYWHERE
            taste = np.where(anywhere, generator.integers(0, num_tastes, num), taste)
            item = taste * TASTE + (TASTE * generator.random(num) ** 2.5).astype(np.int64)
            time_s = 1_600_000_000 + generator.integers(0, DAYS * 86_400, num)
            columns = {
                "user": pa.array(np.char.add("u", user.astype(str))),
                "item": pa.array(np.char.add("i", item.astype(str))),
                "time": pa.array(time_s),
            }
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(part, table.schema)
            writer.write_table(table, row_group_size=250_000)
        assert writer is not None
        writer.close()


def main() -> None:
    """One run, as a user would start it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--keep", type=Path, help="where the table stays")
    call, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="assay-large-") as scratch:
        folder = call.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        table, schema = folder / f"interactions-{call.rows}.parquet", Path(scratch) / "schema.toml"
        schema.write_text(SCHEMA)
        if not table.is_file():
            write_table(table, call.rows)
        assay = str(Path(sys.executable).with_name("assay"))
        command = [assay, "run", "recommend", "--data", str(table), "--schema", str(schema), "--json"]
        home = {**os.environ, "ASSAY_HOME": str(Path(scratch) / "home")}
        began = time.perf_counter()
        done = subprocess.run(command, env=home, stdout=subprocess.PIPE, text=True, check=True)
        taken_s = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["rows"] == call.rows
    name = f"{call.rows:,} interactions"
    rows = [row(f"{name}: everything", taken_s, "s"), row(f"{name}: peak memory", peak, "GiB")]
    rows += [row(f"{name}: {stage}", seconds, "s") for stage, seconds in report["timings_s"].items()]
    for peer in ("ease", "popularity"):
        rows.append(row(f"{name}: NDCG@10", report["metrics"]["ndcg_at_10"], "", peer_name=peer, higher_is_better=True,
                        peer=report["baselines"][peer]["ndcg_at_10"]))  # fmt: skip
    finish("recommend_large", rows)


if __name__ == "__main__":
    main()
