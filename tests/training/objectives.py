"""SFT objectives over random conversations, for the tests of what runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
from oracles import random_tokens

from mlx_zh.corpus.rendered import Rendered
from mlx_zh.training.objective import Settings
from mlx_zh.training.sft_objective import SftObjective

Example = tuple[np.ndarray, np.ndarray]


def conversations(lengths: list[int], seed: int = 0) -> list[Example]:
    """(tokens, trained) of the given lengths, the latter half of each trained."""
    return [
        (random_tokens(length, seed=100 * seed + index), np.arange(length) >= length // 2)
        for index, length in enumerate(lengths)
    ]


def sft(examples: list[Example], objective: type[SftObjective] = SftObjective, **settings: Any) -> SftObjective:
    settings = {"seed": 3, "micro_tokens": 64} | settings
    return objective([Rendered(tokens, trained, False) for tokens, trained in examples], Settings(**settings))
