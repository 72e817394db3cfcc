"""The renderer that a recipe asks for: the date, the mode of thinking, and what is learned of reasoning."""

from __future__ import annotations

from typing import Any

from mlx_zh.corpus.render import Renderer
from mlx_zh.errors import TemplateError
from mlx_zh.language.notice import Notice
from mlx_zh.recipe import Recipe
from mlx_zh.stages.own_models import tokenizer_at_hand


def renderer_of(recipe: Recipe, tokenizer: Any) -> Renderer:
    """Messages and raw text to tokens as in training, evaluation and chat of this recipe.

    Raises TemplateError if the model's chat template has no such mode of thinking.
    """
    return Renderer(
        tokenizer,
        date_string=recipe.data.date_string,
        thinking=recipe.model.thinking,
        reasoning=recipe.data.reasoning,
        raw_text=True,
    )


def thinking_problem(recipe: Recipe) -> str | None:
    """Why the model's chat template cannot do what model.thinking says; None if it can, or is not on this disk."""
    if recipe.model.thinking == "auto":
        return None
    tokenizer = tokenizer_at_hand(recipe.model.path)
    if tokenizer is None:
        return None
    try:
        renderer_of(recipe, tokenizer)
    except TemplateError as error:
        return str(error)
    return None


def thinking_text(recipe: Recipe) -> Notice:
    """The mode of thinking, and what is learned of reasoning, for the user."""
    return Notice("thinking-mode", mode=recipe.model.thinking, reasoning=recipe.data.reasoning)


def is_default(recipe: Recipe) -> bool:
    """Whether the recipe says nothing about thinking."""
    return (recipe.model.thinking, recipe.data.reasoning) == ("auto", "learn")
