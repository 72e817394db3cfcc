"""The text that a recovery adjusts a quantized model to: rows that the adapter was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from mlx_zh.core.packing import PackedBatch
from mlx_zh.corpus.prepared import Corpus
from mlx_zh.corpus.render import Renderer
from mlx_zh.errors import DataError
from mlx_zh.models.export.fidelity import Example, held_out
from mlx_zh.recipe import Recipe
from mlx_zh.stages.data import prepare_stage
from mlx_zh.stages.rendering import renderer_of

_TOKENS = 8192
_LARGEST_ROW = 1024  # tokens
_ENOUGH = 4096  # examples: with more of them, the first ones are taken


def calibration_rows(recipe: Recipe, tokenizer: Any) -> tuple[PackedBatch, ...]:
    """About 8,000 tokens of the training data of SFT, else of DPO's preferred answers.

    The validation data is left out, since the result is measured on it. Raises DataError if there is none.
    """
    renderer = renderer_of(recipe, tokenizer)
    examples: Sequence[Example] = list(islice(_training(recipe, renderer), _ENOUGH))
    if not examples:
        raise DataError(
            "export.recover and mixed bits need text that the adapter was trained on: give the recipe data.sft.train "
            "or data.dpo.train, or write the model with export.bits=8 and without export.recover."
        )
    row_tokens = min(recipe.memory.micro_tokens, _LARGEST_ROW)
    return held_out(examples, max_tokens=_TOKENS, row_tokens=row_tokens).rows


def _training(recipe: Recipe, renderer: Renderer) -> Iterator[Example]:
    if recipe.data.sft.train:
        for rendered in prepare_stage(recipe, "sft", renderer).conversations("train"):
            yield rendered.tokens, rendered.trained
    elif recipe.data.dpo.train:
        for prompt, response in _preferred(recipe, prepare_stage(recipe, "dpo", renderer)):
            tokens = np.concatenate([prompt, response])
            yield tokens, np.arange(len(tokens)) >= len(prompt)


def _preferred(recipe: Recipe, corpus: Corpus) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The prompts and preferred answers of DPO's data, or the good ones of KTO's."""
    if recipe.dpo.unpaired:
        return ((a.prompt, a.response) for a in corpus.answers("train") if a.label)
    return ((pair.prompt, pair.chosen) for pair in corpus.pairs("train"))
