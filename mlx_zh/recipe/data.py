"""The section `data`: how the training data is cleaned, mixed and rendered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from mlx_zh.recipe.section import LaterReasoning, LaterTexts, Located, Section
from mlx_zh.recipe.sources import DataSet, Split


class Deduplicate(Section):
    """Which rows are duplicates.

    `near` is the Jaccard similarity of character n-grams from which two rows are; null turns this comparison off.
    """

    exact: bool = True
    near: Annotated[float, Field(ge=0.5, le=1)] | None = 0.75
    ngram: PositiveInt = 3


class Decontaminate(Section):
    """Which rows are dropped because they contain exam questions.

    `overlap` is the share of a question's character n-grams that a row must contain.
    """

    benchmarks: tuple[Literal["ceval", "cmmlu"], ...] | None = None  # null: those of `evaluate.benchmarks`
    ngram: Annotated[int, Field(ge=4)] = 10
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.4


# Left out of a dump while they are the default, so that digests name only the rules that a recipe sets.
_UNLESS_SET = Field(exclude_if=lambda value: value == "sample")
QualityAction = Annotated[Literal["off", "sample", "count", "drop"], _UNLESS_SET]
PersonalAction = Annotated[Literal["off", "sample", "count", "mask", "drop"], _UNLESS_SET]


class Quality(Section):
    """What each quality rule does with the rows that have its fault; `sample` counts them in a sample of the rows."""

    refusal: QualityAction = "sample"
    language: QualityAction = "sample"
    repetition: QualityAction = "sample"
    truncated: QualityAction = "sample"
    mixed_script: QualityAction = "sample"
    echo: QualityAction = "sample"
    numbering: QualityAction = "sample"
    mojibake: QualityAction = "sample"
    personal: PersonalAction = "sample"

    @property
    def actions(self) -> dict[str, str]:
        """The action of each rule that does more or less than the default."""
        return {name: action for name, action in self if action != "sample"}


def _as_quality(value: Any) -> Any:
    """One action for all rules, if the value is no section."""
    return dict.fromkeys(Quality.model_fields, value) if isinstance(value, str) else value


class Data(Section):
    """The training data, how it is cleaned and mixed, and how it is rendered.

    `variables` are filled in where a row, `system` or one of `evaluate.prompts` says `{{name}}`.
    """

    sft: Split = Split()
    dpo: Split = Split()
    registry: dict[str, DataSet] = {}
    registry_file: Located | None = None
    variables: LaterTexts = {}
    normalize: bool = True
    simplify: bool = False
    quality: Annotated[Quality, BeforeValidator(_as_quality), Field(exclude_if=lambda value: not value.actions)] = (
        Quality()
    )
    deduplicate: Deduplicate = Deduplicate()
    decontaminate: Decontaminate = Decontaminate()
    mixing: Literal["concat", "interleave"] = "concat"
    validation_fraction: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    max_length: PositiveInt = 1024
    train_on: Literal["assistant", "last", "all"] = "assistant"
    reasoning: LaterReasoning = "learn"  # of a learned reply: also its reasoning, or only the answer after it
    on_overflow: Literal["truncate", "drop"] = "truncate"
    on_invalid: Literal["error", "skip"] = "error"
    date_string: str = "26 Jul 2024"
    system: str | None = None

    @field_validator("dpo")
    @classmethod
    def _pairs_have_no_ifd(cls, value: Split) -> Split:
        if value.select is not None and "ifd" in value.select.method:
            raise ValueError("a select.method of random, longest or diverse: ifd scores conversations, not pairs")
        return value

    @model_validator(mode="after")
    def _interleaved_shares(self) -> Data:
        for select in (self.sft.select, self.dpo.select):
            if self.mixing == "interleave" and select is not None and not select.per_source:
                raise ValueError("select.per_source true, because mixing: interleave sets the share of every source")
        return self

    def split(self, stage: str) -> Split:
        """The data of training stage `stage` (sft or dpo)."""
        return self.sft if stage == "sft" else self.dpo


def filled(text: str, variables: Mapping[str, str]) -> str:
    """The text with `{{name}}` replaced by the variable of that name; other names stay as they are."""
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), text)


def placeholders(text: str) -> list[str]:
    """The names that a text says as `{{name}}`."""
    return _VARIABLE.findall(text) if "{{" in text else []


_VARIABLE = re.compile(r"\{\{ ?(\w+) ?\}\}")
