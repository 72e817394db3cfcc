"""The faults of an answer, by the rules of rules.yaml."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mlx_zh.corpus.conversation import Conversation, Message
from mlx_zh.corpus.quality.rules import faults_of
from mlx_zh.corpus.samples import Sampled, SampledAnswer
from mlx_zh.errors import RecipeError
from mlx_zh.exams.free_answers import free_answer_letter
from mlx_zh.judging import final_answers
from mlx_zh.judging.final_answers import final_number, same_number
from mlx_zh.system.digests import value_digest
from mlx_zh.system.json_text import parse_json

_LONGEST = 8_000  # characters of an answer that a regular expression is asked about
_CHOICE = re.compile(r"(?:^|\s)\(?([A-D])\s?[.、:：．)）]\s*(.*?)(?=\s+\(?[A-D]\s?[.、:：．)）]|\s*\Z)", re.DOTALL)
_FENCE = re.compile(r"\s*```[a-zA-Z]*\n(.*?)\n?```\s*", re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """An entry of rules.yaml; the head of that file explains the fields."""

    name: str
    says: str
    penalty: float
    examples: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the rules are given by the user: bounds of the length in characters, and the format.

    `format` is json, or a regular expression that must match the whole answer. Raises RecipeError for another one.
    """

    shortest: int = 1
    longest: int | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.format != "json":
            try:
                re.compile(self.format)
            except (re.error, RecursionError, OverflowError) as error:
                raise RecipeError(
                    f"--format {self.format}: {error}. Give json, or a regular expression that is valid."
                ) from error


Test = Callable[[Sampled, SampledAnswer, Settings], bool]  # whether an answer has the fault


@cache
def rules() -> tuple[int, tuple[Rule, ...]]:
    """The version and the rules of rules.yaml."""
    text = files(__package__).joinpath("rules.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return data["version"], tuple(Rule(**fields) for fields in data["rules"])


def key(settings: Settings) -> str:
    """A digest of all that decides what the rules find, 16 hex digits."""
    return value_digest([rules()[0], final_answers.table().version, asdict(settings)])[:16]


def faults(sample: Sampled, answer: SampledAnswer, settings: Settings) -> list[str]:
    """The names of the rules that find a fault in an answer."""
    return [rule.name for rule in rules()[1] if _TESTS[rule.name](sample, answer, settings)]


def score(names: Sequence[str]) -> float:
    """0 for an answer without faults; each fault takes its penalty off."""
    return 0.0 - sum(rule.penalty for rule in rules()[1] if rule.name in names)


def right(sample: Sampled, text: str) -> bool | None:
    """Whether an answer's final answer is that of the known solution; None where the solution has none to compare."""
    if sample.reference is None:
        return None
    choices = dict(_CHOICE.findall(sample.prompt[-1].content))
    if {"A", "B"} <= choices.keys():
        options = [choices[letter].strip() for letter in sorted(choices)]
        if letter := free_answer_letter(sample.reference, options):
            return free_answer_letter(text, options) == letter
    solution = final_number(sample.reference)
    if solution is None:
        return None
    number = final_number(text)
    return number is not None and same_number(number, solution, text)


def _is_wrong(sample: Sampled, answer: SampledAnswer, _: Settings) -> bool:
    return right(sample, answer.text) is False


def _has_length_fault(_: Sampled, answer: SampledAnswer, settings: Settings) -> bool:
    length = len(answer.text.strip())
    return length < max(settings.shortest, 1) or (settings.longest is not None and length > settings.longest)


def _has_format_fault(_: Sampled, answer: SampledAnswer, settings: Settings) -> bool:
    text = answer.text.strip()
    if settings.format is None:
        return False
    if settings.format != "json":
        return re.fullmatch(settings.format, text[:_LONGEST], re.DOTALL) is None
    fenced = _FENCE.fullmatch(text)
    try:
        return not isinstance(parse_json(fenced[1] if fenced else text), dict | list)
    except ValueError:
        return True


def _is_cut(_: Sampled, answer: SampledAnswer, __: Settings) -> bool:
    return answer.finish == "length"


def _of_quality(name: str) -> Test:
    """The rule of `corpus.quality` that has this name."""

    def has_fault(sample: Sampled, answer: SampledAnswer, _: Settings) -> bool:
        asked = (Message(m.role, m.content, trained=False) for m in sample.prompt)
        conversation = Conversation((*asked, Message("assistant", answer.text)), "")
        return name in faults_of(conversation, (name,))[0]

    return has_fault


_TESTS: dict[str, Test] = {
    "answer": _is_wrong,
    "language": _of_quality("language"),
    "length": _has_length_fault,
    "format": _has_format_fault,
    "repetition": _of_quality("repetition"),
    "truncated": _is_cut,
}
