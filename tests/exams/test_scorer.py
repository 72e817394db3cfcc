"""Invariant 8: by shared prefix, a question gets the log-probs that it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from oracles import log_softmax
from tolerances import HIDDEN, LOGPROBS, ONE_LOGPROB

from mlx_zh.core.logprobs import hidden_states, prefill
from mlx_zh.core.packing import RowBuilder
from mlx_zh.exams.exam import load_exam
from mlx_zh.exams.prompts import Prompt, Prompter
from mlx_zh.exams.protocols import protocols
from mlx_zh.exams.scorer import common_prefix, letter_logprobs
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec

LETTERS = ((17,), (23,), (29,), (31,))
LONG = ((17,), (23, 5, 5), (23, 5, 9), (31, 2))  # as some tokenizers write " A"
OPTIONS = ((17, 4, 9, 9, 3, 8, 2), (23,), (29, 5), (17, 4, 9, 9, 3, 8, 1))


def prompts(lengths: list[int], shared: int, letters: Any = LETTERS, truncated: tuple[int, ...] = ()) -> list[Prompt]:
    rng = np.random.default_rng(1)
    prefix = rng.integers(0, 300, shared)
    return [
        Prompt(
            np.concatenate([prefix[number in truncated :], rng.integers(0, 300, length)]).astype(np.int32),
            letters,
            number in truncated,
        )
        for number, length in enumerate(lengths)
    ]


def alone(model: Any, prompt: Prompt) -> list[float]:
    """The model's own forward on one prompt at a time, and one letter where letters are longer than a token."""
    if all(len(letter) == 1 for letter in prompt.letters):
        logprobs = nn.log_softmax(model(mx.array(prompt.tokens)[None])[0, -1].astype(mx.float32))
        return [logprobs[letter[0]].item() for letter in prompt.letters]
    scores = []
    for letter in prompt.letters:
        tokens = [*prompt.tokens.tolist(), *letter]
        logprobs = nn.log_softmax(model(mx.array([tokens[:-1]]))[0].astype(mx.float32))
        first = len(prompt.tokens) - 1
        scores.append(sum(logprobs[first + k, token].item() for k, token in enumerate(letter)))
    return scores


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_as_one_question_at_a_time(tiny_model: Callable[..., Any], family: str):
    model = tiny_model(family)
    asked = prompts([9, 1, 14, 5, 30], shared=40)
    expected = np.array([alone(model, prompt) for prompt in asked])
    found = letter_logprobs(model, asked, micro_tokens=64)
    np.testing.assert_allclose(found, expected, rtol=LOGPROBS, atol=ONE_LOGPROB)
    assert (found.argmax(1) == expected.argmax(1)).all()


@pytest.mark.numeric
@pytest.mark.parametrize("micro_tokens", [1, 7, 33, 4096])
@pytest.mark.parametrize("letters", [LETTERS, LONG, OPTIONS])
def test_memory_settings_change_nothing(tiny_model: Callable[..., Any], micro_tokens: int, letters: Any):
    # Prefixes and single questions longer than micro_tokens are computed in pieces.
    model = tiny_model()
    asked = prompts([9, 21, 3, 8], shared=25, letters=letters, truncated=(1, 3))
    expected = np.array([alone(model, prompt) for prompt in asked])
    heard: list[int] = []
    found = letter_logprobs(model, asked, micro_tokens=micro_tokens, report=heard.append)
    np.testing.assert_allclose(found, expected, rtol=LOGPROBS, atol=ONE_LOGPROB)
    assert sum(heard) == len(asked)


@pytest.mark.numeric
def test_with_an_adapter_and_quantized_weights(tiny_model: Callable[..., Any]):
    model = tiny_model("qwen2", tied=True, quantized=8)
    add_adapter(model, AdapterSpec("lora", num_layers=3, rank=4), seed=3)
    rng = np.random.default_rng(0)
    model.load_weights(
        [(name, mx.array(rng.normal(size=a.shape, scale=0.1))) for name, a in trainable(model).items()], strict=False
    )
    asked = prompts([6, 11, 4], shared=20)
    expected = np.array([alone(model, prompt) for prompt in asked])
    found = letter_logprobs(model, asked, micro_tokens=32)
    np.testing.assert_allclose(found, expected, rtol=LOGPROBS, atol=ONE_LOGPROB)


@pytest.mark.numeric
def test_one_question_and_no_common_beginning(tiny_model: Callable[..., Any]):
    model = tiny_model()
    for asked in (prompts([12], shared=0), prompts([5, 7], shared=0), prompts([1], shared=0)):
        expected = np.array([alone(model, prompt) for prompt in asked])
        found = letter_logprobs(model, asked, micro_tokens=8)
        np.testing.assert_allclose(found, expected, rtol=LOGPROBS, atol=ONE_LOGPROB)
    assert letter_logprobs(model, [], micro_tokens=8).shape == (0, 4)


def test_a_common_prefix_leaves_a_token_of_every_prompt():
    rows = [np.array(row, dtype=np.int32) for row in ([1, 2, 3, 4], [1, 2, 3], [1, 2, 5, 6, 7])]
    assert common_prefix(rows) == 2
    assert common_prefix(rows[:2]) == 2  # not 3: nothing of the second would be left
    assert common_prefix(rows[:1]) == 3
    assert common_prefix([rows[0], rows[0] + 1]) == 0


@pytest.mark.numeric
def test_every_root_continues_a_prefix_and_branches_their_parent(tiny_model: Callable[..., Any]):
    model = tiny_model(tied=True)
    rng = np.random.default_rng(2)
    prefix, first, second, branch = (rng.integers(0, 300, n).tolist() for n in (13, 5, 4, 3))
    row = RowBuilder()
    row.add(first)
    row.add(branch, parent=row.add(second))
    batch = row.build(0)
    found = hidden_states(model, batch, prefix=prefill(model, prefix, chunk=5))
    for tokens, start in (([*prefix, *first], 0), ([*prefix, *second, *branch], 5)):
        own = model.model(mx.array([tokens]))[0][len(prefix) :]
        part = found[start : start + len(own)]
        np.testing.assert_allclose(np.array(part), np.array(own), atol=HIDDEN, rtol=0)
    with pytest.raises(ValueError, match="at least one token"):
        prefill(model, [], chunk=5)


@pytest.mark.slow
@pytest.mark.network
def test_on_a_real_model(smollm2_path: Path):
    from mlx_zh.models.load import load_model

    loaded = load_model(str(smollm2_path))
    folder = Path(__file__).resolve().parents[2] / "data" / "quickstart" / "exam"
    exam = load_exam(folder, split=None, shots=1).limited(3)
    prompter = Prompter(protocols()["lm-eval"], loaded.tokenizer, None, 8192)
    asked = prompter.subject(exam, exam.subjects[0])
    # In float64: MLX's own log-softmax over 49,152 words is 2e-4 too high here.
    logits = [np.array(loaded.model(mx.array(prompt.tokens)[None])[0, -1].astype(mx.float32)) for prompt in asked]
    expected = np.array([log_softmax(row)[[x[0] for x in p.letters]] for row, p in zip(logits, asked, strict=True)])
    found = letter_logprobs(loaded.model, asked, micro_tokens=128)
    assert np.abs(found - expected).max() < 2e-5
    assert (found.argmax(1) == expected.argmax(1)).all()
