"""Samples and judges for tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.samples import Sampled, SampledAnswer, prompt_id


def sampled(prompt: str, *texts: str, reference: str | None = None, cut: Sequence[int] = ()) -> Sampled:
    """A prompt with its answers; the answers with the numbers in `cut` ended at the most tokens."""
    messages = (Message("user", prompt),)
    finish = ["length" if index in cut else "stop" for index in range(len(texts))]
    answers = tuple(
        SampledAnswer(text, end, len(text), i) for i, (text, end) in enumerate(zip(texts, finish, strict=True))
    )  # type: ignore[arg-type]
    return Sampled(prompt_id(messages), messages, reference, answers)


def shown(messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """The two answers that a judge is shown, in their order."""
    text = messages[-1]["content"]
    mark = re.findall(r" ([0-9a-f]{12})>", text)[-1]  # of the last closing mark, which stands behind all answers
    first, second = re.findall(
        rf"<(?:回答|answer )[12] {mark}>\n(.*?)\n</(?:回答|answer )[12] {mark}>", text, re.DOTALL
    )
    return first, second


@dataclass
class FakeJudge:
    """A judge that decides by a function of the two answers in the order in which it is shown them."""

    decide: Callable[[str, str], str]
    name: str = "fake"
    asked: list[Sequence[Mapping[str, str]]] = field(default_factory=list)

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        self.asked.append(messages)
        return f"理由。\n判定：{self.decide(*shown(messages))}"


def prefers_longer(first: str, second: str) -> str:
    return "平" if len(first) == len(second) else "1" if len(first) > len(second) else "2"
