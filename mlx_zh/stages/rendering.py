"""The renderer that a recipe asks for: the date, the mode of thinking, and what is learned of reasoning."""

from __future__ import annotations

from typing import Any

from mlx_zh.corpus.render import Renderer
from mlx_zh.recipe import Recipe


def renderer_of(recipe: Recipe, tokenizer: Any) -> Renderer:
    """Messages to tokens as in training, evaluation and chat of this recipe.

    Raises TemplateError if the model's chat template has no such mode of thinking.
    """
    return Renderer(
        tokenizer,
        date_string=recipe.data.date_string,
        thinking=recipe.model.thinking,
        reasoning=recipe.data.reasoning,
    )
