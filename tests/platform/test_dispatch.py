"""One contract for tasks in this process and on the run's Ray cluster; then what only one of them can show."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, as_completed
from pathlib import Path
from typing import Any

import pytest
from assay_platform.errors import ConfigError, TaskError, TaskLateError, TaskLostError
from assay_platform.monitoring.metrics import ServiceMetrics
from assay_platform.tasks.beat import Beat, BeatFile, read_beats
from assay_platform.tasks.costs import Costs
from assay_platform.tasks.dispatch import Dispatcher
from assay_platform.tasks.local import local_dispatcher
from assay_platform.tasks.placement import StaticRule
from assay_platform.tasks.rooms import Capacity
from assay_platform.tasks.task import Device, Kind, Needs, Place, Task
from assay_platform.tasks.workers import RayWorkers, ThreadWorkers, Workers

WAIT_S = 60
Make = Callable[[], Workers]


@pytest.fixture(params=["threads", pytest.param("ray", marks=pytest.mark.ray)])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "ray":
        request.getfixturevalue("ray_session")
        return RayWorkers
    return lambda: ThreadWorkers(num_cores=2)


@pytest.fixture
def dispatcher(make: Make) -> Iterator[Dispatcher]:
    with Dispatcher(make()) as dispatcher:
        yield dispatcher


def square(place: Place, x: int) -> int:
    assert place.device == "cpu"
    return x * x


def length(place: Place, rows: list[int]) -> int:
    del place
    return len(rows)


def wait_for(place: Place, path: str) -> str:
    until = time.monotonic() + WAIT_S
    while not Path(path).exists() and not place.ending() and time.monotonic() < until:
        time.sleep(0.01)
    return path


def append(place: Place, path: str, word: str) -> str:
    del place
    with Path(path).open("a") as file:
        file.write(f"{word}\n")
    return word


def fail(place: Place, path: str, times: int) -> int:
    append(place, path, "tried")
    if place.attempt <= times:
        raise OSError(f"attempt {place.attempt}")
    return place.attempt


def task(work: Callable[..., Any], *args: Any, **more: Any) -> Task[Any]:
    return Task(work=work, args=args, **{"kind": Kind.FEATURE, **more})


def words(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < limit, "it never came"
        time.sleep(0.01)


class _UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_odd_error(place: Place) -> None:
    raise _UnpicklableError(1, 2)


def test_results_come_back_whatever_the_order(dispatcher: Dispatcher) -> None:
    futures = {dispatcher.submit(task(square, x)): x for x in range(50)}
    for future in as_completed(futures, timeout=WAIT_S):
        assert future.result() == futures[future] ** 2
    done = dispatcher.now().done
    assert {(one.kind, one.device, one.outcome): count for one, count in done.items()} == {
        (Kind.FEATURE, Device.CPU, "done"): 50
    }


def test_a_value_can_be_shared_by_many_tasks(dispatcher: Dispatcher) -> None:
    rows = dispatcher.share(list(range(1000)))
    assert [dispatcher.submit(task(length, rows)).result(WAIT_S) for _ in range(3)] == [1000] * 3


def test_an_error_of_the_task_is_its_result_and_is_not_tried_again(dispatcher: Dispatcher, tmp_path: Path) -> None:
    tried = tmp_path / "tried"
    with pytest.raises(OSError, match="attempt 1"):
        dispatcher.submit(task(fail, str(tried), 5)).result(WAIT_S)
    assert words(tried) == ["tried"]


def test_an_error_that_a_task_names_is_tried_again(dispatcher: Dispatcher, tmp_path: Path) -> None:
    tried = tmp_path / "tried"
    assert dispatcher.submit(task(fail, str(tried), 2, retries=2, retry_on=(OSError,))).result(WAIT_S) == 3
    assert words(tried) == ["tried"] * 3
    with pytest.raises(OSError, match="attempt 2"):
        dispatcher.submit(task(fail, str(tried), 2, retries=1, retry_on=(OSError,))).result(WAIT_S)


def test_an_error_that_cannot_be_copied_still_says_what_it_was(dispatcher: Dispatcher) -> None:
    with pytest.raises(Exception, match="1 and 2"):
        dispatcher.submit(task(raise_odd_error)).result(WAIT_S)


def test_two_tasks_of_a_key_are_one(dispatcher: Dispatcher, tmp_path: Path) -> None:
    path, go = tmp_path / "written", tmp_path / "go"
    held = [dispatcher.submit(task(wait_for, str(go))) for _ in range(2)]
    first = dispatcher.submit(task(append, str(path), "first", key="k"))
    assert dispatcher.submit(task(append, str(path), "second", key="k")) is first
    go.touch()
    assert first.result(WAIT_S) == "first"
    assert dispatcher.submit(task(append, str(path), "third", key="k")).result(WAIT_S) == "first"
    assert words(path) == ["first"]
    assert all(future.result(WAIT_S) for future in held)


def test_a_key_that_failed_can_be_used_again(dispatcher: Dispatcher, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="attempt 1"):
        dispatcher.submit(task(fail, str(tmp_path / "tried"), 1, key="k")).result(WAIT_S)
    assert dispatcher.submit(task(square, 3, key="k")).result(WAIT_S) == 9


def test_what_is_urgent_goes_first(dispatcher: Dispatcher, tmp_path: Path) -> None:
    path, go = tmp_path / "order", tmp_path / "go"
    whole = Needs(cores=2)
    held = dispatcher.submit(task(wait_for, str(go), cpu=whole))
    until(held.running)
    later = [dispatcher.submit(task(append, str(path), f"p{p}", cpu=whole, priority=p)) for p in (0, 5, 1, 5)]
    go.touch()
    for future in later:
        future.result(WAIT_S)
    assert words(path) == ["p5", "p5", "p1", "p0"]


def test_a_big_task_is_not_passed_over_for_ever(dispatcher: Dispatcher, tmp_path: Path) -> None:
    path, go = tmp_path / "order", tmp_path / "go"
    held = dispatcher.submit(task(wait_for, str(go)))
    until(held.running)
    big = dispatcher.submit(task(append, str(path), "big", cpu=Needs(cores=2)))
    small = dispatcher.submit(task(append, str(path), "small"))
    time.sleep(0.3)
    assert not words(path)  # there is a core for the small one, but the big one came first
    go.touch()
    assert (big.result(WAIT_S), small.result(WAIT_S)) == ("big", "small")
    assert words(path) == ["big", "small"]


def test_what_waits_can_be_cancelled_and_never_runs(dispatcher: Dispatcher, tmp_path: Path) -> None:
    path, go = tmp_path / "written", tmp_path / "go"
    held = dispatcher.submit(task(wait_for, str(go), cpu=Needs(cores=2)))
    waiting = dispatcher.submit(task(append, str(path), "never"))
    assert waiting.cancel()
    with pytest.raises(CancelledError):
        waiting.result(WAIT_S)
    assert waiting in as_completed([waiting], timeout=WAIT_S)
    go.touch()
    held.result(WAIT_S)
    assert dispatcher.submit(task(square, 2)).result(WAIT_S) == 4
    assert not path.exists()
    assert not held.cancel()  # it is done


def test_what_runs_can_be_cancelled_and_gives_its_room_back(dispatcher: Dispatcher, tmp_path: Path) -> None:
    running = dispatcher.submit(task(wait_for, str(tmp_path / "never"), cpu=Needs(cores=2)))
    until(running.running)
    assert running.cancel()
    with pytest.raises(CancelledError):
        running.result(WAIT_S)
    assert dispatcher.submit(task(square, 2, cpu=Needs(cores=2))).result(WAIT_S) == 4


def test_what_is_late_ends_whether_it_runs_or_waits(dispatcher: Dispatcher, tmp_path: Path) -> None:
    whole = Needs(cores=2)
    running = dispatcher.submit(task(wait_for, str(tmp_path / "never"), cpu=whole, deadline_s=1.0, name="slow"))
    waiting = dispatcher.submit(task(square, 2, cpu=whole, deadline_s=0.5))
    with pytest.raises(TaskLateError, match=r"feature was not done within 0.5 s"):
        waiting.result(WAIT_S)
    with pytest.raises(TaskLateError, match=r"slow was not done within 1 s"):
        running.result(WAIT_S)
    assert dispatcher.submit(task(square, 2, cpu=whole, deadline_s=WAIT_S)).result(WAIT_S) == 4


def meet(place: Place, folder: str, me: int, num: int) -> int:
    (Path(folder) / str(me)).touch()
    until(lambda: place.ending() or len(list(Path(folder).iterdir())) == num)
    return me


def test_tasks_that_start_together_meet(dispatcher: Dispatcher, tmp_path: Path) -> None:
    together = dispatcher.submit_together([task(meet, str(tmp_path), me, 2) for me in range(2)])
    assert together.result(WAIT_S) == [0, 1]


def test_if_one_of_them_fails_the_others_end(dispatcher: Dispatcher, tmp_path: Path) -> None:
    tasks = [task(wait_for, str(tmp_path / "never")), task(fail, str(tmp_path / "tried"), 1)]
    with pytest.raises(OSError, match="attempt 1"):
        dispatcher.submit_together(tasks).result(WAIT_S)
    assert dispatcher.submit(task(square, 2, cpu=Needs(cores=2))).result(WAIT_S) == 4


def test_whoever_submits_too_much_waits(make: Make, tmp_path: Path) -> None:
    go = tmp_path / "go"
    with Dispatcher(make(), max_waiting=2) as dispatcher:
        held = dispatcher.submit(task(wait_for, str(go), cpu=Needs(cores=2)))
        until(held.running)
        for x in range(2):
            dispatcher.submit(task(square, x))
        with pytest.raises(TaskError, match=r"was not taken within 0.1 s: 2 others wait"):
            dispatcher.submit(task(square, 9), timeout_s=0.1)
        threading.Timer(0.2, go.touch).start()
        assert dispatcher.submit(task(square, 3)).result(WAIT_S) == 9


def test_without_a_gpu_everything_runs_on_the_cpu(dispatcher: Dispatcher) -> None:
    assert dispatcher.submit(task(square, 3, kind=Kind.MATRIX, gpu=Needs(gpus=0.5))).result(WAIT_S) == 9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cpu": None, "gpu": Needs(gpus=1)}, r"needs 1 cores and 1 GPUs; there are 2 cores and 0 GPUs"),
        ({"cpu": Needs(cores=3)}, r"needs 3 cores and 0 GPUs; there are 2 cores"),
    ],
)
def test_what_no_machine_has_is_refused_at_once(dispatcher: Dispatcher, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        dispatcher.submit(task(square, 3, **more))
    with pytest.raises(ConfigError, match="no tasks"):
        dispatcher.submit_together([])


def test_leaving_by_an_error_ends_everything_and_closing_twice_is_safe(make: Make, tmp_path: Path) -> None:
    dispatcher, futures = Dispatcher(make()), []

    def interrupted() -> None:
        with dispatcher:
            futures.extend(dispatcher.submit(task(wait_for, str(tmp_path / "never"))) for _ in range(4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(future.cancelled() for future in futures)
    dispatcher.close()
    with pytest.raises(TaskError, match="after the dispatcher was closed"):
        dispatcher.submit(task(square, 1))


def test_leaving_without_one_waits_for_every_result(make: Make) -> None:
    with Dispatcher(make()) as dispatcher:
        futures = [dispatcher.submit(task(square, x)) for x in range(9)]
    assert [future.result(0) for future in futures] == [x * x for x in range(9)]


def test_what_is_added_to_a_future_may_submit_more(dispatcher: Dispatcher) -> None:
    followed: list[Any] = []
    first = dispatcher.submit(task(square, 3))
    first.add_done_callback(lambda done: followed.append(dispatcher.submit(task(square, done.result()))))
    until(lambda: bool(followed))
    assert followed[0].result(WAIT_S) == 81


def test_others_can_see_what_runs_where(make: Make, tmp_path: Path) -> None:
    go, folder = tmp_path / "go", tmp_path / "beats"
    beats = BeatFile(folder)
    with Dispatcher(make(), beat=beats) as dispatcher:
        held = dispatcher.submit(task(wait_for, str(go), name="windows", cpu=Needs(cores=2)))
        dispatcher.submit(task(square, 1))

        def seen() -> list[Beat]:
            return [beat for _, beat in read_beats(folder)]

        until(lambda: bool(seen() and seen()[0].running))
        beat = seen()[0]
        assert beat.running[0][:3] == ("windows", Kind.FEATURE, Device.CPU)
        assert (beat.used[Device.CPU], beat.total[Device.CPU]) == (2, 2)
        assert beat.waiting == {Kind.FEATURE: 1}
        go.touch()
        held.result(WAIT_S)
    beats.close()
    assert not list(read_beats(folder))


def die(place: Place, path: str, times: int) -> int:
    append(place, path, "tried")
    if place.attempt <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return place.attempt


def unsendable(place: Place) -> Any:
    del place
    return threading.Lock()


@pytest.mark.ray
def test_a_task_whose_worker_dies_is_started_again(ray_session: str, tmp_path: Path) -> None:
    with Dispatcher(RayWorkers()) as dispatcher:
        assert dispatcher.submit(task(die, str(tmp_path / "a"), 2)).result(WAIT_S) == 3
        with pytest.raises(TaskLostError, match="feature was lost 2 times"):
            dispatcher.submit(task(die, str(tmp_path / "b"), 2, retries=1)).result(WAIT_S)
        together = dispatcher.submit_together([task(die, str(tmp_path / "c"), 1), task(square, 2)])
        assert together.result(WAIT_S) == [2, 4]


@pytest.mark.ray
def test_what_cannot_be_sent_is_an_error_and_is_not_tried_again(ray_session: str) -> None:
    with Dispatcher(RayWorkers()) as dispatcher:
        with pytest.raises(TaskError, match="cannot be sent"):
            dispatcher.submit(task(length, threading.Lock())).result(WAIT_S)
        with pytest.raises(TaskError, match="pickle"):
            dispatcher.submit(task(unsendable)).result(WAIT_S)
        with pytest.raises(TaskError, match="cannot be sent"):
            dispatcher.submit_together([task(length, threading.Lock()), task(square, 1)]).result(WAIT_S)


def test_prometheus_shows_what_dispatchers_do(tmp_path: Path) -> None:
    metrics, go = ServiceMetrics(), tmp_path / "go"
    metrics.watch_tasks(tmp_path / "tasks")
    assert b"assay_tasks_running{" not in metrics.render()
    with local_dispatcher(tmp_path / "tasks") as dispatcher:
        dispatcher.submit(task(square, 1, name="squares")).result(WAIT_S)
        held = dispatcher.submit(task(wait_for, str(go), name="windows"))
        until(lambda: b"assay_tasks_running{" in metrics.render())
        shown = metrics.render().decode()
        process = f'process="{os.getpid()}"'
        assert f'assay_tasks_running{{device="cpu",name="windows",{process}}} 1.0' in shown
        assert f'assay_tasks_total{{device="cpu",name="squares",outcome="done",{process}}} 1.0' in shown
        assert f'assay_task_room{{device="cpu",{process},what="used"}} 1.0' in shown
        go.touch()
        held.result(WAIT_S)
    assert b"assay_tasks_running{" not in metrics.render()
    (kept,) = (tmp_path / "tasks" / "costs").iterdir()
    assert Costs.load(kept).seconds("windows", Device.CPU, 1.0) is not None


def leave(place: Place, code: int) -> None:
    del place
    sys.exit(code)


def test_a_task_that_exits_ends_itself_alone(dispatcher: Dispatcher) -> None:
    with pytest.raises(TaskError, match="SystemExit: 3"):
        dispatcher.submit(task(leave, 3)).result(WAIT_S)
    assert dispatcher.submit(task(square, 2, cpu=Needs(cores=2))).result(WAIT_S) == 4


def test_a_callback_may_submit_although_too_many_wait(make: Make, tmp_path: Path) -> None:
    go, followed = tmp_path / "go", list[Any]()
    with Dispatcher(make(), max_waiting=1) as dispatcher:
        whole = Needs(cores=2)
        held = dispatcher.submit(task(wait_for, str(go), cpu=whole))
        held.add_done_callback(lambda _: followed.append(dispatcher.submit(task(square, 3))))
        until(held.running)
        waiting = dispatcher.submit(task(square, 2, cpu=whole))
        go.touch()
        assert waiting.result(WAIT_S) == 4
    assert followed[0].result(0) == 9  # leaving the block waits for it too


def test_a_slow_callback_still_finds_the_dispatcher_open(make: Make) -> None:
    followed: list[Any] = []

    def follow(done: Any) -> None:
        time.sleep(0.2)
        followed.append(dispatcher.submit(task(square, done.result())))

    with Dispatcher(make()) as dispatcher:
        dispatcher.submit(task(square, 2)).add_done_callback(follow)
    assert followed[0].result(0) == 16


def test_a_cancelled_key_is_free_at_once_and_for_the_next_alone(dispatcher: Dispatcher, tmp_path: Path) -> None:
    go, again = tmp_path / "go", list[Any]()
    held = dispatcher.submit(task(wait_for, str(go), cpu=Needs(cores=2)))
    first = dispatcher.submit(task(square, 2, key="k"))
    first.add_done_callback(lambda _: again.append(dispatcher.submit(task(square, 3, key="k"))))
    first.cancel()
    assert dispatcher.submit(task(square, 4, key="k")) is again[0]
    go.touch()
    assert again[0].result(WAIT_S) == 9
    assert held.result(WAIT_S)


def test_futures_that_cancel_one_another_do_not_wait_for_one_another(make: Make) -> None:
    with Dispatcher(make()) as dispatcher:
        for _ in range(20):
            futures = [dispatcher.submit(task(square, x)) for x in range(4)]
            for future in futures:
                future.add_done_callback(lambda _, futures=futures: [other.cancel() for other in futures])
            futures[-1].cancel()
            assert all(future.done() or future.cancel() for future in futures)


def test_an_endless_deadline_is_none(dispatcher: Dispatcher) -> None:
    assert dispatcher.submit(task(square, 2, deadline_s=float("inf"))).result(WAIT_S) == 4
    assert dispatcher.submit(task(square, 2, deadline_s=1e12)).result(WAIT_S) == 4


class Shrinking(ThreadWorkers):
    """Machines that go."""

    there: Capacity | None = Capacity(2, 1, 2, 1)

    def capacity(self) -> Capacity:
        if self.there is None:
            raise ConnectionError("nobody answers")
        return self.there


def test_machines_that_go_stop_only_what_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("assay_platform.tasks.dispatch._CAPACITY_S", 0.05)
    workers, go = Shrinking(num_cores=2, num_gpus=1), tmp_path / "go"
    on_gpu = Needs(cores=0, gpus=1)
    dispatcher = Dispatcher(workers)
    held = dispatcher.submit(task(wait_for, str(go), cpu=None, gpu=on_gpu))
    big = dispatcher.submit(task(wait_for, str(go), cpu=Needs(cores=2)))
    until(lambda: held.running() and big.running())
    waiting = [
        dispatcher.submit(task(length, [], cpu=None, gpu=on_gpu)),
        dispatcher.submit(task(square, 1, cpu=Needs(cores=2))),
    ]
    workers.there = None
    time.sleep(0.2)
    workers.there = Capacity(1, 0, 1, 0)
    until(lambda: dispatcher.now().total == {Device.CPU: 1, Device.GPU: 0})
    go.touch()
    assert dispatcher.submit(task(square, 3)).result(WAIT_S) == 9  # neither is in its way
    assert not any(future.done() for future in waiting)
    workers.there = Capacity(2, 1, 2, 1)
    assert [future.result(WAIT_S) for future in waiting] == [0, 1]
    dispatcher.close()


def busy(place: Place) -> str:
    time.sleep(0.03)
    return place.device


def test_a_gpu_task_gets_the_cores_that_it_waits_for() -> None:
    with Dispatcher(ThreadWorkers(num_cores=2, num_gpus=1)) as dispatcher:
        small = [dispatcher.submit(task(busy)) for _ in range(60)]
        time.sleep(0.05)
        both = dispatcher.submit(task(busy, cpu=None, gpu=Needs(cores=2, gpus=1)))
        assert both.result(WAIT_S) == "cuda:0"
        assert not all(future.done() for future in small)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_placement_that_fails_ends_all_that_wait() -> None:
    class Broken(StaticRule):
        def pick(self, *_: object) -> None:
            raise ZeroDivisionError

    dispatcher = Dispatcher(ThreadWorkers(num_cores=1), Broken())
    with pytest.raises(TaskError, match="the dispatcher failed: ZeroDivisionError"):
        dispatcher.submit(task(square, 1)).result(WAIT_S)
    dispatcher.close()
