"""A judge model that compares two answers, each pair in both orders; its prompts are in judge.yaml."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, Protocol

import yaml

from mlx_zh.corpus.conversation import Message
from mlx_zh.exams.statistics import Interval, wilson
from mlx_zh.system.digests import value_digest

Verdict = Literal["1", "2", "tie"]
_HAN = re.compile(r"[\u3400-\u9fff]")
_THINKING = re.compile(
    r"\A.*</(?:think|thinking|reasoning)>|<(?:think|thinking|reasoning)>.*\Z", re.DOTALL | re.IGNORECASE
)
_EMPHASIS = re.compile(r"[*_`#]+")


class Judge(Protocol):
    """A model that is asked which answer is better."""

    @property
    def name(self) -> str:
        """What it is called, for messages and records."""

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Its reply to messages. Raises JudgeError."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers, by their numbers, and what the judge said of them in both orders.

    `verdicts` are those for (first, second) and for (second, first); None where the judge's last line is no verdict.
    """

    first: int
    second: int
    verdicts: tuple[Verdict | None, Verdict | None]

    @property
    def winner(self) -> int | None:
        """The better answer, where both orders agree on it; else None, which is a tie."""
        chosen = {self._chosen(order) for order in (0, 1)}
        return chosen.pop() if len(chosen) == 1 else None

    def _chosen(self, order: int) -> int | None:
        shown = (self.first, self.second) if order == 0 else (self.second, self.first)
        verdict = self.verdicts[order]
        return None if verdict in (None, "tie") else shown[0] if verdict == "1" else shown[1]


@dataclass(frozen=True, slots=True)
class Bias:
    """How much a judge favours a position: of `decided` questions that it answered with 1 or 2, `first` with 1.

    Of `comparisons` that it decided in both orders, it contradicted itself in `contradicted`. `unread` replies had no
    verdict in their last line, of `asked`.
    """

    asked: int
    decided: int
    first: int
    comparisons: int
    contradicted: int
    unread: int

    @staticmethod
    def of(compared: Iterable[Comparison]) -> Bias:
        """The counts over comparisons."""
        pairs = [comparison.verdicts for comparison in compared]
        said = [verdict for pair in pairs for verdict in pair]
        both = [pair for pair in pairs if set(pair) <= {"1", "2"}]
        # The same position in both orders is another answer each time.
        contradicted = sum(one == other for one, other in both)
        decided = [verdict for verdict in said if verdict in ("1", "2")]
        return Bias(len(said), len(decided), decided.count("1"), len(both), contradicted, said.count(None))

    @property
    def interval(self) -> Interval:
        """The 95 % interval of the share of 1; a judge without bias has 0.5."""
        return wilson(self.first, self.decided)


def compare(judge: Judge, prompt: Sequence[Message], reference: str | None, texts: Sequence[str]) -> Comparison:
    """Ask for two answers in both orders. Raises JudgeError."""
    said = [judge.ask(question(prompt, reference, *shown)) for shown in (texts, texts[::-1])]
    return Comparison(0, 1, (verdict(said[0]), verdict(said[1])))


def question(prompt: Sequence[Message], reference: str | None, first: str, second: str) -> list[dict[str, str]]:
    """What the judge is asked about two answers, as messages of an API."""
    table = _table()
    words: Mapping[str, str] = table["zh" if _HAN.search(prompt[-1].content + first + second) else "en"]
    conversation = "\n\n".join(f"{message.role}: {message.content}" for message in prompt)
    # Of the texts, and the same for both orders. No text can hold a digest that is made of it.
    mark = value_digest([conversation, reference, *sorted((first, second))])[:12]
    values = {"conversation": conversation, "reference": reference, "first": first, "second": second, "mark": mark}
    parts = ["conversation", *([] if reference is None else ["reference"]), "answers", "task"]
    # Not str.format, because texts may hold braces; in one pass, so that no text is filled in twice.
    text = re.sub(r"\{(\w+)\}", lambda match: str(values[match[1]]), "\n\n".join(words[part] for part in parts))
    return [{"role": "system", "content": words["system"]}, {"role": "user", "content": text}]


def verdict(reply: str) -> Verdict | None:
    """The verdict in the last line of a judge's reply; None where that line is anything else."""
    lines = [line for line in _THINKING.sub("", reply).splitlines() if line.strip()]
    if not lines:
        return None
    line = _EMPHASIS.sub("", unicodedata.normalize("NFKC", lines[-1])).strip()
    match = re.fullmatch(_table()["verdict"], line, re.IGNORECASE)
    if match is None:
        return None
    return "tie" if match["tie"] else "1" if match["choice"] == "1" else "2"


def key(judge: str) -> str:
    """A digest of what decides a judge's verdicts: its name and the wording. 16 hex digits."""
    return value_digest([judge, _table()])[:16]


@cache
def _table() -> dict[str, Any]:
    """The contents of judge.yaml."""
    text = files(__package__).joinpath("judge.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    return table


def examples() -> dict[str, str]:
    """Replies of judge.yaml and the verdict that is read from each, "none" for none."""
    found: dict[str, str] = _table()["examples"]
    return found
