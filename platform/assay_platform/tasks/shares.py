"""How many cores of a cluster a program should keep busy while others want some too.

Ray gives a core to whoever asks first and never takes it back, so a program that holds workers for a long time keeps
others from starting. Programs that say what they want are given max-min fair shares (Bertsekas and Gallager, 'Data
Networks', section 6.5.2): nobody gets more by another's getting less than it. A share is asked for again and again, and
what is above it is given up when its work is done; nothing is taken away.
"""

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from assay_platform.tasks.cluster import may_be_shared

_NAME, _NAMESPACE = "assay-shares", "assay"
_ASKED_EVERY_S, _FORGOTTEN_S = 1.0, 15.0


def fair_shares(num_cores: int, wanted: Mapping[str, int]) -> dict[str, int]:
    """Whole cores for each program, at least one; those that came first get what does not divide."""
    shares = dict.fromkeys(wanted, 1)
    left = num_cores - len(shares)
    while left > 0 and (hungry := [name for name, share in shares.items() if share < wanted[name]]):
        for name in hungry[:left]:
            shares[name] += 1
        left -= len(hungry[:left])
    return shares


class _Ledger:
    """Who wants what; one actor in a cluster. A program that is not heard of is forgotten."""

    def __init__(self) -> None:
        self._wanted: dict[str, int] = {}
        self._heard: dict[str, float] = {}

    def ask(self, program: str, wanted: int, num_cores: int) -> int:
        now = time.monotonic()
        self._wanted[program], self._heard[program] = wanted, now
        for other in [name for name, heard in self._heard.items() if now - heard > _FORGOTTEN_S]:
            self.leave(other)
        return fair_shares(num_cores, self._wanted)[program]

    def leave(self, program: str) -> None:
        self._wanted.pop(program, None)
        self._heard.pop(program, None)


class Share:
    """What this program may use of the running Ray cluster, while it is open: all that it wants of a local one."""

    def __init__(self, wanted: int) -> None:
        import ray

        self._ray: Any = ray
        self._program, self._wanted = uuid.uuid4().hex, wanted
        self._cores, self._asked_s, self._asked = wanted, -_ASKED_EVERY_S, None
        self._ledger: Any = None
        if not may_be_shared():
            return
        # It outlives programs; whatever it forgets when its node is lost, it is told again within a second.
        self._ledger = ray.remote(_Ledger).options(
            name=_NAME, namespace=_NAMESPACE, lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=-1,
            max_task_retries=-1,
        ).remote()  # fmt: skip

    def cores(self, wait_s: float = 0.0) -> int:
        """As many now, by the last answer; before the first, all that is wanted. Asked for once a second at most.

        wait_s: for the answer.
        """
        from ray.exceptions import RayError

        now = time.monotonic()
        if self._ledger is None:
            return self._cores
        if self._asked is None and now - self._asked_s >= _ASKED_EVERY_S:
            num_cores = int(self._ray.cluster_resources().get("CPU", 1))
            self._asked = self._ledger.ask.remote(self._program, self._wanted, num_cores)
            self._asked_s = now
        if self._asked is not None and self._ray.wait([self._asked], timeout=wait_s)[0]:
            with suppress(RayError):
                self._cores = self._ray.get(self._asked)
            self._asked = None
        return self._cores

    def close(self) -> None:
        """Others may have it. Safe to repeat."""
        if self._ledger is not None:
            self._ledger.leave.remote(self._program)
