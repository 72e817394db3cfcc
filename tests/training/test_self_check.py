"""The self-check passes right numbers, and says of wrong ones what is wrong and in which segments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_zh.core import attention as core_attention
from mlx_zh.system import device
from mlx_zh.training import self_check
from mlx_zh.training.check_cases import LENGTHS, ON_CPU, ON_GPU, Case, cases
from mlx_zh.training.check_model import Pair
from mlx_zh.training.self_check import bounds, check

FUSED = mx.fast.scaled_dot_product_attention
PLAIN = Case("float32", 64, width=128)
Attention = Callable[[mx.array, mx.array, mx.array, float, Any], mx.array]


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """On a Mac too: what a device does wrong is simulated here."""
    with mx.stream(mx.cpu):
        yield


def attend(monkeypatch: pytest.MonkeyPatch, attention: Attention) -> None:
    """Let attention of the checked segments be as `attention` computes it. The reference has rows of 32 or 128."""

    def chosen(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None
    ) -> mx.array:
        if q.shape[2] in (32, 128):
            return FUSED(q, k, v, scale=scale, mask=mask)
        return attention(q, k, v, scale, mask)

    monkeypatch.setattr(core_attention, "_in_pieces", lambda queries: False)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", chosen)


def only(lengths: set[int], wrong: Attention) -> Attention:
    def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array:
        if q.shape[2] in lengths:
            return wrong(q, k, v, scale, mask)
        return FUSED(q, k, v, scale=scale, mask=mask)

    return attention


@pytest.mark.numeric
@pytest.mark.parametrize("case", ON_CPU, ids=str)
def test_this_machine_passes(case: Case) -> None:
    outcome = check(case)
    assert outcome.passed, outcome.problem
    assert len(outcome.differences) == 4


@pytest.mark.numeric
def test_whole_blocks_can_be_trained_too() -> None:
    assert check(replace(PLAIN, adapter="full")).passed


def test_the_cases_cover_what_differs_between_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cases() == ON_CPU
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    assert cases() == ON_GPU and len(set(map(str, ON_GPU))) == len(ON_GPU)
    assert LENGTHS == (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 100)
    assert {(c.dtype, c.head) for c in ON_GPU if c.bits is None} == {
        (dtype, head) for dtype in ("bfloat16", "float16", "float32") for head in (64, 128)
    }
    assert {(c.bits, c.group) for c in ON_GPU if c.bits} == {(4, 64), (4, 32)}
    assert {"lora", "dora"} == {c.adapter for c in ON_GPU} and any(c.checkpoint for c in ON_GPU)


def test_both_sides_have_the_same_weights() -> None:
    """A product with the quantized matrix is that with the dequantized one, but for float32 rounding."""
    pair = Pair(Case("float32", 64, bits=4, group=32, width=128))
    x = mx.random.normal((3, 128), key=mx.random.key(0))
    quantized, full = (m.model.layers[0].mlp.gate_proj(x) for m in (pair.model, pair.in_float32))
    assert float(mx.abs(quantized - full).max()) < 1e-5 * float(mx.abs(full).max())


def test_what_metal_refuses_is_the_result_of_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "the vector kernels do not produce a logsumexp; the VJP path requires the full-attention kernel"

    def refused(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array:
        if not isinstance(mask, mx.array):
            raise RuntimeError(message)
        return FUSED(q, k, v, scale=scale, mask=mask)

    attend(monkeypatch, only(set(range(1, 9)), refused))
    outcome = check(PLAIN)
    assert not outcome.passed and outcome.error == message and outcome.differences == ()
    assert outcome.problem == f"roots of 1-8 tokens, branches of 1-8 tokens: MLX reports {message}"
    assert outcome.problem.text("zh") == f"1-8 个词元的根段、1-8 个词元的分支段：MLX 报错 {message}"
    with device.unfused_attention():
        assert check(PLAIN).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mask_that_lets_tokens_see_what_follows(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    attend(monkeypatch, only({5, 16}, lambda q, k, v, scale, mask: FUSED(q, k, v, scale=scale, mask=None)))
    outcome = check(replace(PLAIN, dtype=dtype))
    assert not outcome.passed
    assert outcome.where == ("roots of 5, 16 tokens", "branches of 5, 16 tokens")
    assert outcome.largest.share > 5 if dtype == "float32" else outcome.largest.share > 1


def test_one_branch_token_that_does_not_see_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array:
        return FUSED(q, k[:, :, -1:], v[:, :, -1:], scale=scale, mask=None)

    attend(monkeypatch, only({1}, blind))
    outcome = check(replace(PLAIN, dtype="bfloat16"))
    assert not outcome.passed and outcome.where == ("branches of 1 tokens",)


@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, dtype="bfloat16")], ids=str)
def test_a_gradient_that_is_lost_in_short_segments(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    def stopped(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any) -> mx.array:
        return FUSED(mx.stop_gradient(q), mx.stop_gradient(k), mx.stop_gradient(v), scale=scale, mask=mask)

    attend(monkeypatch, only(set(range(1, 9)), stopped))
    outcome = check(case)
    assert [d.share <= 1 for d in outcome.differences] == [True, True, True, False]
    assert outcome.largest.quantity == "gradients" and "branches of 1-8 tokens" in outcome.where


def test_not_a_number_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    attend(monkeypatch, only({3}, lambda q, k, v, scale, mask: q * mx.nan))
    outcome = check(PLAIN)
    assert not outcome.passed and outcome.where == ("roots of 3 tokens", "branches of 3 tokens")


def test_bounds_follow_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits against 11 are a factor of 8. Float32 on CUDA and on an M5 has 11 bits in products, and two factors."""
    bf16, fp16 = bounds(Case("bfloat16", 64)), bounds(Case("float16", 64))
    assert bf16 == pytest.approx([8 * bound for bound in fp16])
    assert max(bounds(PLAIN)) < 2e-4
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    for architecture, shortened in (("applegpu_g13s", False), ("applegpu_g16p", False), ("applegpu_g17s", True)):
        monkeypatch.setattr(mx, "device_info", lambda name=architecture: {"architecture": name})
        assert device.shortens_float32() is shortened
        assert (bounds(PLAIN)[0] == pytest.approx(2**0.5 * fp16[0])) is shortened
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert not device.shortens_float32()
    monkeypatch.delenv("MLX_ENABLE_TF32")
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert device.shortens_float32()


def test_the_switch_holds_only_inside_its_context() -> None:
    assert device.max_masked_queries() == 0
    with device.unfused_attention():
        with device.unfused_attention(False):
            assert device.max_masked_queries() > 10**6
        assert device.max_masked_queries() > 10**6
    assert device.max_masked_queries() == 0


def test_a_long_error_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> mx.array:
        raise ValueError("x" * 10_000 + "\nmore")

    attend(monkeypatch, fails)
    outcome = self_check.check(PLAIN)
    assert outcome.error == "x" * 200 and outcome.where == ("roots of 1-100 tokens", "branches of 1-100 tokens")
