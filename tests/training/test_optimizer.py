"""AdamW and clipping against PyTorch, and state that survives a round trip to disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from oracles import distance

from mlx_zh.training import optimizer as optimizer_module
from mlx_zh.training.optimizer import Arrays, GroupedAdamW, global_norm

SHAPES = {"a.lora_a": (6, 4), "a.lora_b": (4, 5), "a.m": (5,), "norm.weight": (7,)}


def values(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def arrays(numbers: dict[str, np.ndarray]) -> Arrays:
    return {name: mx.array(number) for name, number in numbers.items()}


def test_first_step_by_hand() -> None:
    """From w = 2, g = 0.5, rate 0.1, decay 0.01: m / (1 - b1) = g and v / (1 - b2) = g^2, so Adam moves by
    0.1 * 0.5 / (0.5 + 1e-8) = 0.1; decay by 0.1 * 0.01 * 2 = 0.002. Together 1.898; a vector decays not: 1.9.
    """
    weights = {"w": mx.full((1, 1), 2.0), "b": mx.full((1,), 2.0)}
    optimizer = GroupedAdamW(weights, weight_decay=0.01, betas=(0.9, 0.999))
    moved = optimizer.update(weights, {"w": mx.full((1, 1), 0.5), "b": mx.full((1,), 0.5)}, 0.1)
    assert moved["w"].item() == pytest.approx(1.898, rel=1e-6)
    assert moved["b"].item() == pytest.approx(1.9, rel=1e-6)
    assert weights["w"].item() == 2.0


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for a CPU with g++")
def test_the_update_in_one_kernel_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: compiled, with and without a factor of the gradients. A fused product and sum rounds once less."""

    def moved() -> tuple[Arrays, Arrays]:
        weights = arrays(values(0))
        optimizer = GroupedAdamW(weights, weight_decay=0.1, betas=(0.8, 0.95), loraplus_ratio=8.0)
        for step, scale in enumerate((None, mx.array(0.3), None)):
            weights = optimizer.update(weights, arrays(values(10 + step)), 0.02 * (step + 1), scale)
        return weights, optimizer.arrays()

    weights, state = moved()
    monkeypatch.setattr(optimizer_module.device, "compiles", lambda: True)
    compiled_weights, compiled_state = moved()
    assert compiled_state["step"].item() == state["step"].item() == 3
    assert distance(compiled_weights, weights) < 1e-6
    assert all(distance({"": compiled_state[name]}, {"": state[name]}) < 1e-6 for name in state if name != "step")


@pytest.mark.oracle
@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_five_steps_equal_pytorch(ratio: float) -> None:
    """torch.optim.AdamW in float64 with one group for each rate and decay, at rates that change from step to step."""
    torch = pytest.importorskip("torch")
    weights = arrays(values(0))
    ours = GroupedAdamW(weights, weight_decay=0.1, betas=(0.8, 0.95), loraplus_ratio=ratio)
    theirs = {n: torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for n, v in values(0).items()}
    groups = [
        {"params": [theirs["a.lora_a"]], "weight_decay": 0.1, "ratio": 1.0},
        {"params": [theirs["a.lora_b"]], "weight_decay": 0.1, "ratio": ratio},
        {"params": [theirs["a.m"], theirs["norm.weight"]], "weight_decay": 0.0, "ratio": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-8)
    for step in range(5):
        rate = 0.02 * (step + 1)
        found = values(10 + step, scale=10.0**-step)
        for name, tensor in theirs.items():
            tensor.grad = torch.tensor(found[name], dtype=torch.float64)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        optimizer.step()
        weights = ours.update(weights, arrays(found), rate)
    assert list(weights) == list(SHAPES)
    assert distance(weights, {n: t.detach().numpy() for n, t in theirs.items()}) < 2e-6


def test_state_goes_through_a_file_bit_for_bit(tmp_path: Path) -> None:
    """Three steps, save, load into a fresh optimizer, three more: the same bits as six in one go."""

    def steps(optimizer: GroupedAdamW, weights: Arrays, numbers: range) -> Arrays:
        for number in numbers:
            weights = optimizer.update(weights, arrays(values(number)), 0.01 * (number + 1))
        return weights

    def fresh() -> Any:
        return GroupedAdamW(arrays(values(99)), weight_decay=0.1, betas=(0.9, 0.999), loraplus_ratio=4.0)

    whole = fresh()
    expected = steps(whole, arrays(values(0)), range(6))

    half = fresh()
    weights = steps(half, arrays(values(0)), range(3))
    mx.save_safetensors(str(tmp_path / "state.safetensors"), half.arrays())
    again = fresh()
    again.load(mx.load(str(tmp_path / "state.safetensors")))
    assert int(again.arrays()["step"]) == 3
    found = steps(again, weights, range(3, 6))
    for one, other in ((found, expected), (again.arrays(), whole.arrays())):
        assert one.keys() == other.keys()
        assert all(np.array(one[n]).tobytes() == np.array(other[n]).tobytes() for n in one)


def test_global_norm_by_hand() -> None:
    """sqrt(3^2 + 4^2 + 12^2) = 13."""
    assert global_norm({"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0], [12.0]])}).item() == 13.0


def test_global_norm_of_half_precision() -> None:
    """300^2 overflows float16; 1000 entries of 300 have the norm 300 sqrt(1000)."""
    found = global_norm({"a": mx.full((1000,), 300.0, dtype=mx.float16)})
    assert found.dtype == mx.float32
    assert found.item() == pytest.approx(300 * 1000**0.5, rel=1e-6)
