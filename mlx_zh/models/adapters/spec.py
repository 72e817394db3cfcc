"""Which weights of a model are trained (LoRA, DoRA or whole blocks), and the names of the adapter's files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ADAPTER_FILE = "adapters.safetensors"  # mlx-lm's weights
PEFT_FILE = "adapter_model.safetensors"  # PEFT's weights
CONFIG_FILE = "adapter_config.json"  # the settings, in both formats

# PEFT's `modules_to_save` that can be trained -> the names of their weights
SAVED = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}


def saved_of(weights: Iterable[str]) -> tuple[str, ...]:
    """The keys of SAVED whose weights are among these names."""
    names = set(weights)
    return tuple(module for module, name in SAVED.items() if name in names)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Which weights are trained, and how."""

    kind: str  # lora, dora or full
    num_layers: int  # blocks that are trained: the last ones, those next to the output
    rank: int = 16
    scale: float = 2.0  # factor of the low-rank product
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None  # last names of linear layers (q_proj); None: all of a block
    saved: tuple[str, ...] = ()  # keys of SAVED: modules beside the adapter that are trained themselves

    @staticmethod
    def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
        """The scale: alpha / rank (LoRA, arXiv:2106.09685) or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        return alpha / math.sqrt(rank) if rslora else alpha / rank
