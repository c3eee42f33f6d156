"""A table of any size: the same as in memory, resumed after a kill, nothing computed twice."""

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
import pytest
from assay_features.backfill import Backfilled, Source, backfill
from assay_features.batch import features_at, final_states
from assay_features.definitions import Decay, Entity, FeaturePlan, Sequence, SinceLatest, Window, entity_columns
from assay_features.events import Events
from assay_features.state import entity_keys
from assay_platform.errors import DataError

PLAN = FeaturePlan(
    (
        Window(entity="card", aggregate="sum", column="amount", length_s=3600),
        Window(entity="card", aggregate="distinct", column="store", length_s=86_400),
        Decay(entity="card", half_life_s=600),
        Sequence(entity="card", column="store", length=3),
        SinceLatest(entity=("card", "store")),
        Sequence(entity="store", column="card", length=2),
    )
)
NUM_ROWS, NUM_CHUNKS = 2_000, 4


def table() -> Events:
    rng = np.random.default_rng(0)
    card, store = np.empty(NUM_ROWS, dtype=object), np.empty(NUM_ROWS, dtype=object)
    card[:] = [None if k == 0 else f"c{k}" for k in rng.integers(0, 60, NUM_ROWS)]
    store[:] = [f"s{k}" for k in rng.integers(0, 8, NUM_ROWS)]
    times = np.sort(rng.integers(0, 200_000, NUM_ROWS)) * 1_000_000
    return Events(time_us=times, keys={"card": card, "store": store}, numbers={"amount": rng.lognormal(size=NUM_ROWS)})


def read_chunk(chunk: int, *, bad: int = -1) -> Events:
    if chunk == bad:
        raise DataError(f"table.csv: column 'amount', row {chunk}: 'much' is not a number")
    rows = np.array_split(np.arange(NUM_ROWS), NUM_CHUNKS)[chunk]
    return table().take(rows)


SOURCE = Source(num_rows=NUM_ROWS, num_chunks=NUM_CHUNKS, identity="v1", read=read_chunk)


def features(result: Backfilled, entity: Entity) -> dict[tuple[object, ...], dict[str, float]]:
    rows = pads.dataset(result.features(entity)).to_table().to_pylist()
    keys = entity_columns(entity)
    return {
        (*(r[k] for k in keys), round(r["event_timestamp"].timestamp() * 1e6)): {
            n: v for n, v in r.items() if n not in keys and n != "event_timestamp"
        }
        for r in rows
    }


def assert_equals_memory(result: Backfilled) -> None:
    events = table()
    expected = features_at(PLAN, events, events)
    for entity in PLAN.entities:
        own = [d.name for d in PLAN.of_entity(entity)]
        if own:
            found = features(result, entity)
            keys = list(zip(*(events.keys[c] for c in entity_columns(entity)), strict=True))
            has_key = [i for i, parts in enumerate(keys) if None not in parts]
            assert set(found) == {(*keys[i], int(events.time_us[i])) for i in has_key}
            for i in has_key:
                row = found[*keys[i], int(events.time_us[i])]
                np.testing.assert_array_equal([row[n] for n in own], [expected[n][i] for n in own])
        states = final_states(PLAN, entity, events)
        by_key = {k: (s.tobytes(), q) for k, s, q in zip(states.keys, states.states, states.sequences, strict=True)}
        read = {
            k: (s.tobytes(), q)
            for part in result.states(entity)
            for k, s, q in zip(part.keys, part.states, part.sequences, strict=True)
        }
        assert read == by_key
        assert set(read) == {k for k in entity_keys(entity, events) if k is not None}


@pytest.mark.ray
def test_partitions_give_what_one_pass_in_memory_gives(tmp_path: Path, ray_session: str) -> None:
    notes: list[str] = []
    result = backfill(PLAN, SOURCE, tmp_path / "b", num_partitions=3, on_progress=lambda _, note: notes.append(note))
    assert_equals_memory(result)
    assert notes[-1] == "9 of 9 partitions computed"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").rglob("*.parquet")}
    backfill(PLAN, SOURCE, tmp_path / "b", num_partitions=3, on_progress=lambda _, note: notes.append(note))
    assert notes[-1] == "nothing left to do"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "b").rglob("*.parquet")} == before
    again = backfill(PLAN, SOURCE, tmp_path / "b", num_partitions=2)  # other partitions: everything anew
    assert_equals_memory(again)


@pytest.mark.ray
def test_a_lost_part_is_made_again_and_a_bad_row_is_named(tmp_path: Path, ray_session: str) -> None:
    result = backfill(PLAN, SOURCE, tmp_path / "b", num_partitions=3)
    for path in sorted((tmp_path / "b" / "states").rglob("*.parquet"))[::2]:
        path.unlink()
    assert_equals_memory(backfill(PLAN, SOURCE, tmp_path / "b", num_partitions=3))
    bad = Source(num_rows=NUM_ROWS, num_chunks=NUM_CHUNKS, identity="v2", read=partial(read_chunk, bad=2))
    with pytest.raises(DataError, match=r"table\.csv: column 'amount', row 2: 'much'"):
        backfill(PLAN, bad, tmp_path / "b", num_partitions=3)
    assert result.num_partitions == 3


@pytest.mark.ray
def test_a_kill_in_the_middle_costs_only_what_was_under_way(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from assay_platform.tasks.cluster import ray_cluster
        from assay_features.backfill import backfill
        from test_backfill import PLAN, SOURCE
        with ray_cluster(2):
            backfill(PLAN, SOURCE, Path({str(tmp_path / "b")!r}), num_partitions=3,
                     on_progress=lambda done, note: print(note, flush=True))
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "partitions computed" in line:
            os.killpg(process.pid, signal.SIGKILL)  # the driver and every worker
            break
    process.wait()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env=environment
    )
    assert "partitions computed" in done.stdout
    assert_equals_memory(Backfilled(tmp_path / "b", NUM_ROWS, 3))
