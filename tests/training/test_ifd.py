"""IFD from one packed tree, against separate full forwards of mlx-lm's own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_zh.training.ifd import WIDTH, IfdScores, Replies, ifd, losses, pack_replies
from mlx_zh.training.stored_values import StoredValues


def own_loss(model: Any, tokens: np.ndarray, spans: Any) -> float:
    """Minus the log-probs of the tokens in the spans, by the model's own forward."""
    logits = model(mx.array(tokens.tolist())[None])[0].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True), np.float64)
    return -sum(logprobs[i - 1, int(tokens[i])] for start, stop in spans for i in range(start, stop))


def own_ifd(model: Any, row: Replies) -> float:
    alone = 0.0
    for start, stop in row.spans:
        before = row.opening if len(row.opening) else row.tokens[start - 1 : start]
        tokens = np.concatenate([before, row.tokens[start:stop]])
        alone += own_loss(model, tokens, [(len(before), len(tokens))])
    return own_loss(model, row.tokens, row.spans) / alone


def conversation(rng: np.random.Generator, *replies: tuple[int, int], opening: list[int]) -> Replies:
    """A row that begins as `opening` does, with replies of (tokens before it, tokens)."""
    trained: list[bool] = []
    for before, size in replies:
        trained += [False] * before + [True] * size
    tokens = rng.integers(10, 300, size=len(trained))
    tokens[: min(len(opening), 2)] = opening[:2]
    row = Replies.of(tokens.astype(np.int32), np.array(trained), opening)
    assert row is not None
    return row


@pytest.mark.parametrize("opening", [[1, 2, 3], [1], []])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scores_equal_two_full_forwards(tiny_model: Callable[..., Any], family: str, opening: list[int]):
    model, rng = tiny_model(family), np.random.default_rng(0)
    shapes = [((9, 12),), ((4, 2),), ((5, 20), (7, 3)), ((3, 8), (1, 2), (6, 30))]
    rows = [conversation(rng, *shape, opening=opening) for shape in shapes]
    packed = ifd(losses(model, rows))
    expected = [own_ifd(model, row) for row in rows]
    assert np.abs(packed - expected).max() < 1e-4, (packed, expected)


@pytest.mark.network
def test_scores_of_the_small_real_model(smollm2_path: Path):
    from mlx_zh.corpus.conversation import Message
    from mlx_zh.corpus.render import Renderer
    from mlx_zh.models.load import load_model

    loaded = load_model(str(smollm2_path))
    renderer = Renderer(loaded.tokenizer)
    assert renderer.decode(renderer.opening()) == "<|im_start|>assistant\n"
    said = [("What is the capital of France?", "The capital of France is Paris."), ("你好", "你好！很高兴认识你。")]
    examples = [renderer.conversation([Message("user", a), Message("assistant", b)]) for a, b in said]
    rows = [Replies.of(e.tokens, e.trained, renderer.opening()) for e in examples if e is not None]
    values = ifd(losses(loaded.model, rows))
    assert np.abs(values - [own_ifd(loaded.model, row) for row in rows]).max() < 1e-4
    assert values[0] < 0.8  # its question tells most of this answer


def test_a_tree_holds_what_both_begin_with_once():
    """Both begin with 1, 2; the tree has 2 + 6 tokens of the conversation, and 3, 21, 22 of the reply alone."""
    tokens = np.array([1, 2, 11, 12, 1, 2, 21, 22], np.int32)
    row = Replies.of(tokens, np.array([False] * 6 + [True] * 2), [1, 2, 3])
    assert row is not None and row.shared == 2 and row.size == 11
    batch = pack_replies([row])
    assert batch.tokens.tolist() == [1, 2, 11, 12, 1, 2, 21, 22, 3, 21, 22]
    assert batch.targets.tolist() == [21, 22, 21, 22] and batch.owner.tolist() == [0, 0, 1, 1]


def test_rows_that_cannot_be_scored_both_ways():
    nothing = np.zeros(4, dtype=bool)
    assert Replies.of(np.arange(4, dtype=np.int32), nothing, [1]) is None
    one_token = np.array([False, False, False, True])
    assert Replies.of(np.arange(4, dtype=np.int32), one_token, []) is None


def test_scores_are_found_again_and_a_killed_pass_goes_on(tiny_model: Callable[..., Any], tmp_path: Path):
    model, rng = tiny_model(), np.random.default_rng(1)
    rows = [conversation(rng, (4, 5), opening=[1, 2]) for _ in range(6)]
    store = StoredValues(tmp_path / "scores.txt", WIDTH)
    first = IfdScores(store)
    assert len(first.missing([*rows[:4], rows[0], None])) == 4
    assert sum(first.compute(model, rows[:4], row_tokens=40)) == sum(row.size for row in rows[:4])
    values = first.ifd([*rows[:4], None])
    assert np.isfinite(values[:4]).all() and np.isnan(values[4])

    with store.path.open("ab") as file:
        file.write(rows[4].digest().encode() + b" 3f80")  # a line that a kill cut short
    again = IfdScores(store)
    assert again.missing(rows) == rows[4:]
    assert (again.ifd(rows[:4]) == values[:4]).all()
    list(again.compute(model, again.missing(rows), row_tokens=1000))
    assert IfdScores(store).missing(rows) == []


def test_other_tokens_openings_or_spans_are_other_rows():
    tokens, trained = np.arange(8, dtype=np.int32), np.array([False] * 4 + [True] * 4)
    rows = [
        Replies.of(tokens, trained, [1]),
        Replies.of(tokens, trained, [2]),
        Replies.of(tokens + 1, trained, [1]),
        Replies.of(tokens, np.array([False] * 5 + [True] * 3), [1]),
    ]
    assert len({row.digest() for row in rows if row is not None}) == 4
