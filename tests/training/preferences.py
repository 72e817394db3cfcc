"""Random preference pairs and DPO objectives over them, for the tests of what runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from oracles import following_logprobs, random_tokens

from mlx_zh.corpus.rendered import RenderedPair
from mlx_zh.recipe import Dpo
from mlx_zh.training.dpo_objective import DpoObjective
from mlx_zh.training.objective import Settings
from mlx_zh.training.reference import Reference, ReferenceStore

# (prompt, shared beginning of the responses, rest of chosen, rest of rejected)
SIZES = [(6, 0, 5, 9), (3, 4, 2, 1), (11, 0, 8, 3), (1, 2, 6, 6), (8, 0, 1, 1), (5, 7, 3, 12), (9, 0, 4, 2)]


def pair(prompt: int, shared: int, chosen: int, rejected: int, seed: int = 0) -> RenderedPair:
    root, both = random_tokens(prompt, seed=10 * seed), random_tokens(shared, seed=10 * seed + 1)
    branches = [random_tokens(chosen, seed=10 * seed + 2), random_tokens(rejected, seed=10 * seed + 3)]
    branches[1][0] = (branches[0][0] + 1) % 300  # they part here
    return RenderedPair(root, *(np.concatenate([both, branch]) for branch in branches))


def pairs(sizes: list[tuple[int, int, int, int]] = SIZES) -> list[RenderedPair]:
    return [pair(*size, seed=index + 1) for index, size in enumerate(sizes)]


def own_sums(model: Any, one: RenderedPair, limit: int | None = None) -> tuple[mx.array, mx.array]:
    """Summed log-probs of the two full sequences' first `limit` response tokens, by the model's own forward."""
    found = []
    for response in (one.chosen, one.rejected):
        logprobs = following_logprobs(model, np.concatenate([one.prompt, response]))
        found.append(logprobs[len(one.prompt) - 1 :][: limit or len(response)].sum())
    return found[0], found[1]


def reference_of(model: Any, found: list[RenderedPair], folder: Path, row_tokens: int = 512) -> np.ndarray:
    reference = Reference(ReferenceStore(folder / "reference.txt"), found)
    for _ in reference.compute(model, row_tokens=row_tokens):
        pass
    return reference.logprobs(found)


def dpo(
    found: list[RenderedPair], reference: np.ndarray | None, settings: dict[str, Any] | None = None, **section: Any
):
    return DpoObjective(
        found, reference, Dpo(**section), Settings(**({"seed": 3, "micro_tokens": 64} | (settings or {})))
    )
