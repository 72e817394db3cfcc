"""Write a merged model as one GGUF file for llama.cpp, LM Studio and Ollama.

Names, the order of rows and metadata are those of llama.cpp's convert_hf_to_gguf.py. A matrix that is quantized in 4
or 5 bits by MLX, and that the adapter does not change, keeps its codes: Q4_1 and Q5_1 have MLX's form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_zh.core.families import Config
from mlx_zh.errors import ModelError
from mlx_zh.models.build import Form, Weights
from mlx_zh.models.export.folder_files import Layout, full_layout, packed_layout, unpack
from mlx_zh.models.export.gguf_encoding import Encoded, encode, keep_codes, same_codes, stored_bytes
from mlx_zh.models.export.gguf_vocabulary import tokenizer_metadata
from mlx_zh.models.export.merge import Fusion, Survival, Tensor, survival
from mlx_zh.models.gguf_blocks import GROUP_SIZE
from mlx_zh.models.gguf_model import ROPE_FACTORS, gguf_architecture, gguf_name, llama3_divisors, permute
from mlx_zh.system.storage import storage_errors

# The types that are written here, with the numbers of llama.cpp's llama_ftype.
FILE_TYPES = {"f16": 1, "bf16": 32, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7}
_FULL = ("f16", "bf16")  # types without quantization


@dataclass(frozen=True)
class About:
    """What the file says about the model beside its title; LM Studio, Ollama and the hubs show it."""

    base: str | None = None  # the name of the base, without its owner
    owner: str | None = None  # the owner of the base on a hub
    url: str | None = None  # the base's page on a hub
    licence: str | None = None  # its name on the hub
    tags: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()

    def metadata(self, title: str) -> dict[str, Any]:
        """The metadata `general.*` of a model with this title; without what is not known."""
        base = {"name": self.base, "organization": self.owner, "repo_url": self.url}
        entries: dict[str, Any] = {
            "general.name": title,
            "general.basename": self.base,
            "general.finetune": title if self.base else None,
            "general.license": self.licence,
            "general.base_model.count": 1 if self.base else None,
            **{f"general.base_model.0.{key}": value for key, value in base.items()},
            "general.tags": list(self.tags),
            "general.languages": list(self.languages),
        }
        return {key: value for key, value in entries.items() if value}


@dataclass(frozen=True)
class GGUFPlan:
    """Everything in the file except the weights. A plan can be made only if the file can be written."""

    fusion: Fusion
    kind: str  # one of FILE_TYPES
    title: str
    metadata: dict[str, Any]
    rope_factors: npt.NDArray[np.float32] | None  # (head_dim / 2,) Llama 3.1's frequency divisors
    layout: Layout  # which matrices are written as MLX quantizes them, and in which form

    @property
    def size(self) -> int:
        """The size of the tensors in bytes."""
        shapes = self.fusion.source.outline.shapes
        return sum(stored_bytes(self.type_of(name), shape) for name, shape in shapes.items())

    def type_of(self, name: str) -> str:
        """The type in which a tensor is stored. Vectors stay float32, as llama.cpp expects."""
        shape = self.fusion.source.outline.shapes[name]
        if len(shape) == 1:
            return "F32"
        form = self.layout.packing.get(name.removesuffix(".weight"))
        if kept := same_codes(form):
            return kept
        if shape[-1] % GROUP_SIZE:
            return "BF16" if self.kind == "bf16" else "F16"
        if form is not None:
            return "Q8_0"  # more bits than Q5_1 has
        if self.kind == "q4_1":
            return "F16"  # not quantized by MLX either
        return self.kind.upper()


@dataclass
class GGUFOutcome:
    """What writing the weights changed."""

    survivals: list[Survival] = field(default_factory=list)  # what is left of the change to each changed matrix
    kept: int = 0  # groups of 32 weights whose codes are MLX's own
    rounded: int = 0  # of them, those whose scale or minimum float16 does not hold exactly
    error: float = 0.0  # the largest norm of that rounding in a matrix, as a share of the matrix's


def plan_gguf(
    fusion: Fusion, kind: str, title: str, about: About | None = None, layout: Layout | None = None
) -> GGUFPlan:
    """The plan of a file of a `kind` in FILE_TYPES. With q4_1, MLX quantizes what is not yet quantized.

    With `layout`, the file has the weights of the folder of that layout.

    Raises ModelError if llama.cpp could not run the model or would split text differently.
    """
    config = fusion.source.config
    architecture = gguf_architecture(config) or ""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    metadata: dict[str, Any] = {
        "general.type": "model",
        **(about or About()).metadata(title),
        "general.size_label": _size_label(fusion.source.parameters),
        "general.file_type": FILE_TYPES[kind],
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
    return GGUFPlan(fusion, kind, title, metadata, factors, layout or _layout(fusion, kind))


def _layout(fusion: Fusion, kind: str) -> Layout:
    """The modules that are written as MLX has them, and their forms; those of more than 5 bits become Q8_0."""
    layout = full_layout(fusion, mx.float16)
    if kind in _FULL:
        return layout
    if kind == "q4_1":
        return replace(packed_layout(fusion, 4, GROUP_SIZE), dtype=mx.float16)
    untouched = fusion.untouched
    return replace(layout, packing=untouched, kept=frozenset(untouched))


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


def write_gguf(path: Path, plan: GGUFPlan, *, step: Callable[[], None] = lambda: None) -> GGUFOutcome:
    """Write the file tensor by tensor; returns what is left of the adapter's change, and what was rounded.

    `step` is called once for each tensor. Raises ModelError for weights that the type cannot hold, StorageError if
    the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(None, plan.metadata["architecture"])
    for key, value in plan.metadata.items():
        _add(writer, key, value)
    if plan.rope_factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, plan.rope_factors.shape, np.dtype(np.float32), plan.rope_factors.nbytes)
    for name, shape in plan.fusion.source.outline.shapes.items():
        kind = plan.type_of(name)
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), stored_bytes(kind, shape), raw_dtype=raw)
    outcome = GGUFOutcome()
    with storage_errors(path):
        try:
            writer.open_output_file(path)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if plan.rope_factors is not None:
                writer.write_tensor_data(plan.rope_factors)
            for name, encoded in _encoded(plan, outcome):
                step()
                writer.write_tensor_data(np.array(permute(name, encoded.data, plan.fusion.source.config)))
        finally:
            writer.close()
    return outcome


def _encoded(plan: GGUFPlan, outcome: GGUFOutcome) -> Iterator[tuple[str, Encoded]]:
    """Every tensor as it is written, one in memory at a time; `outcome` is filled."""
    fusion, layout = plan.fusion, plan.layout
    as_in_mlx = layout.dtype == mx.bfloat16  # a folder's layout; its numbers are rounded to bfloat16 first
    weights = fusion.stored(packed=bool(layout.kept))
    changed = fusion.adapter.tensors
    for name in fusion.source.outline.shapes:
        path = name.removesuffix(".weight")
        form = layout.packing.get(path)
        if form is not None and path in layout.kept:
            parts = [weights.pop(f"{path}.{part}") for part in _parts(weights, path)]
            if as_in_mlx:
                parts = [layout.half(part) for part in parts]
            yield name, _as_packed(parts, form, plan, name, outcome)
            continue
        tensor = fusion.merge(name, weights.pop(name), changed)
        if form is None:
            value = layout.half(tensor.value).astype(mx.float32) if as_in_mlx else tensor.value
            encoded = encode(value, plan.type_of(name), name)
        else:
            encoded = _as_packed(layout.packed(path, tensor), form, plan, name, outcome)
        _watch(tensor, encoded, outcome)
        yield name, encoded


def _parts(weights: Weights, path: str) -> list[str]:
    return [part for part in ("weight", "scales", "biases") if f"{path}.{part}" in weights]


def _as_packed(parts: list[mx.array], form: Form, plan: GGUFPlan, name: str, outcome: GGUFOutcome) -> Encoded:
    """A matrix that MLX quantized: with the same codes if a type of GGUF has them."""
    if same_codes(form) is None:
        return encode(unpack(parts, form), plan.type_of(name), name)
    encoded = keep_codes(parts, form, name)
    outcome.kept += encoded.value.size // GROUP_SIZE
    outcome.rounded += encoded.rounded
    outcome.error = max(outcome.error, encoded.error)
    return encoded


def _watch(tensor: Tensor, encoded: Encoded, outcome: GGUFOutcome) -> None:
    if tensor.before is not None and (left := survival(tensor.before, tensor.value, encoded.value)):
        outcome.survivals.append(left)


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
