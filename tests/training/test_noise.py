"""Dropout and embedding noise: right in distribution, and a function of the token alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from oracles import distance, gradients, random_tokens
from tolerances import HIDDEN

from mlx_zh.core.logprobs import batch_logprobs, hidden_states
from mlx_zh.core.packing import PackedBatch, RowBuilder, pack_conversations, pack_pairs
from mlx_zh.core.recompute import ALL, Levels
from mlx_zh.models.adapters.layers import LoRALinear, add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.training.noise import StepNoise, example_seeds
from mlx_zh.training.objective import Settings
from mlx_zh.training.step import set_weights

Make = Callable[..., Any]
WIDTH = 64


def row_of(lengths: Sequence[int]) -> PackedBatch:
    row = RowBuilder()
    for index, length in enumerate(lengths):
        row.add(random_tokens(length, seed=index))
    return row.build(len(lengths))


def noise_of(lengths: Sequence[int], *, step: int = 0, examples: Sequence[int] = (), seed: int = 7, **on: Any) -> Any:
    settings: dict[str, Any] = {"dropout": True, "neftune_alpha": None} | on
    ids = examples or range(len(lengths))
    return StepNoise(row_of(lengths), example_seeds(seed, step, list(ids)), **settings)


def mask_of(noise: StepNoise, tokens: int, *, rate: float = 0.3, layer: str = "layers.0.q_proj") -> np.ndarray:
    """What dropout leaves of ones (T, D): a layer whose own product is 0 and whose A and B are the identity."""
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    linear.weight = mx.zeros((WIDTH, WIDTH))
    probe = LoRALinear(linear, AdapterSpec("lora", 1, rank=WIDTH, scale=1.0, dropout=rate), 0, layer)
    probe.lora_a = probe.lora_b = mx.eye(WIDTH)
    with noise.layer():
        return np.array(probe(mx.ones((tokens, WIDTH))))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_dropout_is_inverted_and_has_its_rate(rate: float) -> None:
    """Every entry is 0 or 1 / (1 - rate), and 64,000 of them are 0 at that rate within 5 standard deviations."""
    left = mask_of(noise_of([1000]), 1000, rate=rate)
    kept = left != 0
    np.testing.assert_allclose(left[kept], 1 / (1 - rate), rtol=1e-6)
    deviation = (rate * (1 - rate) / kept.size) ** 0.5
    assert abs((1 - kept.mean()) - rate) < 5 * deviation
    # neither some tokens nor some channels are favoured: their rates scatter as a binomial does
    for axis, draws in ((0, 1000), (1, WIDTH)):
        expected = (rate * (1 - rate) / draws) ** 0.5
        assert kept.mean(axis=axis).std() == pytest.approx(expected, rel=0.35)


def test_draws_are_independent() -> None:
    """Other tokens, layers, steps, examples and seeds: masks agree where chance has it, 0.7^2 + 0.3^2 = 0.58."""
    tokens = 200
    base = mask_of(noise_of([tokens]), tokens) != 0
    others = {
        "layer": mask_of(noise_of([tokens]), tokens, layer="layers.1.q_proj") != 0,
        "part": mask_of(noise_of([tokens]), tokens, layer="layers.0.k_proj") != 0,
        "step": mask_of(noise_of([tokens], step=1), tokens) != 0,
        "example": mask_of(noise_of([tokens], examples=[1]), tokens) != 0,
        "seed": mask_of(noise_of([tokens], seed=8), tokens) != 0,
        "token": np.roll(base, 1, axis=0),
        "channel": np.roll(base, 1, axis=1),
    }
    deviation = (0.58 * 0.42 / base.size) ** 0.5
    for name, other in others.items():
        assert abs((base == other).mean() - 0.58) < 5 * deviation, name
    np.testing.assert_array_equal(mask_of(noise_of([tokens]), tokens) != 0, base)


def test_a_draw_does_not_depend_on_the_row() -> None:
    """Examples 4, 9 and 2 together, in another order, and alone: each has its own mask everywhere."""
    lengths = {4: 11, 9: 1, 2: 30}

    def masks(examples: list[int]) -> dict[int, np.ndarray]:
        sizes = [lengths[e] for e in examples]
        left = mask_of(noise_of(sizes, examples=examples), sum(sizes))
        return dict(zip(examples, np.split(left, np.cumsum(sizes)[:-1]), strict=True))

    together = masks([4, 9, 2])
    for group in ([2, 4, 9], [4], [9], [2, 9]):
        for example, left in masks(group).items():
            np.testing.assert_array_equal(left, together[example])


def test_the_branches_of_a_pair_belong_to_one_example() -> None:
    """A pair's tokens draw by their place in the tree, whatever stands before the tree in the row."""
    pairs = [([1, 2, 3], [4, 5], [6, 7, 8]), ([9], [10], [11, 12])]
    seeds = example_seeds(0, 0, [5, 6])
    both = StepNoise(pack_pairs(pairs), seeds, dropout=True, neftune_alpha=None)
    second = StepNoise(pack_pairs(pairs[1:]), seeds[1:], dropout=True, neftune_alpha=None)
    np.testing.assert_array_equal(mask_of(both, 12)[8:], mask_of(second, 4))
    assert len({row.tobytes() for row in mask_of(both, 12)}) == 12


def test_a_seed_for_each_example_is_asked_for() -> None:
    with pytest.raises(ValueError, match="1 seeds for 2 examples"):
        noise_of([3, 4], examples=[0])


def test_neftune_by_hand() -> None:
    """Uniform in +-alpha / sqrt(L D), L an example's own tokens: 5 / sqrt(400 * 64) = 0.03125; of 100: 0.0625.

    The deviation of a uniform draw is its bound over sqrt(3) (arXiv:2310.05914, algorithm 1).
    """
    noise = noise_of([400, 100], dropout=False, neftune_alpha=5.0)
    added = np.array(noise.embeddings(mx.zeros((500, WIDTH))))
    for part, bound in ((added[:400], 0.03125), (added[400:], 0.0625)):
        assert bound * 0.999 < np.abs(part).max() <= bound
        assert part.std() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert abs(part.mean()) < 5 * part.std() / part.size**0.5
    alone = noise_of([100], examples=[1], dropout=False, neftune_alpha=5.0)
    np.testing.assert_array_equal(np.array(alone.embeddings(mx.zeros((100, WIDTH)))), added[400:])
    other = noise_of([400, 100], step=1, dropout=False, neftune_alpha=5.0)
    assert abs(np.corrcoef(added.ravel(), np.array(other.embeddings(mx.zeros((500, WIDTH)))).ravel())[0, 1]) < 0.03


def test_what_is_off_is_off() -> None:
    """Only dropout: embeddings pass untouched. Only NEFTune: layers drop nothing. Outside of a layer: nothing."""
    hidden = mx.random.normal((9, WIDTH))
    np.testing.assert_array_equal(np.array(noise_of([9]).embeddings(hidden)), np.array(hidden))
    assert (mask_of(noise_of([9], dropout=False, neftune_alpha=5.0), 9) == 1).all()


def test_settings_give_noise_to_training_alone() -> None:
    """A validation pass (no step) has none, nor has training without dropout and NEFTune."""
    batch = row_of([4])
    assert Settings(0, 64, dropout=0.5, neftune_alpha=5.0).noise(batch, None, [0]) is None
    assert Settings(0, 64).noise(batch, 3, [0]) is None
    first, second = (Settings(0, 64, dropout=0.5).noise(batch, step, [0]) for step in (3, 4))
    assert first is not None and second is not None
    assert (mask_of(first, 4) != mask_of(second, 4)).any()


def adapted(tiny_model: Make, kind: str, dropout: float) -> Any:
    model = tiny_model("qwen2")
    add_adapter(model, AdapterSpec(kind, num_layers=2, rank=4, scale=1.5, dropout=dropout), seed=1)
    if kind != "full":
        weights = {n: w + 0.1 * mx.random.normal(w.shape, key=mx.random.key(1)) for n, w in trainable(model).items()}
        set_weights(model, weights)
    return model


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_packing_does_not_change_a_models_dropout(tiny_model: Make, kind: str) -> None:
    """Hidden states of three examples packed and each alone, with dropout and NEFTune; without, they are others."""
    model = adapted(tiny_model, kind, 0.3)
    lengths = [12, 5, 20]
    on = {"dropout": True, "neftune_alpha": 5.0}
    batch = row_of(lengths)
    together = np.array(hidden_states(model, batch, noise=noise_of(lengths, **on)))
    parts = np.split(together, np.cumsum(lengths)[:-1])
    for example, part in enumerate(parts):
        row = RowBuilder()
        row.add(random_tokens(lengths[example], seed=example))
        noise = StepNoise(row.build(1), example_seeds(7, 0, [example]), **on)
        alone = np.array(hidden_states(model, row.build(1), noise=noise))
        np.testing.assert_allclose(alone, part, atol=HIDDEN, rtol=0)
    quiet = np.array(hidden_states(model, batch))
    for off in ({"dropout": False}, {"neftune_alpha": None}):  # either alone is felt, and the other is missed
        part = np.array(hidden_states(model, batch, noise=noise_of(lengths, **(on | off))))
        assert np.abs(quiet - part).max() > 0.1 and np.abs(together - part).max() > 0.1
    np.testing.assert_array_equal(np.array(hidden_states(model, batch)), quiet)  # nothing is left switched on


@pytest.mark.numeric
@pytest.mark.parametrize("level", [0, 1, 2])
def test_scored_tokens_draw_their_own_dropout_in_the_last_block(tiny_model: Make, level: int) -> None:
    """Computed alone, a few tokens in the middle of examples give what they give among all tokens."""
    model = adapted(tiny_model, "lora", 0.3)
    masks = [np.arange(n) % 4 == 3 for n in (12, 5, 20)]
    batch = pack_conversations((random_tokens(n, n), mask) for n, mask in zip((12, 5, 20), masks, strict=True))
    noise = StepNoise(batch, example_seeds(7, 0, [0, 1, 2]), dropout=True, neftune_alpha=5.0)
    among_all = np.array(hidden_states(model, batch, noise=noise)[batch.scored])
    levels = Levels(ALL if level else 0, ALL if level == 2 else 0)
    alone = np.array(hidden_states(model, batch, noise=noise, checkpoint=levels, only_scored=True))
    assert 0 < len(alone) < 10
    np.testing.assert_allclose(alone, among_all, atol=HIDDEN, rtol=0)


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_checkpointed_layers_draw_the_same_noise_twice(tiny_model: Make, kind: str) -> None:
    """The backward pass computes blocks again: other draws there would give other gradients.

    A second check by finite differences along the gradient itself, since both passes could be wrong together; with
    DoRA along its magnitudes, since A and B get no gradient through the norm (section 4.3 of the paper).
    """
    model = adapted(tiny_model, kind, 0.3)
    examples = [(random_tokens(n, n), np.ones(n, dtype=bool)) for n in (12, 5, 20)]
    batch = pack_conversations(examples)
    noise = StepNoise(batch, example_seeds(7, 0, [0, 1, 2]), dropout=kind != "full", neftune_alpha=5.0)

    def loss(checkpoint: bool) -> mx.array:
        return -batch_logprobs(model, batch, checkpoint=checkpoint, noise=noise).mean()

    value, expected = gradients(model, partial(loss, False))
    again, found = gradients(model, partial(loss, True))
    assert again == pytest.approx(value, rel=1e-6)
    assert distance(found, expected) < 1e-5

    weights = trainable(model)
    along = {n: mx.array(g) for n, g in found.items() if kind != "dora" or n.endswith(".m")}
    size = sum(float(mx.square(g).sum()) for g in along.values()) ** 0.5
    reach = 0.02 / size
    ends = []
    for sign in (1, -1):
        set_weights(model, {n: weights[n] + sign * reach / size * g for n, g in along.items()})
        ends.append(float(loss(True)))
    assert (ends[0] - ends[1]) / (2 * reach) == pytest.approx(size, rel=0.01)
