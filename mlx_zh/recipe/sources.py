"""Data sets by name, the sources of a training stage, and which of their rows are learned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mlx_zh.recipe.section import LaterLocated, LaterSwitch, LaterText, Located, Section


class DataSet(Section):
    """A data set by name: where it lives and what its columns mean. Entries of the registry have this form."""

    hub: Literal["huggingface", "modelscope", "url", "file", "generated"]
    id: str = ""  # on a hub: its name there; for url: the address; for file: what to get, in words
    also: dict[Literal["huggingface", "modelscope"], str] = Field({}, exclude_if=lambda value: not value)
    kind: Literal["sft", "dpo"]
    revision: str | None = None
    subset: LaterText = None  # a configuration of a set on Hugging Face; its rows come through `datasets`
    streaming: LaterSwitch = None  # true: rows come one by one, and no further than `max_samples`
    files: tuple[str, ...] = ()  # patterns; without any, every data file of `split`
    split: str = "train"
    format: str = "auto"
    columns: dict[str, str] = {}
    near_duplicates: bool = True  # false: rows that look alike are different ones, as in arithmetic
    rows: PositiveInt | None = None
    mean_tokens: Annotated[PositiveInt | None, Field(exclude_if=lambda value: value is None)] = None  # about, a row
    size_mb: Annotated[PositiveFloat | None, Field(exclude_if=lambda value: value is None)] = None  # about, its files
    source: Annotated[tuple[str, ...], Field(exclude_if=lambda value: not value)] = ()  # where these facts are from
    sha256: str | None = None
    licence: str = "not stated"
    note: str = ""

    @property
    def ids(self) -> dict[str, str]:
        """Its id by hub; empty for a set that is on none."""
        if self.hub not in ("huggingface", "modelscope"):
            return {}
        return {self.hub: self.id} | {str(hub): id for hub, id in self.also.items()}

    @field_validator("also")
    @classmethod
    def _on_the_other_hub(cls, value: Any, info: ValidationInfo) -> Any:
        hub = info.data.get("hub")
        if value and (hub in value or hub not in ("huggingface", "modelscope")):
            raise ValueError("the id on the other hub, as also: {modelscope: OWNER/NAME}")
        return value

    @field_validator("subset", "streaming")
    @classmethod
    def _only_on_hugging_face(cls, value: Any, info: ValidationInfo) -> Any:
        hub = info.data.get("hub", "huggingface")
        if value and hub != "huggingface":
            raise ValueError(f"left out where hub is {hub}: only sets of huggingface are read so")
        return value


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Source(Section):
    """One data set: a file, a folder of files, or a registered name. A plain string is either, a file first.

    `subset`, `split`, `revision` and `streaming` go before those of the registered data set.
    """

    name: str | None = None
    path: Located | None = None
    subset: LaterText = None
    split: LaterText = None
    revision: LaterText = None
    streaming: LaterSwitch = None
    format: str = "auto"
    columns: dict[str, str] = {}
    sheet: LaterText = None  # of an Excel workbook; without it, the first one with rows
    max_samples: PositiveInt | None = None
    weight: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _says_what(self) -> Source:
        if self.name is None and self.path is None:
            raise ValueError("a section with a name (of a registered data set) or a path")
        return self

    @property
    def label(self) -> str:
        """What the user calls it."""
        return str(self.name or self.path)


Sources = tuple[Annotated[Source, BeforeValidator(_as_source)], ...]


def _as_methods(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Select(Section):
    """Which of the training rows are learned: the first `count` rows, or `fraction` of all, in the method's order.

    With neither, all rows that the method does not drop. `model` scores rows for ifd; by default it is the smallest
    one on this disk, else the base.
    """

    method: Annotated[
        tuple[Literal["random", "longest", "diverse", "ifd"], ...],
        BeforeValidator(_as_methods),
        Field(min_length=1),
    ] = ("random",)
    count: PositiveInt | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    per_source: bool = True
    model: LaterLocated = None

    @field_validator("method")
    @classmethod
    def _go_together(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value) or ("random" in value and len(value) > 1):
            raise ValueError("random, longest, diverse or ifd, or a list of different ones without random")
        return value

    @field_validator("fraction")
    @classmethod
    def _one_number(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("count") is not None:
            raise ValueError("left out where count is given")
        return value

    @field_validator("model")
    @classmethod
    def _scores(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and "ifd" not in info.data.get("method", ("ifd",)):
            raise ValueError("left out, because only the method ifd scores rows with a model")
        return value


class Split(Section):
    """Training and validation sources of one stage, and which of the training rows are learned."""

    train: Sources = ()
    validation: Sources = ()
    select: Annotated[Select | None, Field(exclude_if=lambda value: value is None)] = None
