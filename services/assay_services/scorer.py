"""A process that holds models: it takes batches from the front, and answers every other request that the front gets."""

from pathlib import Path

from assay_platform.config import Config

from assay_services.alias_board import board_of
from assay_services.dependencies import make_dependencies
from assay_services.lanes import LaneWorker
from assay_services.served import Served
from assay_services.stepping_aside import SteppingAside


class Scorer:
    """A thread a lane, the registry's follower, and the application on a Unix socket."""

    def __init__(self, config: Config, front: Path, *, fraud: str | None = None, recommend: str | None = None) -> None:
        """front: the socket that gives batches. fraud, recommend: see `make_dependencies`."""
        self._aside = SteppingAside(front.with_suffix(".reading"))
        deps = make_dependencies(config, fraud=fraud, recommend=recommend, board=board_of(front), busy=self._aside)
        self._served = Served(deps)
        self._workers = [
            LaneWorker(lane, front, deps.siblings.socket, answer) for lane, answer in self._served.by_lane().items()
        ]

    def start(self) -> None:
        """Read the models, then take batches."""
        self._served.start()
        for worker in self._workers:
            worker.start()
        self._aside.workers.extend(self._workers)

    def stop(self) -> None:
        """Answer what is being answered, then write what is in memory."""
        for worker in self._workers:
            worker.stop()
        self._served.stop()
