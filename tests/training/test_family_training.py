"""Every family is trained: its loss falls, rows and checkpointing change nothing, and a stopped run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import FAMILIES, family_model
from lab import assert_same, files_in, finish, lines
from objectives import conversations, sft
from oracles import distance
from tolerances import GRADIENT

from mlx_zh.core import expert_loads
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.recipe import Checkpoint, Training
from mlx_zh.training import checkpoints
from mlx_zh.training.loop import Loop
from mlx_zh.training.step import loss_and_gradients

NEW = [name for name in FAMILIES if name not in ("llama", "mistral", "qwen2", "qwen3")]
EXAMPLES = conversations([30, 14, 5, 21, 9, 12])  # longer and shorter than Gemma's window
EXPERTS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDER = 4.0  # as in the tests of the forward pass


def adapted(name: str) -> Any:
    model = family_model(name)
    targets = EXPERTS if name == "qwen3_moe" else None
    add_adapter(model, AdapterSpec("lora", 3, rank=4, targets=targets), seed=1)
    return model


def loop_of(name: str, folder: Path, stop_after: int | None = None, steps: int = 20) -> Loop:
    loop = Loop(
        model=adapted(name),
        objective=sft(EXAMPLES, micro_tokens=40, checkpoint=True),
        validation=None,
        section=Training(epochs=10.0, max_steps=steps, batch_size=3, learning_rate=1e-2, warmup_steps=2),
        checkpoint=Checkpoint(every_steps=4),
        files=files_in(folder),
        seed=11,
        key="k",
        loraplus_ratio=1.0,
        save_best=lambda _: None,
    )
    loop.stop = lambda: stop_after is not None and loop.progress.step >= stop_after
    return loop


@pytest.mark.parametrize("name", NEW)
def test_the_loss_falls(name: str, tmp_path: Path) -> None:
    loop = loop_of(name, tmp_path)
    finish(loop)
    losses = [line["loss"] for line in lines(loop)]
    assert len(losses) == 20 and np.mean(losses[-4:]) < 0.85 * np.mean(losses[:4])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("gemma3_text", "qwen3_5_moe") else pytest.mark.thorough)
        for name in NEW
    ],
)
def test_a_stopped_run_goes_on(name: str, tmp_path: Path) -> None:
    """9 steps at once and in two parts: the same metrics, weights and moments, bit for bit."""
    whole = loop_of(name, tmp_path / "whole", steps=9)
    finish(whole)
    parts = loop_of(name, tmp_path / "parts", stop_after=7, steps=9)
    finish(parts)
    resumed = loop_of(name, tmp_path / "parts", steps=9)
    found, remarks = checkpoints.load_newest(resumed.files.checkpoints)
    assert found is not None and remarks == []
    resumed.resume(found)
    finish(resumed)
    assert_same(whole, resumed)


@pytest.mark.parametrize("name", NEW)
def test_rows_and_checkpointing_change_nothing(name: str) -> None:
    model = adapted(name)
    for module in model.modules():
        if "lora_b" in module:  # as after some steps
            module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(3)) * 0.1
    found: list[tuple[float, dict[str, Any]]] = []
    for settings in ({"micro_tokens": 200}, {"micro_tokens": 1}, {"micro_tokens": 40, "checkpoint": True}):
        objective = sft(EXAMPLES, **settings)
        rows = objective.rows(np.arange(len(EXAMPLES)), 1)
        loss, _, gradients = loss_and_gradients(model, objective, rows, trainable(model))
        found.append((float(loss), gradients))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert distance(gradients, found[0][1]) < WIDER * GRADIENT


def test_the_load_of_the_experts_is_in_the_metrics(tmp_path: Path) -> None:
    loop = loop_of("qwen3_moe", tmp_path, steps=1)
    finish(loop)
    line = lines(loop)[0]
    assert 1.0 < line["experts/busiest"] <= 8 / 2 and 0.0 <= line["experts/idle"] < 1.0


def test_a_load_counted_by_hand() -> None:
    """4 tokens, 2 of 4 experts each: expert 0 gets all, 1 three, 2 one and 3 none: shares 1/2, 3/8, 1/8 and 0."""

    class Mlp(dict):  # type: ignore[type-arg]
        top_k = 2

        def gate(self, x: mx.array) -> mx.array:
            return x

    logits = mx.array([[9.0, 5, 1, 0], [9, 5, 1, 0], [9, 5, 1, 0], [9, 1, 5, 0]])
    mlp = Mlp(switch_mlp=None, gate=None)
    with expert_loads.recording() as loads:
        expert_loads.record(mlp, logits)
        expert_loads.record({}, logits)  # an MLP without experts
    expert_loads.record(mlp, logits)  # nobody listens
    assert [load.tolist() for load in loads] == [[0.5, 0.375, 0.125, 0.0]]
    sums = {name: float(value) for name, value in expert_loads.sums(loads, 10).items()}
    assert expert_loads.figures(sums, 10) == {"experts/busiest": 2.0, "experts/idle": 0.25}
    assert expert_loads.sums([], 10) == {} and expert_loads.figures({}, 10) == {}
    assert expert_loads.no_sums(family_model("llama")) == {}
    assert expert_loads.no_sums(family_model("qwen3_moe")).keys() == sums.keys()


def test_a_router_never_changes(tmp_path: Path) -> None:
    loop = loop_of("qwen3_moe", tmp_path, steps=3)
    before = [np.array(layer.mlp.gate.weight) for layer in loop.model.layers if "gate" in layer.mlp]
    finish(loop)
    after = [np.array(layer.mlp.gate.weight) for layer in loop.model.layers if "gate" in layer.mlp]
    assert len(before) == 2 and all(map(np.array_equal, before, after))
    experts = [w for name, w in loop.weights.items() if "switch_mlp.up_proj.lora_b" in name]
    assert experts and all(np.abs(np.array(w)).max() > 0 for w in experts)
