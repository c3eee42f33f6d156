"""The dispatcher of a command that runs on one machine: its cores, its GPUs, what tasks took before."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from assay_platform.errors import StorageError
from assay_platform.tasks.beat import BeatFile
from assay_platform.tasks.costs import Costs
from assay_platform.tasks.dispatch import Dispatcher
from assay_platform.tasks.placement import ByCost
from assay_platform.tasks.workers import ThreadWorkers


@contextmanager
def local_dispatcher(folder: Path | None) -> Iterator[Dispatcher]:
    """Threads of this process, placed by cost. folder: where costs are kept and others see what runs;
    None: nowhere."""
    import torch

    num_cores = os.cpu_count() or 1
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    machine = re.sub(r"\W+", "-", " ".join([f"{num_cores} cores", *sorted(set(gpus))])).lower()
    workers = ThreadWorkers(num_cores=num_cores, num_gpus=len(gpus))
    if folder is None:
        with Dispatcher(workers, ByCost()) as dispatcher:
            yield dispatcher
        return
    kept = folder / "costs" / f"{machine}.json"  # a time is one of this kind of machine
    placement, beats = ByCost(Costs.load(kept)), BeatFile(folder)
    try:
        with Dispatcher(workers, placement, beat=beats) as dispatcher:
            yield dispatcher
    finally:
        beats.close()
        with suppress(StorageError):  # they are measured again
            placement.costs.save(kept)
