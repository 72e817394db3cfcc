"""The recipe: a YAML file that describes a whole run. Every value is checked against a type.

Key names are those of LLaMA-Factory, TRL and mlx-lm where these agree. Unknown keys are errors. Any key can be
overridden on the command line with `section.key=value`.
"""

from mlx_zh.recipe.data import Deduplicate, Quality, filled, placeholders
from mlx_zh.recipe.loading import load_recipe
from mlx_zh.recipe.model import Lora, Model
from mlx_zh.recipe.recipe import Recipe
from mlx_zh.recipe.results import ADAPTER_FORMATS, Evaluate, Export, Rounds
from mlx_zh.recipe.section import Section
from mlx_zh.recipe.sources import DataSet, Select, Source, Sources, Split
from mlx_zh.recipe.training import Checkpoint, Dpo, Memory, Training

__all__ = [
    "ADAPTER_FORMATS",
    "Checkpoint",
    "DataSet",
    "Deduplicate",
    "Dpo",
    "Evaluate",
    "Export",
    "Lora",
    "Memory",
    "Model",
    "Quality",
    "Recipe",
    "Rounds",
    "Section",
    "Select",
    "Source",
    "Sources",
    "Split",
    "Training",
    "filled",
    "load_recipe",
    "placeholders",
]
