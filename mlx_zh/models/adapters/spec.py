"""What of a model is trained: LoRA, DoRA or whole blocks; and the names of the files that keep it."""

from __future__ import annotations

import math
from dataclasses import dataclass

ADAPTER_FILE = "adapters.safetensors"  # mlx-lm's
PEFT_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"  # of both


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What is trained. `kind` is lora, dora or full; `scale` multiplies the low-rank product.

    `targets` are the last names of linear layers (`q_proj`), or None for every linear layer of a block;
    `num_layers` counts blocks from the top.
    """

    kind: str
    num_layers: int
    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    @staticmethod
    def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
        """alpha / rank (LoRA, arXiv:2106.09685) or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        return alpha / math.sqrt(rank) if rslora else alpha / rank
