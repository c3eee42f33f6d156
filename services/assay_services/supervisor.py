"""`assay serve` on one machine: a process that speaks HTTP, some that score, one that looks at the registry for them,
and this one, which starts them again.

Processes are forked from one that has imported everything and started nothing, so one that is started again answers as
soon as it has read its models, and the libraries are in memory once. On Ctrl-C or SIGTERM the front stops accepting and
answers who waits; then those that score write what is in their memory.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from assay_platform.config import Config

from assay_services.siblings import sockets_of

_PRELOADED = ["assay_services.preloaded"]
_FRONT_S, _SCORER_S = 12.0, 20.0
# One that ends sooner than this after its start is started again after a pause, not at once.
_SETTLED_S, _PAUSE_S = 5.0, 1.0
_log = logging.getLogger("assay.service")


@dataclass
class _Child:
    """What is kept running."""

    name: str
    target: Callable[..., None]
    arguments: tuple[Any, ...]
    process: BaseProcess | None = None
    started_at: float = 0.0
    not_before: float = 0.0


class Supervisor:
    """Keeps children running until told to stop."""

    def __init__(self, children: Sequence[tuple[str, Callable[..., None], tuple[Any, ...]]]) -> None:
        """children: name, function, arguments; the first one is stopped first."""
        self._children = [_Child(*child) for child in children]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)

    def run(self) -> None:
        """Until SIGINT or SIGTERM."""
        asked, ask = multiprocessing.Pipe(duplex=False)
        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: ask.send(None))
        try:
            while not asked.poll():
                self._start_those_that_are_not()
                sentinels = [child.process.sentinel for child in self._children if child.process is not None]
                multiprocessing.connection.wait([asked, *sentinels], timeout=_PAUSE_S)
                self._notice_those_that_ended()
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_those_that_are_not(self) -> None:
        for child in self._children:
            if child.process is None and time.monotonic() >= child.not_before:
                process = self._context.Process(target=child.target, args=child.arguments, name=child.name)
                process.start()
                child.process = process
                child.started_at = time.monotonic()

    def _notice_those_that_ended(self) -> None:
        for child in self._children:
            if child.process is None or child.process.is_alive():
                continue
            now = time.monotonic()
            settled = now - child.started_at > _SETTLED_S
            child.not_before = now if settled else now + _PAUSE_S
            _log.warning("process %s of the %s has ended (%s) and is started again", child.process.pid, child.name,
                         child.process.exitcode)  # fmt: skip
            child.process = None

    def _stop(self) -> None:
        front, *others = self._children
        for together, patience_s in (([front], _FRONT_S), (others, _SCORER_S)):
            running = [child.process for child in together if child.process is not None]
            for process in running:
                process.terminate()
            until = time.monotonic() + patience_s
            for process in running:
                process.join(max(0.0, until - time.monotonic()))
                if process.is_alive():
                    process.kill()


def end_with_parent() -> None:
    """Call in a child: it is told to stop when the process that supervises it has died."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="assay-parent", daemon=True).start()


def serve(config: Config, listener: socket.socket, *, fraud: str | None, recommend: str | None) -> None:
    """Until SIGINT or SIGTERM. listener: bound. fraud, recommend: names of models to follow."""
    # In the children, where the libraries are.
    from assay_services.children import run_board_writer, run_front, run_scorer

    folder, name = sockets_of(config.paths.home), f"{os.getpid()}.front"
    scorers = [
        (f"scorer {i}", run_scorer, (config, folder / name, fraud, recommend)) for i in range(config.service.workers)
    ]
    try:
        Supervisor(
            [
                ("front", run_front, (config, listener, folder, name)),
                *scorers,
                ("board of aliases", run_board_writer, (config, folder / name)),
            ]
        ).run()
    finally:
        for left in folder.glob(f"{os.getpid()}.*"):
            left.unlink(missing_ok=True)
