"""Bodies → replies: which version a request is for, one call for all of a version, who stands in for one that fails.

Without threads or queues: whoever calls has a batch, and every body gets a reply, whatever becomes of the others.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeGuard, TypeVar

from assay_platform.errors import DataError, InputError
from assay_platform.monitoring.metrics import ServiceMetrics
from fastapi.exceptions import RequestValidationError

from assay_services import bodies
from assay_services.bodies import BodyReader, FraudBody, RecommendBody
from assay_services.fraud import FraudScorer
from assay_services.hot_swap import Loaded, Slot
from assay_services.recommend import ItemRecommender
from assay_services.replies import JSON, Reply, refusal
from assay_services.schemas import FraudResponse, ModelRef, RecommendResponse
from assay_services.shown import ShownLists

MAX_COUNTERFACTUALS = 10
Body = TypeVar("Body")
Answer = TypeVar("Answer")
_log = logging.getLogger("assay.service")


@dataclass(frozen=True)
class Answering(ABC, Generic[Body, Answer]):
    """What one application answers."""

    slot: Slot[Any]
    metrics: ServiceMetrics

    @property
    @abstractmethod
    def reader(self) -> BodyReader[Body]:
        """Of its bodies."""

    @abstractmethod
    def check(self, body: Body) -> None:
        """Raise DataError for what is readable and yet not allowed."""

    @abstractmethod
    def key(self, body: Body, champion: Loaded[Any]) -> str:
        """Of the user or event, by which a canary is chosen."""

    @abstractmethod
    def by(self, loaded: Loaded[Any], asked: Sequence[Body]) -> Iterator[Answer | Exception]:
        """What a version says to each."""

    @abstractmethod
    def made(self, body: Body, answer: Answer) -> None:
        """Count and remember an answer."""

    def __call__(self, _: Hashable, contents: Sequence[bytes]) -> list[Reply]:
        """A reply to each body, in order."""
        found: list[Reply | None] = [None] * len(contents)
        asked: dict[Loaded[Any], list[tuple[int, Body]]] = {}
        for i, content in enumerate(contents):
            try:
                body = self.reader.read(content)
                self.check(body)
                loaded = self.slot.require()
                if self.slot.challenger is not None:
                    loaded = self.slot.chosen(self.key(body, loaded))
            except Exception as error:  # noqa: BLE001 - every error has a reply
                found[i] = refusal(error)
            else:
                asked.setdefault(loaded, []).append((i, body))
        for loaded, members in asked.items():
            for (i, body), answer in zip(members, self._by(loaded, [body for _, body in members]), strict=True):
                if isinstance(answer, Exception):
                    found[i] = refusal(answer)
                else:
                    self.made(body, answer)
                    found[i] = Reply(200, bodies.as_json(answer), JSON)
        replies = [reply for reply in found if reply is not None]
        assert len(replies) == len(contents)
        return replies

    def _by(self, loaded: Loaded[Any], asked: Sequence[Body]) -> list[Answer | Exception]:
        """What a version on trial fails, the one before answers."""
        answers = self._counted(loaded, asked)
        broken = {i: answer for i, answer in enumerate(answers) if _is_a_fault(answer)}
        instead = self.slot.instead_of(loaded) if broken else None
        if instead is not None:
            _log.error("%s version %s failed %d requests; version %s answers them", loaded.name, loaded.version,
                       len(broken), instead.version, exc_info=next(iter(broken.values())))  # fmt: skip
            for i, answer in zip(broken, self._counted(instead, [asked[i] for i in broken]), strict=True):
                answers[i] = answer
        return answers

    def _counted(self, loaded: Loaded[Any], asked: Sequence[Body]) -> list[Answer | Exception]:
        try:
            answers = list(self.by(loaded, asked))
        except Exception as error:  # noqa: BLE001 - whoever is behind it has to hear of it
            answers = [error] * len(asked)
        failed = sum(_is_a_fault(answer) for answer in answers)
        loaded.outcomes.failed += failed
        loaded.outcomes.answered += len(asked) - failed
        return answers


def _is_a_fault(answer: object) -> TypeGuard[Exception]:
    """Of the version, not of the request."""
    return isinstance(answer, Exception) and not isinstance(answer, InputError | RequestValidationError)


@dataclass(frozen=True)
class ScoreAnswering(Answering[FraudBody, FraudResponse]):
    """`POST /v1/fraud/score`. max_batch: events in one request."""

    slot: Slot[FraudScorer]
    max_batch: int

    @property
    def reader(self) -> BodyReader[FraudBody]:
        """See the base."""
        return bodies.FRAUD

    def check(self, body: FraudBody) -> None:
        """See the base."""
        if len(body.events) > self.max_batch:
            raise DataError(f"events: {len(body.events)} in one request; at most {self.max_batch} are allowed")
        if body.counterfactual and len(body.events) > MAX_COUNTERFACTUALS:
            raise DataError(f"counterfactual: {len(body.events)} events; at most {MAX_COUNTERFACTUALS} in one request")

    def key(self, body: FraudBody, champion: Loaded[FraudScorer]) -> str:
        """See the base."""
        return champion.model.key_of(body.events[0])

    def by(self, loaded: Loaded[FraudScorer], asked: Sequence[FraudBody]) -> Iterator[FraudResponse | Exception]:
        """In one call. All of them want reasons, or none does."""
        model = ModelRef(name=loaded.name, version=loaded.version)
        requests = [body.events for body in asked]
        with self.slot.turn:
            answers = loaded.model.score_together(requests, explain=asked[0].explain, keep_as=model)
        for body, scores in zip(asked, answers, strict=True):
            if isinstance(scores, DataError):
                yield scores
                continue
            loaded.outcomes.scores.extend(one.score for one in scores)
            if body.counterfactual:
                for event, one in zip(body.events, scores, strict=True):
                    one.counterfactual = loaded.model.counterfactual(event, one)
            yield FraudResponse(model=model, scores=scores)

    def made(self, body: FraudBody, answer: FraudResponse) -> None:
        """See the base."""
        self.slot.remember(body.events)
        for one in answer.scores:
            self.metrics.decided(one.decision)


@dataclass(frozen=True)
class ListAnswering(Answering[RecommendBody, RecommendResponse]):
    """`POST /v1/recommend`."""

    slot: Slot[ItemRecommender]
    shown: ShownLists = field(default_factory=ShownLists)

    @property
    def reader(self) -> BodyReader[RecommendBody]:
        """See the base."""
        return bodies.RECOMMEND

    def check(self, body: RecommendBody) -> None:
        """Its reader has checked all."""

    def key(self, body: RecommendBody, champion: Loaded[ItemRecommender]) -> str:
        """See the base."""
        return str(body.user_id)

    def by(
        self, loaded: Loaded[ItemRecommender], asked: Sequence[RecommendBody]
    ) -> Iterator[RecommendResponse | Exception]:
        """One list after the other; one that fails spoils no other."""
        model = ModelRef(name=loaded.name, version=loaded.version)
        for body in asked:
            try:
                with self.slot.turn:
                    items, cold = loaded.model.recommend(
                        body.user_id, k=body.k, exclude_seen=body.exclude_seen, context=body.context
                    )
                list_id = loaded.model.keep_list(model, body.user_id, items)
            except Exception as error:  # noqa: BLE001 - it fails this list and no other
                yield error
            else:
                yield RecommendResponse(model=model, items=items, cold_start=cold, list_id=list_id)

    def made(self, body: RecommendBody, answer: RecommendResponse) -> None:
        """See the base."""
        self.slot.remember(body)
        self.shown.add(str(body.user_id), [item.item_id for item in answer.items])
        self.metrics.listed(
            cold_start=answer.cold_start, coverage=self.shown.coverage(self.slot.require().model.num_items)
        )
