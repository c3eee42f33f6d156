"""Rooms, costs and placements: against oracles, and on devices that only sleep."""

import time
from pathlib import Path

import pytest
from assay_platform.errors import ConfigError
from assay_platform.tasks.costs import Costs
from assay_platform.tasks.dispatch import Dispatcher
from assay_platform.tasks.placement import ByCost, Load, Placement, Queue, StaticRule, Work
from assay_platform.tasks.rooms import Capacity, Rooms, Taken
from assay_platform.tasks.task import Device, Kind, Needs, Place, Task
from assay_platform.tasks.workers import ThreadWorkers
from hypothesis import given, settings
from hypothesis import strategies as st

CPU, GPU = Device.CPU, Device.GPU
ONE = {CPU: (Needs(),), GPU: (Needs(cores=0, gpus=1),)}
IDLE = {CPU: Load(2, 0.0), GPU: Load(1, 0.0)}

needs = st.builds(Needs, cores=st.sampled_from([0.0, 0.5, 1.0, 2.0]), gpus=st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]))


def work(number: int, name: str = "net", *, kind: Kind = Kind.MATRIX, size: float = 1.0, priority: int = 0) -> Work:
    return Work(number, name, kind, size, priority, 0.0, ONE)


def queues(*heads: Work) -> list[Queue]:
    return [Queue(head, 1) for head in heads]


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(needs, min_size=1, max_size=3), st.booleans()), max_size=30))
def test_no_gpu_and_no_core_is_given_twice(asked: list[tuple[list[Needs], bool]]) -> None:
    rooms, taken = Rooms(Capacity(4.0, 3, 4.0, 3)), list[Taken]()
    for wanted, give_back in asked:
        if give_back and taken:
            rooms.give(taken.pop(0))
        if (found := rooms.take(wanted)) is not None:
            taken.append(found)
        shares = [0.0] * 3
        for one in taken:
            for need, gpus in zip(one.needs, one.gpus, strict=True):
                assert len(gpus) == (0 if not need.gpus else max(1, int(need.gpus)))
                for gpu in gpus:
                    shares[gpu] += min(1.0, need.gpus)
        assert max(shares) <= 1 + 1e-6
        assert sum(need.cores for one in taken for need in one.needs) <= 4 + 1e-6
        assert rooms.used_gpus == pytest.approx(sum(shares))
    for one in taken:
        rooms.give(one)
    assert rooms.take([Needs(cores=4.0, gpus=1.0)] + [Needs(cores=0, gpus=1.0)] * 2) is not None


def test_shares_are_packed_so_that_whole_gpus_stay_free() -> None:
    rooms = Rooms(Capacity(8.0, 2, 8.0, 2))
    assert [rooms.take([Needs(gpus=0.5)]).gpus for _ in range(2)] == [((0,),), ((0,),)]  # type: ignore[union-attr]
    assert rooms.take([Needs(gpus=1.0)]) == Taken((Needs(gpus=1.0),), ((1,),))
    assert rooms.take([Needs(gpus=0.25)]) is None


@pytest.mark.parametrize("wrong", [{"cores": -1.0}, {"gpus": 1.5}, {"gpus": -0.5}])
def test_what_cannot_be_needed_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="cannot need"):
        Needs(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpu": None}, {"cpu": Needs(gpus=1.0)}, {"gpu": Needs()}, {"deadline_s": 0.0}, {"retries": -1}, {"size": -1.0},
    ],
)  # fmt: skip
def test_a_task_that_says_nonsense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Task(work=print, kind=Kind.IO, **wrong)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    st.floats(0, 10), st.floats(0, 2), st.lists(st.floats(1, 100), min_size=9, max_size=40, unique=True),
    st.floats(5, 1000),
)  # fmt: skip
def test_a_line_is_found_through_calls_of_which_the_first_compiled(
    start: float, slope: float, sizes: list[float], compiling: float
) -> None:
    costs = Costs()
    for number, size in enumerate(sizes):
        costs.add("net", CPU, size, start + slope * size + (compiling if number == 0 else 0.0))
    for size in (1.0, 50.0, 200.0):
        assert costs.seconds("net", CPU, size) == pytest.approx(start + slope * size, rel=0.05, abs=0.05)
    assert costs.seconds("net", GPU, 1.0) is None


def test_costs_are_kept_and_a_damaged_file_is_as_none(tmp_path: Path) -> None:
    costs, path = Costs(), tmp_path / "costs.json"
    for size in (1.0, 2.0, 4.0):
        costs.add("net", GPU, size, 0.5 + size)
    costs.save(path)
    assert Costs.load(path).seconds("net", GPU, 8.0) == costs.seconds("net", GPU, 8.0) == pytest.approx(8.5)
    for broken in ("", "[]", '{"format": 1, "seen": [["net", "abacus", [[1, 2]]]]}', '{"format": 9}'):
        path.write_text(broken)
        assert Costs.load(path).seconds("net", GPU, 8.0) is None
    assert Costs.load(tmp_path / "absent").seconds("net", GPU, 8.0) is None


def known(**seconds: tuple[float, float]) -> ByCost:
    """name → what it takes on (CPU, GPU)."""
    placement = ByCost()
    for name, both in seconds.items():
        for device, one in zip((CPU, GPU), both, strict=True):
            placement.costs.add(name, device, 1.0, one)
    return placement


def test_each_device_takes_what_it_is_best_at() -> None:
    placement = known(net=(10.0, 1.0), solve=(3.0, 1.0), trees=(1.0, 2.0))
    waiting = [work(1, "solve"), work(2, "trees"), work(3, "net")]
    assert placement.pick(GPU, queues(*waiting), 0.0, IDLE) == waiting[2]
    assert placement.pick(CPU, queues(*waiting), 0.0, IDLE) == waiting[1]


def test_nothing_is_taken_that_the_other_would_finish_sooner() -> None:
    placement = known(net=(10.0, 1.0))
    waiting = [work(1, "net")]
    assert placement.pick(CPU, queues(*waiting), 0.0, {CPU: Load(2, 0.0), GPU: Load(1, 8.0)}) is None
    assert placement.pick(CPU, queues(*waiting), 0.0, {CPU: Load(2, 0.0), GPU: Load(1, 9.5)}) == waiting[0]
    assert placement.pick(CPU, [Queue(waiting[0], 9)], 0.0, IDLE) is None  # the GPU is done with nine sooner
    assert placement.pick(CPU, [Queue(waiting[0], 10)], 0.0, IDLE) == waiting[0]


def test_what_was_never_measured_goes_where_its_kind_goes() -> None:
    for placement in (ByCost(), StaticRule()):
        waiting = [work(1, "a", kind=Kind.MATRIX), work(2, "b", kind=Kind.FEATURE)]
        assert placement.pick(GPU, queues(*waiting), 0.0, IDLE) == waiting[0]
        assert placement.pick(CPU, queues(*waiting), 0.0, IDLE) == waiting[1]


def test_priority_goes_before_cost_and_what_waited_long_before_what_fits_better() -> None:
    placement = known(net=(10.0, 1.0), trees=(1.0, 2.0))
    waiting = [work(1, "trees"), work(2, "net"), work(3, "trees", priority=1)]
    assert placement.pick(CPU, queues(*waiting), 0.0, IDLE) == waiting[2]
    aged = [work(1, "net"), work(2, "net"), work(3, "trees")]
    assert placement.pick(CPU, queues(*aged), 0.0, {CPU: Load(2, 0.0), GPU: Load(1, 50.0)}) == aged[2]
    assert placement.pick(CPU, queues(*aged), 61.0, {CPU: Load(2, 0.0), GPU: Load(1, 50.0)}) == aged[0]


def test_what_the_other_device_is_better_for_is_in_nobodys_way() -> None:
    placement = known(net=(1000.0, 100.0), trees=(1.0, 2.0))
    loads = {CPU: Load(2, 0.0), GPU: Load(1, 50.0)}
    trees = work(2, "trees")._replace(needs={CPU: (Needs(),)})
    urgent = work(1, "net", priority=1)
    for now_s, first in ((0.0, work(1, "net")), (61.0, work(1, "net")), (0.0, urgent)):
        assert placement.pick(CPU, queues(first, trees), now_s, loads) == trees
        assert placement.pick(GPU, queues(first, trees), now_s, loads) == first


def test_a_static_rule_keeps_the_order_and_can_put_all_on_one_device() -> None:
    waiting = [work(1, kind=Kind.FEATURE), work(2), work(3, kind=Kind.FEATURE, priority=2)]
    assert StaticRule().pick(CPU, queues(*waiting), 0.0, IDLE) == waiting[2]
    assert StaticRule(only=GPU).pick(CPU, queues(*waiting), 0.0, IDLE) is None
    assert StaticRule(only=GPU).pick(GPU, queues(*waiting), 0.0, {GPU: Load(1, 0.0)}) == waiting[2]
    cpu_alone = work(4)._replace(needs={CPU: (Needs(),)})
    assert StaticRule().pick(CPU, queues(cpu_alone), 0.0, IDLE) == cpu_alone


SECONDS = {"net": (0.20, 0.02), "windows": (0.02, 0.02), "trees": (0.02, 0.06), "tiny": (0.004, 0.006)}


def pretend(place: Place, name: str) -> str:
    time.sleep(SECONDS[name][place.device != "cpu"])
    return place.device


def makespan(placement: Placement) -> float:
    tasks = [name for name in ("net", "windows", "trees", "tiny") for _ in range(12)]
    kinds = {"net": Kind.MATRIX, "windows": Kind.FEATURE, "trees": Kind.UPDATE, "tiny": Kind.MATRIX}
    began = time.monotonic()
    with Dispatcher(ThreadWorkers(num_cores=2, num_gpus=1), placement) as dispatcher:
        for name in tasks:
            needs = Needs(cores=0, gpus=1)
            dispatcher.submit(Task(work=pretend, args=(name,), name=name, kind=kinds[name], gpu=needs))
    return time.monotonic() - began


def test_measured_costs_learn_to_use_both_devices() -> None:
    placement = ByCost()
    makespan(placement)  # learns
    by_cost, gpu_alone = makespan(placement), makespan(StaticRule(only=GPU))
    assert gpu_alone > 1.2  # twelve of each, one after the other
    assert by_cost < 0.8 * gpu_alone
