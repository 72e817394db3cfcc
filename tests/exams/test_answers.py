"""What a model chooses, from the log-probs of letters and of options."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_prompts import EXAM

from mlx_zh.corpus.render import Renderer
from mlx_zh.exams import answers
from mlx_zh.exams.answers import Examinee
from mlx_zh.exams.catalog import Entry
from mlx_zh.exams.csvfile import Question
from mlx_zh.exams.exam import Subject
from mlx_zh.exams.prompts import Prompter
from mlx_zh.exams.protocols import protocols

SUBJECT = Subject("s", Entry("自然"), (), (Question("0", "甲", ("河", "红茶和米酒", "小 河", "山"), "A"),))


@pytest.mark.parametrize(
    ("protocol", "choice", "logprobs"),
    [
        ("zero-shot-chat", "A", (-3.0, -5.0, -6.0, -7.0)),
        ("cloze", "B", (-3.0, -1.0, -2.0, -7.0)),  # divided by 1, 5, 3 and 1 characters
    ],
)
def test_options_are_compared_by_character(
    byte_tokenizer: Any, monkeypatch, protocol: str, choice: str, logprobs: tuple[float, ...]
):
    monkeypatch.setattr(answers, "letter_logprobs", lambda *_, **__: np.array([[-3.0, -5.0, -6.0, -7.0]]))
    prompter = Prompter(protocols()[protocol], byte_tokenizer, Renderer(byte_tokenizer), 10**6)
    examinee = Examinee(None, byte_tokenizer, (), protocols()[protocol], prompter, 64, 8)  # type: ignore[arg-type]
    (answer,) = examinee.answer(EXAM, SUBJECT)
    assert (answer.choice, answer.logprobs) == (choice, logprobs)
    assert (answer.mass is None) == (protocol == "cloze")
