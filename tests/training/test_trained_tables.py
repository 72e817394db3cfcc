"""`lora.modules_to_save`: embedding and head trained beside an adapter, compared with a plain automatic gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from lab import assert_same, finish
from objectives import conversations, sft
from oracles import distance, following_logprobs, gradients, own_loss, random_tokens
from tolerances import GRADIENT, LOSS

from mlx_zh.core.logprobs import output_head, token_logprobs
from mlx_zh.core.trained_tables import TrainedEmbedding, TrainedHead
from mlx_zh.models.adapters.layers import add_adapter, remove_adapter, trainable
from mlx_zh.models.adapters.spec import SAVED, AdapterSpec
from mlx_zh.training.optimizer import GroupedAdamW
from mlx_zh.training.step import loss_and_gradients, set_weights, train_step

pytestmark = pytest.mark.numeric
Make = Callable[..., Any]
LENGTHS = [9, 33, 4, 21, 15, 2, 28]
BOTH = ("embed_tokens", "lm_head")
CASES = [(False, BOTH), (False, ("embed_tokens",)), (False, ("lm_head",)), (True, BOTH), (True, ("lm_head",))]


def prepared(make: Make, saved: tuple[str, ...] = BOTH, *, layers: int = 3, **settings: Any) -> Any:
    model = make("qwen2", **settings)
    add_adapter(model, AdapterSpec("lora", num_layers=layers, rank=4, scale=1.5, saved=saved), seed=1)
    weights = trainable(model)
    set_weights(model, {n: w + 0.1 * mx.random.normal(w.shape, key=mx.random.key(1)) for n, w in weights.items()})
    return model


@pytest.mark.parametrize(("tied", "saved"), CASES)
@pytest.mark.parametrize("micro_tokens", [1, 40, 10_000])
@pytest.mark.parametrize(("checkpoint", "logit_rows"), [(False, None), (True, 5)])
def test_loss_and_gradient_equal_the_models_own(
    tiny_model: Make, tied: bool, saved: tuple[str, ...], micro_tokens: int, checkpoint: bool, logit_rows: int | None
) -> None:
    """Rows of one example each, of some, and all in one; chunks of 5 rows of logits; blocks computed again."""
    model, examples = prepared(tiny_model, saved, tied=tied), conversations(LENGTHS)
    objective = sft(examples, micro_tokens=micro_tokens, checkpoint=checkpoint, logit_rows=logit_rows)
    rows = objective.rows(np.arange(len(examples)), 0)
    loss, _, computed = loss_and_gradients(model, objective, rows, trainable(model))
    value, expected = gradients(model, partial(own_loss, model, examples))
    assert float(loss) == pytest.approx(value, rel=LOSS)
    tables = {"model.embed_tokens.weight"} if tied else {SAVED[name] for name in saved}
    assert tables == {name for name in computed if name.endswith(".weight")}
    assert all(np.abs(expected[name]).max() > 0 for name in tables)
    assert distance(computed, expected) < GRADIENT


def test_a_trained_embedding_gets_its_gradient_through_blocks_without_an_adapter(tiny_model: Make) -> None:
    model, examples = prepared(tiny_model, layers=1), conversations(LENGTHS)
    for checkpoint in (False, True):
        objective = sft(examples, micro_tokens=40, checkpoint=checkpoint)
        rows = objective.rows(np.arange(len(examples)), 0)
        _, _, computed = loss_and_gradients(model, objective, rows, trainable(model))
        assert distance(computed, gradients(model, partial(own_loss, model, examples))[1]) < GRADIENT


@pytest.mark.parametrize("grad", [True, False])
def test_the_heads_gradient_has_its_weight_for_each_position(tiny_model: Make, grad: bool) -> None:
    """As DPO asks for it: every position has another cotangent, of either sign."""
    model = prepared(tiny_model)
    head, targets = output_head(model), mx.array(random_tokens(23, seed=1))
    assert isinstance(head, TrainedHead)
    hidden = mx.random.normal((23, 64), key=mx.random.key(3))
    cotangent = mx.random.normal((23,), key=mx.random.key(4))

    def ours(hidden: mx.array, weight: mx.array) -> mx.array:
        head.weight = weight
        return (token_logprobs(hidden, head, targets, chunk=4, grad=grad) * cotangent).sum()

    def plain(hidden: mx.array, weight: mx.array) -> mx.array:
        logits = hidden @ weight.T
        chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return ((chosen - mx.logsumexp(logits, axis=-1)) * cotangent).sum()

    weight = head.weight
    one, other = (mx.value_and_grad(f, argnums=(0, 1))(hidden, weight) for f in (ours, plain))
    assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-4)
    names = ("hidden", "weight")
    assert distance(dict(zip(names, one[1], strict=True)), dict(zip(names, other[1], strict=True))) < GRADIENT


def test_the_heads_backward_pass_holds_no_logits_of_all_tokens() -> None:
    """4,096 tokens times 2,000 words are 33 MB in float32; a chunk of 16 rows is 0.1 MB, the head 0.26 MB."""
    head = TrainedHead(nn.Linear(32, 2000, bias=False))
    hidden, targets = mx.random.normal((4096, 32)), mx.array(random_tokens(4096, seed=2, vocabulary=2000))
    mx.eval(hidden, targets, head.weight)

    def loss(hidden: mx.array, weight: mx.array) -> mx.array:
        head.weight = weight
        return token_logprobs(hidden, head, targets, chunk=16).sum()

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(loss, argnums=(0, 1))(hidden, head.weight))
    assert mx.get_peak_memory() - before < 16e6


@pytest.mark.parametrize("quantized", [None, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_new_adapter_changes_nothing_and_removing_it_restores_the_tables(
    tiny_model: Make, tied: bool, quantized: int | None
) -> None:
    model = tiny_model("llama", tied=tied, quantized=quantized)
    tokens = mx.array(random_tokens(12, seed=5))[None]
    before, base = model(tokens), model.model.embed_tokens
    add_adapter(model, AdapterSpec("lora", num_layers=3, rank=4, saved=BOTH), seed=1)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, TrainedEmbedding) and embedding.weight.dtype == mx.float32
    assert ("lm_head" in model) is not tied
    if quantized is None:
        assert mx.array_equal(model(tokens), before).item()
    else:
        np.testing.assert_allclose(np.array(model(tokens)), np.array(before), atol=1e-4)
    set_weights(model, {name: array + 1 for name, array in trainable(model).items()})
    assert not np.allclose(np.array(model(tokens)), np.array(before), atol=0.1)
    remove_adapter(model)
    assert model.model.embed_tokens is base and mx.array_equal(model(tokens), before).item()


def test_a_model_in_half_precision_stays_in_it(tiny_model: Make) -> None:
    model = tiny_model("llama", dtype="bfloat16")
    tokens = mx.array(random_tokens(12, seed=5))[None]
    before = model(tokens)
    add_adapter(model, AdapterSpec("lora", num_layers=3, rank=4, saved=BOTH), seed=1)
    after = model(tokens)
    assert after.dtype == mx.bfloat16 and mx.array_equal(after, before).item()
    assert all(array.dtype == mx.float32 for array in trainable(model).values())


def test_a_step_moves_the_words_that_occur_and_no_others(tiny_model: Make) -> None:
    """Adam's first step moves each weight with a gradient by the learning rate; a word that never occurs stays."""
    model = tiny_model("qwen2")
    add_adapter(model, AdapterSpec("lora", num_layers=3, rank=4, saved=("embed_tokens",)), seed=1)
    examples = conversations(LENGTHS)
    objective, weights = sft(examples, micro_tokens=40), trainable(model)
    before = np.array(weights["model.embed_tokens.weight"])
    optimizer = GroupedAdamW(weights, weight_decay=0.0, betas=(0.9, 0.999))
    rows = objective.rows(np.arange(len(examples)), 0)
    _, after = train_step(model, objective, rows, weights, optimizer, learning_rate=1e-3, max_grad_norm=None)
    moved = np.abs(np.array(after["model.embed_tokens.weight"]) - before).max(axis=1) > 0
    # The last token of a conversation is a target only, so it is read by nothing that is scored.
    read = {int(t) for tokens, _ in examples for t in tokens[:-1]}
    assert set(np.flatnonzero(moved).tolist()) == read
    assert {"m:model.embed_tokens.weight", "v:model.embed_tokens.weight"} <= optimizer.arrays().keys()


def test_resumed_equals_uninterrupted(tiny_model: Make, tmp_path: Any, monkeypatch: Any) -> None:
    import lab

    plain = lab.AdapterSpec
    monkeypatch.setattr(lab, "AdapterSpec", lambda *a, **k: plain(*a, **k, saved=BOTH))
    runs = lab.Lab(tiny_model, tmp_path)
    whole = runs.loop("whole")
    finish(whole)
    finish(runs.loop("parts", stop_after=4))
    rest = runs.resumed("parts")
    finish(rest)
    assert "lm_head.weight" in rest.weights
    assert_same(whole, rest)


def test_the_reference_is_the_policy_at_step_0(tiny_model: Make) -> None:
    """Bit for bit, where the tables are not quantized."""
    from mlx_zh.core.logprobs import batch_logprobs
    from mlx_zh.core.packing import pack_conversations

    model = tiny_model("llama")
    batch = pack_conversations([(tokens, np.ones(len(tokens), bool)) for tokens, _ in conversations(LENGTHS)])
    before = batch_logprobs(model, batch, grad=False, chunk=7)
    add_adapter(model, AdapterSpec("lora", num_layers=3, rank=4, saved=BOTH), seed=1)
    assert mx.array_equal(batch_logprobs(model, batch, chunk=7), before).item()
    assert following_logprobs(model, random_tokens(5, seed=0)).shape == (4,)
