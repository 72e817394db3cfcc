"""A run of a tiny model with two adapters, as it lies in a project folder, for the tests of the Talk page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zh.models.adapters.files import save_adapter
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.load import load_model


def make_run(model: Path, project: Path, name: str = "tiny", **more: Any) -> Path:
    """A run folder with a recipe and the adapters sft and dpo, which make the model write different texts."""
    run = project / "runs" / name
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(
        f"name: {name}\nruns: runs\nmodel:\n  path: {model}\ndata:\n  system: 请简短。\n"
        "evaluate:\n  prompts:\n  - 你好\n  - prompt: 再见\n    expect: 再\n",
        encoding="utf-8",
    )
    (run / "manifest.json").write_text("{}")  # by which a folder is known as a run
    for number, stage in enumerate(("sft", "dpo")):
        loaded = load_model(str(model)).model
        spec = AdapterSpec(kind="lora", num_layers=2, rank=4, scale=20.0)
        add_adapter(loaded, spec, seed=1)
        mx.random.seed(5 + number)
        weights = {key: mx.random.normal(array.shape) for key, array in trainable(loaded).items()}
        save_adapter(run / stage / "adapters", weights, spec, {})
    return run
