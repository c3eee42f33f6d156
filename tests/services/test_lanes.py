"""Batches go to processes that score; whatever becomes of those, every request is answered."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from assay_services import lanes
from assay_services.batching import BatchLimits, OverloadedError
from assay_services.lanes import Lanes, LaneWorker, Pool
from assay_services.replies import Reply
from assay_services.stepping_aside import SteppingAside

LIMITS = BatchLimits(max_batch_s=0.05, max_wait_s=5.0)


@asynccontextmanager
async def front(path: Path) -> AsyncIterator[tuple[Pool, Lanes]]:
    pool = Pool(LIMITS)
    listening = Lanes(path, {"echo": pool})
    await listening.start()
    yield pool, listening
    await listening.stop()


def echo(_: Hashable, jobs: Sequence[bytes]) -> list[Reply]:
    return [Reply(200, job, ((b"x", b"y"),)) for job in jobs]


async def ask(pool: Pool, job: bytes, shape: bool | None = None) -> Reply:
    return await pool.submit(job, rows=1, shape=("", shape), within_s=float("inf"))


def worker(path: Path, answer: Callable[[Hashable, Sequence[bytes]], list[Reply]] = echo) -> LaneWorker:
    made = LaneWorker("echo", path, Path("/nowhere.sock"), answer)
    made.start()
    return made


async def until(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_many_requests_are_answered_in_few_batches_by_all_workers(tmp_path: Path) -> None:
    sizes: list[int] = []
    names: set[str] = set()

    def slow(shape: Any, jobs: Sequence[bytes]) -> list[Reply]:
        sizes.append(len(jobs))
        names.add(threading.current_thread().name + str(threading.get_ident()))
        time.sleep(0.005)
        return [Reply(200, b"%s %r" % (job, shape[1]), ()) for job in jobs]

    async def work() -> list[Reply]:
        async with front(tmp_path / "front") as (pool, listening):
            workers = [worker(tmp_path / "front", slow) for _ in range(2)]
            await until(lambda: len(pool.processes) == 2)
            assert listening.next_process() == Path("/nowhere.sock")
            found = await asyncio.gather(*(ask(pool, b"%d" % i, i % 2 == 0) for i in range(300)))
            for one in workers:
                await asyncio.to_thread(one.stop)
            return found

    replies = asyncio.run(work())
    assert [reply.body for reply in replies] == [b"%d %r" % (i, i % 2 == 0) for i in range(300)]
    assert len(sizes) < 150
    assert len(names) == 2


def test_an_answer_that_fails_is_a_refusal_and_the_next_one_is_made(tmp_path: Path) -> None:
    def picky(_: Hashable, jobs: Sequence[bytes]) -> list[Reply]:
        if b"bad" in jobs:
            raise RuntimeError("a bug")
        return echo(_, jobs)

    async def work() -> tuple[Reply, Reply]:
        async with front(tmp_path / "front") as (pool, _):
            one = worker(tmp_path / "front", picky)
            await until(lambda: pool.processes)
            found = await ask(pool, b"bad"), await ask(pool, b"good")
            await asyncio.to_thread(one.stop)
            return found

    bad, good = asyncio.run(work())
    assert (bad.status, good) == (500, Reply(200, b"good", ((b"x", b"y"),)))


_PROCESS = """
import os, sys, time
from pathlib import Path
from assay_services.lanes import LaneWorker
from assay_services.replies import Reply

def answer(_, jobs):
    Path(sys.argv[2]).write_text(str(os.getpid()))
    time.sleep(float(sys.argv[3]))
    return [Reply(200, job, ()) for job in jobs]

LaneWorker("echo", Path(sys.argv[1]), Path("/nowhere.sock"), answer).start()
time.sleep(60)
"""


def process(path: Path, seconds: float) -> tuple["subprocess.Popen[bytes]", Path]:
    """A process that takes so long for an answer, and the file in which it says that it is at it."""
    at_it = path.with_suffix(f".{time.monotonic_ns()}")
    return subprocess.Popen([sys.executable, "-c", _PROCESS, str(path), str(at_it), str(seconds)]), at_it


def test_what_a_killed_process_had_is_answered_by_another_and_nobody_is_killed_by_it_twice(tmp_path: Path) -> None:
    async def work() -> None:
        path = tmp_path / "front"
        async with front(path) as (pool, _):
            victim, at_it = process(path, 60)
            await until(lambda: pool.processes)
            asked = asyncio.ensure_future(ask(pool, b"precious"))
            await until(at_it.exists)
            also = [asyncio.ensure_future(ask(pool, b"%d" % i)) for i in range(5)]
            victim.kill()
            await until(lambda: not pool.processes)
            assert not asked.done(), "it waits for another"
            heir = worker(path)
            assert (await asked).body == b"precious"
            assert [(await one).body for one in also] == [b"%d" % i for i in range(5)]
            await asyncio.to_thread(heir.stop)
            poison = asyncio.ensure_future(ask(pool, b"poison"))
            for _ in range(2):
                victim, at_it = process(path, 60)
                await until(at_it.exists)
                victim.kill()
                victim.wait()
            with pytest.raises(OverloadedError, match="have ended"):
                await poison
            heir = worker(path)
            assert (await ask(pool, b"after it")).body == b"after it"
            await asyncio.to_thread(heir.stop)

    asyncio.run(work())


def test_a_process_that_hangs_is_ended_and_its_batch_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "_HUNG_S", 0.3)

    async def work() -> int:
        path = tmp_path / "front"
        async with front(path) as (pool, _):
            hanging, at_it = process(path, 60)
            await until(lambda: pool.processes)
            asked = asyncio.ensure_future(ask(pool, b"patient"))
            await until(at_it.exists)
            assert int(at_it.read_text()) == hanging.pid
            code = await asyncio.to_thread(hanging.wait, 20)
            heir = worker(path)
            assert (await asked).body == b"patient"
            await asyncio.to_thread(heir.stop)
            return code

    assert asyncio.run(work()) == -signal.SIGKILL


def test_without_a_process_requests_wait_for_a_while_and_then_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_PATIENCE_S", 0.3)

    async def work() -> None:
        async with front(tmp_path / "front") as (pool, listening):
            with pytest.raises(OverloadedError, match="is being started"):
                await ask(pool, b"before any was there")
            one = worker(tmp_path / "front")
            await until(lambda: pool.processes)
            await asyncio.to_thread(one.stop)
            await until(lambda: not pool.processes)
            began = time.monotonic()
            with pytest.raises(OverloadedError, match="is being started"):
                await ask(pool, b"waits")
            assert 0.1 < time.monotonic() - began < 2
            assert pool.num_waiting == 0
            assert listening.next_process() is None

    asyncio.run(work())


def test_a_worker_finds_a_front_that_was_started_again(tmp_path: Path) -> None:
    path = tmp_path / "front"
    one = worker(path)

    async def work() -> bytes:
        async with front(path) as (pool, _):
            await until(lambda: pool.processes)
            return (await ask(pool, b"hello")).body

    assert asyncio.run(work()) == b"hello"
    assert asyncio.run(work()) == b"hello"
    one.stop()


def test_a_process_that_steps_aside_gets_no_batches_as_long_as_another_one_is_there(tmp_path: Path) -> None:
    def named(name: bytes) -> Callable[[Hashable, Sequence[bytes]], list[Reply]]:
        return lambda _, jobs: [Reply(200, name, ())] * len(jobs)

    async def who(pool: Pool, num: int = 30) -> set[bytes]:
        return {reply.body for reply in [await ask(pool, b"x") for _ in range(num)]}

    async def work() -> None:
        path = tmp_path / "front"
        async with front(path) as (pool, _):
            first, second = worker(path, named(b"first")), worker(path, named(b"second"))
            await until(lambda: len(pool.processes) == 2)
            first.step_aside(True)
            await until(lambda: any(lane.aside for lane in pool._lanes))
            assert await who(pool) == {b"second"}
            second.step_aside(True)
            await until(lambda: all(lane.aside for lane in pool._lanes))
            assert await who(pool) <= {b"first", b"second"}
            second.step_aside(False)
            await until(lambda: not all(lane.aside for lane in pool._lanes))
            # The other one goes: who stands aside answers all the same.
            await asyncio.to_thread(second.stop)
            await until(lambda: len(pool.processes) == 1)
            assert await who(pool, 3) == {b"first"}
            await asyncio.to_thread(first.stop)

    asyncio.run(work())


def test_processes_read_one_after_the_other_and_alone_nobody_waits(tmp_path: Path) -> None:
    class Told:
        def __init__(self) -> None:
            self.aside = False

        def step_aside(self, aside: bool) -> None:
            self.aside = aside

    both = [Told(), Told()]
    asides = [SteppingAside(tmp_path / "reading") for _ in both]
    with asides[0]():  # at the start nobody takes batches yet
        pass
    at_once: list[bool] = []

    def read(aside: SteppingAside, told: Told) -> None:
        with aside():
            at_once.append(both[0].aside and both[1].aside)
            assert told.aside
            time.sleep(0.1)

    threads = []
    for aside, told in zip(asides, both, strict=True):
        aside.workers.append(told)
        threads.append(threading.Thread(target=read, args=(aside, told)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert at_once == [False, False]
    assert not any(told.aside for told in both)
