"""Which weights of a model are trained (LoRA, DoRA or whole blocks), and the names of the adapter's files."""

from __future__ import annotations

import math
from dataclasses import dataclass

ADAPTER_FILE = "adapters.safetensors"  # mlx-lm's weights
PEFT_FILE = "adapter_model.safetensors"  # PEFT's weights
CONFIG_FILE = "adapter_config.json"  # the settings, in both formats


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """Which weights are trained, and how."""

    kind: str  # lora, dora or full
    num_layers: int  # blocks that are trained: the last ones, those next to the output
    rank: int = 16
    scale: float = 2.0  # factor of the low-rank product
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None  # last names of linear layers (q_proj); None: all of a block

    @staticmethod
    def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
        """The scale: alpha / rank (LoRA, arXiv:2106.09685) or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        return alpha / math.sqrt(rank) if rslora else alpha / rank
