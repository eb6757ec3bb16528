"""What every section of a config is made of: strict types, and values that are bounded."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def wrong(message: str, key: str = "") -> PydanticCustomError:
    """Return the error of a value that does not go with the others; `key` is what is meant inside the value."""
    return PydanticCustomError("jaxft", "{message}", {"key": key, "message": message})


class Section(BaseModel):
    """A part of a config: strict types, no unknown key, not to be changed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
