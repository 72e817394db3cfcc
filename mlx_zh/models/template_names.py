"""What LLaMA-Factory calls a model's chat template, by the marks in it and the model's family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_zh.models.chat_templates import default_template

# The first mark that a template has decides; below it the name by `model_type`, "" for any other family.
_BY_MARK: Mapping[str, Mapping[str, str]] = {
    "SmolLM": {"llama": "smollm2"},
    "<|start_header_id|>": {"llama": "llama3"},
    "<<SYS>>": {"llama": "llama2"},
    "<|start_of_role|>": {"granite": "granite3"},
    "<start_of_turn>": {"gemma3_text": "gemma3"},
    "[gMASK]<sop>": {"glm4": "glm4"},
    "<|im_sep|>": {"phi3": "phi4"},
    "<|end|>": {"phi3": "phi"},
    "<seed:bos>": {"seed_oss": "seed_oss"},
    "[INST]": {"mistral": "mistral"},
    "<|im_start|>": {"qwen2": "qwen", "mimo": "mimo", "": "chatml"},
}
_QWEN3 = ("qwen3", "qwen3_moe")


def llama_factory_name(template: Any, model_type: str) -> str:
    """The value of its setting `template` for a tokenizer's `chat_template`; "" where none is known."""
    text = default_template(template)
    if model_type in _QWEN3 and "<|im_start|>" in text:
        return "qwen3" if "<think>" in text else "qwen3_nothink"
    for mark, names in _BY_MARK.items():
        if mark in text:
            return names.get(model_type, names.get("", ""))
    return ""
