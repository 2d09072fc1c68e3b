"""Numbers, texts and choices that the classes of configs and the targets of components share, with their bounds."""

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True, arbitrary_types_allowed=True)
"""Of every class of configs: unknown keys are refused."""


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):  # Python would take it for 0 or 1
        raise ValueError("should be a number")
    return value


def _named(what: str) -> AfterValidator:
    def check(text: Any) -> Any:
        if not os.fspath(text).strip() or text == "null":
            raise ValueError(f"should name {what}")
        return text

    return AfterValidator(check)


_NUMBER = BeforeValidator(_refuse_bool)
RateFactor = Annotated[Literal[1, 2, 4], _NUMBER]
_LARGEST = 1e15  # of which float32 holds the square
Count = Annotated[int, _NUMBER, Field(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, _NUMBER, Field(ge=0, le=2**31 - 1)]
Size = Annotated[int, _NUMBER, Field(ge=1, le=2**16)]  # of one axis of a tensor: pixels, frames, tokens
Seed = Annotated[int, _NUMBER, Field(ge=0, lt=2**63)]
Number = Annotated[float, _NUMBER, Field(ge=-_LARGEST, le=_LARGEST)]
Positive = Annotated[float, _NUMBER, Field(gt=0, le=_LARGEST)]
NotNegative = Annotated[float, _NUMBER, Field(ge=0, le=_LARGEST)]
Fraction = Annotated[float, _NUMBER, Field(ge=0, le=1)]
Decay = Annotated[float, _NUMBER, Field(ge=0, lt=1)]  # of a moving average, which 1 would never move
Momentum = Annotated[float, _NUMBER, Field(gt=-1, lt=1)]
Fps = Annotated[float, _NUMBER, Field(ge=0.01, le=1000)]
Resolution = Size | tuple[Size, Size]  # pixels: one number for squares, or (height, width)
Shapes = Annotated[Sequence[tuple[Size, Size, Size]], Field(min_length=1)]
Name = Annotated[str, _named("something")]
Prompt = Annotated[str, Field(strict=True), _named("what a video shows")]
StrictText = Annotated[str, Field(strict=True, min_length=1)]  # no number
PathText = Annotated[str, _named("a file or folder")]
StrictPath = Annotated[str, Field(strict=True), _named("a file or folder")]
AnyPath = Annotated[str | os.PathLike[str], _named("a file or folder")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")]
Dtype = Literal["float32", "float16", "bfloat16"]
Decoder = Literal["pyav", "decord"]
PlaceSet = Literal["first", "last", "ends", "center", "every_second", "every_fourth", "random"]
ClipPosition = Literal["first", "center", "random"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
