"""Small configurations of the model families, each with what sets it apart, for mlx-lm's own classes."""

from __future__ import annotations

from typing import Any

import numpy as np

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
WINDOW = 6

RECURRENT: dict[str, Any] = {
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
# What each family has beside that. Numbers are chosen so that leaving any of it out changes the logits by percents.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "internlm3": {"qkv_bias": True, "bias": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "ernie4_5": {"head_dim": 32, "use_bias": True, "tie_word_embeddings": True},
    "seed_oss": {"head_dim": 32, "attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    "granite": {
        "logits_scaling": 4.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.3,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mimo": {},
    "glm4": {"tie_word_embeddings": False, "head_dim": 16, "attention_bias": True, "partial_rotary_factor": 0.5},
    "hunyuan_v1_dense": {"head_dim": 32, "attention_bias": True},
    "phi3": {"partial_rotary_factor": 0.75},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 20,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 1000.0,
        "tie_word_embeddings": True,
    },
    "qwen3_5": RECURRENT,
    "qwen3_5_moe": RECURRENT
    | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
}
# Llama's class with windows, as later Mistral models have them.
WINDOWED = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": WINDOW}


def family_config(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a small model."""
    return {"model_type": family} | COMMON | FAMILIES[family] | changes


def family_model(family: str, *, quantized: int | None = None, seed: int = 0, **changes: Any) -> Any:
    """mlx-lm's own model with every parameter random: norms and biases too, or an error in them would not show."""
    return randomized(own_class(family_config(family, **changes)), quantized=quantized, seed=seed)


def randomized(model: Any, *, quantized: int | None = None, dtype: str = "float32", seed: int = 0) -> Any:
    """The model with random weights of `dtype`, then quantized if asked for; in evaluation mode."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    rng = np.random.default_rng(seed)
    weights = []
    for name, array in tree_flatten(model.parameters()):
        values = rng.normal(size=array.shape)
        values = 1 + 0.2 * values if "norm" in name else values * (1.5 / np.sqrt(64) if array.ndim > 1 else 0.2)
        weights.append((name, mx.array(values.astype(np.float32)).astype(getattr(mx, dtype))))
    model.load_weights(weights)
    if quantized is not None:
        nn.quantize(model, group_size=32, bits=quantized)
    model.eval()
    mx.eval(model.parameters())
    return model


def own_class(config: dict[str, Any]) -> Any:
    """mlx-lm's model of a config; of a tied Gemma 3 without the head that it drops when it has seen the tensors."""
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model = getattr(model, "language_model", model)
    if config["tie_word_embeddings"] and getattr(model, "tie_word_embeddings", None) is False:
        model.tie_word_embeddings = True
        model.pop("lm_head")
    return model
