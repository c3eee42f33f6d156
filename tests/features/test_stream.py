"""Events one at a time: the same features as in batch, nothing twice, nothing lost by a kill."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from assay_features.batch import features_at, final_states
from assay_features.definitions import Decay, Entity, FeaturePlan, Latest, Sequence, SinceLatest, Window, entity_columns
from assay_features.events import Events
from assay_features.state import entity_keys
from assay_features.stream import EventStream, StreamSettings
from assay_platform.errors import DataError, StorageError
from assay_platform.storage.disk import DiskTier
from assay_platform.storage.tiered import TieredStore
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

US = 1_000_000
T0 = 1_700_000_000
PLAN = FeaturePlan(
    (
        Window(entity="card", aggregate="count", length_s=3600),
        Window(entity="card", aggregate="sum", column="amount", length_s=60, max_events=50),
        Window(entity="card", aggregate="distinct", column="store", length_s=3600),
        Decay(entity="card", half_life_s=600, column="amount"),
        Latest(entity="card", column="amount"),
        SinceLatest(entity="store"),
        Window(entity=("card", "store"), aggregate="mean", column="amount", length_s=3600),
        Sequence(entity="card", column="store", length=4),
    )
)


def open_stream(
    folder: Path, *, plan: FeaturePlan = PLAN, now_s: float = T0 + 10**6, lateness_s: float = 900
) -> EventStream:
    store = TieredStore(DiskTier(folder / "warm", sync=False))
    given = StreamSettings(allowed_lateness_s=lateness_s, checkpoint_s=1000)
    return EventStream("shop", plan, store, folder / "log", given, clock=lambda: now_s)


def shut(stream: EventStream) -> None:
    """A clean end of the process."""
    stream.close()
    stream._store.close()


def kill(stream: EventStream) -> None:
    """What a killed process leaves: files, without what was only in memory."""
    stream._stop_timer()
    assert stream._log is not None
    stream._log.close()
    stream._store._warm.close()


def make(rows: list[tuple[float, str | None, str, float]], ids: list[str | None] | None = None) -> Events:
    def column(values: list[str | None]) -> np.ndarray:
        out = np.empty(len(values), dtype=object)
        out[:] = values
        return out

    return Events(
        time_us=np.array([round((T0 + r[0]) * US) for r in rows], dtype=np.int64),
        keys={"card": column([r[1] for r in rows]), "store": column([r[2] for r in rows])},
        numbers={"amount": np.array([r[3] for r in rows], dtype=np.float64)},
        ids=None if ids is None else column(ids),
    )


def assert_same(stream: EventStream, events: Events, *, at_s: float = 5000) -> None:
    """Features and sequences of every key equal those of the batch over the same events."""
    moment = (T0 + int(at_s)) * US
    for entity in PLAN.entities:
        known = sorted({key for key in entity_keys(entity, events) if key is not None})
        if not known:
            continue
        parts = [key.split("\x1f") for key in known]
        queries = Events(
            time_us=np.full(len(known), moment),
            keys={name: np.array([p[i] for p in parts], dtype=object) for i, name in enumerate(entity_columns(entity))},
        )
        one = FeaturePlan(tuple(d for d in PLAN.definitions if getattr(d, "entity", None) == entity))
        read = stream.read({entity: known}, queries.time_us)
        for name, expected in features_at(one, events, queries).items():
            np.testing.assert_allclose(read.values[name], expected, rtol=1e-9, atol=1e-9, err_msg=name)
        if PLAN.sequence_of(entity) is not None:
            batch = final_states(one, entity, events)
            expected_by_key = dict(zip(batch.keys, batch.sequences, strict=True))
            assert dict(zip(known, read.sequences[entity], strict=True)) == expected_by_key


rows = st.tuples(
    st.integers(0, 800), st.sampled_from(["a", "b", None]), st.sampled_from(["s", "t", "u"]), st.integers(-9, 9)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(rows, min_size=1, max_size=8), max_size=5), kills=st.integers(0, 4))
def test_any_batches_in_any_order_with_a_kill_between_equal_the_batch(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[int, str | None, str, float]]], kills: int
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    stream = open_stream(folder)
    everything: list[tuple[int, str | None, str, float]] = []
    for i, batch in enumerate(batches):
        assert stream.push(make(batch)).accepted == len(batch)
        everything += batch
        if i == kills:
            kill(stream)
            stream = open_stream(folder)
    assert_same(stream, make(everything))
    shut(stream)
    again = open_stream(folder)
    assert_same(again, make(everything))
    shut(again)


def test_a_duplicate_is_ignored_also_after_a_restart(tmp_path: Path) -> None:
    stream = open_stream(tmp_path)
    first = make([(0, "a", "s", 1), (1, "a", "s", 2), (1, "a", "t", 2)], ["x", "y", "x"])
    report = stream.push(first)
    assert (report.accepted, report.duplicates, report.late) == (2, [2], [])
    kill(stream)
    stream = open_stream(tmp_path)
    report = stream.push(make([(1, "a", "s", 2), (2, "a", "s", 3), (2, "a", "s", 3)], ["y", None, None]))
    assert (report.accepted, report.duplicates) == (2, [0])
    assert_same(stream, make([(0, "a", "s", 1), (1, "a", "s", 2), (2, "a", "s", 3), (2, "a", "s", 3)]))
    shut(stream)


def test_late_within_the_bound_counts_and_beyond_is_reported(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, lateness_s=900)
    stream.push(make([(2000, "a", "s", 1)]))
    report = stream.push(make([(1100, "a", "s", 5), (1099, "a", "s", 7), (2500, "b", "s", 1), (1599, "b", "s", 1)]))
    assert (report.accepted, report.late) == (2, [1, 3])
    assert_same(stream, make([(2000, "a", "s", 1), (1100, "a", "s", 5), (2500, "b", "s", 1)]))
    shut(stream)


def test_an_event_ahead_of_the_clock_is_refused_and_nothing_of_its_batch_is_taken(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, now_s=T0 + 100)
    stream.push(make([(400, "a", "s", 1)]))  # five minutes ahead are allowed
    with pytest.raises(DataError, match=r"events\[1\]: its time .* is 301 s ahead"):
        stream.push(make([(100, "a", "s", 1), (401, "a", "s", 1)]))
    assert_same(stream, make([(400, "a", "s", 1)]))
    shut(stream)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    stream = open_stream(tmp_path)
    events = make([(0, "a", "s", 1)])
    with pytest.raises(DataError, match="numeric column 'amount'"):
        stream.push(Events(time_us=events.time_us, keys=events.keys))
    with pytest.raises(DataError, match="key column 'store'"):
        stream.push(Events(time_us=events.time_us, keys={"card": events.keys["card"]}, numbers=events.numbers))
    shut(stream)


def states_of(events: Events) -> dict[Entity, object]:
    return {entity: final_states(PLAN, entity, events) for entity in PLAN.entities}


def test_a_batch_published_meanwhile_keeps_the_newer_events(tmp_path: Path) -> None:
    """The batch knows the events up to 1000; one from before came in too late for it, two are newer."""
    stream = open_stream(tmp_path)
    table = [(0, "a", "s", 1), (1000, "a", "t", 2), (900, "b", "s", 3)]
    stream.load(states_of(make(table[:1])), until_us=(T0 + 0) * US)  # type: ignore[arg-type]
    newer = [(1000, "a", "t", 2), (1100, "a", "s", 4), (1200, "c", "s", 5)]
    stream.push(make(newer))
    stream.load(states_of(make(table)), until_us=(T0 + 1000) * US)  # type: ignore[arg-type]
    assert_same(stream, make([*table, *newer[1:]]))
    late = [(950, "a", "s", 9)]
    stream.push(make(late))
    kill(stream)
    stream = open_stream(tmp_path)
    assert_same(stream, make([*table, *newer[1:], *late]))
    shut(stream)


def test_a_checkpoint_drops_the_log_that_nothing_needs_any_more(tmp_path: Path) -> None:
    stream = open_stream(tmp_path, lateness_s=10)
    assert stream._opened_log()
    stream._log._segment_bytes = 500  # type: ignore[union-attr]
    events = [(i, "a", "s", 1.0) for i in range(60)]
    for row in events:
        stream.push(make([row]))
    before = len(stream._log.segments())  # type: ignore[union-attr]
    stream.checkpoint()
    assert len(stream._log.segments()) < before / 2  # type: ignore[union-attr]
    kill(stream)
    stream = open_stream(tmp_path, lateness_s=10)
    assert_same(stream, make(events))
    shut(stream)


def test_a_second_process_reads_what_the_writer_has_written_and_may_not_write(tmp_path: Path) -> None:
    writer = open_stream(tmp_path)
    writer.push(make([(0, "a", "s", 1)]))
    writer.checkpoint()
    reader = EventStream("shop", PLAN, writer._store, tmp_path / "log", StreamSettings(), clock=lambda: T0 + 10**6)
    assert_same(reader, make([(0, "a", "s", 1)]))
    with pytest.raises(StorageError, match="one writer"):
        reader.push(make([(1, "a", "s", 1)]))
    shut(writer)


def test_many_threads_push_and_read_at_once(tmp_path: Path) -> None:
    stream = open_stream(tmp_path)
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for i in range(40):
                stream.push(make([(i, f"c{worker}", "s", 1.0), (i, "shared", "s", 1.0)]))
                stream.read({"card": ["shared"]}, [(T0 + 100) * US])
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    events = [(i, card, "s", 1.0) for k in range(4) for i in range(40) for card in (f"c{k}", "shared")]
    assert_same(stream, make(events))
    shut(stream)


@pytest.mark.parametrize("num_pushes", [1, 30, 200])
def test_a_process_killed_at_any_point_loses_nothing_acknowledged(tmp_path: Path, num_pushes: int) -> None:
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_stream import make, open_stream
        stream = open_stream(Path({str(tmp_path)!r}))
        for i in range(100_000):
            stream.push(make([(i % 700, f"c{{i % 7}}", "s", float(i)), (i % 700, "all", "t", 1.0)], [f"{{i}}", None]))
            if i % 50 == 25:
                stream.checkpoint()
            print(i, flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= num_pushes:
            os.kill(process.pid, signal.SIGKILL)
            break
    acknowledged = max([num_pushes, *(int(line) for line in process.stdout.read().split())])
    process.wait()
    stream = open_stream(tmp_path)
    assert stream._log is not None
    num_logged = stream._log.next_position // 2
    assert num_logged in (acknowledged + 1, acknowledged + 2)  # the one being written may be whole
    expected = [(i % 700, f"c{i % 7}", "s", float(i)) for i in range(num_logged)]
    expected += [(i % 700, "all", "t", 1.0) for i in range(num_logged)]
    order = np.argsort([k for i in range(num_logged) for k in (i,)] + list(range(num_logged)), kind="stable")
    assert_same(stream, make([expected[k] for k in order]))
    shut(stream)


def test_a_sequence_may_keep_several_columns_side_by_side(tmp_path: Path) -> None:
    plan = FeaturePlan((Sequence(entity="card", column=("store", "amount"), length=2),))
    events = make([(0, "a", "s", 1.0), (5, "a", "t", 2.5), (7, "b", "s", 3.0), (9, "a", "u", 4.0)])
    stream = open_stream(tmp_path, plan=plan)
    stream.push(events)
    found = stream.read({"card": ["a", "b"]}, np.full(2, (T0 + 99) * US)).sequences["card"]
    assert [recent.values for recent in found] == [("t\x1f2.5", "u\x1f4"), ("s\x1f3",)]
    batch = final_states(plan, "card", events)
    assert dict(zip(batch.keys, batch.sequences, strict=True)) == dict(zip("ab", found, strict=True))
    assert FeaturePlan.from_dict(plan.to_dict()) == plan
    shut(stream)


def test_what_was_forgotten_was_never_seen_also_after_a_kill_and_counts_again_from_then_on(tmp_path: Path) -> None:
    stream = open_stream(tmp_path)
    stream.push(make([(1, "a", "x", 5.0), (2, "b", "x", 7.0), (3, "a", "y", 9.0)]))
    never = stream.read({"card": ["nobody"]}, [(T0 + 10) * US])
    kept = stream.read({"card": ["b"], "store": ["x"]}, [(T0 + 10) * US])
    assert stream.forget("card", "a")
    assert not stream.forget("colour", "red")
    for again in (False, True):
        if again:
            kill(stream)
            stream = open_stream(tmp_path)
        found = stream.read({"card": ["a"]}, [(T0 + 10) * US])
        np.testing.assert_equal(found.values, never.values)
        assert found.sequences == never.sequences
        others = stream.read({"card": ["b"], "store": ["x"]}, [(T0 + 10) * US])
        np.testing.assert_equal(others.values, kept.values)
    stream.push(make([(20, "a", "x", 1.0)]))
    expected = EventStream(
        "other", PLAN, TieredStore(DiskTier(tmp_path / "other")), tmp_path / "other log", clock=lambda: T0 + 10**6
    )
    expected.push(make([(20, "a", "x", 1.0)]))
    np.testing.assert_equal(
        stream.read({"card": ["a"]}, [(T0 + 30) * US]).values, expected.read({"card": ["a"]}, [(T0 + 30) * US]).values
    )
    shut(stream)
    shut(expected)
