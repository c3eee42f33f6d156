"""What a person sees while work runs: a live bar on a terminal, plain lines elsewhere. All on stderr.

Results go to stdout through `say`; progress never does, so `--json` output can be piped.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO


def say(text: str = "") -> None:
    """Print a line of the result."""
    print(text, flush=True)


def complain(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


_asked_to_stop = threading.Event()


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Inside of the block Ctrl-C ends the work at the next stage at the latest.

    Python drops a KeyboardInterrupt that comes while it runs a callback of a weak reference, as imports have many of;
    the work would go on as if nobody had asked. What it prints of such a one is left out.
    """

    def stop(_number: int, _frame: Any) -> None:
        _asked_to_stop.set()
        raise KeyboardInterrupt

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt):
            tell(what)

    _asked_to_stop.clear()
    # Who ignores Ctrl-C, as a shell's background job does, goes on ignoring it; only the main thread may ask.
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    tell, sys.unraisablehook = sys.unraisablehook, dropped
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = tell


def _stop_if_asked() -> None:
    if _asked_to_stop.is_set() and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


class Stage:
    """One step under way."""

    def __init__(self, task: Any, progress: Any, live: Any = None) -> None:
        self._task, self._progress, self._live = task, progress, live
        self.note = ""

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """What is under way, below the bar; on a terminal alone."""
        if self._live is None:
            return
        from rich.console import Group
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in header:
            table.add_column(name, no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self._live.update(Group(self._progress, table))

    def update(self, done: float, note: str = "") -> None:
        """done: fraction, 0 to 1. note: a few words behind the bar."""
        _stop_if_asked()
        self.note = note or self.note
        if self._progress is not None:
            self._progress.update(self._task, completed=min(1.0, done), note=self.note)


class Reporter:
    """Shows stages and remembers how long each took (`timings_s`)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self.timings_s: dict[str, float] = {}

    def line(self, text: str) -> None:
        """A remark between stages."""
        print(text, file=self._stream, flush=True)

    @contextmanager
    def stage(self, name: str, text: str) -> Iterator[Stage]:
        """A step with a bar. name: key in `timings_s`; several stages of one name add up."""
        _stop_if_asked()
        started = time.perf_counter()
        if self._live:
            from rich.console import Console
            from rich.live import Live
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            console = Console(file=self._stream)
            columns = (
                TextColumn("{task.description:<34}"),
                BarColumn(30),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
            )
            progress = Progress(*columns, console=console)
            with Live(progress, console=console, transient=True) as live:
                stage = Stage(progress.add_task(text, total=1.0, note=""), progress, live)
                yield stage
        else:
            stage = Stage(None, None)
            yield stage
        _stop_if_asked()
        elapsed_s = time.perf_counter() - started
        self.timings_s[name] = self.timings_s.get(name, 0.0) + elapsed_s
        self.line(f"{text:<34} {elapsed_s:6.1f} s  {stage.note}".rstrip())
