"""What lists were made of lately: how much of the catalogue they show, and what their users took of them."""

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence

_LISTS, _USERS, _WITHIN_S = 1000, 50_000, 7 * 86400.0


class ShownLists:
    """The newest lists of this process. Thread-safe."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._lists: deque[tuple[str, ...]] = deque()
        self._times_shown: Counter[str] = Counter()
        self._of_user: OrderedDict[str, tuple[float, set[str]]] = OrderedDict()

    def add(self, user: str, items: Sequence[str]) -> None:
        """A list that was answered."""
        with self._lock:
            self._lists.append(tuple(items))
            self._times_shown.update(items)
            if len(self._lists) > _LISTS:
                self._times_shown -= Counter(self._lists.popleft())
            self._of_user[user] = (self._clock(), set(items))
            self._of_user.move_to_end(user)
            if len(self._of_user) > _USERS:
                self._of_user.popitem(last=False)

    def coverage(self, num_items: int) -> float:
        """Share of a catalogue that the newest thousand lists show."""
        return len(self._times_shown) / max(1, num_items)

    def taken(self, user: str, item: str) -> bool:
        """Whether a user takes an item of his newest list, of the last seven days, for the first time."""
        with self._lock:
            at, items = self._of_user.get(user, (0.0, set()))
            if item not in items or self._clock() - at > _WITHIN_S:
                return False
            items.remove(item)
            return True
