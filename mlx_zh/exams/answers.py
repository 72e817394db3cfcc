"""A model's answer to a question, and a model that answers all questions of a subject."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn

from mlx_zh.exams.csvfile import LETTERS
from mlx_zh.exams.exam import Exam, Subject
from mlx_zh.exams.prompts import Prompt, Prompter
from mlx_zh.exams.protocols import Protocol
from mlx_zh.exams.scorer import Report, letter_logprobs
from mlx_zh.models.generate import GenerationSession, Sampling
from mlx_zh.system.forms import fits

_PREFILL = 512  # tokens of a prompt that are computed at once before a free answer

VERSION = 1  # raise it when the same prompts would give other answers


@dataclass(frozen=True, slots=True)
class Answer:
    """A line of the result file: the question, what the model chose, and how sure it was."""

    subject: str
    id: str  # of the question
    truth: str | None  # the right letter; None where it is not known
    choice: str | None  # the model's letter; None where a free answer gives none
    logprobs: tuple[float, ...] | None  # of A, B, C and D, or of the options a character; None for a free answer
    mass: float | None  # probability of the four letters together; None where no letters are scored
    tokens: int  # of the prompt
    truncated: bool  # whether the prompt did not fit and was cut
    text: str | None = None  # a free answer

    @property
    def correct(self) -> bool:
        """Whether the choice is the right letter; an answer without a letter is wrong."""
        return self.choice is not None and self.choice == self.truth

    def as_dict(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Answer:
        """The inverse of `as_dict`. Raises TypeError where the fields are not those of an answer."""
        if not fits(fields, Answer):
            raise TypeError("no answer")
        logprobs = fields["logprobs"]
        return Answer(**{**fields, "logprobs": None if logprobs is None else tuple(logprobs)})


@dataclass(frozen=True)
class Examinee:
    """A model, and how it is asked."""

    model: nn.Module
    tokenizer: Any
    eos_token_ids: Collection[int]
    protocol: Protocol
    prompter: Prompter
    micro_tokens: int  # tokens computed together
    max_new_tokens: int  # of a free answer

    def answer(self, exam: Exam, subject: Subject, report: Report = lambda _: None) -> list[Answer]:
        """The answers to a subject's questions, in order; `report` gets the number of questions just answered."""
        prompts = self.prompter.subject(exam, subject)
        if self.protocol.reply == "free":
            return self._answer_freely(subject, prompts, report)
        scores = letter_logprobs(self.model, prompts, micro_tokens=self.micro_tokens, report=report)
        by_text = self.protocol.reply == "options"
        answers = []
        for question, prompt, row in zip(subject.questions, prompts, scores, strict=True):
            if by_text:
                row = row / [len(text) for text in self.protocol.candidates(question)]
            logprobs = tuple(round(float(value), 6) for value in row)
            choice = LETTERS[int(row.argmax())]  # of equal letters the first, as in the benchmarks' code
            mass = None if by_text else round(sum(math.exp(value) for value in logprobs), 6)
            answers.append(
                Answer(
                    subject.key,
                    question.id,
                    question.answer,
                    choice,
                    logprobs,
                    mass,
                    len(prompt.tokens),
                    prompt.truncated,
                )
            )
        return answers

    def _answer_freely(self, subject: Subject, prompts: Sequence[Prompt], report: Report) -> list[Answer]:
        """Answers that the model writes, decoded greedily."""
        chunk = min(self.micro_tokens, _PREFILL)
        session = GenerationSession(self.model, self.tokenizer, self.eos_token_ids, chunk)
        sampling = Sampling(temperature=0.0, max_tokens=self.max_new_tokens)
        answers = []
        for question, prompt in zip(subject.questions, prompts, strict=True):
            text = "".join(session.stream(prompt.tokens.tolist(), sampling)).strip()
            choice = self.protocol.letter_in(text, question.options)
            size = len(prompt.tokens)
            answers.append(
                Answer(subject.key, question.id, question.answer, choice, None, None, size, prompt.truncated, text)
            )
            report(1)
        return answers
