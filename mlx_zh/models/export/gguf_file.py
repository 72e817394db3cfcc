"""Write a merged model as one GGUF file (F16 or Q8_0) for llama.cpp, LM Studio and Ollama.

Names, the order of rows and metadata are those of llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_zh.core.families import FAMILIES, Config
from mlx_zh.errors import ModelError
from mlx_zh.models.export.gguf_vocabulary import tokenizer_metadata
from mlx_zh.models.export.merge import Fusion, Survival, survival
from mlx_zh.models.gguf_model import ROPE_FACTORS, gguf_name, llama3_divisors, permute
from mlx_zh.system.storage import storage_errors

_BLOCK = 32
_FILE_TYPES = {"f16": 1, "q8_0": 7}  # llama.cpp's llama_ftype: MOSTLY_F16, MOSTLY_Q8_0


@dataclass(frozen=True)
class GGUFPlan:
    """Everything in the file except the weights. A plan can be made only if the file can be written."""

    fusion: Fusion
    kind: str  # f16 or q8_0
    title: str
    metadata: dict[str, Any]
    rope_factors: npt.NDArray[np.float32] | None  # (head_dim / 2,) Llama 3.1's frequency divisors

    @property
    def size(self) -> int:
        """The size of the tensors in bytes."""
        return sum(_layout(shape, self.kind)[1] for shape in self.fusion.source.outline.shapes.values())


def plan_gguf(fusion: Fusion, kind: str, title: str) -> GGUFPlan:
    """The plan of a file of `kind` f16 or q8_0.

    Raises ModelError if llama.cpp could not run the model or would split text differently.
    """
    config = fusion.source.config
    architecture = FAMILIES[config["model_type"]].gguf
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": title,
        "general.size_label": _size_label(fusion.source.parameters),
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    keys: dict[str, Any] = {
        "vocab_size": fusion.source.outline.shapes["model.embed_tokens.weight"][0],
        "context_length": config.get("max_position_embeddings", 2048),
        "embedding_length": hidden,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.get("rope_theta", 10000.0)),
    }
    scaling, factors = _rope(config, head_dim, fusion.source.name)
    metadata |= {f"{architecture}.{name}": value for name, value in (keys | scaling).items()}
    metadata = {"architecture": architecture} | metadata | tokenizer_metadata(fusion.base)
    return GGUFPlan(fusion, kind, title, metadata, factors)


def _rope(config: Config, head_dim: int, name: str) -> tuple[dict[str, Any], npt.NDArray[np.float32] | None]:
    """The metadata of the RoPE scaling, and for Llama 3.1 the frequency divisors, which GGUF stores as a tensor."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return {}, None
    if kind == "llama3":
        divisors = llama3_divisors(scaling, head_dim, float(config.get("rope_theta", 10000.0)))
        return {}, divisors.astype(np.float32)
    metadata: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling.get("factor", 1.0))}
    if kind == "yarn":
        metadata["rope.scaling.original_context_length"] = int(scaling["original_max_position_embeddings"])
    elif kind != "linear":
        raise ModelError(
            f"{name} uses the RoPE scaling {kind!r}; llama3, linear and yarn can be written to GGUF. Export `hf` "
            "and convert that folder with llama.cpp's convert_hf_to_gguf.py."
        )
    return metadata, None


def write_gguf(path: Path, plan: GGUFPlan, *, step: Callable[[], None] = lambda: None) -> list[Survival]:
    """Write the file tensor by tensor; returns what is left of the change to each changed matrix.

    `step` is called once for each tensor. Raises ModelError for weights that the type cannot hold, StorageError if
    the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(None, plan.metadata["architecture"])
    for key, value in plan.metadata.items():
        _add(writer, key, value)
    if plan.rope_factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, plan.rope_factors.shape, np.dtype(np.float32), plan.rope_factors.nbytes)
    shapes = plan.fusion.source.outline.shapes
    for name, shape in shapes.items():
        kind, size = _layout(shape, plan.kind)
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), size, raw_dtype=raw)
    survivals: list[Survival] = []
    with storage_errors(path):
        try:
            writer.open_output_file(path)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if plan.rope_factors is not None:
                writer.write_tensor_data(plan.rope_factors)
            for tensor in plan.fusion.tensors():
                step()
                data, written = _encode(tensor.value, plan, tensor.name)
                if tensor.before is not None and (tensor_survival := survival(tensor.before, tensor.value, written)):
                    survivals.append(tensor_survival)
                writer.write_tensor_data(data)
        finally:
            writer.close()
    return survivals


def _layout(shape: tuple[int, ...], kind: str) -> tuple[str, int]:
    """The type in which a tensor is stored, and its size in bytes. Vectors stay float32, as llama.cpp expects."""
    count = int(np.prod(shape))
    if len(shape) == 1:
        return "F32", 4 * count
    if kind == "q8_0" and shape[-1] % _BLOCK == 0:
        return "Q8_0", count // _BLOCK * (2 + _BLOCK)
    return "F16", 2 * count


def _encode(value: mx.array, plan: GGUFPlan, name: str) -> tuple[npt.NDArray[Any], mx.array]:
    """A tensor as it is written, and the float32 value that this stands for, with rows in the model's order."""
    kind, _ = _layout(value.shape, plan.kind)
    config = plan.fusion.source.config
    if kind == "F32":
        return np.array(permute(name, value, config)), value
    limit = 65504.0 * (127 if kind == "Q8_0" else 1)  # the maximum of float16, the type of Q8_0's scales and F16
    if not float(mx.abs(value).max()) <= limit:
        raise ModelError(
            f"{name} has weights beyond what {kind} can hold (or NaN), so no GGUF file is written. Export `hf` in "
            "bfloat16 instead, and look at the losses of the training."
        )
    if kind == "F16":
        half = value.astype(mx.float16)
        return np.array(permute(name, half, config)), half.astype(mx.float32)
    codes, scales = quantize_q8_0(value)
    written = (codes.astype(mx.float32) * scales.astype(mx.float32)).reshape(value.shape)
    rows = value.shape[0]
    groups = [permute(name, part.reshape(rows, -1), config) for part in (codes, scales)]
    quants = np.array(groups[0]).reshape(-1, _BLOCK).view(np.uint8)
    halves = np.array(groups[1]).reshape(-1, 1).view(np.uint8)
    return np.concatenate([halves, quants], axis=1), written


def quantize_q8_0(value: mx.array) -> tuple[mx.array, mx.array]:
    """Codes (blocks, 32) int8 and scales (blocks, 1) float16, equal to llama.cpp's quantize_row_q8_0 bit for bit."""
    blocks = value.reshape(-1, _BLOCK)
    scale = mx.abs(blocks).max(axis=1, keepdims=True) / 127
    inverse = mx.where(scale == 0, 0.0, 1 / scale)
    scaled = blocks * inverse
    rounded = mx.sign(scaled) * mx.floor(mx.abs(scaled) + 0.5)  # rounds halves away from zero, as C's roundf
    return rounded.astype(mx.int8), scale.astype(mx.float16)


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a metadata entry with the GGUF type of its value."""
    if key == "architecture":
        return  # the writer adds it itself
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        if not value:
            return
        if isinstance(value[0], int):
            value = [int(v) for v in value]
        writer.add_array(key, value)
        return
    adders[type(value)](key, value)


def _size_label(parameters: int) -> str:
    """A number of weights in short form: 8030261248 -> 8.0B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= size:
            figure = parameters / size
            return f"{figure:.1f}{letter}" if figure < 10 else f"{figure:.0f}{letter}"
    return str(parameters)
