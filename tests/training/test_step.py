"""Invariant 2: a step is its examples, whatever rows, chunks and checkpoints it was cut into."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from metal_messages import VICTIM
from objectives import conversations, sft
from oracles import distance, gradients, own_logprobs, own_loss
from tolerances import GRADIENT, LOSS, MOVED

from mlx_zh.core.recompute import Levels
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.system.accelerator import AcceleratorError
from mlx_zh.training.objective import Row
from mlx_zh.training.optimizer import Arrays, GroupedAdamW
from mlx_zh.training.sft_objective import SftObjective
from mlx_zh.training.step import StepResult, evaluate, loss_and_gradients, set_weights, train_step

pytestmark = pytest.mark.numeric
Make = Callable[..., Any]
LENGTHS = [9, 33, 4, 21, 15, 2, 28]  # unequal, so that a mean of means is another number
STEPS = [[0, 3, 5, 1], [6, 2, 4], [1, 0]]  # ragged, as the tail of an epoch is


def prepared(tiny_model: Make, kind: str = "lora", *, dropout: float = 0.0, **settings: Any) -> Any:
    model = tiny_model("qwen2", **settings)
    add_adapter(model, AdapterSpec(kind, num_layers=3, rank=4, scale=1.5, dropout=dropout), seed=1)
    if kind != "full":
        noise = {n: 0.1 * mx.random.normal(w.shape, key=mx.random.key(1)) for n, w in trainable(model).items()}
        set_weights(model, {n: w + noise[n] for n, w in trainable(model).items()})
    return model


def step_of(model: Any, objective: SftObjective, examples: list[int], step: int | None = 0) -> tuple[float, Arrays]:
    rows = objective.rows(np.array(examples), step)
    loss, _, found = loss_and_gradients(model, objective, rows, trainable(model))
    return float(loss), found


def trained(model: Any, objective: SftObjective, steps: list[list[int]], rate: float = 1e-3) -> list[StepResult]:
    """Run some steps; the new weights are in the model."""
    weights = trainable(model)
    optimizer = GroupedAdamW(weights, weight_decay=0.01, betas=(0.9, 0.999))
    results = []
    for number, examples in enumerate(steps):
        rows = objective.rows(np.array(examples), number)
        result, weights = train_step(
            model, objective, rows, weights, optimizer, learning_rate=rate, max_grad_norm=1.0
        )
        results.append(result)
    return results


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("micro_tokens", [1, 40, 10_000])
def test_loss_and_gradient_equal_the_models_own(tiny_model: Make, kind: str, micro_tokens: int) -> None:
    """The mean over all scored tokens of the step, through mlx-lm's forward and an automatic gradient.

    With rows of one example each, of some, and with all in one row.
    """
    model, examples = prepared(tiny_model, kind), conversations(LENGTHS)
    loss, found = step_of(model, sft(examples, micro_tokens=micro_tokens), STEPS[0])
    chosen = [examples[i] for i in STEPS[0]]
    logprobs = np.concatenate([own_logprobs(model, tokens)[1:][scored[1:]] for tokens, scored in chosen])
    assert loss == pytest.approx(-logprobs.mean(), rel=LOSS)
    _, expected = gradients(model, partial(own_loss, model, chosen))
    assert distance(found, expected) < GRADIENT


def test_a_mean_of_means_is_another_number(tiny_model: Make) -> None:
    """What peers compute with one example a micro-batch: the mean over examples of each example's mean.

    Here they differ by more than 1 %, so the tolerance of the test above tells them apart.
    """
    model, examples = prepared(tiny_model), conversations(LENGTHS)
    means = [-own_logprobs(model, tokens)[1:][scored[1:]].mean() for tokens, scored in examples]
    loss, _ = step_of(model, sft(examples, micro_tokens=1), list(range(7)))
    assert abs(np.mean(means) / loss - 1) > 0.01


def test_the_four_bit_step_equals_the_models_own(tiny_model: Make) -> None:
    model, examples = prepared(tiny_model, quantized=4), conversations(LENGTHS)
    loss, found = step_of(model, sft(examples, micro_tokens=40, checkpoint=True, logit_rows=5), STEPS[0])
    value, expected = gradients(model, partial(own_loss, model, [examples[i] for i in STEPS[0]]))
    assert loss == pytest.approx(value, rel=LOSS)
    assert distance(found, expected) < GRADIENT


def size_of(arrays: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((a**2).sum() for a in arrays.values())))


MEMORY: list[dict[str, Any]] = [
    {"micro_tokens": 1},
    {"micro_tokens": 40},
    {"checkpoint": True},
    {"checkpoint": Levels(2)},
    {"checkpoint": lambda batch: Levels(3, batch.tokens.size % 3)},
    {"logit_rows": 1},
    {"logit_rows": 7},
    {"micro_tokens": 50, "checkpoint": True, "logit_rows": 3},
]
NOISE: list[dict[str, Any]] = [{}, {"dropout": 0.3, "neftune_alpha": 5.0}]


@pytest.mark.parametrize("noise", NOISE, ids=["quiet", "noise"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_memory_settings_do_not_change_the_result(tiny_model: Make, kind: str, noise: dict[str, Any]) -> None:
    """Loss and gradient of each step, and weights after three steps, are those of the plain setting.

    Weights hardly change in three steps, so what they moved is compared, by its norm and less strictly: Adam divides
    each entry's gradient by its own size, which near 0 is rounding.
    """
    if kind == "full":
        noise = {k: v for k, v in noise.items() if k != "dropout"}
    examples = conversations(LENGTHS)
    plain = sft(examples, micro_tokens=10_000, **noise)
    reference = prepared(tiny_model, kind, dropout=noise.get("dropout", 0.0))
    start = {n: np.array(w) for n, w in trainable(reference).items()}
    expected = [step_of(reference, plain, examples, n) for n, examples in enumerate(STEPS)]
    expected_results = trained(reference, plain, STEPS)
    moved = {n: np.array(w, dtype=np.float64) - start[n] for n, w in trainable(reference).items()}
    for settings in MEMORY:
        model = prepared(tiny_model, kind, dropout=noise.get("dropout", 0.0))
        objective = sft(examples, **({"micro_tokens": 10_000} | settings | noise))
        for number, ids in enumerate(STEPS):
            loss, found = step_of(model, objective, ids, number)
            assert loss == pytest.approx(expected[number][0], rel=LOSS)
            assert distance(found, expected[number][1]) < GRADIENT, settings
        results = trained(model, objective, STEPS)
        for one, other in zip(results, expected_results, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=LOSS)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=GRADIENT)
            assert (one.scored_tokens, one.tokens) == (other.scored_tokens, other.tokens)
        after = {n: np.array(w, dtype=np.float64) for n, w in trainable(model).items()}
        apart = size_of({n: w - start[n] - moved[n] for n, w in after.items()})
        assert apart / size_of(moved) < MOVED, settings


@pytest.mark.parametrize("noise", NOISE, ids=["quiet", "noise"])
def test_the_order_of_examples_in_a_step_does_not_matter(tiny_model: Make, noise: dict[str, Any]) -> None:
    model = prepared(tiny_model, dropout=noise.get("dropout", 0.0))
    objective = sft(conversations(LENGTHS), micro_tokens=40, **noise)
    loss, expected = step_of(model, objective, [0, 3, 5, 1, 6])
    for order in ([6, 1, 5, 3, 0], [3, 0, 6, 5, 1]):
        again, found = step_of(model, objective, order)
        assert again == pytest.approx(loss, rel=LOSS)
        assert distance(found, expected) < GRADIENT


def test_noise_is_there_in_training_and_not_in_validation(tiny_model: Make) -> None:
    """A training step's loss differs from the quiet one and from the next step's; a validation pass equals it."""
    model, examples = prepared(tiny_model, dropout=0.3), conversations(LENGTHS)
    noisy = sft(examples, dropout=0.3, neftune_alpha=5.0)
    quiet = float(own_loss(model, examples))
    first, second = (step_of(model, noisy, list(range(7)), step)[0] for step in (0, 1))
    assert len({round(value, 4) for value in (quiet, first, second)}) == 3
    validation = sum(share for share, _ in evaluate(model, noisy, noisy.rows(np.arange(7), None)))
    assert validation == pytest.approx(quiet, rel=LOSS)


def test_the_first_step_by_hand(tiny_model: Make) -> None:
    """Adam's first step moves every entry by the rate against its gradient's sign, where that is not tiny."""
    model, examples = prepared(tiny_model), conversations(LENGTHS)
    objective = sft(examples)
    before = {n: np.array(w) for n, w in trainable(model).items()}
    _, found = step_of(model, objective, STEPS[0])
    weights = trainable(model)
    optimizer = GroupedAdamW(weights, weight_decay=0.0, betas=(0.9, 0.999))
    rows = objective.rows(np.array(STEPS[0]), 0)
    result, after = train_step(model, objective, rows, weights, optimizer, learning_rate=1e-3, max_grad_norm=None)
    assert result.applied
    assert result.tokens == sum(LENGTHS[i] for i in STEPS[0]) == 65
    # of n tokens the latter half is trained: 9 -> 5, 21 -> 11, 2 -> 1, 33 -> 17
    assert result.scored_tokens == 5 + 11 + 1 + 17
    assert result.grad_norm == pytest.approx(
        np.sqrt(sum((np.array(g, dtype=np.float64) ** 2).sum() for g in found.values())), rel=1e-5
    )
    for name, array in trainable(model).items():
        gradient = np.array(found[name])
        clear = np.abs(gradient) > 1e-5  # of which Adam's epsilon of 1e-8 takes a thousandth
        assert clear.any()
        np.testing.assert_allclose(
            (np.array(array) - before[name])[clear], -1e-3 * np.sign(gradient[clear]), rtol=2e-3
        )
        assert np.array(after[name]).tobytes() == np.array(array).tobytes()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_model_gets_its_own_arrays_back(tiny_model: Make, kind: str) -> None:
    """The very arrays that it held before, not those that stood for them while the gradient was traced."""
    model = prepared(tiny_model, kind, tied=True)
    weights = trainable(model)
    step_of(model, sft(conversations(LENGTHS), checkpoint=True, logit_rows=3), STEPS[0])
    assert all(array is weights[name] for name, array in trainable(model).items())


def test_a_row_is_built_while_the_row_before_it_is_computed(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But nothing of it is computed before that row is finished, so one row's activations are in memory at a time."""
    model, objective = prepared(tiny_model), sft(conversations([20, 20, 20]), micro_tokens=20, logit_rows=6)
    rows, events = objective.rows(np.arange(3), 0), list[str]()

    def recorded(module: Any, name: str, event: Callable[..., str]) -> None:
        function = getattr(module, name)

        def call(*arguments: Any) -> Any:
            events.append(event(*arguments))
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    recorded(objective, "share", lambda *_: "build")
    recorded(mx, "async_eval", lambda *_: "start")
    recorded(mx, "eval", lambda values: "wait" if len(values) == 3 else "chunk")  # loss, sums and gradients
    loss_and_gradients(model, objective, rows, trainable(model))
    first, later = ["build", "chunk", "chunk", "start"], ["build", "wait", "chunk", "chunk", "start"]
    assert events == [*first, *later, *later, "wait"]  # 10 scored tokens of each row, 6 at a time


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_fault_of_any_row_is_told_before_the_weights_change(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    """The device tells it when the row is waited for. The step can then be taken again, with the same result."""
    objective = sft(conversations([20, 20, 20]), micro_tokens=20)
    results = []
    for fails in (False, True):
        model = prepared(tiny_model)
        weights = trainable(model)
        optimizer = GroupedAdamW(weights, weight_decay=0.01, betas=(0.9, 0.999))
        take = partial(train_step, learning_rate=1e-3, max_grad_norm=None)
        if fails:
            moments, evaluate, waits = optimizer.arrays(), mx.eval, iter(range(3))

            def failing(*values: Any, waits: Any = waits, evaluate: Callable[..., None] = evaluate) -> None:
                if isinstance(values[0], tuple) and len(values[0]) == 3 and next(waits) == row:
                    raise RuntimeError(VICTIM)
                evaluate(*values)

            monkeypatch.setattr(mx, "eval", failing)
            with pytest.raises(AcceleratorError):
                take(model, objective, objective.rows(np.arange(3), 0), weights, optimizer)
            monkeypatch.setattr(mx, "eval", evaluate)
            assert all(array is moments[name] for name, array in optimizer.arrays().items())
        result, after = take(model, objective, objective.rows(np.arange(3), 0), weights, optimizer)
        results.append((result.loss, {name: np.array(array).tobytes() for name, array in after.items()}))
    assert results[0] == results[1]


def test_steps_lower_the_loss_and_leave_no_traced_arrays(tiny_model: Make) -> None:
    """After checkpointed steps with a trained head, every array of the model can be read, and it runs again."""
    model, examples = prepared(tiny_model, "full", tied=True), conversations(LENGTHS)
    objective = sft(examples, checkpoint=True, logit_rows=3)
    before = float(own_loss(model, examples))
    results = trained(model, objective, [list(range(7))] * 6, rate=3e-3)
    assert results[0].loss == pytest.approx(before, rel=LOSS)
    assert all(np.isfinite(np.array(w)).all() for w in trainable(model).values())
    assert float(own_loss(model, examples)) < results[-1].loss < 0.8 * before
    list(
        evaluate(model, objective, objective.rows(np.arange(7), None))
    )  # a pass without gradients, checkpointed head
    assert all(np.isfinite(np.array(w)).all() for w in trainable(model).values())


@pytest.mark.oracle
@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_clipping_equals_pytorch(tiny_model: Make, limit: float) -> None:
    """What reaches the optimizer is what torch.nn.utils.clip_grad_norm_ leaves of the gradient."""
    torch = pytest.importorskip("torch")
    model, objective = prepared(tiny_model), sft(conversations(LENGTHS))
    weights = trainable(model)
    _, found = step_of(model, objective, STEPS[0])
    theirs = {n: torch.nn.Parameter(torch.tensor(np.array(w, dtype=np.float64))) for n, w in weights.items()}
    for name, tensor in theirs.items():
        tensor.grad = torch.tensor(np.array(found[name], dtype=np.float64))
    norm = torch.nn.utils.clip_grad_norm_(theirs.values(), limit)
    clipped: dict[str, Arrays] = {}

    class Watched(GroupedAdamW):
        def update(self, weights: Arrays, gradients: Arrays, learning_rate: float, scale: Any = None) -> Arrays:
            clipped["gradients"] = {n: g if scale is None else g * scale for n, g in gradients.items()}
            return super().update(weights, gradients, learning_rate, scale)

    optimizer = Watched(weights, weight_decay=0.0, betas=(0.9, 0.999))
    rows = objective.rows(np.array(STEPS[0]), 0)
    result, _ = train_step(model, objective, rows, weights, optimizer, learning_rate=1e-3, max_grad_norm=limit)
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-5)  # the norm before clipping
    assert distance(clipped["gradients"], {n: t.grad.numpy() for n, t in theirs.items()}) < 5e-5


class Spoiled(SftObjective):
    """An objective whose loss, or whose gradient alone, is not finite."""

    spoil = "loss"

    def share(self, model: Any, row: Row) -> Any:
        share, sums = super().share(model, row)
        if self.spoil == "loss":
            return share * float("nan"), sums
        weight = next(iter(trainable(model).values())).sum()
        return share + mx.sqrt(weight - mx.stop_gradient(weight)), sums  # adds 0, whose gradient is 1 / 0


@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(tiny_model: Make, spoil: str) -> None:
    """Weights and moments stay as they were, bit for bit; the next good step is the first one."""
    model = prepared(tiny_model)
    good = sft(conversations(LENGTHS))
    bad = Spoiled(good._examples, good.settings)
    bad.spoil = spoil
    weights = trainable(model)
    optimizer = GroupedAdamW(weights, weight_decay=0.01, betas=(0.9, 0.999))
    before = {n: np.array(w).tobytes() for n, w in (weights | optimizer.arrays()).items()}
    rows = bad.rows(np.array(STEPS[0]), 0)
    result, after = train_step(model, bad, rows, weights, optimizer, learning_rate=1e-3, max_grad_norm=1.0)
    assert not result.applied
    assert np.isfinite(result.loss) == (spoil == "gradient")
    assert not np.isfinite(result.grad_norm)
    assert {n: np.array(w).tobytes() for n, w in (after | optimizer.arrays()).items()} == before
    assert all(np.array(w).tobytes() == before[n] for n, w in trainable(model).items())

    rows = good.rows(np.array(STEPS[0]), 0)
    result, found = train_step(model, good, rows, after, optimizer, learning_rate=1e-3, max_grad_norm=1.0)
    fresh = prepared(tiny_model)
    trained(fresh, good, STEPS[:1])
    assert result.applied
    assert all(np.array(w).tobytes() == np.array(found[n]).tobytes() for n, w in trainable(fresh).items())


def test_an_example_without_scored_tokens_adds_nothing(tiny_model: Make) -> None:
    """In a row of its own and in a row with others: loss and gradient are those of the others."""
    model = prepared(tiny_model)
    examples = conversations(LENGTHS)
    silent = (examples[3][0], np.zeros(21, dtype=bool))
    loss, expected = step_of(model, sft(examples), [0, 1])
    for micro_tokens in (1, 10_000):
        again, found = step_of(model, sft([*examples, silent], micro_tokens=micro_tokens), [0, 1, 7])
        assert again == pytest.approx(loss, rel=LOSS)
        assert distance(found, expected) < GRADIENT


def test_rows_of_a_step_by_hand() -> None:
    """Lengths 9 33 4 in rows of 40: 33 + 4 and 9. Scored 5 + 17 + 2 = 24 in all, which every row divides by.

    A first token that is marked as trained is not scored, so it does not count either.
    """
    examples = conversations(LENGTHS)
    rows = sft(examples, micro_tokens=40).rows(np.array([0, 1, 2]), 5)
    assert [row.examples for row in rows] == [(0,), (1, 2)]
    assert [row.batch.tokens.size for row in rows] == [9, 37]
    assert [row.count for row in rows] == [24, 24]
    assert [row.training for row in rows] == [True, True]
    assert [row.noise for row in rows] == [None, None]

    all_trained = [(tokens, np.ones(len(tokens), dtype=bool)) for tokens, _ in examples]
    assert [row.count for row in sft(all_trained).rows(np.array([0, 2]), None)] == [8 + 3]
