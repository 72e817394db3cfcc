"""The base class of a recipe's sections, and the types of values that several sections have."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]


def resolved_path(value: str, info: ValidationInfo) -> str:
    """A path relative to the recipe's folder, if it exists there, made relative to the current folder.

    Any other text is returned unchanged, except that `~` is expanded.
    """
    folder: Path | None = (info.context or {}).get("beside")
    try:
        if folder is None or not value or Path(value).expanduser().is_absolute():
            return str(Path(value).expanduser()) if value.startswith("~") else value
        beside = folder / value
        return os.path.normpath(beside) if beside.exists() else value
    except (OSError, RuntimeError) as error:  # a name that is too long, or the home folder of an unknown user
        raise ValueError("a valid name of a file or folder") from error


def in_home(value: str) -> str:
    """The path with `~` expanded."""
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError as error:  # the home folder of an unknown user
        raise ValueError("a valid name of a folder") from error


Located = Annotated[str, Field(min_length=1), AfterValidator(resolved_path)]


def folder_name(value: str) -> str:
    """The name, if a folder can have it. Raises ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
        raise ValueError("a folder name of letters, digits, '-', '_' and '.', beginning with a letter or digit")
    if len(value) > _LONGEST_NAME:
        raise ValueError(f"a folder name of at most {_LONGEST_NAME} characters")
    return value


_LONGEST_NAME = 150  # file systems take 255 bytes, and what is made from the name is longer


# What the model's chat template is asked for, and what is learned of the reasoning in the data.
Mode = Literal["on", "off", "auto"]
Reasoning = Literal["learn", "context", "drop"]

# Which blocks are computed again: as many as each row needs, all, none, or so many of the lowest.
Recomputed = Literal["auto"] | bool | PositiveInt
Measured = Literal["auto"] | bool  # auto: what was measured to be faster

_SWITCHES = (bool, bool | None, Recomputed, Measured)
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Section(BaseModel):
    """Base class of every part of a recipe. Instances are immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _check_value(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in _SWITCHES:
            raise ValueError("something other than true or false")
        if isinstance(value, str) and "\0" in value:
            raise ValueError("text without NUL characters")
        if isinstance(value, str) and _SURROGATE.search(value):
            raise ValueError("text without halves of surrogate pairs")
        return value


# Keys that came after the first version: left out of a dump while they have their defaults, so that the digests of
# runs and checkpoints made before them stay what they are.
LaterMode = Annotated[Mode, Field(exclude_if=lambda value: value == "auto")]
LaterReasoning = Annotated[Reasoning, Field(exclude_if=lambda value: value == "learn")]
LaterText = Annotated[str | None, Field(min_length=1, exclude_if=lambda value: value is None)]
LaterSwitch = Annotated[bool | None, Field(exclude_if=lambda value: value is None)]
LaterLocated = Annotated[Located | None, Field(exclude_if=lambda value: value is None)]
LaterWeight = Annotated[NotNegative, Field(exclude_if=lambda value: value == 1.0)]
LaterTexts = Annotated[dict[str, str], Field(exclude_if=lambda value: not value)]
