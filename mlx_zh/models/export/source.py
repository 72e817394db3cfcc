"""A model on disk as tensors that are read one at a time: nothing is in memory before its turn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zh.models import folder, gguf, gguf_model
from mlx_zh.models.build import Outline, Weights, outline
from mlx_zh.models.load import end_of_turn_ids, load_tokenizer

_HALF = (mx.bfloat16, mx.float16)


@dataclass(frozen=True)
class Source:
    """A resolved model, outlined; `stored` reads its tensors."""

    place: Path
    name: str  # as the user wrote it
    config: dict[str, Any]  # without "quantization"
    tokenizer: Any
    outline: Outline
    fingerprint: str
    dtype: mx.Dtype  # the half precision of its weights; bfloat16 where they have none
    quantize: tuple[int, int] | None = None

    @property
    def parameters(self) -> int:
        """How many weights the model has."""
        total = 0
        for shape in self.outline.shapes.values():
            size = 1
            for side in shape:
                size *= side
            total += size
        return total

    def stored(self) -> Weights:
        """Every tensor as stored (packed ones too), lazy where the file is safetensors; a new table each time."""
        weights, _ = _read(self.place, self.config)
        outline(dict(self.config), weights, str(self.place), quantize=self.quantize)
        return weights


def open_source(place: Path, name: str, *, quantize: tuple[int, int] | None = None) -> Source:
    """Outline the model at `place`; with `quantize`, as it is when it is quantized on load. Raises ModelError."""
    from mlx_zh.models.load import load_config

    config = load_config(place)
    tokenizer = load_tokenizer(place)
    weights, fingerprint = _read(place, config)
    halves = {array.dtype for array in weights.values()} & set(_HALF)
    # GGUF's scales are float16 whatever the model was trained in, and some models overflow in it.
    dtype = halves.pop() if len(halves) == 1 and place.is_dir() else mx.bfloat16
    found = outline(config, weights, str(place), quantize=quantize)
    ends = list(end_of_turn_ids(tokenizer, config, place))
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return Source(place, name, config, tokenizer, found, fingerprint, dtype, quantize)


def _read(place: Path, config: dict[str, Any]) -> tuple[Weights, str]:
    if place.is_file():
        file = gguf.read_gguf(place)
        return gguf_model.gguf_weights(file, config), file.fingerprint
    return folder.folder_weights(place)
