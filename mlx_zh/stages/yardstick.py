"""The predictions of base + adapter on held-out text; every fused model is compared with them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from mlx_zh.corpus.conversation import Document, Message
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.rendered import Rendered
from mlx_zh.errors import DataError, DownloadError, first_line
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.export import fidelity, in_llama_cpp
from mlx_zh.models.export.held_out import bundled_conversations
from mlx_zh.models.load import load_model
from mlx_zh.recipe import Recipe
from mlx_zh.stages.data import prepare_stage
from mlx_zh.stages.rendering import renderer_of
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.stages.run_models import open_model
from mlx_zh.system import console

HELD_OUT_TOKENS = 4096
_LARGEST_ROW = 1024  # tokens


@dataclass(frozen=True)
class Yardstick:
    """The predictions of base + adapter, and what is needed to compare another model with them."""

    recipe: Recipe
    text: fidelity.HeldOut
    tuned: fidelity.Predictions
    perplexity: float  # of base + adapter
    moved: float  # KL(base + adapter || base), in nats per token
    probes: tuple[tuple[int, ...], ...]  # the token ids of each bundled conversation

    def measure(self, path: Path) -> tuple[fidelity.Fidelity, list[Notice]]:
        """Load a written model as a user would; returns its fidelity, and a warning if its tokenizer differs."""
        loaded = load_model(str(path), dtype=self.recipe.model.dtype)
        distance = fidelity.distance(self.tuned, self.text.predictions(loaded.model), self.text.targets)
        measured = fidelity.Fidelity(
            self.text.targets.size, distance.kl, distance.top1, self.perplexity, distance.perplexity, self.moved
        )
        probes = [_tokens(r) for r in _bundled(renderer_of(self.recipe, loaded.tokenizer))]
        different = sum(before != after for before, after in zip_longest(self.probes, probes))
        warning = Notice("fused-tokenizer-differs", count=different, texts=len(probes))
        return measured, [warning] if different else []

    def measure_in_llama_cpp(self, path: Path) -> fidelity.Distance | None:
        """How far a GGUF file is from base + adapter in llama.cpp; None if its package is missing or fails."""
        if not in_llama_cpp.is_installed():
            return None
        console.say("Running the GGUF file in llama.cpp ...")
        try:
            return in_llama_cpp.measure(path, self.text, self.tuned)
        except Exception as error:  # the package raises errors of many types, also while it is imported
            console.warn(Notice("llama-cpp-failed", reason=first_line(error)))
            return None


def measure_tuned(recipe: Recipe, adapter: Path) -> Yardstick | None:
    """Run the base and base + adapter over the recipe's validation data, or else over the bundled text.

    None, with a warning, if the chat template renders none of it. Raises ModelError, AdapterError, TemplateError.
    """
    loaded = open_model(recipe)
    renderer = renderer_of(recipe, loaded.tokenizer)
    bundled = _bundled(renderer)
    examples = [e for e in _validation(recipe, renderer) or bundled if e.trained[1:].any()]
    if not examples:
        console.warn(Notice("fused-nothing-rendered"))
        return None
    text = fidelity.held_out(
        [path for e in examples for path in e.paths()],
        max_tokens=HELD_OUT_TOKENS,
        row_tokens=min(recipe.memory.micro_tokens, _LARGEST_ROW),
    )
    base = text.predictions(loaded.model)
    # Full fine-tuning replaces the weights of these modules, so keep a copy of the base's head.
    base = fidelity.Predictions(base.hidden, copy.copy(base.head))
    load_adapter(loaded.model, adapter)
    loaded.model.eval()
    tuned = text.predictions(loaded.model)
    moved = fidelity.distance(tuned, base, text.targets).kl
    perplexity = fidelity.distance(tuned, tuned, text.targets).perplexity
    return Yardstick(recipe, text, tuned, perplexity, moved, tuple(map(_tokens, bundled)))


def _validation(recipe: Recipe, renderer: Renderer) -> Sequence[Rendered]:
    """The validation examples of SFT if SFT ran in this folder, so that they are already prepared; else none."""
    if not RunFolder.of(recipe).stage("sft").path.is_dir() or not recipe.data.sft.train:
        return []
    try:
        return list(prepare_stage(recipe, "sft", renderer).conversations("validation"))
    except (DataError, DownloadError) as error:
        console.warn(Notice("validation-data-unreadable", reason=str(error)))
        return []


def _bundled(renderer: Renderer) -> list[Rendered]:
    """The bundled conversations, or their texts alone if the model has no chat template."""
    if not renderer.has_template:
        texts = ["\n\n".join(text for _, text in turns) for turns in bundled_conversations()]
        return [piece for pieces in renderer.documents([Document(text) for text in texts]) for piece in pieces]
    conversations = [[Message(role, text) for role, text in turns] for turns in bundled_conversations()]
    return [rendered for rendered in renderer.conversations(conversations) if rendered is not None]


def _tokens(rendered: Rendered) -> tuple[int, ...]:
    return tuple(rendered.tokens.tolist())
