"""Where tasks run: threads of this process, or a Ray cluster."""

import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from assay_platform.errors import ClusterError, TaskError
from assay_platform.tasks.cluster import quiet_ray_environment
from assay_platform.tasks.rooms import Capacity, Taken
from assay_platform.tasks.task import Device, Needs, Place, Shared, Task

# Functions of modules that are remembered with what they need.
_MOST_REMOTES = 256


class Outcome(NamedTuple):
    """What became of a task. lost: its worker died, so nobody knows; seconds: that its function ran."""

    value: Any = None
    error: BaseException | None = None
    lost: str = ""
    seconds: float = 0.0


class Start(NamedTuple):
    """Tasks that start together, and where."""

    tasks: Sequence[Task[Any]]
    device: Device
    taken: Taken
    attempt: int


# done(outcomes): one of each task, in their order; from any thread, once a start.
Done = Callable[[list[Outcome]], None]


class Workers(Protocol):
    """Run what was chosen. Methods are called by one thread at a time and do not wait."""

    # Cores beyond those that there are, for tasks so short that handing over the next one would take longer.
    ahead_cores: float

    def capacity(self) -> Capacity:
        """What there is now."""

    def share(self, value: Any) -> Shared:
        """See `Dispatcher.share`."""

    def start(self, start: Start, done: Done) -> Callable[[], None]:
        """Begin. Returns how to end it early; `done` is called then too, whatever it says."""


def _run(work: Callable[..., Any], args: Sequence[Any], place: Place) -> Outcome:
    began = time.perf_counter()
    try:
        value = work(place, *args)
    except BaseException as error:  # noqa: BLE001 - of code that is not ours; whoever waits for the result gets it
        if not isinstance(error, Exception):
            error = TaskError(f"{type(error).__name__}: {error}")  # `sys.exit` ends a task, not who waits for it
        return Outcome(error=error, seconds=time.perf_counter() - began)
    return Outcome(value, seconds=time.perf_counter() - began)


class ThreadWorkers:
    """Threads of this process, which share its memory: nothing is sent or copied.

    For work that spends its time outside of the interpreter: torch, numpy, numba, files. What does not look at
    `place.ending` runs to its end although nobody waits for it; it keeps its room until then.
    """

    ahead_cores = 0.0

    def __init__(self, *, num_cores: float, num_gpus: int = 0) -> None:
        self._capacity = Capacity(num_cores, num_gpus, num_cores, num_gpus)

    def capacity(self) -> Capacity:
        """See `Workers`."""
        return self._capacity

    def share(self, value: Any) -> Shared:
        """See `Workers`."""
        return Shared(value)

    def start(self, start: Start, done: Done) -> Callable[[], None]:
        """See `Workers`."""
        ending = threading.Event()
        outcomes: dict[int, Outcome] = {}
        lock = threading.Lock()

        def one(number: int) -> None:
            task, gpus = start.tasks[number], start.taken.gpus[number]
            device = f"cuda:{gpus[0]}" if gpus else "cpu"
            place = Place(device, start.taken.needs[number].cores, start.attempt, task.key, ending.is_set)
            args = [arg.held if isinstance(arg, Shared) else arg for arg in task.args]
            ended(number, _run(task.work, args, place))

        def ended(number: int, outcome: Outcome) -> None:
            if outcome.error is not None:
                ending.set()  # the others of the group have nothing to wait for
            with lock:
                outcomes[number] = outcome
                last = len(outcomes) == len(start.tasks)
            if last:
                done([outcomes[n] for n in range(len(outcomes))])

        for number, task in enumerate(start.tasks):
            thread = threading.Thread(target=one, args=(number,), name=f"task-{task.name or task.kind}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the machine has no more threads
                ended(number, Outcome(error=TaskError(str(error))))
        return ending.set


class RayWorkers:
    """Processes of the Ray cluster that this one is connected to.

    Values travel through the object store. What is ended early is killed. Tasks that start together get a placement
    group.
    """

    def __init__(self) -> None:
        quiet_ray_environment()
        import ray

        if not ray.is_initialized():
            raise ClusterError("Ray is not running; enter `ray_cluster()` first")
        self._ray: Any = ray
        self._remotes: dict[Any, Any] = {}
        self.ahead_cores = 2.0 * self.capacity().cores

    def capacity(self) -> Capacity:
        """See `Workers`."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cores, gpus = ([float(node.get(name, 0.0)) for node in alive] or [0.0] for name in ("CPU", "GPU"))
        return Capacity(sum(cores), int(sum(gpus)), max(cores), int(max(gpus)))

    def share(self, value: Any) -> Shared:
        """See `Workers`."""
        return Shared(self._ray.put(value))

    def start(self, start: Start, done: Done) -> Callable[[], None]:
        """See `Workers`."""
        if len(start.tasks) == 1:
            try:
                ref = self._submit(start, 0, {})
            except Exception as error:  # noqa: BLE001 - of pickle, which says it in many ways
                done([Outcome(error=TaskError(f"the task cannot be sent to a worker: {_line(error)}"))])
                return lambda: None
            ref.future().add_done_callback(lambda future: done([_outcome(future)]))
            return lambda: self._end(ref)
        ending = threading.Event()
        threading.Thread(target=self._together, args=(start, done, ending), daemon=True).start()
        return ending.set

    def _submit(self, start: Start, number: int, options: dict[str, Any]) -> Any:
        task, needs = start.tasks[number], start.taken.needs[number]
        args = [arg.held if isinstance(arg, Shared) else arg for arg in task.args]
        sent = _is_of_a_module(task.work)
        work = task.work if sent else None
        remote = self._made(work, needs, task.name, options) if options else self._remote(work, needs, task.name)
        place = (needs.cores, start.device is Device.GPU, start.attempt, task.key)
        return remote.remote(*place, *args) if sent else remote.remote(*place, task.work, *args)

    def _remote(self, work: Callable[..., Any] | None, needs: Needs, name: str) -> Any:
        """What runs a function of a module, which is sent to a worker once, or one that comes with its task (None)."""
        known = self._remotes.get((work, needs, name))
        if known is None:
            if len(self._remotes) >= _MOST_REMOTES:
                self._remotes.clear()
            known = self._remotes[work, needs, name] = self._made(work, needs, name, {})
        return known

    def _made(self, work: Callable[..., Any] | None, needs: Needs, name: str, options: dict[str, Any]) -> Any:
        options = {"num_cpus": needs.cores, "num_gpus": needs.gpus, "max_retries": 0, **options}
        return self._ray.remote(_on_ray(work)).options(**options, **({"name": name} if name else {}))

    def _end(self, ref: Any) -> None:
        from ray.exceptions import RayError

        with suppress(RayError, ValueError):
            self._ray.cancel(ref, force=True)

    def _together(self, start: Start, done: Done, ending: threading.Event) -> None:
        from ray.exceptions import RayError
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles = [
            {name: amount for name, amount in (("CPU", n.cores), ("GPU", n.gpus)) if amount} for n in start.taken.needs
        ]
        outcomes: list[Outcome] = []
        group = None
        try:
            group = placement_group(bundles)
            while not ending.is_set() and not group.wait(0.2):
                pass
            refs = []
            for number in range(0 if ending.is_set() else len(start.tasks)):
                strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
                refs.append(self._submit(start, number, {"scheduling_strategy": strategy}))
            waiting = list(refs)
            while waiting and not ending.is_set():
                ready, waiting = self._ray.wait(waiting, timeout=0.2)
                if any(_outcome(ref.future()).error or _outcome(ref.future()).lost for ref in ready):
                    break  # the others have nothing to wait for
            for ref in waiting:
                self._end(ref)
            outcomes = [_outcome(ref.future()) for ref in refs]
        except RayError as error:
            outcomes = [Outcome(lost=_line(error))] * len(start.tasks)
        except Exception as error:  # noqa: BLE001 - of pickle, as above
            outcomes = [Outcome(error=TaskError(f"the tasks cannot be sent to workers: {_line(error)}"))]
        finally:
            if group is not None:
                with suppress(RayError):
                    remove_placement_group(group)
            done(outcomes or [Outcome(lost="ended before it began")] * len(start.tasks))


def _outcome(future: Any) -> Outcome:
    """Of a Ray task: its function's errors are values, so an error here is Ray's."""
    from ray.exceptions import RayTaskError

    try:
        value, error, seconds = future.result()
    except RayTaskError as problem:  # its arguments or its value could not be sent
        return Outcome(error=TaskError(str(problem).strip().splitlines()[-1]))
    except BaseException as problem:  # noqa: BLE001 - also `CancelledError`, and errors that Ray could not rebuild
        return Outcome(lost=_line(problem))
    return Outcome(value, error, seconds=seconds)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_of_a_module(work: Callable[..., Any]) -> bool:
    name = getattr(work, "__qualname__", "")
    return getattr(sys.modules.get(getattr(work, "__module__", "")), name, None) is work


def _on_ray(work: Callable[..., Any] | None) -> Callable[..., list[Any]]:
    """A function for `ray.remote`. work: None: comes as the first argument."""

    def task(cores: float, on_gpu: bool, attempt: int, key: str, *args: Any) -> list[Any]:
        # Ray shows a worker its own GPUs alone, so they are always the first ones.
        place = Place("cuda" if on_gpu else "cpu", cores, attempt, key, lambda: False)
        return _run_on_ray(args[0], args[1:], place) if work is None else _run_on_ray(work, args, place)

    return task


def _run_on_ray(work: Callable[..., Any], args: Sequence[Any], place: Place) -> list[Any]:
    """Value, error and seconds: a list of plain values needs no pickle."""
    threads = max(1, int(place.cores))
    if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    value, error, _, seconds = _run(work, args, place)
    if error is not None:
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301 - made here, a moment ago
        except Exception:  # noqa: BLE001 - whatever an error of other code does when it is copied
            error = TaskError(f"{type(error).__name__}: {error}")
    return [value, error, seconds]
