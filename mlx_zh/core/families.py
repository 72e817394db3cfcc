"""The model families that this program knows. Any other decoder of mlx-lm is tried, and `core.proof` decides."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Config = dict[str, Any]  # a model's config.json: its maker chose the keys, so a value is checked where it is used


@dataclass(frozen=True, slots=True)
class Family:
    """The names of a family in other programs, and what its sizes follow from beside the usual keys."""

    mlx_lm: str  # module of mlx_lm.models; no other module is ever imported
    architecture: str | None  # class of Transformers; None: hf is not written
    gguf: str | None = None  # `general.architecture` of a GGUF file; None: GGUF is not written or read
    attention_bias: bool = False  # queries, keys and values have a bias
    query_key_norms: bool = False  # queries and keys are normalized
    windows: bool = False  # mlx-lm heeds `layer_types` or what stands for it: some layers have a window
    norms: int = 2  # of a block
    swiglu: bool = True  # the MLP is gate_proj, up_proj and down_proj with SiLU
    recurrent: bool = False  # some layers are gated delta nets
    part: str = ""  # before the names of mlx-lm's tensors: the language model is a part of its model


# By `model_type` of config.json.
FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", "llama", windows=True),
    "mistral": Family("llama", "MistralForCausalLM", "llama", windows=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", "qwen2", attention_bias=True),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", "qwen3", query_key_norms=True),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", query_key_norms=True),
    "internlm3": Family("internlm3", "InternLM3ForCausalLM"),
    "ernie4_5": Family("ernie4_5", "Ernie4_5ForCausalLM"),
    "seed_oss": Family("seed_oss", "SeedOssForCausalLM"),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", windows=True),
    "granite": Family("granite", "GraniteForCausalLM"),
    "mimo": Family("mimo", "MiMoForCausalLM", attention_bias=True),
    "glm4": Family("glm4", "Glm4ForCausalLM", norms=4, swiglu=False),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM"),
    "phi3": Family("phi3", "Phi3ForCausalLM", swiglu=False),
    "gemma3_text": Family(
        "gemma3_text", "Gemma3ForCausalLM", query_key_norms=True, windows=True, norms=4, swiglu=False
    ),
    "qwen3_5": Family("qwen3_5", "Qwen3_5ForCausalLM", query_key_norms=True, recurrent=True, part="language_model."),
    "qwen3_5_moe": Family("qwen3_5_moe", None, query_key_norms=True, recurrent=True, part="language_model."),
}
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]*")
_NO_MODELS = ("base", "cache", "pipeline", "activations", "switch_layers", "rope_utils", "bitlinear_layers")


def family_of(config: Config) -> Family | None:
    """The family of a `config.json`; for one that is not in the table, what mlx-lm has under its name, or None."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    if kind in FAMILIES:
        return FAMILIES[kind]
    if not _IDENTIFIER.fullmatch(kind) or kind in _NO_MODELS:
        return None
    package = find_spec("mlx_lm")  # of a module in it, this would run the whole package
    folders = package.submodule_search_locations if package is not None else None
    exists = any((Path(folder) / "models" / f"{kind}.py").is_file() for folder in folders or ())
    return Family(kind, None) if exists else None
