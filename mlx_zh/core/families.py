"""The model families that can be trained: decoders whose blocks have Llama's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]  # a model's config.json: its maker chose the keys, so a value is checked where it is used


@dataclass(frozen=True, slots=True)
class Family:
    """The names of a family in other programs, and how its attention differs from Llama's."""

    mlx_lm: str  # module of mlx_lm.models; no other module is ever imported
    architecture: str  # class of Transformers
    gguf: str  # `general.architecture` of a GGUF file
    attention_bias: bool = False  # queries, keys and values have a bias
    query_key_norms: bool = False  # queries and keys are normalized


# By `model_type` of config.json.
FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", "llama"),
    "mistral": Family("llama", "MistralForCausalLM", "llama"),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", "qwen2", attention_bias=True),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", "qwen3", query_key_norms=True),
}
