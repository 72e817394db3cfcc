"""How a question becomes a prompt and how the answer is read off: data with a version, in protocols.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mlx_zh.corpus.conversation import Message
from mlx_zh.exams.csvfile import LETTERS, Question
from mlx_zh.system.digests import text_digest


@dataclass(frozen=True, slots=True)
class Form:
    """The words of one benchmark under one protocol; see the head of protocols.yaml."""

    header: str
    question: str
    answer: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Protocol:
    """A protocol; see the head of protocols.yaml."""

    name: str
    version: int
    source: str
    style: str
    reply: str
    shots: int
    overlong: str
    forms: Mapping[str, Form]
    continuation: str = "{answer}"
    strip: bool = False
    extract: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """A digest of everything that can change an answer."""
        state = {name: value for name, value in asdict(self).items() if name != "source"}
        return text_digest(repr(state))[:16]

    def text(self, form: str, subject: str, shots: Sequence[Question], question: Question) -> str:
        """The prompt of a protocol in text style."""
        words = self.forms[form]
        shown = [self._asked(words, shot) + words.answer.format(answer=shot.answer) for shot in shots]
        return words.header.format(subject=subject) + "".join(shown) + self._asked(words, question)

    def messages(self, form: str, subject: str, shots: Sequence[Question], question: Question) -> list[Message]:
        """The prompt of a protocol in chat style: worked examples as turns, ending with the user's question."""
        words = self.forms[form]
        messages = [] if words.system is None else [Message("system", words.system.format(subject=subject))]
        header = words.header.format(subject=subject)
        for number, asked in enumerate((*shots, question)):
            messages.append(Message("user", (header if number == 0 else "") + self._asked(words, asked)))
            if number < len(shots):
                messages.append(Message("assistant", words.answer.format(answer=asked.answer)))
        return messages

    def letter_in(self, answer: str) -> str | None:
        """The letter that a free answer gives, or None: then it is wrong."""
        answer = answer.strip()
        for rule in self.extract:
            if found := re.findall(rule, answer):
                return str(found[-1])
        return None

    def _asked(self, words: Form, question: Question) -> str:
        options = dict(zip(LETTERS, question.options, strict=True))
        text = question.text.strip() if self.strip else question.text
        return words.question.format(question=text, **options)


@cache
def protocols() -> Mapping[str, Protocol]:
    """Every protocol by name."""
    data: dict[str, dict[str, Any]] = yaml.safe_load(
        files(__package__).joinpath("protocols.yaml").read_text(encoding="utf-8")
    )
    found = {}
    for name, fields in data.items():
        forms = {form: Form(**words) for form, words in fields.pop("forms").items()}
        extract = tuple(fields.pop("extract", ()))
        found[name] = Protocol(name=name, forms=forms, extract=extract, **fields)
    return found
