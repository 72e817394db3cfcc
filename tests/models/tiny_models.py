"""Tiny random models of each family, written as a folder or as a GGUF file by means other than the loader's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from families import FAMILIES, own_class

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


MERGES = ["h e", "l l", "Ġ w", "he ll", "1 2", "12 3"]
TOKENS = SPECIAL + byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]
VOCABULARY = 288  # rows; more than tokens, as in Qwen's models
TOKENS += [f"[unused{n}]" for n in range(VOCABULARY - len(TOKENS))]
TEXT_IDS = [1, 40, 41, 7, 260, 263, 99, 3, 2, 120, 121, 5]


def tiny_config(kind: str = "llama", tied: bool = True, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": kind,
        "hidden_size": HEADS * HEAD_DIM,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 96,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind == "qwen3":
        config["head_dim"] = 2 * HEAD_DIM  # heads need not add up to hidden_size
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        config |= FAMILIES.get(kind, {}) | {"num_hidden_layers": 3}
    return config | changes


def tiny_model(config: dict[str, Any], seed: int = 0) -> Any:
    """mlx-lm's own model with every parameter random: norms and biases too, or an error in them would not show."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model = own_class(config)
    rng = np.random.default_rng(seed)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        value = rng.normal(size=array.shape) * 0.3
        if "norm" in name:
            value = 1 + value
        weights.append((name, mx.array(value.astype(np.float32))))
    model.load_weights(weights)
    model.eval()
    return model


def parameters(model: Any) -> dict[str, np.ndarray]:
    from mlx.utils import tree_flatten

    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


def logits(model: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(model(mx.array([TEXT_IDS])).astype(mx.float32))[0]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    names = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **names)
    fast.save_pretrained(folder)


def write_folder(folder: Path, config: dict[str, Any], model: Any, shards: int = 1) -> Path:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    items = sorted(tree_flatten(model.parameters()))
    names = ["model.safetensors"]
    if shards > 1:
        names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
        mapping = {name: names[i % shards] for i, (name, _) in enumerate(items)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    for n, name in enumerate(names):
        part = dict(items[n::shards])
        mx.save_safetensors(str(folder / name), part)
    return folder


PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


_HEAD_KEYS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def gguf_name(name: str) -> str:
    for ours, theirs in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")):
        if name.startswith(ours + "."):
            return name.replace(ours, theirs)
    _, _, layer, rest = name.split(".", 3)
    part, suffix = rest.rsplit(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{suffix}"


def llama_cpp_order(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours (2i, 2i+1) where Hugging Face rotates (i, i + half): row by row, head by head."""
    moved = np.empty_like(array)
    size = array.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            for side in range(2):
                moved[head * size + 2 * i + side] = array[head * size + side * (size // 2) + i]
    return moved


def write_gguf(
    path: Path,
    config: dict[str, Any],
    model: Any,
    kind: str = "F32",
    *,
    kinds: dict[str, str] | None = None,
    rope_factors: np.ndarray | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write `model` with matrices of type `kind`, or of the type that `kinds` gives for their GGUF name."""
    import gguf

    arch = "llama" if config["model_type"] == "mistral" else config["model_type"]
    writer = gguf.GGUFWriter(str(path), arch)
    _write_metadata(writer, config, metadata or {})
    for parameter, array in parameters(model).items():
        target = gguf_name(parameter)
        if arch == "llama" and (".attn_q." in target or ".attn_k." in target):
            array = llama_cpp_order(array, config[_HEAD_KEYS[target.split(".")[2]]])
        chosen = (kinds or {}).get(target, kind) if array.ndim == 2 else "F32"
        raw = gguf.GGMLQuantizationType[chosen]
        writer.add_tensor(target, gguf.quants.quantize(array, raw), raw_dtype=raw)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(model: Any, kind: str, kinds: dict[str, str] | None = None) -> dict[str, np.ndarray]:
    """The model's parameters after a round trip through `kind`, by the `gguf` package's own arithmetic."""
    import gguf

    result = {}
    for name, array in parameters(model).items():
        raw = gguf.GGMLQuantizationType[(kinds or {}).get(gguf_name(name), kind) if array.ndim == 2 else "F32"]
        result[name] = gguf.quants.dequantize(gguf.quants.quantize(array, raw), raw)
    return result


def _write_metadata(writer: Any, config: dict[str, Any], metadata: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    if "llama.block_count" not in metadata:
        writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    } | metadata
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)


def llama3_divisors(config: dict[str, Any], factor: float) -> np.ndarray:
    """Llama 3.1's scaling, frequency by frequency, as Meta's reference code states it."""
    divisors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors)


def flat(tree: Any) -> list[tuple[str, Any]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(tree))
