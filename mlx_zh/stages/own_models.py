"""Base models for a first recipe: which one suits this machine, which there are, and whether one is at hand."""

from __future__ import annotations

from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from mlx_zh.errors import MlxZhError, RecipeError
from mlx_zh.language.reader import reader_language, say
from mlx_zh.language.translation import in_readers_language
from mlx_zh.models import catalog
from mlx_zh.stages import interview
from mlx_zh.system import console

if TYPE_CHECKING:
    from mlx_zh.recipe import Memory, Recipe
    from mlx_zh.stages.tokenizer_cache import SnapshotTokenizer

# The largest model of one family that a machine with less memory than this trains with room for other programs.
_SUGGESTED = ((12e9, "qwen3-1.7b"), (24e9, "qwen3-4b"), (48e9, "qwen3-8b"))
_LARGEST = "qwen3-14b"


def suggested_model() -> str:
    """The short name of a base model that suits this machine's memory."""
    memory = psutil.virtual_memory().total
    return next((name for limit, name in _SUGGESTED if memory < limit), _LARGEST)


def fitting_memory(recipe: Recipe) -> Memory:
    """The fastest memory settings with which a Mac with this machine's memory trains the recipe.

    Those of the recipe for a model that is not in the table, and if none fit: then the run says so.
    """
    from mlx_zh.planning.search import cheapest
    from mlx_zh.stages.memory_check import mac, training_step

    config, settings = catalog.planned_config(recipe.model.path), recipe.memory
    if config is None:
        return settings
    machine = mac(psutil.virtual_memory().total)
    for stage in ("sft", "dpo"):
        if recipe.data.split(stage).train:
            fitting = cheapest(training_step(recipe, stage, config, machine), settings, machine.budget)
            settings = settings if fitting is None else fitting.settings
    return settings


def checked_model(answer: str) -> str:
    """A short name, a hub id, or the path of a folder or .gguf file. Raises RecipeError for anything else."""
    if catalog.known_model(answer) is not None or _exists(answer):
        return answer
    if catalog.HUB_ID.fullmatch(answer) and not answer.startswith((".", "~")):
        return answer
    raise RecipeError(
        say("init-bad-model", answer=answer, suggestion=in_readers_language(catalog.suggestion(answer)))
    )


def _exists(path: str) -> bool:
    try:
        return bool(path.strip()) and Path(expanduser(path)).exists()
    except (OSError, RuntimeError, ValueError):
        return False


def ask_model() -> str:
    """Show the table of models and ask for one; the suggested one is the default."""
    models = catalog.catalog()
    rows = []
    for number, (name, model) in enumerate(models.items(), start=1):
        suits = model.suits.zh if reader_language() == "zh" else model.suits.en
        rows.append((str(number), name, f"{model.size_gb:g} GB" if model.size_gb else "", suits))
    console.say()
    console.say(console.table(rows))
    default, names = suggested_model(), list(models)
    question = say("init-ask-model", default=default)
    return interview.ask(question, default, lambda answer: checked_model(interview.chosen(answer, names)))


def tokenizer_at_hand(model: str) -> SnapshotTokenizer | None:
    """The tokenizer of a model that is on this disk; None if anything would have to be downloaded."""
    from mlx_zh.models import wheel
    from mlx_zh.models.load import BUILT_IN, hub_ids
    from mlx_zh.recipe import Model
    from mlx_zh.stages.tokenizer_cache import open_tokenizer
    from mlx_zh.system import hub

    try:
        if model == BUILT_IN:
            return open_tokenizer(Model(path=model)) if wheel.location().is_file() else None
        if _exists(model):
            return open_tokenizer(Model(path=model))
        folder = hub.cached(model, ids=hub_ids(model))
        return open_tokenizer(Model(path=str(folder))) if folder is not None else None
    except MlxZhError:  # the run will say what is wrong with it; the samples are shown without it
        return None
