"""The model that answers in a chat or behind a server: that of a recipe, or any other, with its own renderer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_zh.chatting.chatbot import Chatbot, context_length
from mlx_zh.corpus.render import Renderer
from mlx_zh.models.generate import Sampling
from mlx_zh.models.load import load_model
from mlx_zh.stages.rendering import renderer_of
from mlx_zh.system import console

if TYPE_CHECKING:
    from mlx_zh.recipe import Recipe


def open_chatbot(
    target: str,
    recipe: Recipe | None,
    sampling: Sampling,
    *,
    hub: str | None = None,
    max_context: int | None = None,
    seed: int | None = None,
) -> Chatbot:
    """Load the base of `recipe`, or without one the model that `target` names; no adapter is loaded yet.

    `hub` is taken before the recipe's, `max_context` is in tokens. Raises ModelError, DownloadError, TemplateError.
    """
    bar = console.DownloadBar()
    if recipe:
        source = recipe.model
        loaded = load_model(
            source.path,
            hub=hub or source.hub,
            revision=source.revision,
            dtype=source.dtype,
            quantize=(source.quantize.bits, source.quantize.group_size) if source.quantize else None,
            progress=bar,
            reading=console.say_reading,
        )
        renderer = renderer_of(recipe, loaded.tokenizer)
        renderer.check_template()
    else:
        loaded = load_model(target, hub=hub or "auto", progress=bar, reading=console.say_reading)
        renderer = Renderer(loaded.tokenizer)
    return Chatbot(loaded, renderer, context_length(loaded.config, max_context), sampling, seed=seed)
