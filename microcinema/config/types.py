"""Numbers and choices that the classes of configs share, with their bounds."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

CONFIG = ConfigDict(extra="forbid", coerce_numbers_to_str=True, arbitrary_types_allowed=True)
"""Of every class of configs: unknown keys are refused."""
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "float16", "bfloat16"]
