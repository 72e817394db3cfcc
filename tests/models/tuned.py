"""A tiny base on disk, an adapter for it that changes something, and base + adapter in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tiny_models import LAYERS, logits, tiny_config, tiny_model, write_folder

from mlx_zh.models.adapters.files import save_adapter
from mlx_zh.models.adapters.layers import add_adapter, trainable
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.export.merge import Fusion, open_adapter
from mlx_zh.models.export.source import open_source
from mlx_zh.models.load import load_model


@dataclass
class Tuned:
    base: Path
    adapter: Path
    spec: AdapterSpec
    weights: dict[str, mx.array]
    logits: np.ndarray  # of base + adapter

    def fusion(self, original: Path | None = None, quantize: tuple[int, int] | None = None) -> Fusion:
        base = open_source(self.base, str(self.base), quantize=quantize)
        full = None if original is None else open_source(original, str(original))
        return Fusion(base, open_adapter(self.adapter, base), full)


def make_tuned(
    folder: Path,
    family: str = "llama",
    *,
    kind: str = "lora",
    tied: bool = False,
    layers: int = LAYERS,
    targets: tuple[str, ...] | None = None,
    size: float = 0.1,
    quantize: tuple[int, int] | None = None,
    saved: tuple[str, ...] = (),
    **changes: Any,
) -> Tuned:
    """`size` is that of B's entries, and of the change of a full fine-tuning and of the tables in `saved`."""
    config = tiny_config(family, tied, **changes)
    base = write_folder(folder / "base", config, tiny_model(config))
    loaded = load_model(str(base), quantize=quantize)
    spec = AdapterSpec(kind, layers, rank=4, scale=2.0, targets=targets, saved=saved)
    add_adapter(loaded.model, spec, seed=1)
    rng = np.random.default_rng(2)
    weights = {}
    for name, array in trainable(loaded.model).items():
        noise = mx.array((size * rng.normal(size=array.shape)).astype(np.float32))
        weights[name] = noise if name.endswith("lora_b") else array + noise if name.endswith(".weight") else array
        if name.endswith(".m"):
            weights[name] = array * mx.array((1 + 0.1 * rng.normal(size=array.shape)).astype(np.float32))
    save_adapter(folder / "adapter", weights, spec, {})
    loaded.model.load_weights(list(weights.items()), strict=False)
    loaded.model.eval()
    return Tuned(base, folder / "adapter", spec, weights, logits(loaded.model))
