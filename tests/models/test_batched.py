"""Several answers to many prompts together: the same as one by one, and drawn from the exact distribution."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step

from mlx_zh.models.batched import BatchedGeneration, Question
from mlx_zh.models.drawing import answer_seed, draw
from mlx_zh.models.generate import Sampling

GREEDY, WARM = Sampling(temperature=0.0), Sampling(temperature=1.2, top_p=0.9)
Tokens = list[int]


def chi_square_limit(freedom: int) -> float:
    """The value that chi-square exceeds once in 100,000 times (Wilson and Hilferty's approximation; z = 4.265)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 4.265 * np.sqrt(2 / (9 * freedom))) ** 3)


def prompts(count: int = 6, vocabulary: int = 300) -> list[Tokens]:
    """Prompts of different lengths, one of a single token and one longer than a chunk."""
    rng = random.Random(1)
    sizes = [1, 40, 3, 17, 8, 25][:count]
    return [[rng.randrange(vocabulary) for _ in range(size)] for size in sizes]


def questions(asked: Sequence[Tokens], count: int = 3, longest: int = 12) -> list[Question]:
    return [Question(p, [answer_seed(5, str(p), i) for i in range(count)], longest) for p in asked]


def answers(
    model: Any, asked: Sequence[Question], sampling: Sampling, rows: int, ends: Sequence[int] = (7,)
) -> dict[int, list[tuple[Tokens, str]]]:
    generation = BatchedGeneration(model, ends, sampling, rows=rows, chunk=16)
    return {n: [(reply.tokens, reply.finish) for reply in replies] for n, replies in generation.answers(asked)}


def alone(model: Any, question: Question, index: int, sampling: Sampling, ends: Sequence[int]) -> Tokens:
    """One answer by mlx-lm's own loop, with a cache of its own."""
    position = itertools.count()

    def sampler(logprobs: mx.array) -> mx.array:
        return draw(logprobs, sampling, [question.seeds[index]], [next(position)])

    tokens: Tokens = []
    for token, _ in generate_step(
        mx.array(list(question.tokens)), model, max_tokens=question.max_tokens, sampler=sampler
    ):
        tokens.append(int(token))
        if token in ends:
            break
    return tokens


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_every_answer_is_that_of_mlx_lm_alone(
    tiny_model: Callable[..., Any], family: str, sampling: Sampling
) -> None:
    model = tiny_model("llama" if family == "mistral" else family)
    asked = questions(prompts())
    ends = [7, *range(200, 230)]  # so that some answers end early, and others take their slots
    together = answers(model, asked, sampling, 4, ends)
    assert together.keys() == set(range(len(asked)))
    for number, question in enumerate(asked):
        for index, (tokens, finish) in enumerate(together[number]):
            assert tokens == alone(model, question, index, sampling, ends)
            assert finish == ("stop" if tokens[-1] in ends else "length")
            assert len(tokens) <= question.max_tokens
    finishes = Counter(finish for replies in together.values() for _, finish in replies)
    assert min(finishes.values()) > 2 or sampling is GREEDY


def test_sliding_windows_see_what_they_see_alone(tiny_model: Callable[..., Any]) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    model = tiny_model("llama", layer_types=kinds, sliding_window=6)
    asked = questions(prompts())
    together = answers(model, asked, WARM, 5)
    for number, question in enumerate(asked):
        for index, (tokens, _) in enumerate(together[number]):
            assert tokens == alone(model, question, index, WARM, [7])


@pytest.mark.parametrize("rows", range(2, 9))
def test_the_number_of_rows_changes_nothing(tiny_model: Callable[..., Any], rows: int) -> None:
    model, ends = tiny_model("qwen3"), list(range(250, 270))
    asked = questions(prompts(), longest=20)
    assert answers(model, asked, WARM, rows, ends) == answers(model, asked, WARM, 1, ends)


@settings(max_examples=8)
@given(order=st.permutations(range(6)), kept=st.integers(1, 6), rows=st.integers(1, 9), fixed=st.booleans())
def test_neither_order_nor_company_changes_an_answer(
    tiny_model: Callable[..., Any], order: list[int], kept: int, rows: int, fixed: bool
) -> None:
    """`fixed`: the shape stays to the end, as on an accelerator."""
    model, ends = tiny_model("llama"), list(range(250, 270))
    asked = questions(prompts())
    whole = answers(model, asked, WARM, 4, ends)
    with pytest.MonkeyPatch.context() as patch:
        if fixed:
            patch.setattr("mlx_zh.models.batched.device.is_cpu", lambda: False)
        some = answers(model, [asked[i] for i in order[:kept]], WARM, rows, ends)
    assert some == {place: whole[number] for place, number in enumerate(order[:kept])}


def test_answers_have_limits_of_their_own(tiny_model: Callable[..., Any]) -> None:
    asked = [Question(p, [1, 2], longest) for p, longest in zip(prompts(4), (1, 9, 2, 5), strict=True)]
    found = answers(tiny_model("llama"), asked, GREEDY, 3, ends=[])
    assert {n: [len(tokens) for tokens, _ in replies] for n, replies in found.items()} == {
        0: [1, 1],
        1: [9, 9],
        2: [2, 2],
        3: [5, 5],
    }


def test_a_prompt_is_computed_once_for_all_its_answers(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    kind, computed = type(model), []

    def counting(self: Any, inputs: mx.array, cache: Any = None, _call: Any = kind.__call__) -> Any:
        computed.append(inputs.shape)
        return _call(self, inputs, cache)

    monkeypatch.setattr(kind, "__call__", counting)
    answers(model, questions([list(range(10, 50))], count=5, longest=4), WARM, 2)
    prompt = [shape for shape in computed if shape[0] == 1 and shape[1] > 1]
    assert sum(shape[1] for shape in prompt) == 39  # the last token is computed by itself, for the logits


def exact(model: Any, prompt: Tokens, sampling: Sampling) -> dict[tuple[int, int], float]:
    """The probability of every answer of two tokens, by the model's logits and the definition of the nucleus."""

    def distribution(tokens: Tokens) -> np.ndarray:
        logits = np.array(model(mx.array([tokens])), dtype=np.float64)[0, -1]
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        falling = np.argsort(-probs)
        before = np.cumsum(probs[falling]) - probs[falling]
        kept = falling[before < sampling.top_p]
        warmed = np.zeros_like(probs)
        warmed[kept] = probs[kept] ** (1 / sampling.temperature)
        return np.asarray(warmed / warmed.sum())

    first = distribution(prompt)
    return {
        (a, b): first[a] * p
        for a in np.flatnonzero(first)
        for b, p in enumerate(distribution([*prompt, int(a)]))
        if p
    }


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1.0), Sampling(0.7, 0.8), Sampling(2.0, 0.95)], ids=str)
def test_answers_have_the_exact_probabilities(tiny_model: Callable[..., Any], sampling: Sampling) -> None:
    model, prompt, count = tiny_model("llama", vocabulary=10), [1, 5, 3], 6000
    question = Question(prompt, [answer_seed(0, "p", i) for i in range(count)], 2)
    [replies] = answers(model, [question], sampling, 500, ends=[]).values()
    drawn = Counter((tokens[0], tokens[1]) for tokens, _ in replies)
    expected = exact(model, prompt, sampling)
    assert drawn.keys() <= expected.keys()  # nothing from outside the nucleus
    common = {pair: p * count for pair, p in expected.items() if p * count >= 5}
    rest = count - sum(common.values())
    value = sum((drawn[pair] - mean) ** 2 / mean for pair, mean in common.items())
    if rest >= 5:
        value += (sum(drawn.values()) - sum(drawn[pair] for pair in common) - rest) ** 2 / rest
    assert len(common) > 4
    assert value < chi_square_limit(len(common) - (rest < 5))


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.999))
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_reach_top_p(seed: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=40, scale=2).astype(np.float32)
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum()
    falling = np.argsort(-probs)
    before = np.cumsum(probs[falling]) - probs[falling]
    if np.abs(before - top_p).min() < 1e-5:  # where float32 decides
        return
    nucleus = set(falling[before < top_p].tolist())
    found = draw(mx.broadcast_to(mx.array(logits), (400, 40)), Sampling(50.0, top_p), range(400), [0] * 400)
    assert set(np.array(found).tolist()) <= nucleus
    assert len(nucleus) > 8 or set(np.array(found).tolist()) == nucleus  # at this temperature all are drawn


def test_one_number_of_the_seed_or_the_position_changes_the_token() -> None:
    logits = mx.zeros((3, 5000))
    seeds, positions = [9, 9, 10], [0, 1, 0]
    together = np.array(draw(logits, Sampling(1.0, 1.0), seeds, positions)).tolist()
    single = [int(draw(logits[:1], Sampling(1.0, 1.0), [s], [p])[0]) for s, p in zip(seeds, positions, strict=True)]
    assert together == single
    assert len(set(together)) == 3
    assert len({answer_seed(s, p, i) for s in (1, 2) for p in ("a", "b") for i in range(3)}) == 12


def test_metal_computes_the_same(metal: Any, tiny_model: Callable[..., Any]) -> None:
    """With the rules of Metal, and its way to sort."""
    model = tiny_model("llama")
    asked = questions(prompts())
    assert answers(model, asked, WARM, 4) == {
        number: [
            (tokens, "stop" if tokens[-1] == 7 else "length")
            for tokens in (alone(model, question, index, WARM, [7]) for index in range(3))
        ]
        for number, question in enumerate(asked)
    }
