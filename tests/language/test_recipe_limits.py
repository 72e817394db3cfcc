"""Every limit of the recipe's types is told in Chinese: no English words, and no number that is cut in two."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen

from mlx_zh.language.translation import in_readers_language
from mlx_zh.models.catalog import KnownModel
from mlx_zh.recipe import Recipe
from mlx_zh.recipe_text.document import Document
from mlx_zh.recipe_text.problems import explain

WRONG: tuple[Any, ...] = (
    *(None, True, "", "x.y", " ", "\0", "1.5.2", "nan", float("inf"), float("nan"), -0.75, 1.5, 99.25, 1e300, 10**30),
    *("9" * 5000, [], [""], [{}], {}, {"x": 1}, {1: 2}, [1.5], b"x", -(2**70), "：", "path：x"),
)


def models(annotation: Any, known: list[type[pydantic.BaseModel]]) -> list[type[pydantic.BaseModel]]:
    """All sections below a type."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel) and annotation not in known:
        known.append(annotation)
        for info in annotation.model_fields.values():
            models(info.annotation, known)
    for inner in get_args(annotation):
        models(inner, known)
    return known


def constraints(annotation: Any, metadata: Any) -> Iterator[Any]:
    """Limits and choices of a field, those within its alternatives included."""
    for part in metadata:
        yield from getattr(part, "metadata", None) or [part]
    if get_origin(annotation) is Literal:
        yield annotation
        return
    for inner in get_args(annotation):
        yield from constraints(inner, getattr(inner, "__metadata__", ()))


def breaking(constraint: Any) -> list[Any]:
    """Values that break a constraint, as near to it as can be."""
    match constraint:
        case Gt():
            return [constraint.gt, constraint.gt - 0.75]
        case Ge():
            return [constraint.ge - 0.25, constraint.ge - 1]
        case Lt():
            return [constraint.lt, constraint.lt + 0.2]
        case Le():
            return [constraint.le + 0.2, constraint.le + 1]
        case MinLen():
            return ["", [], {}]
    return ["no.such", 0.7, -3] if get_origin(constraint) is Literal else []


SECTIONS = [*models(Recipe, []), *models(KnownModel, [])]
FIELDS = [(section, name) for section in dict.fromkeys(SECTIONS) for name in section.model_fields]
# What may stand in a Chinese sentence as it is: names of the recipe's keys, and values in quotation marks.
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|b'x'|\{[^}]*\}")


def problems(section: type[pydantic.BaseModel], name: str, value: Any) -> list[str]:
    """What is said about a key with this value."""
    alias = section.model_fields[name].alias or name
    document = Document(Path("r"), {alias: value})
    try:
        section.model_validate({alias: value}, context={"beside": Path()})
    except pydantic.ValidationError as error:
        return [text for _, text in explain(error, document, section) if " must be " in text]
    return []


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_every_limit_is_told_in_chinese(section: type[pydantic.BaseModel], name: str) -> None:
    info = section.model_fields[name]
    values = [*WRONG, *(value for part in constraints(info.annotation, info.metadata) for value in breaking(part))]
    for value in values:
        for english in problems(section, name, value):
            assert "Input should" not in english and "Unable" not in english and "valid dictionary" not in english
            chinese = in_readers_language(english, "zh")
            assert "应为" in chinese and "。" in chinese, chinese
            for number in re.findall(r"(?<![\w.])-?\d+\.\d+(?:e[+-]\d+)?", english):
                assert number in chinese, (english, chinese)
            words = set(re.findall(r"[A-Za-z]{2,}", QUOTED.sub("", chinese)))
            assert words <= SAME | NAMES, (words - SAME - NAMES, chinese)


# Names of keys, and the words that may be their values.
TEXTS = [section.model_fields[name].alias or name for section, name in FIELDS]
TEXTS += [
    str(choice)
    for section, name in FIELDS
    for part in constraints(section.model_fields[name].annotation, ())
    if get_origin(part) is Literal
    for choice in get_args(part)
]
NAMES = {word for text in TEXTS for word in re.findall("[A-Za-z]{2,}", text)}
SAME = {
    *("true", "false", "null", "none", "start", "base", "dpo", "sft", "loss", "lora", "type", "full", "hub"),
    *(
        "huggingface",
        "modelscope",
        "path",
        "name",
        "also",
        "OWNER",
        "NAME",
        "judge",
        "url",
        "model",
        "by",
        "NUL",
        "nan",
    ),
    *("inf", "YAML", "UTF", "GB", "MB"),
}


def test_a_limit_with_a_point_stays_whole() -> None:
    english = problems(models(Recipe, [])[0].model_fields["dpo"].annotation, "label_smoothing", 0.7)  # type: ignore[arg-type]
    assert [in_readers_language(text, "zh") for text in english] == [
        "r: label_smoothing 应为：小于 0.5 的数；得到的是 0.7。"
    ]
