"""Train one model on several workers of a Ray cluster, through Ray Train: gloo between CPUs, NCCL between GPUs.

Ray Train starts the workers and their process group; what a step does is `fit`'s, see `Ranks`. A worker that dies takes
its group with it, and a new group goes on after the last epoch that the checkpoint has. Ray Train's own restarts are
not used: they repeat errors of the training's code, too.
"""

import pickle
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from assay_platform.errors import AssayError, ClusterError, ConfigError, WorkError
from assay_platform.tasks.cluster import quiet_ray_environment, ray_cluster
from assay_platform.tasks.shares import Share
from assay_platform.training.checkpoint import Checkpoint
from assay_platform.training.ranks import Ranks

Trained = TypeVar("Trained")

_MAX_RESTARTS = 3
_POLL_S, _ANSWER_S = 0.2, 30.0


@dataclass(frozen=True, kw_only=True)
class Workers:
    """num: how many train together; one is this process. folder: for their checkpoints; every node has to see it."""

    num: int = 1
    folder: Path | None = None

    def train(
        self,
        work: Callable[..., Trained],
        data: Mapping[str, Any],
        *,
        on_epoch: Callable[[int, float], None] = lambda epoch, metric: None,
        checkpoint: Checkpoint | None = None,
    ) -> Trained:
        """What `work(**data, on_epoch=…, checkpoint=…)` returns; with `ranks=…` too on several workers, of the first.

        work: trains by `fit`. Several workers take it and give its result pickled, read `data` from the object store,
        and go on after the loss of one even without a checkpoint of the caller's. They are on GPUs if the cluster has
        one for each, else on equal parts of its cores, or of a fair share of them where others search or train too.
        on_epoch: called here, in this thread.

        Raises:
            ConfigError: the cluster is too small.
            ClusterError: workers died too often.
            WorkError: `work` failed.
        """
        if self.num == 1:
            return work(**data, on_epoch=on_epoch, checkpoint=checkpoint)
        assert self.folder is not None
        with ray_cluster():
            import ray
            from ray.util.queue import Empty, Queue

            cores_each(_cores_of_nodes(), self.num)  # says whether the cluster is large enough
            folder = (self.folder / uuid.uuid4().hex).resolve()
            told, share = Queue(actor_options={"num_cpus": 0}), Share(sum(_cores_of_nodes()))
            held = checkpoint or Checkpoint(folder / "training.pt", "")
            arguments = {"work": work, "data": ray.put(dict(data)), "told": told, "checkpoint": held}
            group = partial(_trainer, self.num, share.cores(_ANSWER_S), folder, arguments)
            result: Future[bytes] = Future()
            # In a thread of its own: Ray Train takes Ctrl-C over in the main one, and does not give it back.
            threading.Thread(target=_settle, args=(result, group, self.num), daemon=True).start()
            try:
                while not result.done() or not told.empty():
                    share.cores()  # or others would take it for ended
                    try:
                        on_epoch(*told.get(timeout=_POLL_S))
                    except Empty:
                        continue
            finally:
                share.close()
                told.shutdown(force=True)
                shutil.rmtree(folder, ignore_errors=True)
            trained: Trained = pickle.loads(result.result())  # noqa: S301 - of our own worker
            return trained


HERE = Workers()


def _settle(result: "Future[bytes]", group: Callable[[], Any], num: int) -> None:
    try:
        result.set_result(_trained(group, num))
    except BaseException as error:  # noqa: BLE001 - whoever waits for the result gets it
        result.set_exception(error)


def _trained(group: Callable[[], Any], num: int) -> bytes:
    """What the last group of workers returned."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError, WorkerGroupError

    last = ""
    for _ in range(_MAX_RESTARTS + 1):
        try:
            returned: bytes = group().fit().return_value
        except WorkerGroupError as error:
            _check_lost(list(error.worker_failures.values()), num)
            last = str(error)
        except (TrainingFailedError, RayError) as error:
            last = str(error)
        else:
            return returned
    raise ClusterError(f"the training on workers was begun {_MAX_RESTARTS + 1} times and lost; the last time: {last}")


def _check_lost(causes: Sequence[Exception], num: int) -> None:
    """Raises:
    AssayError: what the training itself failed with, where no worker was lost.
    """
    own = [cause for cause in causes if not type(cause).__module__.startswith("ray.")]
    on_purpose = next((cause for cause in own if isinstance(cause, AssayError)), None)
    if on_purpose is not None:
        raise on_purpose
    # Those that miss a lost worker fail with a RuntimeError. Where all have failed, nobody was lost.
    telling = [cause for cause in own if not isinstance(cause, RuntimeError)] or (own if len(own) == num else [])
    if telling:
        raise WorkError(f"the training on workers failed: {type(telling[0]).__name__}: {telling[0]}")


def _cores_of_nodes() -> list[int]:
    import ray

    cluster: Any = ray
    return [int(node["Resources"].get("CPU", 0)) for node in cluster.nodes() if node["Alive"]]


def _trainer(num: int, num_cores: int, folder: Path, arguments: Mapping[str, Any]) -> Any:
    quiet_ray_environment()
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster: Any = ray
    on_gpus = cluster.cluster_resources().get("GPU", 0) >= num
    cores = min(cores_each(_cores_of_nodes(), num), max(1, num_cores // num))
    return TorchTrainer(
        _work,
        train_loop_config=dict(arguments),
        torch_config=TorchConfig(backend="nccl" if on_gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=num, use_gpu=on_gpus, resources_per_worker={"CPU": float(cores)}),
        run_config=RunConfig(name="run", storage_path=str(folder)),
    )


def cores_each(nodes: Sequence[int], num_workers: int) -> int:
    """The most cores that each of the workers can have on nodes of so many.

    Raises:
        ConfigError: there is less than one for each.
    """
    for cores in range(max(nodes, default=0), 0, -1):
        if sum(node // cores for node in nodes) >= num_workers:
            return cores
    raise ConfigError(f"{num_workers} workers need a core each; the cluster has {sum(nodes)}")


def _work(arguments: dict[str, Any]) -> Any:
    """On a worker."""
    import ray

    cluster: Any = ray
    ranks, told = Ranks.here(), arguments["told"]

    def on_epoch(epoch: int, metric: float) -> None:
        if ranks.number == 0:
            told.put((epoch, metric))

    data = cluster.get(arguments["data"])
    trained = arguments["work"](**data, on_epoch=on_epoch, checkpoint=arguments["checkpoint"], ranks=ranks)
    # Ray Train takes no tensors.
    return pickle.dumps(trained) if ranks.number == 0 else None
