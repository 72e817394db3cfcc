"""A fast tokenizer as GGUF metadata: tokens, types, merges, the splitting rule, special ids, chat template."""

from __future__ import annotations

import re
from typing import Any

from mlx_zh.errors import ModelError
from mlx_zh.models.chat_templates import DEFAULT, named_templates
from mlx_zh.models.export.source import Source
from mlx_zh.models.folder import as_ids
from mlx_zh.models.gguf_tokenizer import TEMPLATE, cutting_rule
from mlx_zh.system.json_text import parse_json

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's llama_token_attr


def tokenizer_metadata(source: Source) -> dict[str, Any]:
    """The metadata `tokenizer.*` of a model. Raises ModelError if llama.cpp cannot split text as its tokenizer."""
    tokenizer = source.tokenizer
    state = parse_json(tokenizer.backend_tokenizer.to_str())
    rule = cutting_rule(tokenizer)
    model = state["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges") or rule is None:
        raise ModelError(
            f"{source.name}: its tokenizer is not one of the byte-level kinds whose rules llama.cpp knows by name "
            "(Llama 3, Qwen2 and Qwen3, SmolLM, GPT-2), so no GGUF file is written. Export `hf` and convert that "
            "folder with llama.cpp's convert_hf_to_gguf.py."
        )
    tokens, types = _tokens(tokenizer, source.outline.shapes["model.embed_tokens.weight"][0])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": adds_bos(tokenizer),
    }
    for name, index in _special_ids(source).items():
        metadata[f"tokenizer.ggml.{name}_token_id"] = index
    return metadata | _templates(tokenizer)


def _templates(tokenizer: Any) -> dict[str, Any]:
    """The chat templates as llama.cpp's converter writes them: `default` under the key itself, others below it."""
    templates = named_templates(tokenizer.chat_template)
    default = templates.pop(DEFAULT, "")
    others = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in sorted(templates.items()) if text}
    metadata: dict[str, Any] = {f"{TEMPLATE}.{name}": text for name, text in others.items()}
    if others:
        metadata["tokenizer.chat_templates"] = list(others)
    return metadata | ({TEMPLATE: default} if default else {})


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts BOS before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _tokens(tokenizer: Any, rows: int) -> tuple[list[str], list[int]]:
    """The name and the type of every row of the embedding; unused rows are named as llama.cpp names them."""
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [UNUSED] * rows
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index], types[index] = str(added.content), CONTROL if added.special else USER_DEFINED
    return tokens, types


def _special_ids(source: Source) -> dict[str, int]:
    """The ids of bos, eos, padding and unknown, and of the end-of-turn token if it is another one."""
    tokenizer = source.tokenizer
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    names = tokenizer.get_vocab()
    ends = as_ids(source.config.get("eos_token_id"), source.path)
    turn_ends = [names[mark] for mark in ("<|eot_id|>", "<|im_end|>") if names.get(mark) in ends]
    if turn_ends and turn_ends[0] != ids["eos"]:
        ids["eot"] = turn_ends[0]
    if "<|eom_id|>" in names and names["<|eom_id|>"] in ends:
        ids["eom"] = names["<|eom_id|>"]
    return {name: int(index) for name, index in ids.items() if index is not None}
