"""While a process that scores reads a version, the others answer.

To read a version and to let it rehearse takes the interpreter for a second or two, and a request that comes meanwhile
would wait for it. So the processes of a service do it one after the other, and the one whose turn it is takes no
batches as long as another one does. A process that is alone answers beside it, as it would have.
"""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

# Longer than a version takes to be read from a store far away; who waits longer reads beside the other.
_PATIENCE_S, _PAUSE_S = 60.0, 0.05
# In which the batches that were on their way are answered.
_ON_THEIR_WAY_S = 0.05
_log = logging.getLogger("assay.service")


class TakesBatches(Protocol):
    """What can be told to take none for a while."""

    def step_aside(self, aside: bool) -> None:
        """Take none from now on, if another one is there; or take them again."""


class SteppingAside:
    """Of one process. workers: those of its lanes, from when they take batches."""

    def __init__(self, lock: Path) -> None:
        """lock: a file that the processes of a service have in common."""
        self._lock = lock
        self.workers: list[TakesBatches] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What is done inside may take the interpreter."""
        if not self.workers:
            yield
            return
        with self._lock.open("a") as turn:
            if not _taken(turn):
                _log.warning("others have been reading a version for %g s; this process reads beside them", _PATIENCE_S)
            for worker in self.workers:
                worker.step_aside(True)
            try:
                time.sleep(_ON_THEIR_WAY_S)
                yield
            finally:
                for worker in self.workers:
                    worker.step_aside(False)


def _taken(turn: IO[str]) -> bool:
    """Whether it is this process's turn now. The system gives it free when the file is closed."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(_PAUSE_S)
        else:
            return True
