"""Invariants 1 and 3: what a packed row is, and that the model sees in it what it would see sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles import LLAMA3_ROPE, distance, following_logprobs, gradients, own_logprobs, random_tokens
from tolerances import GRADIENT, HIDDEN, LOGPROBS, ONE_LOGPROB

from mlx_zh.core.logprobs import batch_logprobs, hidden_states, sequence_logprobs, sum_by_owner
from mlx_zh.core.packing import PackedBatch, RowBuilder, pack_choices, pack_conversations, pack_pairs, plan_rows
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.training.step import set_weights

pytestmark = pytest.mark.numeric

MODELS = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tied": True},
    "llama-rope": {"family": "llama", "rope_scaling": LLAMA3_ROPE},
    "llama-4bit-tied-rope": {"family": "llama", "tied": True, "rope_scaling": LLAMA3_ROPE, "quantized": 4},
    "llama-biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"family": "mistral"},
    "qwen2-tied": {"family": "qwen2", "tied": True},
    "qwen2-4bit": {"family": "qwen2", "quantized": 4},
    "qwen3": {"family": "qwen3"},
    "qwen3-4bit-tied": {"family": "qwen3", "tied": True, "quantized": 4},
}

Tree = list[tuple[int, int | None]]  # (tokens, parent) of each segment
TREES: dict[str, Tree] = {
    "conversations": [(9, None), (1, None), (40, None), (2, None)],
    "pairs": [(7, None), (5, 0), (11, 0), (1, None), (1, 3), (3, 3)],
    "few-shot": [(45, None), *[(n, 0) for n in (3, 1, 8, 2, 5, 5, 13)]],
    "three levels": [(6, None), (4, 0), (3, 1), (9, 1), (2, 0), (5, 4), (1, 4)],
    "chained prefix": [(5, None), (1, 0), (8, 1), (1, 2), (1, 3), (6, 4), (4, 4)],
    "branch after other roots": [(4, None), (6, None), (3, 0), (2, 1), (7, 0)],
}


def build(tree: Tree) -> tuple[PackedBatch, list[list[int]]]:
    """A row of random tokens shaped like `tree`, every segment scored; and each segment's line of row positions."""
    row = RowBuilder()
    lines: list[list[int]] = []
    start = 0
    for index, (length, parent) in enumerate(tree):
        row.add(random_tokens(length, seed=1000 + index), parent)
        row.score(index, [True] * length, owner=index)
        lines.append(([] if parent is None else lines[parent]) + list(range(start, start + length)))
        start += length
    return row.build(len(tree)), lines


def randomized(model: Any) -> None:
    """Adapters as training leaves them: B is no longer 0."""
    weights = trainable(model)
    rng = np.random.default_rng(5)
    set_weights(
        model,
        {
            n: w if n.endswith("m") else mx.array(rng.normal(size=w.shape) * 0.1, mx.float32)
            for n, w in weights.items()
        },
    )


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_equal_the_models_own(tiny_model: Callable[..., Any], name: str) -> None:
    """Every position of every tree has the state that the model's forward gives it in its own sequence."""
    model = tiny_model(**MODELS[name])
    for tree in TREES.values():
        batch, lines = build(tree)
        tokens = np.array(batch.tokens)
        packed = np.array(hidden_states(model, batch))
        for line in lines:
            own = np.array(model.model(mx.array(tokens[line])[None])[0])
            np.testing.assert_allclose(packed[line], own, atol=HIDDEN, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_sequence_logprobs_equal_the_models_own(tiny_model: Callable[..., Any], name: str) -> None:
    """A segment's score is the sum of the log-probs of its tokens, a root's first token excepted."""
    model = tiny_model(**MODELS[name])
    for tree in TREES.values():
        batch, lines = build(tree)
        tokens = np.array(batch.tokens)
        expected = [
            own_logprobs(model, tokens[line])[len(line) - length :].sum()
            for line, (length, _) in zip(lines, tree, strict=True)
        ]
        found = np.array(sequence_logprobs(model, batch))
        np.testing.assert_allclose(found, expected, rtol=LOGPROBS, atol=ONE_LOGPROB)


def weighted(model: Any, batch: PackedBatch, factors: mx.array) -> mx.array:
    """A sum of the packed sequence log-probs."""
    return (sum_by_owner(batch_logprobs(model, batch), batch.owner, batch.num_sequences) * factors).sum()


def weighted_own(model: Any, sequences: list[tuple[np.ndarray, int]], factors: mx.array) -> mx.array:
    """The same through the model's own forward: of each sequence the log-probs of its last so many tokens."""
    total = mx.zeros(())
    for (tokens, last), factor in zip(sequences, factors, strict=True):
        total = total + factor * following_logprobs(model, tokens)[max(len(tokens) - last - 1, 0) :].sum()
    return total


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *[(name, kind) for name in ("llama-tied", "qwen3") for kind in ("lora", "dora", "full")],
        *[(name, kind) for name in ("llama-4bit-tied-rope", "qwen2-4bit") for kind in ("lora", "dora")],
    ],
)
def test_gradients_equal_the_models_own(tiny_model: Callable[..., Any], name: str, kind: str) -> None:
    """The gradient of a weighted sum of sequence log-probs, over a pair, a few-shot tree and three levels.

    The weights differ in sign and size, so that no two branches could stand in for each other.
    """
    model = tiny_model(**MODELS[name])
    add_adapter(model, AdapterSpec(kind, num_layers=3, rank=4, scale=1.5), seed=1)
    if kind != "full":
        randomized(model)
    for shape in ("pairs", "few-shot", "three levels", "chained prefix"):
        batch, lines = build(TREES[shape])
        tokens = np.array(batch.tokens)
        factors = mx.array(np.random.default_rng(3).normal(size=len(lines)).astype(np.float32))
        sequences = [(tokens[line], length) for line, (length, _) in zip(lines, TREES[shape], strict=True)]
        value, found = gradients(model, partial(weighted, model, batch, factors))
        expected_value, expected = gradients(model, partial(weighted_own, model, sequences, factors))
        # A sum of log-probs whose factors are about 1, of either sign.
        assert value == pytest.approx(expected_value, abs=ONE_LOGPROB * batch.targets.size**0.5)
        assert distance(found, expected) < GRADIENT


def test_a_branch_does_not_see_its_neighbours(tiny_model: Callable[..., Any]) -> None:
    """Other tokens in one branch, and other trees in the row, leave every other segment's states as they were."""
    model = tiny_model()

    def states(branch: int, neighbour: int) -> np.ndarray:
        row = RowBuilder()
        row.add(random_tokens(9, neighbour))
        root = row.add(random_tokens(6, 1))
        row.add(random_tokens(5, branch), root)
        row.add(random_tokens(5, 3), root)
        return np.array(hidden_states(model, row.build(0)))

    before, after = states(branch=2, neighbour=4), states(branch=22, neighbour=44)
    same = [*range(9, 15), *range(20, 25)]
    np.testing.assert_array_equal(before[same], after[same])
    assert np.abs(before[15:20] - after[15:20]).max() > 0.1
    assert np.abs(before[:9] - after[:9]).max() > 0.1


def test_conversations_by_hand() -> None:
    """Tokens 10 11 12 13 | 20 21 22, trained 12 13 | 20 22.

    12 stands at row position 2 and is predicted by position 1; 13 by 2. 20 is a root's first token: nothing
    predicts it. 22 stands at row position 6 and is predicted by 5. No prediction crosses from one root to the next.
    """
    batch = pack_conversations([([10, 11, 12, 13], [False, False, True, True]), ([20, 21, 22], [True, False, True])])
    assert batch.tokens.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert [(s.start, s.stop, s.parent, s.position) for s in batch.segments] == [(0, 4, None, 0), (4, 7, None, 0)]
    assert batch.scored.tolist() == [1, 2, 5]
    assert batch.targets.tolist() == [12, 13, 22]
    assert batch.owner.tolist() == [0, 0, 1]
    assert batch.num_sequences == 2


def test_pairs_by_hand() -> None:
    """Prompt 1 2 3, chosen 4 5, rejected 6; then prompt 7, chosen 8, rejected 9 10.

    Both branches' first tokens are predicted by the prompt's last position: 2 for the first pair, 6 for the second.
    """
    batch = pack_pairs([([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10])])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [(s.start, s.stop, s.parent, s.position) for s in batch.segments] == [
        (0, 3, None, 0),
        (3, 5, 0, 3),
        (5, 6, 0, 3),
        (6, 7, None, 0),
        (7, 8, 3, 1),
        (8, 10, 3, 1),
    ]
    assert batch.scored.tolist() == [2, 3, 2, 6, 6, 8]
    assert batch.targets.tolist() == [4, 5, 6, 8, 9, 10]
    assert batch.owner.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.num_sequences == 4


def test_what_two_responses_begin_with_is_there_once() -> None:
    """Prompt 1 2, chosen 7 8 4, rejected 7 8 5 6: the root is 1 2 7 8, and 7 8 are scored for both.

    Responses 7 8 and 7 8 9 share only 7: each keeps a branch, though all of the first is in the second.
    """
    batch = pack_pairs([([1, 2], [7, 8, 4], [7, 8, 5, 6]), ([3], [7, 8], [7, 8, 9])])
    assert batch.tokens.tolist() == [1, 2, 7, 8, 4, 5, 6, 3, 7, 8, 8, 9]
    assert [(s.start, s.stop, s.parent, s.position) for s in batch.segments] == [
        (0, 4, None, 0),
        (4, 5, 0, 4),
        (5, 7, 0, 4),
        (7, 9, None, 0),
        (9, 10, 3, 2),
        (10, 12, 3, 2),
    ]
    assert batch.scored.tolist() == [1, 2, 3, 1, 2, 3, 5, 7, 8, 7, 8, 10]
    assert batch.targets.tolist() == [7, 8, 4, 7, 8, 5, 6, 7, 8, 7, 8, 9]
    assert batch.owner.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3]


def test_pairs_score_like_one_response_at_a_time(tiny_model: Callable[..., Any]) -> None:
    """The log-prob of a response after its prompt, whether or not the other begins like it."""
    model = tiny_model(tied=True)
    prompt, common = random_tokens(9, 1), random_tokens(6, 2)
    responses = [random_tokens(n, 30 + n) for n in (5, 8, 1)]
    pairs = [
        (prompt, responses[0], responses[1]),
        (prompt[:1], np.concatenate([common, responses[2]]), np.concatenate([common, responses[0]])),
        (prompt[:4], common, common),
    ]
    expected = [
        own_logprobs(model, np.concatenate([start, response]))[len(start) :].sum()
        for start, chosen, rejected in pairs
        for response in (chosen, rejected)
    ]
    np.testing.assert_allclose(np.array(sequence_logprobs(model, pack_pairs(pairs))), expected, rtol=LOGPROBS)


def test_choices_by_hand() -> None:
    """Prefix 1 2, questions 3 4 and 5, choices 90 91: scored after each question's last token, positions 3 and 4."""
    batch = pack_choices([1, 2], [[3, 4], [5]], [90, 91])
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5]
    assert [(s.start, s.stop, s.parent, s.position) for s in batch.segments] == [
        (0, 2, None, 0),
        (2, 4, 0, 2),
        (4, 5, 0, 2),
    ]
    assert batch.scored.tolist() == [3, 3, 4, 4]
    assert batch.targets.tolist() == [90, 91, 90, 91]
    assert batch.owner.tolist() == [0, 1, 2, 3]

    bare = pack_choices([], [[3, 4], [5]], [90])
    assert [(s.start, s.stop, s.parent, s.position) for s in bare.segments] == [(0, 2, None, 0), (2, 3, None, 0)]
    assert bare.scored.tolist() == [1, 2]


def test_choices_score_like_one_question_at_a_time(tiny_model: Callable[..., Any]) -> None:
    """The packed subject gives each choice the log-prob that prefix + question + choice gives its last token."""
    model = tiny_model()
    prefix, choices = random_tokens(30, 1), [7, 8, 9, 10]
    questions = [random_tokens(n, 50 + n) for n in (4, 1, 9)]
    packed = np.array(sequence_logprobs(model, pack_choices(prefix, questions, choices)))
    expected = [own_logprobs(model, [*prefix, *question, c])[-1] for question in questions for c in choices]
    np.testing.assert_allclose(packed, expected, atol=ONE_LOGPROB, rtol=0)


def test_positions_and_ancestors_of_a_chain() -> None:
    """Segments of 5, 1 and 8 tokens in a chain begin at positions 0, 5 and 6; the branch after them at 14."""
    batch, _ = build([(5, None), (1, 0), (8, 1), (2, 2), (3, 0)])
    assert [s.position for s in batch.segments] == [0, 5, 6, 14, 5]
    assert batch.ancestors(3) == (0, 1, 2)
    assert batch.ancestors(4) == (0,)
    assert batch.ancestors(0) == ()


def test_a_mask_without_scored_tokens_scores_nothing() -> None:
    """Not even by accident: a root whose only trained token is its first has nothing to predict it."""
    batch = pack_conversations([([5, 6], [False, False]), ([7], [True])])
    assert (batch.scored.tolist(), batch.targets.tolist(), batch.owner.tolist()) == ([], [], [])
    assert batch.num_sequences == 2


def test_an_empty_segment_is_refused() -> None:
    """It would have no last position for its children to continue."""
    with pytest.raises(ValueError, match="at least one token"):
        pack_pairs([([], [1], [2])])


def test_plan_rows_by_hand() -> None:
    """First-fit decreasing into rows of 10 for lengths 4 9 3 6 12 1: 12 alone, 9+1, 6+4, 3.

    By first item: {0, 3} (4+6), {1, 5} (9+1), {2} (3), {4} (12, too long for any row).
    """
    assert plan_rows([4, 9, 3, 6, 12, 1], 10) == [[0, 3], [1, 5], [2], [4]]
    assert plan_rows([], 10) == []


def test_plan_rows_loses_nothing_and_overfills_nothing() -> None:
    """For random lengths: every item once, no row over the limit but an item that is too long by itself."""
    rng = np.random.default_rng(0)
    for limit in (1, 17, 64, 1000):
        lengths = rng.integers(1, 100, 60).tolist()
        rows = plan_rows(lengths, limit)
        assert sorted(item for row in rows for item in row) == list(range(60))
        assert all(sum(lengths[i] for i in row) <= limit or len(row) == 1 for row in rows)
        # first-fit: two rows that fit together would have been one
        sums = sorted(sum(lengths[i] for i in row) for row in rows)
        assert len(sums) < 2 or sums[0] + sums[1] > limit
