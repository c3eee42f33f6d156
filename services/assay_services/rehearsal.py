"""A new version answers recent real requests aside before it answers anybody: what it does with them is the evidence.

Compared with the version that answers now, on the same requests: does it take them all, does it decide alike, does it
see about as much risk, is it as fast. A version that has nothing to be compared with is not held up.
"""

import statistics
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from assay_platform.config import Rollout
from assay_platform.errors import DataError
from assay_platform.monitoring.drift import bands_of

# Fewer requests say nothing of a distribution.
_FEWEST = 20
# Events that are rehearsed by one call: many more than one cost little more, and nobody waits long for a few.
_TOGETHER = 8
# Between two calls it rests so many times as long as the last one took: real ones wait for the interpreter, too.
_REST = 2.0
# Where real requests leave no gap for so long, it is rehearsed beside them.
_TURN_S = 0.1
# A call faster than this is fast enough, whatever it was before.
_FAST_S = 0.005


class Answer(NamedTuple):
    """What a version says to one request. choices: decisions or items, whatever can be the same or not.

    scores: calibrated probabilities; none where scores mean nothing between requests.
    """

    choices: frozenset[Hashable]
    scores: tuple[float, ...] = ()


class Rehearsed(Protocol):
    """A version that can be asked aside; nothing that it says is kept."""

    def rehearse(self, requests: Sequence[Any]) -> list[Answer | DataError]:
        """Answer each of several requests that another version was asked, or say what of it does not fit."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was seen, on so many requests.

    refused: requests that the other version takes and this one does not. changed: share of choices that differ.
    moved: share of scores in another band of risk. slowdown: median time of a call for a request, of the other's.
    """

    requests: int
    refused: int = 0
    changed: float = 0.0
    moved: float = 0.0
    slowdown: float = 1.0
    first_refusal: str = ""
    objections: tuple[str, ...] = ()


def rehearse(
    now: Rehearsed, candidate: Rehearsed, requests: Sequence[Any], limits: Rollout, turn: threading.Lock
) -> Evidence:
    """Let both answer, one after the other, and object to what crosses a limit. turn: held while real requests are
    answered; a request that is rehearsed waits for it, since two at once take more than twice as long.
    """
    if not requests:
        return Evidence(requests=0)
    theirs, their_s = _asked(now, requests, turn)
    mine, my_s = _asked(candidate, requests, turn)
    both = [(a, b) for a, b in zip(theirs, mine, strict=True) if isinstance(a, Answer) and isinstance(b, Answer)]
    refusals = [b for a, b in zip(theirs, mine, strict=True) if isinstance(a, Answer) and not isinstance(b, Answer)]
    choices = [1.0 - len(a.choices & b.choices) / max(len(a.choices), len(b.choices), 1) for a, b in both]
    pairs = [pair for a, b in both for pair in zip(a.scores, b.scores, strict=True)]
    moved = 0.0
    if pairs:
        before, after = zip(*pairs, strict=True)
        moved = float((bands_of(before) != bands_of(after)).mean())
    evidence = Evidence(
        requests=len(requests),
        refused=len(refusals),
        changed=statistics.mean(choices) if choices else 0.0,
        moved=moved,
        slowdown=my_s / their_s if their_s else 1.0,
        first_refusal=refusals[0] if refusals else "",
    )
    return _with_objections(evidence, my_s, has_scores=bool(pairs), limits=limits)


def _with_objections(evidence: Evidence, seconds: float, *, has_scores: bool, limits: Rollout) -> Evidence:
    found = []
    if evidence.refused:
        found.append(f"refuses {evidence.refused} of {evidence.requests} recent requests ({evidence.first_refusal})")
    if evidence.requests >= _FEWEST and has_scores:
        if evidence.changed > limits.max_changed:
            found.append(f"decides {evidence.changed:.0%} otherwise; at most {limits.max_changed:.0%}")
        if evidence.moved > limits.max_moved:
            found.append(f"moves {evidence.moved:.0%} of scores to other bands of risk; at most {limits.max_moved:.0%}")
    if evidence.slowdown > limits.max_slowdown and seconds > _FAST_S:
        found.append(f"takes {evidence.slowdown:.1f} times as long; at most {limits.max_slowdown:g}")
    return Evidence(**{**vars(evidence), "objections": tuple(found)})


def _asked(
    version: Rehearsed, requests: Sequence[Any], turn: threading.Lock, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[Answer | str], float]:
    """What it says to each, or why it refuses; median seconds of a call for a request."""
    answers: list[Answer | str] = []
    seconds = []
    for chunk in _chunks(requests):
        has_turn = turn.acquire(timeout=_TURN_S)
        began = clock()
        try:
            said = version.rehearse(chunk)
            seconds.append((clock() - began) / len(chunk))
            answers += [str(one) if isinstance(one, DataError) else one for one in said]
        except Exception as error:  # noqa: BLE001 - a version that breaks is what is looked for
            # Which of them broke it, does not matter: it takes none of them as it comes with the others.
            answers += [f"{type(error).__name__}: {error}"] * len(chunk)
        finally:
            if has_turn:
                turn.release()
        time.sleep(_REST * (clock() - began))
    return answers, statistics.median(seconds) if seconds else 0.0


def _chunks(requests: Sequence[Any]) -> list[list[Any]]:
    """Requests of a few events together; one of more comes alone."""
    chunks: list[list[Any]] = []
    room = 0
    for request in requests:
        size = len(request) if isinstance(request, list) else 1
        if size > room:
            chunks.append([])
            room = _TOGETHER
        chunks[-1].append(request)
        room -= size
    return chunks
