"""Bodies that are read and written thousands of times a second: the same contract as `schemas`, without its cost.

msgspec reads a body that fits in microseconds. One that does not goes to the model of `schemas` that OpenAPI shows,
which names every field that is wrong, and takes what is only written unusually.
"""

from typing import Annotated, Any, Generic, TypeVar

import msgspec
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from assay_services.schemas import FraudRequest, RecommendRequest, Record

Wanted = TypeVar("Wanted")
_encoder = msgspec.json.Encoder()


class FraudBody(msgspec.Struct, forbid_unknown_fields=True):
    """See `FraudRequest`."""

    events: Annotated[list[Record], msgspec.Meta(min_length=1)]
    explain: bool = False
    counterfactual: bool = False


class RecommendBody(msgspec.Struct, forbid_unknown_fields=True):
    """See `RecommendRequest`."""

    user_id: str | int
    k: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 10
    exclude_seen: bool | None = None
    context: Record = {}


class Glance(msgspec.Struct):
    """What a body wants, without reading what it holds; whatever does not fit is said where it is read."""

    events: list[msgspec.Raw] = []
    explain: bool = False
    counterfactual: bool = False


_glance = msgspec.json.Decoder(Glance)


def glance(content: bytes) -> Glance:
    """Enough to queue a request."""
    try:
        return _glance.decode(content)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return Glance()


class BodyReader(Generic[Wanted]):
    """Bytes → a body."""

    def __init__(self, wanted: type[Wanted], shown: type[BaseModel]) -> None:
        """shown: the model that OpenAPI shows, with the same fields."""
        self._decoder = msgspec.json.Decoder(wanted)
        self._wanted, self._shown = wanted, shown

    def read(self, content: bytes) -> Wanted:
        """Parse and check.

        Raises:
            RequestValidationError: it does not fit; says which fields.
        """
        try:
            return self._decoder.decode(content)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            try:
                return self._wanted(**dict(self._shown.model_validate_json(content)))
            except ValidationError as error:
                raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None

    @property
    def openapi(self) -> dict[str, Any]:
        """What a route that reads its body here says of it."""
        return {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": self._shown.model_json_schema()}},
            }
        }


FRAUD: BodyReader[FraudBody] = BodyReader(FraudBody, FraudRequest)
RECOMMEND: BodyReader[RecommendBody] = BodyReader(RecommendBody, RecommendRequest)


def as_json(answer: Any) -> bytes:
    """A dataclass as JSON."""
    return _encoder.encode(answer)
