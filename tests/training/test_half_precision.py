"""Training in float16: small gradients keep their digits, and an overflow is found and told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from objectives import conversations, sft
from oracles import distance
from project import Project, losses

from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.stages import half_precision
from mlx_zh.system import accelerator
from mlx_zh.training import step
from mlx_zh.training.objective import Row
from mlx_zh.training.optimizer import Arrays
from mlx_zh.training.step import loss_and_gradients, loss_scale

Make = Callable[..., Any]
LENGTHS = [20, 12, 25]


def model_of(tiny_model: Make, dtype: str) -> Any:
    """The same numbers in each type, those of float16, with a weak head: small gradients, like a trained model's."""
    model = tiny_model("llama", layers=2, dtype="float16")
    model.lm_head.weight = model.lm_head.weight * 0.05
    model.set_dtype(getattr(mx, dtype))
    add_adapter(model, AdapterSpec("lora", num_layers=2, rank=4), seed=1)
    return model


def gradients_of(model: Any, count: int) -> tuple[float, Arrays]:
    """Loss and gradients of a row that belongs to a step of `count` scored tokens."""
    objective = sft(conversations(LENGTHS))
    rows = [replace(row, count=count) for row in objective.rows(np.arange(len(LENGTHS)), 0)]
    rng = np.random.default_rng(5)
    weights = {
        name: array if name.endswith("lora_a") else mx.array(rng.normal(size=array.shape, scale=0.02), mx.float32)
        for name, array in trainable(model).items()
    }
    loss, _, gradients = loss_and_gradients(model, objective, rows, weights)
    return float(loss), {name: np.array(value) for name, value in gradients.items()}


@pytest.mark.numeric
def test_the_gradients_of_a_large_step_are_as_exact_as_those_of_a_small_one(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unscaled, most of them would be below 6e-8: with 131,072 scored tokens nothing is left."""
    loss, exact = gradients_of(model_of(tiny_model, "float32"), 131_072)
    found_loss, found = gradients_of(model_of(tiny_model, "float16"), 131_072)
    assert found_loss == pytest.approx(loss, rel=2e-3)
    assert distance(found, exact) < 0.03  # float16's 11 bits through two blocks; bfloat16 has an error of 0.1
    small = gradients_of(model_of(tiny_model, "float16"), 1)[1]
    assert distance({name: value * 131_072 for name, value in found.items()}, small) < 0.01
    monkeypatch.setattr(step, "loss_scale", lambda *_: 1.0)
    assert distance(gradients_of(model_of(tiny_model, "float16"), 131_072)[1], exact) > 0.5


@pytest.mark.parametrize(("count", "scale"), [(1, 1), (15, 1), (16, 2), (1000, 64), (2048, 256), (4095, 256)])
def test_the_scale_is_the_power_of_two_below_an_eighth_of_the_count(tiny_model: Make, count: int, scale: int) -> None:
    [row] = sft(conversations([9])).rows(np.array([0]), 0)
    rows: list[Row] = [replace(row, count=count)]
    assert loss_scale(model_of(tiny_model, "float16"), rows) == scale
    assert (
        loss_scale(model_of(tiny_model, "bfloat16"), rows) == loss_scale(model_of(tiny_model, "float32"), rows) == 1
    )
    assert loss_scale(model_of(tiny_model, "float16"), []) == 1


def test_the_scale_is_taken_out_exactly(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where nothing under- or overflows, scaled and unscaled are the same bits."""
    plain = gradients_of(model_of(tiny_model, "float32"), 40)
    monkeypatch.setattr(step, "loss_scale", lambda *_: 2.0**10)
    scaled = gradients_of(model_of(tiny_model, "float32"), 40)
    assert plain[0] == scaled[0]
    assert all(np.array_equal(plain[1][name], scaled[1][name]) for name in plain[1])


@pytest.mark.parametrize("block", [1, 2])
def test_the_block_that_overflows_is_named(tiny_model: Make, block: int) -> None:
    model = model_of(tiny_model, "float16")
    rows = sft(conversations(LENGTHS)).rows(np.arange(len(LENGTHS)), None)
    place = half_precision.overflow(model, rows)
    assert place is not None and place.startswith("a gradient or a logit exceeded 65,504")
    model.layers[block - 1].mlp.down_proj.linear.weight = mx.full((64, 96), 3e4, dtype=mx.float16)
    place = half_precision.overflow(model, rows)
    assert place is not None and place.startswith(f"the output of block {block} of 2 exceeded 65,504")
    assert place.text("zh").startswith(f"第 {block} 层（共 2 层）的输出超出了 float16 的最大值 65504。")


def test_other_types_are_not_searched(tiny_model: Make) -> None:
    rows = sft(conversations(LENGTHS)).rows(np.arange(len(LENGTHS)), None)
    assert half_precision.overflow(model_of(tiny_model, "bfloat16"), rows) is None


# Whole runs


@pytest.mark.numeric
def test_a_run_in_float16_learns_what_float32_learns(project: Project) -> None:
    """float16 rounds to 11 bits; the loss after six steps differs by a few thousandths."""
    exact = project.train("model.dtype=float32", "sft.learning_rate=1e-3", name="exact")
    half = project.train("model.dtype=float16", "sft.learning_rate=1e-3", name="half")
    assert losses(half) == pytest.approx(losses(exact), rel=5e-3)
    assert math.isfinite(losses(half, "grad_norm")[-1])


def test_repeated_overflow_ends_with_the_way_out(project: Project) -> None:
    """A learning rate of 1e5 makes the first update explode. Where is told once, not for every step."""
    result = project.sft("model.dtype=float16", "sft.learning_rate=1e5", "sft.max_skipped_steps=3")
    assert result.status == 2 and "3 steps in a row, up to step 4, were skipped" in result.err
    assert "model.dtype: float16 (use bfloat16)" in result.err
    assert result.out.count("exceeded 65,504, the largest number of float16") == 1
    assert "set model.dtype=bfloat16 and start over with --fresh" in result.out.replace("\n", " ")
    assert not (Path("runs/tiny/sft/adapters")).exists()


def test_a_search_that_the_gpu_gives_up_does_not_end_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place of the overflow is only advice. An error that is not the GPU's is a bug, and is not hidden."""

    def given_up(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(accelerator, "PAUSE", 0.0)
    monkeypatch.setattr(half_precision, "overflow", given_up)
    settings = ("model.dtype=float16", "sft.learning_rate=1e5", "sft.max_skipped_steps=3")
    message = "kIOGPUCommandBufferCallbackErrorInnocentVictim"
    result = project.sft(*settings)
    assert result.status == 2 and "3 steps in a row, up to step 4, were skipped" in result.err
    message = "something else"
    failed = project.sft("--fresh", *settings)
    assert failed.status == 70 and message in failed.err
