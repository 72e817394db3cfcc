"""A family's config.json in the form that its module of mlx-lm reads, and its tensors under mlx-lm's names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from mlx_zh.core.families import Config, family_of
from mlx_zh.errors import ModelError

if TYPE_CHECKING:
    import mlx.core as mx

# What Gemma 3's text_config leaves out where it has these values (transformers' Gemma3TextConfig).
_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
_WITH_IMAGES = ("gemma3", "qwen3_5", "qwen3_5_moe")
_TEXT_PREFIXES = ("language_model.", "model.language_model.")  # before the names of a language part's tensors
_OTHER_PARTS = tuple(
    prefix + part for prefix in ("", "model.") for part in ("vision_tower.", "multi_modal_projector.", "visual.")
)


def completed(config: Config, where: str) -> Config:
    """The config for mlx-lm: of a model with images its language part, and RoPE and windows under mlx-lm's keys.

    Raises ModelError, naming `where`, if some layers have a window and mlx-lm would let them see the whole text.
    """
    config = _language_part(config)
    _flatten_rope(config)
    _check_windows(config, where)
    return config


def _language_part(config: Config) -> Config:
    text = config.get("text_config")
    kind = str(config.get("model_type"))
    if kind in ("qwen3_5_text", "qwen3_5_moe_text"):
        return config | {"model_type": kind.removesuffix("_text")}
    if kind not in _WITH_IMAGES or not isinstance(text, dict):
        return config
    outer: Config = {
        name: config[name] for name in ("eos_token_id", "bos_token_id", "pad_token_id") if name in config
    }
    packed = {name: config[name] for name in ("quantization", "quantization_config") if name in config}
    if kind == "gemma3":
        return _GEMMA3 | outer | text | packed | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    if isinstance(config.get("tie_word_embeddings"), bool):
        outer["tie_word_embeddings"] = config["tie_word_embeddings"]
    return outer | text | packed | {"model_type": kind}


def language_tensors(weights: dict[str, mx.array]) -> None:
    """Of a model with images, keep the language part's tensors, under the names of a model without images."""
    if not any(name.startswith(_TEXT_PREFIXES) for name in weights):
        return
    for name in list(weights):
        array = weights.pop(name)
        if name.startswith(_OTHER_PARTS):
            continue
        if name.startswith("model.language_model."):
            name = "model." + name.removeprefix("model.language_model.")
        weights[name.removeprefix("language_model.")] = array


def mlx_lm_names(weights: dict[str, mx.array], config: Config) -> dict[str, mx.array]:
    """Tensors of a model with this config under the names that they have in mlx-lm's own model."""
    family = family_of(config)
    part = family.part if family is not None else ""
    return {part + name: array for name, array in weights.items()}


def hub_tensor(name: str, array: mx.array, config: Config) -> mx.array:
    """A tensor as the hubs have it: what mlx-lm changes in those of Qwen3.5 when it reads them, taken back."""
    if not (family := family_of(config)) or not family.recurrent:
        return array
    if name.endswith(".conv1d.weight"):
        return array.swapaxes(1, 2)
    return array - 1.0 if name.endswith(_NORMS_FROM_ONE) else array


# The norms whose weight the hubs store less 1; not that of a gated delta net.
_NORMS_FROM_ONE = (
    ".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight", ".q_norm.weight",
    ".k_norm.weight",
)  # fmt: skip


def hub_config(config: Config) -> Config:
    """The config for transformers, in which the language part of a model with images has a type of its own."""
    family = family_of(config)
    if family is None or not family.recurrent:
        return config
    return config | {"model_type": f"{config['model_type']}_text"}


def is_float32(name: str) -> bool:
    """Whether a tensor stays float32 in any model: decays of a gated delta net, of which an exponential is taken."""
    return name.endswith(".A_log")


def _flatten_rope(config: Config) -> None:
    """Copy RoPE's numbers out of rope_parameters, where transformers 5 puts them; mlx-lm would use its defaults."""
    nested = config.get("rope_parameters")
    if not isinstance(nested, dict):
        return
    local = nested.get("sliding_attention")
    if isinstance(local, dict) and isinstance(nested.get("full_attention"), dict):
        config.setdefault("rope_local_base_freq", local.get("rope_theta", 10000.0))
        nested = nested["full_attention"]
    if "rope_theta" in nested:
        config.setdefault("rope_theta", nested["rope_theta"])
    if "partial_rotary_factor" in nested:
        config.setdefault("partial_rotary_factor", nested["partial_rotary_factor"])
    kind = nested.get("rope_type") or nested.get("type") or "default"
    if kind != "default" and not config.get("rope_scaling"):
        config["rope_scaling"] = {key: value for key, value in nested.items() if key != "rope_theta"}


def _check_windows(config: Config, where: str) -> None:
    listed: Any = config.get("layer_types") or []
    kinds = [str(kind) for kind in listed] if isinstance(listed, list) else [str(listed)]
    family = family_of(config)
    heeded = family is not None and family.windows
    unknown = sorted({kind for kind in kinds if kind != "full_attention" and not (heeded and kind == _SLIDING)})
    if _RECURRENT in kinds and family is not None and family.recurrent:
        _check_interval(config, kinds, where)
        return
    if unknown or (config.get("use_sliding_window") and not heeded):
        raise ModelError(
            f"{where}: layers with {', '.join(unknown) or _SLIDING} are not supported for model_type "
            f"{config.get('model_type')!r}, because mlx-lm would let them see the whole text. Choose another model."
        )
    if config.get("model_type") == "gemma3_text":
        _window_pattern(config, kinds, where)


def _check_interval(config: Config, kinds: list[str], where: str) -> None:
    """Raise ModelError unless one layer in every `full_attention_interval` has attention, as mlx-lm has them."""
    interval = config.get("full_attention_interval", 4)
    if not isinstance(interval, int) or interval < 1:
        raise ModelError(f"{where}: full_attention_interval must be a whole number, got {str(interval)[:40]!r}.")
    if kinds != ["full_attention" if (i + 1) % interval == 0 else _RECURRENT for i in range(len(kinds))]:
        raise ModelError(
            f"{where}: its layer_types do not repeat, and mlx-lm has them only with one full_attention in every "
            f"{interval} layers. Choose another model."
        )


_SLIDING, _RECURRENT = "sliding_attention", "linear_attention"

_EXPERTS = re.compile(r"(.+)\.mlp\.switch_mlp\.(\w+)")  # mlx-lm's: all experts in one
_EXPERT = re.compile(r"(.+)\.mlp\.experts\.(\d+)\.(\w+)")  # the hubs': one by one


def expert_names(module: str, count: int) -> list[str]:
    """The hubs' names of the `count` experts of one of mlx-lm's modules; of any other module only its own."""
    match = _EXPERTS.fullmatch(module)
    return [f"{match[1]}.mlp.experts.{number}.{match[2]}" for number in range(count)] if match else [module]


def of_expert(module: str) -> tuple[str, int] | None:
    """mlx-lm's module and the number of the expert that one of the hubs' modules is; None for any other module."""
    match = _EXPERT.fullmatch(module)
    return (f"{match[1]}.mlp.switch_mlp.{match[3]}", int(match[2])) if match else None


def _window_pattern(config: Config, kinds: list[str], where: str) -> None:
    """Set mlx-lm's `sliding_window_pattern`: every so many layers, one sees the whole text. Raises ModelError."""
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    if kinds and "full_attention" in kinds:
        pattern = kinds.index("full_attention") + 1
    if not isinstance(pattern, int) or pattern < 1:
        raise ModelError(f"{where}: sliding_window_pattern must be a whole number, got {str(pattern)[:40]!r}.")
    expected = ["full_attention" if (i + 1) % pattern == 0 else _SLIDING for i in range(len(kinds))]
    if kinds != expected:
        raise ModelError(
            f"{where}: its layer_types do not repeat, and mlx-lm has them only with one full_attention in every "
            f"{pattern} layers. Choose another model."
        )
    config["sliding_window_pattern"] = pattern
