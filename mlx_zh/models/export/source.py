"""A model on disk whose tensors are read one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zh.core.families import Config
from mlx_zh.models import folder, gguf, gguf_model
from mlx_zh.models.build import Outline, Weights, outline
from mlx_zh.models.identity import fingerprint_of
from mlx_zh.models.load import end_of_turn_ids, load_tokenizer
from mlx_zh.system.digests import Reading

_HALF = (mx.bfloat16, mx.float16)


@dataclass(frozen=True)
class Source:
    """A model on disk, described without reading its weights; `stored` reads them."""

    path: Path  # a folder or a .gguf file
    name: str  # as the user wrote it
    config: Config  # without "quantization"
    tokenizer: Any
    outline: Outline
    fingerprint: str  # see `models.identity`
    dtype: mx.Dtype  # the half-precision type of its weights; bfloat16 if they have none or several
    quantize: tuple[int, int] | None = None  # (bits, group size) with which it is quantized when read

    @property
    def parameters(self) -> int:
        """The number of weights."""
        total = 0
        for shape in self.outline.shapes.values():
            size = 1
            for side in shape:
                size *= side
            total += size
        return total

    def stored(self) -> Weights:
        """Every tensor as stored, quantized or not, in a new table; lazy if the file is safetensors."""
        weights = _read(self.path, self.config)
        outline(dict(self.config), weights, str(self.path), quantize=self.quantize)
        return weights


def open_source(
    path: Path, name: str, *, quantize: tuple[int, int] | None = None, reading: Reading | None = None
) -> Source:
    """Describe the model at `path`, a folder or .gguf file, without reading its weights.

    `quantize` is (bits, group size) for a full-precision model that is to be quantized when it is read; `reading` is
    called before a large file is read for its digest. Raises ModelError.
    """
    from mlx_zh.models.load import load_config

    config = load_config(path)
    tokenizer = load_tokenizer(path)
    weights = _read(path, config)
    halves = {array.dtype for array in weights.values()} & set(_HALF)
    # GGUF's scales are float16 even if the model was trained in bfloat16, and some models overflow in float16.
    dtype = halves.pop() if len(halves) == 1 and path.is_dir() else mx.bfloat16
    model_outline = outline(config, weights, str(path), quantize=quantize)
    ends = list(end_of_turn_ids(tokenizer, config, path))
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return Source(path, name, config, tokenizer, model_outline, fingerprint_of(path, reading), dtype, quantize)


def _read(path: Path, config: Config) -> Weights:
    """The tensors of the model."""
    if path.is_file():
        return gguf_model.gguf_weights(gguf.read_gguf(path), config)
    return folder.folder_weights(path)
