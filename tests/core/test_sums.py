"""Sums in groups against float64: over vocabularies that groups divide and that they do not, and over all entries."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tolerances import LARGEST, UNIT

from mlx_zh.core.logprobs import token_logprobs
from mlx_zh.core.sums import exponentials, log_sum_exp, norm, sum_last, total
from mlx_zh.system import device
from mlx_zh.training.optimizer import global_norm

VOCABULARIES = [1, 255, 256, 257, 49_152, 122_753, 128_256]
# Each of the three stages gives at most 256 terms of one sign to an accumulator. Such a sum of n terms is off by less
# than sqrt(n / 3) UNIT on average, the exponential by 2 UNIT, and stages add up as squares: 17 UNIT at LARGEST.
SUM = LARGEST * (256 / 3 + 4) ** 0.5 * UNIT  # 2.4e-6, as a share


def logits_of(vocabulary: int, spread: float) -> np.ndarray:
    return (spread * np.random.default_rng(vocabulary).normal(size=(5, vocabulary))).astype(np.float32)


def exact_log_sum_exp(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return np.logaddexp.reduce(wide, axis=-1)


@pytest.mark.parametrize("spread", [0.3, 2.0, 5.0])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_log_sum_exp_loses_no_small_terms(vocabulary: int, spread: float) -> None:
    """Its value is rounded too, by UNIT of its size. In one sum the error is 2e-4 with 128,256 words and spread 5."""
    logits = logits_of(vocabulary, spread)
    expected = exact_log_sum_exp(logits)
    bound = SUM + 2 * UNIT * np.abs(expected).max() + UNIT
    measured = np.array(log_sum_exp(mx.array(logits)), dtype=np.float64)
    assert np.abs(measured - expected).max() < bound
    values, divisor, normalizer = (np.array(array, dtype=np.float64) for array in exponentials(mx.array(logits)))
    assert np.abs(normalizer[:, 0] - expected).max() < bound
    probabilities = np.exp(logits - expected[:, None])
    # An exponential's argument is rounded by UNIT of the largest difference of two logits.
    span = 2 * UNIT * float(np.ptp(logits))
    assert np.abs(values / divisor / probabilities - 1).max() < SUM + span + 4 * UNIT


@pytest.mark.parametrize("count", [1, 256, 257, 70_001, 3_000_000])
def test_a_sum_of_equal_terms_is_their_count(count: int) -> None:
    """In one sum, 3,000,000 tenths are 5 % too few.

    Equal terms are rounded alike in every group, so errors do not cancel: each of three stages may be off by half of
    UNIT for each of its 256 terms.
    """
    worst = 3 * 128 * UNIT  # 2.3e-5
    tenths = mx.full((count,), 0.1)
    assert float(total(tenths)) == pytest.approx(np.float64(np.float32(0.1)) * count, rel=worst)
    assert float(norm(tenths)) == pytest.approx(float(np.float32(0.1)) * count**0.5, rel=worst)
    assert np.array(sum_last(mx.ones((3, count)))).tolist() == [count] * 3


def test_the_norm_of_a_large_gradient() -> None:
    """Six million weights, in float64 NumPy; MLX's own sum of squares is 1 % too small."""
    values = (np.random.default_rng(0).normal(size=(2000, 3000)) * 1e-3).astype(np.float32)
    expected = np.linalg.norm(values.astype(np.float64))
    assert float(global_norm({"embedding": mx.array(values)})) == pytest.approx(expected, rel=SUM)
    halves = {"a": mx.array(values[:700]), "b": mx.array(values[700:])}
    assert float(global_norm(halves)) == pytest.approx(expected, rel=SUM)


def head_of(vocabulary: int, trained: bool) -> tuple[nn.Linear, mx.array, mx.array]:
    rng = np.random.default_rng(1)
    head = nn.Linear(32, vocabulary, bias=False)
    head.weight = mx.array((rng.normal(size=(vocabulary, 32)) * 0.5).astype(np.float32))
    if not trained:
        head.freeze()
    hidden = mx.array(rng.normal(size=(6, 32)).astype(np.float32))
    return head, hidden, mx.array(rng.integers(0, vocabulary, 6).astype(np.int32))


@pytest.mark.numeric
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("vocabulary", [49_152, 122_753])
def test_log_probs_of_a_large_vocabulary(vocabulary: int, trained: bool) -> None:
    """Mean log-prob and gradient in float64. With one sum they were off by 3e-5 and 5e-6 or more.

    A logit of 32 products is off by sqrt(32 / 6) UNIT of about 3, and so is its mean over the vocabulary.
    """
    head, hidden, targets = head_of(vocabulary, trained)
    weight, wide = (np.array(array, dtype=np.float64) for array in (head.weight, hidden))
    logits = wide @ weight.T
    normalizer = np.logaddexp.reduce(logits, axis=-1)
    chosen = np.array(targets)
    expected = (logits[np.arange(6), chosen] - normalizer).mean()
    slope = (weight[chosen] - np.exp(logits - normalizer[:, None]) @ weight) / 6
    value, gradient = mx.value_and_grad(lambda h: token_logprobs(h, head, targets).mean())(hidden)
    bound = SUM + LARGEST * 3 * (32 / 6) ** 0.5 * UNIT + 2 * UNIT * np.abs(normalizer).max()  # 7e-6
    assert abs(float(value) - expected) < bound
    assert np.linalg.norm(np.array(gradient) - slope) < SUM * np.linalg.norm(slope)


@pytest.mark.oracle
@pytest.mark.parametrize("vocabulary", [49_152, 128_256])
def test_as_exact_as_pytorch(vocabulary: int) -> None:
    """Against PyTorch's float64; its own float32 may not be three times as exact."""
    torch = pytest.importorskip("torch")
    head, hidden, targets = head_of(vocabulary, trained=False)

    def theirs(dtype: object) -> tuple[float, np.ndarray]:
        states = torch.tensor(np.array(hidden), dtype=dtype, requires_grad=True)
        logits = states @ torch.tensor(np.array(head.weight), dtype=dtype).T
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(np.array(targets)).long())
        loss.backward()
        return loss.item(), states.grad.double().numpy()

    exact, exact_slope = theirs(torch.float64)
    single, single_slope = theirs(torch.float32)
    value, gradient = mx.value_and_grad(lambda h: -token_logprobs(h, head, targets).mean())(hidden)
    size = np.linalg.norm(exact_slope)
    assert abs(float(value) - exact) < 3 * abs(single - exact) + 4 * UNIT * exact
    error, their_error = (np.linalg.norm(np.array(g) - exact_slope) / size for g in (gradient, single_slope))
    assert error < 3 * their_error + 4 * UNIT


@pytest.mark.parametrize("grad", [True, False])
def test_the_kernels_of_gpus_take_their_own_sums(monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    """Without a rule for sums, log-probs come from MLX's softmax: the same but for what one sum loses."""
    head, hidden, targets = head_of(300, trained=False)
    run = lambda: mx.value_and_grad(lambda h: token_logprobs(h, head, targets, grad=grad).sum())(hidden)  # noqa: E731
    grouped = run() if grad else (token_logprobs(hidden, head, targets, grad=False), None)
    monkeypatch.setattr(device, "summed_at_once", lambda: 0)
    whole = run() if grad else (token_logprobs(hidden, head, targets, grad=False), None)
    np.testing.assert_allclose(np.array(grouped[0]), np.array(whole[0]), rtol=2e-6)
    if grad:
        np.testing.assert_allclose(np.array(grouped[1]), np.array(whole[1]), atol=2e-6)


def test_a_divisor_beyond_float16() -> None:
    """70,000 equal logits: the divisor is 70,000, which float16 cannot hold. Only the target's row is not 0."""
    head = nn.Linear(2, 70_000, bias=False)
    weight = np.zeros((70_000, 2), np.float32)
    weight[5] = [1.0, -2.0]
    head.weight = mx.array(weight).astype(mx.float16)
    head.freeze()
    hidden = mx.zeros((1, 2), dtype=mx.float16)
    gradient = mx.grad(lambda h: token_logprobs(h, head, mx.array([5])).sum())(hidden)
    np.testing.assert_allclose(np.array(gradient.astype(mx.float32)), [[1.0, -2.0]], rtol=2e-3)
