"""The token ids of a subject's prompts, and of the four letters (or options) after them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.render import Renderer
from mlx_zh.errors import TemplateError
from mlx_zh.exams.csvfile import LETTERS, Question
from mlx_zh.exams.exam import Exam, Subject
from mlx_zh.exams.protocols import Protocol

Ids = npt.NDArray[np.int32]
Letters = tuple[tuple[int, ...], ...]  # token ids of A, B, C and D, or of the options, as they would follow

# How many tokens before a letter can merge with it. Every prompt ends in `答案：` or `答案是：`, so these are enough.
_TAIL = 3


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model sees it."""

    tokens: Ids  # (T,)
    letters: Letters  # empty where the answer is written freely
    truncated: bool  # whether it did not fit, and examples or its beginning were left out


class Prompter:
    """Makes prompts of at most `max_length` tokens under one protocol.

    The ids of a letter are taken from the tokens of prompt and letter encoded together. Raises TemplateError where a
    token holds parts of both, or where a letter that must be one token is several.
    """

    def __init__(self, protocol: Protocol, tokenizer: Any, renderer: Renderer | None, max_length: int) -> None:
        self._protocol, self._tokenizer, self._max_length = protocol, tokenizer, max_length
        self._chat = renderer  # needed in chat style only
        self._letters_after: dict[tuple[int, ...], Letters] = {}  # by the last tokens of the prompt
        if renderer is not None and protocol.reply != "free":
            _require_no_thought(protocol, renderer)

    def subject(self, exam: Exam, subject: Subject) -> list[Prompt]:
        """The prompts of a subject's questions, in order."""
        name, questions = subject.entry.name, subject.questions
        if self._protocol.style == "text":  # the tokenizer is fastest with all texts together
            texts = [self._protocol.text(exam.form, name, subject.dev, question) for question in questions]
            whole = self._encoded(texts)
        else:
            whole = [self._encoders(exam.form, name, question)[0](subject.dev) for question in questions]
        return [
            self._fitting(exam.form, subject, question, tokens)
            for question, tokens in zip(questions, whole, strict=True)
        ]

    def _fitting(self, form: str, subject: Subject, question: Question, whole: list[int]) -> Prompt:
        """The prompt of one question, from its tokens with all worked examples."""
        shots, tokens = list(subject.dev), whole
        ask, answer = self._encoders(form, subject.entry.name, question)
        letters = self._letters(question, whole, lambda text: answer(shots, text))
        room = self._max_length - max(map(len, letters), default=1) + 1
        if self._protocol.overlong == "drop-shots":
            while len(tokens) > room and shots:
                # CMMLU's own rule (mp_utils.py, gen_prompt): the longest example goes first.
                shots.remove(max(shots, key=lambda shot: len(ask([shot]))))
                tokens = ask(shots)
        return Prompt(
            np.array(tokens[-room:], dtype=np.int32), letters, len(tokens) < len(whole) or len(tokens) > room
        )

    def _encoders(
        self, form: str, name: str, question: Question
    ) -> tuple[Callable[[Sequence[Question]], list[int]], Callable[[Sequence[Question], str], list[int]]]:
        """Two functions of the worked examples: the tokens of the prompt, and of prompt and letter together."""
        protocol, chat = self._protocol, self._chat
        if protocol.style == "text":
            return (
                lambda shots: self._encoded([protocol.text(form, name, shots, question)])[0],
                lambda shots, letter: self._encoded(
                    [protocol.text(form, name, shots, question) + protocol.continuation.format(answer=letter)]
                )[0],
            )
        assert chat is not None
        return (
            lambda shots: chat.prompt(protocol.messages(form, name, shots, question)),
            lambda shots, letter: _answered(chat, protocol.messages(form, name, shots, question), letter),
        )

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, verbose=False)["input_ids"] if texts else []
        return ids

    def _letters(self, question: Question, prompt: list[int], answer: Callable[[str], list[int]]) -> Letters:
        """Ids of the letters after `prompt`; `answer` gives the tokens of prompt and letter together.

        Prompts with the same last tokens have the same letters, so these are encoded once.
        """
        if self._protocol.reply == "free":
            return ()
        if self._protocol.reply == "options":
            return tuple(self._option(prompt, answer(text), text) for text in self._protocol.candidates(question))
        tail = tuple(prompt[-_TAIL:])
        if tail not in self._letters_after:
            self._letters_after[tail] = self._split(prompt, [answer(letter) for letter in LETTERS])
        return self._letters_after[tail]

    def _option(self, prompt: list[int], answered: list[int], option: str) -> tuple[int, ...]:
        """The tokens of an option after `prompt`, without those that close the turn."""
        rest = answered[len(prompt) :]
        if answered[: len(prompt)] == prompt:
            for end in range(1, len(rest) + 1):
                if self._tokenizer.decode(rest[:end]).strip() == option:
                    return tuple(rest[:end])
        raise self._error(f"its tokens do not separate the option {option!r} from what stands around it", "an option")

    def _split(self, prompt: list[int], answered: list[list[int]]) -> Letters:
        """What each of the four encodings has after the prompt."""
        if any(tokens[: len(prompt)] != prompt for tokens in answered):
            raise self._error("a token stands across the boundary between the prompt and the letter")
        rests = [tuple(tokens[len(prompt) :]) for tokens in answered]
        if self._protocol.style == "chat":  # what closes the turn follows the letter
            if len({rest[1:] for rest in rests}) > 1:
                raise self._error("a letter is not one token")
            rests = [rest[:1] for rest in rests]
        single = self._protocol.reply == "next-token"
        if any(not rest or (single and len(rest) > 1) for rest in rests) or len(set(rests)) < len(rests):
            raise self._error("a letter is not one token")
        for letter, rest in zip(LETTERS, rests, strict=True):
            if self._tokenizer.decode(list(rest)).strip(" ") != letter:
                raise self._error(f"the token after the prompt is {self._tokenizer.decode(list(rest))!r}")
        return tuple(rests)

    def _error(self, reason: str, scored: str = "a letter") -> TemplateError:
        return TemplateError(
            f"protocol {self._protocol.name} cannot be used with this model: {reason}, so the log-prob of {scored} "
            "is not defined. Choose another protocol (evaluate.protocol)."
        )


def _require_no_thought(protocol: Protocol, renderer: Renderer) -> None:
    """Raise TemplateError if the model thinks before it answers: then no letter follows the prompt."""
    if renderer.mode == "on" or renderer.thinks_first:
        raise TemplateError(
            f"protocol {protocol.name} reads the log-probs of an answer right after the prompt, and this model "
            "thinks before it answers. Set model.thinking: off if its chat template has this switch, or use "
            "evaluate.protocol: generate, where the model writes its answer"
        )


def _answered(chat: Renderer, messages: list[Message], letter: str) -> list[int]:
    rendered = chat.conversation([*messages, Message("assistant", letter)], train_on="last")
    assert rendered is not None  # only a length limit could drop it
    tokens: list[int] = rendered.tokens.tolist()
    return tokens
