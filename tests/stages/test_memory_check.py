"""What the user is told where memory is short."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_zh.planning.memory import Estimate
from mlx_zh.recipe import load_recipe
from mlx_zh.stages import memory_check

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "quantization": {"bits": 4, "group_size": 64},
}


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_every_part_of_an_estimate_has_a_name_in_both_languages(tmp_path: Path, kind: str, stage: str) -> None:
    """Parts below 50 MB are not named, and those of a tiny model all are; an 8B model's are not."""
    path = tmp_path / "recipe.yaml"
    path.write_text("name: n\nmodel: {path: m}\ndata: {sft: {train: [a]}, dpo: {train: [b]}}\n", encoding="utf-8")
    recipe = load_recipe(str(path), [f"lora.type={kind}"])
    machine = memory_check.mac(16 * 2**30)
    step = memory_check.training_step(recipe, stage, CONFIG, machine)
    parts = step.memory(recipe.memory).parts
    assert {"weights", "adapters", "optimizer", "gradients"} <= parts.keys()
    large = Estimate("backward", {name: 1e9 for name in parts})
    told = memory_check.shortage(stage, large, machine)
    assert told.text("en").count("1.0") == len(parts) and "adapters 1.0" in told.text("en")
    assert "适配器 1.0" in told.text("zh") and "adapters" not in told.text("zh")
