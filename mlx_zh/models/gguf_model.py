"""From GGUF to mlx-lm: a `config.json`, mlx-lm's tensor names, and rows in Hugging Face's order."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlx_zh.core.families import FAMILIES, Config, family_of
from mlx_zh.errors import ModelError
from mlx_zh.models.build import Form, describe_packing
from mlx_zh.models.gguf import GGUFFile, read_tensor
from mlx_zh.models.gguf_blocks import BITS, GROUP_SIZE

if TYPE_CHECKING:
    import mlx.core as mx

# GGUF's architectures, each also the model_type that it is read as. Mistral is stored as llama in GGUF.
ARCHITECTURES = tuple(dict.fromkeys(family.gguf for family in FAMILIES.values() if family.gguf))

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"


def gguf_config(file: GGUFFile) -> Config:
    """The config.json that belongs to this file. Raises ModelError if mlx-lm's Llama-like classes cannot run it."""
    kind = file.architecture
    if kind not in ARCHITECTURES or file.metadata.get("general.type", "model") != "model":
        raise ModelError(
            f"{file.path} is a {file.metadata.get('general.type', 'model')} of architecture "
            f"{kind or 'unknown'!r}; a model of architecture {', '.join(ARCHITECTURES)} is needed (Mistral is stored "
            "as llama). Choose a model of one of these families."
        )
    key = _Keys(file)
    hidden, heads = key.integer("embedding_length"), key.integer("attention.head_count")
    config: Config = {
        "model_type": kind,
        "architectures": [FAMILIES[kind].architecture],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": key.integer("block_count"),
        "intermediate_size": key.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": key.integer("attention.head_count_kv", heads),
        "head_dim": key.integer("attention.key_length", hidden // max(heads, 1)),
        "rms_norm_eps": key.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": key.integer("context_length"),
        "rope_theta": key.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path} has no tensor token_embd.weight. Download it again.")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    if kind == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    _check_shape(file, key, config)
    config["rope_scaling"] = _rope_scaling(file, key, config)
    ids = {name: token_id(file, name) for name in ("bos", "eos", "eot", "eom")}
    config |= {f"{name}_token_id": ids[name] for name in ("bos", "eos")}
    ends = [ids[name] for name in ("eos", "eot", "eom")]
    if len(unique := list(dict.fromkeys(end for end in ends if end is not None))) > 1:
        config["eos_token_id"] = unique
    return config


def token_id(file: GGUFFile, name: str) -> int | None:
    """The id of a special token (bos, eos, padding …), or None. Raises ModelError if the file has no number there."""
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ModelError(
            f"{file.path}: tokenizer.ggml.{name}_token_id is {str(value)[:40]!r}, a whole number is needed. Convert "
            "the model again with a current llama.cpp."
        )
    return value


class _Keys:
    """The metadata of the file's architecture: ARCHITECTURE.NAME by its NAME."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def get(self, name: str) -> Any:
        value = self.file.metadata.get(f"{self.file.architecture}.{name}")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]  # one number for each layer, all equal
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
            raise ModelError(
                f"{self.file.path}: metadata {self.file.architecture}.{name} is {value!r}, a number is needed. "
                "Convert the model again with a current llama.cpp."
            )
        # The file stores float32, where 1e-5 is 9.999999747378752e-06; the shortest decimal restores 1e-5.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def integer(self, name: str, default: int | None = None) -> int:
        return int(self.number(name, default))


def _check_shape(file: GGUFFile, key: _Keys, config: Config) -> None:
    rotary = key.integer("rope.dimension_count", config["head_dim"])
    experts = key.integer("expert_count", 0)
    problem = ""
    if experts:
        problem = f"it has {experts} experts a layer"
    elif rotary != config["head_dim"]:
        problem = f"it rotates {rotary} of {config['head_dim']} dimensions of a head"
    elif config["num_hidden_layers"] > len(file.tensors):
        problem = f"its metadata says {config['num_hidden_layers']:,} layers, and it has {len(file.tensors)} tensors"
    elif config["num_attention_heads"] < 1 or config["num_key_value_heads"] < 1:
        problem = "it has layers without attention heads"
    if problem:
        raise ModelError(
            f"{file.path} does not have Llama's architecture: {problem}. Choose a dense Llama, Mistral, Qwen2 or "
            "Qwen3 model."
        )


def _rope_scaling(file: GGUFFile, key: _Keys, config: Config) -> Config | None:
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, config)
    kind = key.get("rope.scaling.type")
    if kind in (None, "none"):
        return None
    factor = key.number("rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = key.integer("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ModelError(
        f"{file.path} uses the RoPE scaling {kind!r}; only linear, yarn and Llama 3's can be read. Take the model's "
        "safetensors instead."
    )


def _llama3_scaling(file: GGUFFile, config: Config) -> Config:
    """config.json's "rope_scaling" of Llama 3.1, derived from the frequency divisors that GGUF stores.

    Raises ModelError if the divisors are not of Llama 3.1's form.
    """
    stored = np.array(read_tensor(file, ROPE_FACTORS)["weight"], dtype=np.float64)
    head_dim, theta = config["head_dim"], config["rope_theta"]
    if stored.shape == (head_dim // 2,) and np.isfinite(stored).all() and stored.min() > 0 and theta > 0:
        for scaling in (_usual_scaling(stored), _fitted_scaling(stored, head_dim, theta)):
            if scaling and np.allclose(stored, llama3_divisors(scaling, head_dim, theta), rtol=1e-3):
                return scaling
    raise ModelError(
        f"{file.path}: the RoPE scaling in {ROPE_FACTORS} is not Llama 3's. Take the model's safetensors instead."
    )


def _usual_scaling(divisors: npt.NDArray[np.float64], original: int = 8192, high: float = 4.0) -> Config:
    """A scaling whose largest divisor is that of `divisors`; the other numbers are those of Llama 3.1 to 3.3."""
    return {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _fitted_scaling(divisors: npt.NDArray[np.float64], head_dim: int, theta: float) -> Config | None:
    """The scaling of a model that was trained on another length; None if the divisors do not determine it.

    Between the two ends, a frequency makes `turns = low + share * (high - low)` turns in the original length, where
    `share` follows from its divisor. Multiplying length, low and high by one number changes no divisor, so low is 1.
    """
    factor = divisors.max()
    between = (divisors > 1 + 1e-4) & (divisors < factor * (1 - 1e-4))
    if not between.any():
        return None
    wavelengths = _wavelengths(head_dim, theta)[between]
    share = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
    if between.sum() == 1:
        return _usual_scaling(divisors, round(float((1 + 3 * share[0]) * wavelengths[0])))
    # length / wavelength - share * (high - 1) = 1, for every frequency between the ends
    (length, above), *_ = np.linalg.lstsq(np.stack([1 / wavelengths, -share], 1), np.ones(share.size), rcond=None)
    high = round(1 + float(above), 3)
    return _usual_scaling(divisors, round(float(length)), high) if length >= 1 and high > 1 else None


def _wavelengths(head_dim: int, theta: float) -> npt.NDArray[np.float64]:
    """The positions in which each pair of a head's dimensions turns once: (head_dim / 2,)."""
    half = head_dim // 2
    return np.asarray(2 * np.pi * theta ** (np.arange(half) / half))


def llama3_divisors(scaling: Config, head_dim: int, theta: float) -> npt.NDArray[np.float64]:
    """The number by which Llama 3.1 divides each rotation frequency: (head_dim / 2,)."""
    low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
    turns = scaling.get("original_max_position_embeddings", 8192) / _wavelengths(head_dim, theta)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / scaling["factor"] + smooth))


def gguf_weights(file: GGUFFile, config: Config) -> dict[str, mx.array]:
    """Every tensor by its mlx-lm name, with `.scales` and `.biases`, q and k rows in Hugging Face's order.

    Raises ModelError if the file has tensors that its architecture does not have.
    """
    unknown = sorted(name for name in file.tensors if name != ROPE_FACTORS and _rename(name) is None)
    if unknown:
        shown = ", ".join(unknown[:8]) + (" …" if len(unknown) > 8 else "")
        raise ModelError(
            f"{file.path} has {len(unknown)} tensors that a {file.architecture} model does not have: {shown}. Its "
            "architecture is a variant that is not supported; choose another model."
        )
    weights: dict[str, mx.array] = {}
    for name in file.tensors:
        target = _rename(name)
        if target is None:
            continue
        path, part = target.rsplit(".", 1)
        for suffix, array in read_tensor(file, name).items():
            if config["model_type"] == "llama" and (heads := _HEADS.get(path.rsplit(".", 1)[-1])):
                array = _unpermute(array, config[heads])
            weights[f"{path}.{part if suffix == 'weight' else suffix}"] = array
    return weights


def gguf_packing(file: GGUFFile) -> dict[str, Any] | None:
    """config.json's "quantization" for the matrices as stored; None if none is quantized."""
    matrices = {name: info for name, info in file.tensors.items() if len(info.shape) == 2 and _rename(name)}
    modules = {name: str(_rename(name)).removesuffix(".weight") for name in matrices}
    packing: dict[str, Form] = {
        modules[name]: {"group_size": GROUP_SIZE, "bits": BITS[info.kind], "mode": "affine"}
        for name, info in matrices.items()
        if info.kind in BITS
    }
    return describe_packing(packing, modules.values()) if packing else None


_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def _rename(name: str) -> str | None:
    """mlx-lm's name of one of GGUF's tensors; None if there is none."""
    if match := _BLOCK.fullmatch(name):
        layer, part, suffix = match.groups()
        return f"model.layers.{layer}.{_LAYER[part]}.{suffix}" if part in _LAYER else None
    stem, _, suffix = name.rpartition(".")
    return f"{_TOP[stem]}.{suffix}" if stem in _TOP and suffix == "weight" else None


def gguf_name(name: str) -> str:
    """GGUF's name of one of mlx-lm's tensors."""
    path, _, suffix = name.rpartition(".")
    for gguf_part, mlx_path in _TOP.items():
        if path == mlx_path:
            return f"{gguf_part}.{suffix}"
    _, _, layer, part = path.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}.{suffix}"


_PARTS = {mlx_part: gguf_part for gguf_part, mlx_part in _LAYER.items()}


def gguf_architecture(config: Config) -> str | None:
    """The name of a model's architecture in GGUF; None if GGUF files of it are neither read nor written here."""
    family = family_of(config)
    return None if family is None else family.gguf


def permute(name: str, array: mx.array, config: Config) -> mx.array:
    """The tensor `name` with rows in llama.cpp's order; only q and k of Llama and Mistral change.

    llama.cpp rotates neighbouring dimensions of a head, Hugging Face its first half with its second.
    """
    part = name.rsplit(".", 2)[-2]
    if part not in _HEADS or gguf_architecture(config) != "llama":
        return array
    halves = array.reshape(config[_HEADS[part]], 2, -1, *array.shape[1:])  # (heads, 2, head_dim / 2, ...)
    return halves.swapaxes(1, 2).reshape(array.shape)


def _unpermute(array: mx.array, heads: int) -> mx.array:
    """Rows in Hugging Face's order from llama.cpp's, which interleaves the two halves of each q and k head.

    This works for weights, biases, and each part of a quantized weight, because rows are never split.
    """
    if array.shape[0] % (2 * heads):
        return array  # the later comparison of shapes reports it
    rows = array.reshape(heads, -1, 2, *array.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return rows.swapaxes(1, 2).reshape(array.shape)
