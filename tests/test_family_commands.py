"""A whole run of two families that differ most from Llama: training, answers, exports, and a refusal before them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project, losses

from mlx_zh import fuse


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe"])
def test_a_family_from_training_to_export(project: Project, model_folder: Callable[..., Path], family: str) -> None:
    project.recipe["model"]["path"] = str(model_folder(family))
    project.recipe["export"] = {"formats": ["hf", "peft"]}
    project.write_recipe()
    found = losses(project.train("sft.max_steps=4"))
    assert len(found) >= 4 and found[-1] < found[0]
    result = project.run(fuse.main)
    assert result.status == 0, result
    assert Path("runs/tiny/fused/hf/model.safetensors").is_file()
    assert Path("runs/tiny/fused/peft/adapter_model.safetensors").is_file()

    refused = project.sft("name=other", "export.formats=[gguf]")
    assert refused.status != 0 and f"cannot be written for models of type '{family}'" in refused.err
    assert not Path("runs/other/sft/metrics.jsonl").exists()
