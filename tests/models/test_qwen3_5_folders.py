"""Qwen3.5 on disk and in a chat: folders as hubs have them, adapters of other programs, a state to go back to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model as their_load
from tiny_models import TEXT_IDS, logits, tiny_config, tiny_model, write_folder
from tuned import make_tuned

from mlx_zh.errors import ModelError
from mlx_zh.models import snapshots
from mlx_zh.models.adapters.files import load_adapter, read_adapter
from mlx_zh.models.adapters.peft import read_peft, write_peft
from mlx_zh.models.family_configs import completed
from mlx_zh.models.generate import GenerationSession, Sampling
from mlx_zh.models.load import load_model

NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm", "q_norm", "k_norm")
GREEDY = Sampling(temperature=0.0, max_tokens=8)


def with_images(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the whole model, which has the language part's in it."""
    outer = ("model_type", "eos_token_id", "bos_token_id", "quantization")
    text = {name: value for name, value in config.items() if name not in outer}
    kinds = ["full_attention" if (i + 1) % 2 == 0 else "linear_attention" for i in range(3)]
    text |= {"model_type": f"{config['model_type']}_text", "layer_types": kinds, "attn_output_gate": True}
    return {name: config[name] for name in outer if name in config} | {"text_config": text, "vision_config": {}}


def rewrite(folder: Path, config: dict[str, Any], stored: dict[str, mx.array]) -> Path:
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    (folder / "config.json").write_text(json.dumps(with_images(config)))
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_is_read(tmp_path: Path, tied: bool) -> None:
    """Norms less 1, the convolution's axes in another order, and parts that are no language model."""
    config = tiny_config("qwen3_5", tied)
    model = tiny_model(config)
    folder, stored = write_folder(tmp_path / "hub", config, model), {}
    for name, array in tree_flatten(model.parameters()):
        if name.endswith(".weight") and any(name.removesuffix(".weight").endswith(norm) for norm in NORMS):
            array = array - 1
        array = mx.contiguous(array.swapaxes(1, 2)) if "conv1d" in name else array
        stored[name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)] = array
    stored |= {"mtp.fc.weight": mx.zeros((2, 2)), "model.visual.patch_embed.proj.weight": mx.zeros((2, 3, 2, 2))}
    ours = load_model(str(rewrite(folder, config, stored)))
    np.testing.assert_allclose(logits(ours.model), logits(model), atol=1e-4)  # 1 was taken off in float32
    theirs, _ = their_load(folder)
    np.testing.assert_array_equal(logits(ours.model), logits(theirs))
    assert ours.config["model_type"] == "qwen3_5"


def test_a_quantized_folder_of_mlx_is_read(tmp_path: Path) -> None:
    config = tiny_config("qwen3_5")
    model = tiny_model(config)
    nn.quantize(model, group_size=32, bits=4)
    config["quantization"] = {"group_size": 32, "bits": 4}
    folder = write_folder(tmp_path / "mlx", config, model)
    stored = {f"language_model.{name}": array for name, array in tree_flatten(model.parameters())}
    stored["vision_tower.blocks.0.attn.qkv.weight"] = mx.zeros((2, 2))
    ours = load_model(str(rewrite(folder, config, stored)), dtype="float32")
    theirs, _ = their_load(folder)
    np.testing.assert_array_equal(logits(ours.model), logits(model))
    np.testing.assert_array_equal(logits(ours.model), logits(theirs))
    assert ours.model.layers[0].linear_attn.in_proj_qkv.bits == 4
    half = load_model(str(folder), dtype="bfloat16").model
    assert half.layers[0].linear_attn.A_log.dtype == mx.float32  # an exponential is taken of it
    assert half.layers[0].linear_attn.dt_bias.dtype == mx.bfloat16


def test_layers_that_mlx_lm_would_take_for_others_are_refused() -> None:
    config = tiny_config("qwen3_5") | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
    with pytest.raises(ModelError, match="one full_attention in every 2 layers"):
        completed(dict(config), "model")
    with pytest.raises(ModelError, match="full_attention_interval must be a whole number, got 'x'"):
        completed(dict(config) | {"full_attention_interval": "x"}, "model")
    with pytest.raises(ModelError, match="layers with linear_attention are not supported for model_type 'qwen3'"):
        completed(dict(config) | {"model_type": "qwen3"}, "model")


def test_adapters_have_the_names_of_mlx_lm_and_of_either_model_in_peft(tmp_path: Path) -> None:
    tuned = make_tuned(tmp_path, "qwen3_5", layers=3)
    stored = mx.load(str(tuned.adapter / "adapters.safetensors"))
    names = {name.rpartition(".")[0] for name in tuned.weights}
    assert "model.layers.0.linear_attn.in_proj_a" in names
    plain = read_adapter(tuned.adapter)[1]
    assert plain.keys() == tuned.weights.keys()
    mx.save_safetensors(
        str(tuned.adapter / "adapters.safetensors"), {f"language_model.{n}": a for n, a in plain.items()}
    )
    config = json.loads((tuned.adapter / "adapter_config.json").read_text())
    (tuned.adapter / "adapter_config.json").write_text(json.dumps(config | {"mlx_zh": {}}))  # as mlx-lm writes it
    loaded = load_model(str(tuned.base))
    load_adapter(loaded.model, tuned.adapter)
    loaded.model.eval()
    np.testing.assert_array_equal(logits(loaded.model), tuned.logits)
    assert stored.keys() in ({*tuned.weights}, {f"language_model.{name}" for name in tuned.weights})

    write_peft(tmp_path / "peft", tuned.spec, tuned.weights, base="b", matrices=sorted(names))
    file = tmp_path / "peft" / "adapter_model.safetensors"
    arrays = {
        name.replace(".model.layers", ".model.language_model.layers"): a for name, a in mx.load(str(file)).items()
    }
    assert all("language_model" in name for name in arrays)
    mx.save_safetensors(str(file), arrays)
    assert read_peft(tmp_path / "peft")[1].keys() == tuned.weights.keys()


def session_of(loaded: Any) -> GenerationSession:
    return GenerationSession(loaded.model, loaded.tokenizer, loaded.eos_token_ids, prefill_chunk=7)


def greedy(model: Any, prompt: list[int], ends: tuple[int, ...]) -> list[int]:
    """mlx-lm's own loop."""
    tokens = []
    for token, _ in generate_step(mx.array(prompt), model, max_tokens=GREEDY.max_tokens):
        tokens.append(int(token))
        if tokens[-1] in ends:
            break
    return tokens


def test_a_chat_goes_back_to_the_state_before_the_reply(tmp_path: Path) -> None:
    """The second prompt leaves out 6 tokens that opened the first reply, as templates that think do."""
    config = tiny_config("qwen3_5")
    loaded = load_model(str(write_folder(tmp_path / "m", config, tiny_model(config))))
    session = session_of(loaded)
    said, opening = TEXT_IDS * 4, [9, 8, 7, 6, 5, 4]
    first = said + opening
    list(session.stream(first, GREEDY))
    assert session.tokens[: len(first)] == first
    assert session.tokens[len(first) :] == greedy(loaded.model, first, loaded.eos_token_ids)
    second = said + TEXT_IDS[::-1] * 2 + opening
    list(session.stream(second, GREEDY))
    assert session.statistics.prompt_cached == len(first) - snapshots.REPLY_START
    assert session.tokens[len(second) :] == greedy(loaded.model, second, loaded.eos_token_ids)
    third = TEXT_IDS[3:] * 3  # another conversation
    list(session.stream(third, GREEDY))
    assert session.statistics.prompt_cached == 0
    assert session.tokens[len(third) :] == greedy(loaded.model, third, loaded.eos_token_ids)
    fourth = session.tokens + TEXT_IDS * 2  # goes on from everything
    computed = len(session.tokens)
    list(session.stream(fourth, GREEDY))
    assert session.statistics.prompt_cached == computed
    assert session.tokens[len(fourth) :] == greedy(loaded.model, fourth, loaded.eos_token_ids)


def test_a_chat_that_is_stopped_while_the_prompt_is_computed(tmp_path: Path) -> None:
    config = tiny_config("qwen3_5")
    loaded = load_model(str(write_folder(tmp_path / "m", config, tiny_model(config))))
    session, prompt = session_of(loaded), TEXT_IDS * 4
    calls: list[int] = []

    def stop() -> bool:
        calls.append(1)
        return len(calls) >= 3

    assert list(session.stream(prompt, GREEDY, stop)) == []
    assert 0 < len(session.tokens) < len(prompt) and session.statistics.reason == "stopped"
    list(session.stream(prompt, GREEDY))
    assert session.statistics.prompt_cached > 0
    assert session.tokens[len(prompt) :] == greedy(loaded.model, prompt, loaded.eos_token_ids)
