"""Who waits, who comes next, who is refused."""

import asyncio
import threading
import time
from collections.abc import Hashable, Sequence
from typing import Any

import pytest
from assay_platform.errors import ConfigError
from assay_services.batching import (
    Batcher,
    BatchLimits,
    BatchQueue,
    CallCost,
    DeadlinePassedError,
    OverloadedError,
    Waiting,
)
from hypothesis import given
from hypothesis import strategies as st

LIMITS = BatchLimits(max_batch_s=0.02, max_wait_s=0.2, max_waiting=1000)


def waiting(job: str, at: float, rows: int = 1, until: float = float("inf")) -> Waiting[str]:
    return Waiting(job, rows, at, until)


def measured(fixed_s: float, a_row_s: float) -> CallCost:
    cost = CallCost()
    for rows in (1, 64, 1, 64, 32, 128):
        cost.observe(rows, fixed_s + a_row_s * rows)
    return cost


def test_the_cost_of_a_call_is_learned_from_calls() -> None:
    cost = measured(0.005, 0.0005)
    assert cost.fixed_s == pytest.approx(0.005)
    assert cost.a_row_s == pytest.approx(0.0005)
    assert cost.rows_within(0.0201) == 30
    assert cost.rows_within(0.001) == 10, "as long as what a call costs before its first row, it is worth its rows"
    assert measured(0.0, 0.0005).rows_within(1e-9) == 1, "somebody has to be answered"


def test_a_batch_grows_step_by_step_until_larger_ones_have_been_seen() -> None:
    cost = CallCost()
    cost.observe(1, 0.0001)
    assert cost.rows_within(1.0) == 2


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(1e-6, 2.0)), min_size=1, max_size=40))
def test_costs_are_never_negative_whatever_was_measured(calls: list[tuple[int, float]]) -> None:
    cost = CallCost()
    for rows, seconds in calls:
        cost.observe(rows, seconds)
    assert cost.fixed_s >= 0
    assert cost.a_row_s > 0
    assert cost.rows_within(0.02) >= 1


def test_whoever_has_waited_longest_comes_next_with_all_that_are_alike() -> None:
    queue = BatchQueue(LIMITS, costs={"plain": measured(0.001, 0.0001), "reasons": measured(0.001, 0.0001)})
    for at, (shape, job) in enumerate([("plain", "a"), ("reasons", "b"), ("plain", "c"), ("reasons", "d")]):
        queue.add(shape, waiting(job, at / 1000))
    first, second = queue.take(0.01), queue.take(0.01)
    assert first is not None
    assert second is not None
    assert [one.job for one in first.taken] == ["a", "c"]
    assert [one.job for one in second.taken] == ["b", "d"]
    assert queue.take(0.01) is None


def test_a_batch_takes_as_many_rows_as_its_time_allows_and_a_large_request_goes_alone() -> None:
    queue = BatchQueue(LIMITS, costs={None: measured(0.01, 0.00099)})
    for job, rows in (("a", 6), ("b", 4), ("c", 4), ("large", 50), ("d", 1)):
        queue.add(None, waiting(job, 0.0, rows))
    batches = []
    while (batch := queue.take(0.0)) is not None:
        batches.append([one.job for one in batch.taken])
    assert batches == [["a", "b"], ["c"], ["large"], ["d"]]


def test_who_would_wait_too_long_is_refused_and_told_when_to_come_back() -> None:
    queue = BatchQueue(LIMITS, costs={None: measured(0.01, 0.00099)})
    accepted = 0
    while queue.wait_s(0.0) <= LIMITS.max_wait_s:
        queue.add(None, waiting("x", 0.0))
        accepted += 1
    with pytest.raises(OverloadedError) as refused:
        queue.add(None, waiting("one too many", 0.0))
    assert 0.2 < queue.wait_s(0.0) < 0.23
    assert refused.value.retry_after_s == pytest.approx(queue.wait_s(0.0))
    assert accepted > 50
    queue.take(0.0)
    queue.add(None, waiting("y", 0.05))  # what was taken is on its way


def test_who_needs_the_answer_sooner_than_it_can_be_ready_is_refused_at_once() -> None:
    queue = BatchQueue(LIMITS, costs={None: measured(0.01, 0.00099)})
    queue.add(None, waiting("x", 0.0, until=0.03))
    with pytest.raises(OverloadedError, match="longer than asked for"):
        queue.add(None, waiting("y", 0.0, until=0.015))


def test_who_has_gone_or_whose_time_has_passed_is_not_scored() -> None:
    queue = BatchQueue(LIMITS, costs={None: measured(0.001, 0.0001)})
    queue.add(None, Waiting("gone", 1, 0.0, float("inf"), gone=lambda: True))
    queue.add(None, waiting("late", 0.0, until=0.5))
    queue.add(None, waiting("here", 0.0))
    batch = queue.take(1.0)
    assert batch is not None
    assert ([one.job for one in batch.taken], [one.job for one in batch.expired]) == (["here"], ["gone", "late"])


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 40), st.floats(0.0, 0.01), st.booleans()), max_size=60))
def test_every_request_is_answered_once_or_refused(coming: list[tuple[str, int, float, bool]]) -> None:
    queue: BatchQueue[int] = BatchQueue(LIMITS)
    now, refused, seen = 0.0, set(), []
    for number, (shape, rows, pause, takes) in enumerate(coming):
        now += pause
        try:
            queue.add(shape, Waiting(number, rows, now, float("inf")))
        except OverloadedError:
            refused.add(number)
        if takes and (batch := queue.take(now)) is not None:
            seen += [one.job for one in batch.taken]
            now += 0.001 * batch.rows
            queue.done(batch, 0.001 * batch.rows, now)
    while (batch := queue.take(now)) is not None:
        seen += [one.job for one in batch.taken]
    assert sorted(seen) == sorted(set(range(len(coming))) - refused)
    assert queue.wait_s(now + 10) == 0.0
    assert len(queue) == 0


def test_limits_have_to_be_above_0() -> None:
    with pytest.raises(ConfigError, match="max_wait_s is 0"):
        BatchLimits(max_wait_s=0)


class Doubler:
    """Answers with twice a number after a while; refuses negative ones; keeps the sizes of its calls."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.sizes: list[int] = []
        self._seconds = seconds

    def __call__(self, shape: Hashable, jobs: Sequence[int]) -> list[int | Exception]:
        self.sizes.append(len(jobs))
        time.sleep(self._seconds)
        return [2 * job if job >= 0 else ValueError(f"{job} is negative") for job in jobs]


def test_requests_that_come_at_once_are_answered_in_a_few_calls_each_with_its_own_answer() -> None:
    work = Doubler()
    batcher: Batcher[int, int] = Batcher(work, LIMITS, name="test")

    async def ask() -> list[Any]:
        jobs = [*range(50), -1]
        return await asyncio.gather(*(batcher.submit(job, rows=1) for job in jobs), return_exceptions=True)

    answers = asyncio.run(ask())
    batcher.close()
    assert answers[:50] == [2 * number for number in range(50)]
    assert isinstance(answers[50], ValueError)
    assert len(work.sizes) < 15


def test_a_call_that_fails_fails_those_in_it_and_the_next_one_is_answered() -> None:
    def work(_: Hashable, jobs: Sequence[int]) -> list[int]:
        if 0 in jobs:
            raise ZeroDivisionError
        return [1 // job for job in jobs]

    batcher: Batcher[int, int] = Batcher(work, LIMITS, name="test")
    with pytest.raises(ZeroDivisionError):
        asyncio.run(batcher.submit(0, rows=1))
    assert asyncio.run(batcher.submit(1, rows=1)) == 1
    batcher.close()


def test_a_request_that_is_cancelled_while_it_waits_is_never_scored() -> None:
    begun, go = threading.Event(), threading.Event()
    scored: list[int] = []

    def work(_: Hashable, jobs: Sequence[int]) -> list[int]:
        scored.extend(jobs)
        begun.set()
        go.wait(5)
        return list(jobs)

    batcher: Batcher[int, int] = Batcher(work, LIMITS, name="test")

    async def ask() -> None:
        first = asyncio.ensure_future(batcher.submit(1, rows=1))
        await asyncio.to_thread(begun.wait, 5)
        second = asyncio.ensure_future(batcher.submit(2, rows=1))
        await asyncio.sleep(0)
        second.cancel()
        third = asyncio.ensure_future(batcher.submit(3, rows=1))
        await asyncio.sleep(0)
        go.set()
        assert await asyncio.gather(first, third) == [1, 3]

    asyncio.run(ask())
    batcher.close()
    assert scored == [1, 3]


def test_time_that_runs_out_in_the_queue_is_told() -> None:
    batcher: Batcher[int, int] = Batcher(Doubler(0.1), LIMITS, name="test")

    async def ask() -> None:
        first = asyncio.ensure_future(batcher.submit(1, rows=1))
        await asyncio.sleep(0.02)  # it is being answered
        with pytest.raises(DeadlinePassedError):
            await batcher.submit(2, rows=1, within_s=0.03)
        assert await first == 2

    asyncio.run(ask())
    batcher.close()


def test_after_close_nobody_is_taken_on_and_those_who_wait_are_answered() -> None:
    batcher: Batcher[int, int] = Batcher(Doubler(), LIMITS, name="test")

    async def ask() -> list[Any]:
        before = [asyncio.ensure_future(batcher.submit(number, rows=1)) for number in range(5)]
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.close)
        with pytest.raises(OverloadedError, match="about to stop"):
            await batcher.submit(9, rows=1)
        return await asyncio.gather(*before)

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8]


def test_a_second_thread_takes_only_what_fills_a_batch() -> None:
    running, sizes = threading.Event(), []
    under_way: list[int] = []
    most = 0
    lock = threading.Lock()

    def work(_: Hashable, jobs: Sequence[int]) -> list[int]:
        nonlocal most
        with lock:
            under_way.append(len(jobs))
            most = max(most, len(under_way))
            sizes.append(len(jobs))
        if len(sizes) == 1:
            running.wait(10)
        else:
            time.sleep(0.01)
        with lock:
            under_way.pop()
        return [2 * job for job in jobs]

    batcher: Batcher[int, int] = Batcher(work, BatchLimits(max_rows=2, max_wait_s=30), name="test", num_threads=2)

    async def ask() -> list[int]:
        first = asyncio.create_task(batcher.submit(0, rows=1))
        await asyncio.sleep(0.05)
        alone = asyncio.create_task(batcher.submit(1, rows=1))
        await asyncio.sleep(0.05)
        # Fewer than a batch may have: it waits for the thread that is busy.
        assert sizes == [1]
        more = [asyncio.create_task(batcher.submit(i, rows=1)) for i in range(2, 20)]
        await asyncio.sleep(0.3)
        running.set()
        return list(await asyncio.gather(first, alone, *more))

    assert asyncio.run(ask()) == [2 * i for i in range(20)]
    batcher.close()
    assert most == 2
    assert max(sizes) == 2
