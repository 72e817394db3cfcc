"""What llama.cpp's importance matrix is measured on: base + adapter, on text that the adapter was trained on."""

from __future__ import annotations

from pathlib import Path

from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.export.fidelity import HeldOut
from mlx_zh.models.export.importance import Importance, measure_importance
from mlx_zh.recipe import Recipe
from mlx_zh.stages.calibration import calibration_rows
from mlx_zh.stages.run_models import open_model
from mlx_zh.system import console


def measured_importance(recipe: Recipe, adapter: Path) -> Importance:
    """The importance of each input of each matrix of base + adapter.

    Raises DataError without training data, ModelError, AdapterError, AcceleratorError.
    """
    loaded = open_model(recipe)
    text = HeldOut(calibration_rows(recipe, loaded.tokenizer))
    load_adapter(loaded.model, adapter)
    loaded.model.eval()
    console.say("Measuring how large the inputs of each matrix are ...")
    return measure_importance(loaded.model, text)
