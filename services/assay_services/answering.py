"""How requests are answered: jobs, the calls that answer them, and who stands in for a version that fails."""

import logging
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from assay_platform.errors import DataError, InputError

from assay_services.batching import DeadlinePassedError, OverloadedError
from assay_services.bodies import RecommendBody
from assay_services.fraud import FraudScorer
from assay_services.hot_swap import Loaded, Slot
from assay_services.recommend import ItemRecommender
from assay_services.schemas import FraudScore, ModelRef, RecommendResponse, Record

Answered = TypeVar("Answered")
_log = logging.getLogger("assay.service")


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """Events of one request and the version that is to score them."""

    loaded: Loaded[FraudScorer]
    events: list[Record]
    explain: bool


@dataclass(frozen=True, slots=True)
class ListJob:
    """One user's list and the version that is to make it."""

    loaded: Loaded[ItemRecommender]
    body: RecommendBody


def score_jobs(_: Hashable, jobs: Sequence[ScoreJob]) -> list[list[FraudScore] | DataError]:
    """In one call. Jobs of one shape have one version and either all or none want reasons."""
    loaded, explain = jobs[0].loaded, jobs[0].explain
    model = ModelRef(name=loaded.name, version=loaded.version)
    try:
        answers = loaded.model.score_together([job.events for job in jobs], explain=explain, keep_as=model)
    except Exception:
        loaded.outcomes.failed += len(jobs)
        raise
    loaded.outcomes.answered += len(jobs)
    for answer in answers:
        if not isinstance(answer, DataError):
            loaded.outcomes.scores.extend(score.score for score in answer)
    return answers


def make_lists(_: Hashable, jobs: Sequence[ListJob]) -> Iterator[RecommendResponse | Exception]:
    """One list after the other."""
    for job in jobs:
        model, body = job.loaded.model, job.body
        shown_by = ModelRef(name=job.loaded.name, version=job.loaded.version)
        try:
            items, cold = model.recommend(body.user_id, k=body.k, exclude_seen=body.exclude_seen, context=body.context)
        except DataError as error:
            yield error
            continue
        except Exception as error:  # noqa: BLE001 - it fails this list and no other
            job.loaded.outcomes.failed += 1
            yield error
            continue
        job.loaded.outcomes.answered += 1
        list_id = model.keep_list(shown_by, body.user_id, items)
        yield RecommendResponse(model=shown_by, items=items, cold_start=cold, list_id=list_id)


async def answered(
    slot: Slot[Any],
    key: Callable[[Loaded[Any]], str],
    by: Callable[[Loaded[Any]], Awaitable[Answered]],
) -> Answered:
    """The answer of the version that a request is for; what a version on trial fails, the one before answers.

    key: of the user or event, by which a canary is chosen. by: who answers → the answer.
    """
    loaded = slot.require()
    if slot.challenger is not None:
        loaded = slot.chosen(key(loaded))
    try:
        return await by(loaded)
    except (InputError, OverloadedError, DeadlinePassedError):
        raise
    except Exception:
        instead = slot.instead_of(loaded)
        if instead is None:
            raise
        _log.exception("%s version %s failed a request; version %s answers it", loaded.name, loaded.version,
                       instead.version)  # fmt: skip
        return await by(instead)
