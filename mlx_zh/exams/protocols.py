"""How a question becomes a prompt and how the answer is read off: data with a version, in protocols.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from mlx_zh.corpus.conversation import Message
from mlx_zh.exams.csvfile import LETTERS, Question
from mlx_zh.exams.free_answers import free_answer_letter, free_answer_rules
from mlx_zh.system.digests import text_digest


@dataclass(frozen=True, slots=True)
class Form:
    """The texts of one benchmark under one protocol; the head of protocols.yaml explains each."""

    header: str
    question: str
    answer: str
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Protocol:
    """How questions are asked and answers read; the head of protocols.yaml explains each field."""

    name: str
    version: int
    source: str
    style: str
    reply: str
    shots: int
    overlong: str
    forms: Mapping[str, Form]  # of C-Eval and of CMMLU
    continuation: str = "{answer}"
    strip: bool = False
    extract: tuple[str, ...] = ()  # all that decides how a free answer is read

    def fingerprint(self) -> str:
        """A digest of everything that can change an answer."""
        state = {name: value for name, value in asdict(self).items() if name != "source"}
        return text_digest(repr(state))[:16]

    def text(self, form: str, subject: str, shots: Sequence[Question], question: Question) -> str:
        """The prompt in text style: header, worked examples, question."""
        texts = self.forms[form]
        shown = [self._question(texts, shot) + texts.answer.format(answer=shot.answer) for shot in shots]
        return texts.header.format(subject=subject) + "".join(shown) + self._question(texts, question)

    def messages(self, form: str, subject: str, shots: Sequence[Question], question: Question) -> list[Message]:
        """The prompt in chat style: worked examples as turns, then the question as the last user message."""
        texts = self.forms[form]
        messages = [] if texts.system is None else [Message("system", texts.system.format(subject=subject))]
        header = texts.header.format(subject=subject)
        for number, asked in enumerate((*shots, question)):
            messages.append(Message("user", (header if number == 0 else "") + self._question(texts, asked)))
            if number < len(shots):
                messages.append(Message("assistant", texts.answer.format(answer=self._shown(asked))))
        return messages

    def candidates(self, question: Question) -> tuple[str, ...]:
        """The four texts that are scored as answers: the options' texts, or the letters."""
        return tuple(option.strip() for option in question.options) if self.reply == "options" else LETTERS

    def _shown(self, shot: Question) -> str:
        """The answer of a worked example."""
        assert shot.answer is not None  # worked examples have answers
        return self.candidates(shot)[LETTERS.index(shot.answer)]

    def letter_in(self, answer: str, options: Sequence[str] = ()) -> str | None:
        """The letter that a free answer to a question with these options gives; None where it gives none."""
        return free_answer_letter(answer, options)

    def _question(self, texts: Form, question: Question) -> str:
        options = dict(zip(LETTERS, question.options, strict=True))
        text = question.text.strip() if self.strip else question.text
        return texts.question.format(question=text, **options)


@cache
def protocols() -> Mapping[str, Protocol]:
    """Every protocol by name."""
    data: dict[str, dict[str, Any]] = yaml.safe_load(
        files(__package__).joinpath("protocols.yaml").read_text(encoding="utf-8")
    )
    by_name = {}
    for name, fields in data.items():
        forms = {form: Form(**texts) for form, texts in fields.pop("forms").items()}
        free = fields["reply"] == "free"
        extract = tuple(rule.text for rule in free_answer_rules().all()) if free else ()
        by_name[name] = Protocol(name=name, forms=forms, extract=extract, **fields)
    return by_name
