"""Every family on disk: read as hubs have it, its answers, its adapters in other programs, its exports read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from families import FAMILIES
from mlx.utils import tree_flatten
from mlx_lm.utils import load_adapters
from mlx_lm.utils import load_model as their_load
from test_batched import GREEDY, WARM, alone, answers, prompts, questions
from tiny_models import TEXT_IDS, VOCABULARY, logits, parameters, tiny_config, tiny_model, write_folder
from tuned import Tuned, make_tuned

from mlx_zh.core.families import FAMILIES as KNOWN
from mlx_zh.errors import AdapterError, ModelError
from mlx_zh.models.adapters.files import load_adapter, read_adapter
from mlx_zh.models.adapters.layers import adapted_layers, add_adapter, trainable
from mlx_zh.models.adapters.peft import read_peft, write_peft
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.export.folder_files import full_layout, packed_layout
from mlx_zh.models.export.folder_files import write_folder as write_fused
from mlx_zh.models.export.mlx_adapter import write_mlx_adapter
from mlx_zh.models.export.writable import check_writable
from mlx_zh.models.family_configs import expert_names
from mlx_zh.models.generate import GenerationSession
from mlx_zh.models.load import load_model
from mlx_zh.planning.memory import trained_values
from mlx_zh.planning.shapes import model_shape, planned_targets
from mlx_zh.recipe import Export

NEW = [name for name in FAMILIES if name not in ("llama", "mistral", "qwen2", "qwen3")]
EXPERTS = ("q_proj", "gate_proj", "down_proj")  # targets with experts among them
MERGED = 2e-4  # W x + s B A x against (W + s B A) x in float32, logits of size 10


def tuned_of(folder: Path, name: str, **changes: Any) -> Tuned:
    targets = EXPERTS if name == "qwen3_moe" else None
    return make_tuned(folder, name, layers=3, **({"targets": targets} | changes))


# ---- reading


@pytest.mark.parametrize("name", NEW)
def test_a_folder_is_read_as_mlx_lm_reads_it(tmp_path: Path, name: str) -> None:
    config = tiny_config(name)
    model = tiny_model(config)
    loaded = load_model(str(write_folder(tmp_path / name, config, model)))
    np.testing.assert_array_equal(logits(loaded.model), logits(model))


def test_experts_that_lie_apart_become_one(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe")
    model = tiny_model(config)
    folder = write_folder(tmp_path / "moe", config, model)
    stored = apart(dict(mx.load(str(folder / "model.safetensors"))))
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in stored
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    np.testing.assert_array_equal(logits(load_model(str(folder)).model), logits(model))
    del stored["model.layers.0.mlp.experts.7.up_proj.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    with pytest.raises(ModelError, match=r"experts\.7\.up_proj\.weight' is missing"):
        load_model(str(folder))


def apart(stored: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors with experts one by one, as hubs have them."""
    found: dict[str, mx.array] = {}
    for name, array in stored.items():
        path = name.removesuffix(".weight")
        names = expert_names(path, array.shape[0])
        parts = [array] if names == [path] else list(array)
        found |= {f"{part}.weight": value for part, value in zip(names, parts, strict=True)}
    return found


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_with_images_the_language_part_is_read(tmp_path: Path, prefix: str) -> None:
    config = tiny_config("gemma3_text")
    model = tiny_model(config)
    folder = write_folder(tmp_path / "gemma", config, model)
    stored = dict(mx.load(str(folder / "model.safetensors")))
    renamed = {prefix + name.removeprefix("model."): array for name, array in stored.items()}
    renamed["vision_tower.patch.weight"] = renamed["multi_modal_projector.w"] = mx.zeros((2, 2))
    mx.save_safetensors(str(folder / "model.safetensors"), renamed)
    text = {name: value for name, value in config.items() if name != "tie_word_embeddings"}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(whole))
    np.testing.assert_array_equal(logits(load_model(str(folder)).model), logits(model))


def test_a_router_that_is_quantized_on_loading_keeps_8_bits(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", hidden_size=128)
    loaded = load_model(
        str(write_folder(tmp_path / "moe", config, tiny_model(config))), quantize=(4, 32), dtype="bfloat16"
    )
    mlp = loaded.model.layers[0].mlp
    assert (mlp.gate.bits, mlp.gate.group_size, mlp.switch_mlp.up_proj.bits) == (8, 64, 4)


# ---- answers


SAMPLED = ("gemma3_text", "qwen3_moe", "qwen3_5")  # with windows, experts, a state: the draw itself is the same


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        pytest.param(
            name,
            sampling,
            id=f"{kind}-{name}",
            marks=pytest.mark.thorough if kind == "sampled" and name not in SAMPLED else (),
        )
        for kind, sampling in (("greedy", GREEDY), ("sampled", WARM))
        for name in NEW
    ],
)
def test_answers_in_slots_are_those_of_mlx_lm_alone(name: str, sampling: Any) -> None:
    """Prompts longer and shorter than Gemma's window of 6 tokens; a family with windows has caches of their own."""
    model = tiny_model(tiny_config(name))
    asked = questions(prompts(vocabulary=VOCABULARY), count=2)
    together = answers(model, asked, sampling, 3)
    for number, question in enumerate(asked):
        for index, (tokens, _) in enumerate(together[number]):
            assert tokens == alone(model, question, index, sampling, [7])


@pytest.mark.parametrize("name", NEW)
def test_a_chats_second_turn_is_as_if_it_were_the_first(tmp_path: Path, name: str) -> None:
    config = tiny_config(name)
    loaded = load_model(str(write_folder(tmp_path / name, config, tiny_model(config))))
    first, second = TEXT_IDS * 2, TEXT_IDS * 2 + TEXT_IDS[::-1]

    def chat(*turns: list[int]) -> list[int]:
        session = GenerationSession(loaded.model, loaded.tokenizer, loaded.eos_token_ids, prefill_chunk=5)
        for turn in turns:
            list(session.stream(turn, type(GREEDY)(temperature=0.0, max_tokens=8)))
        return session.tokens

    assert chat(first, second) == chat(second)


# ---- adapters


@pytest.mark.parametrize("name", NEW)
def test_mlx_lm_loads_our_adapter(tmp_path: Path, name: str) -> None:
    tuned = tuned_of(tmp_path, name)
    (tmp_path / "out").mkdir()
    write_mlx_adapter(tmp_path / "out", tuned.fusion())
    theirs, _ = their_load(tuned.base)
    load_adapters(theirs, str(tmp_path / "out"))
    theirs.eval()
    np.testing.assert_allclose(logits(theirs), tuned.logits, atol=1e-5)
    assert np.abs(logits(load_model(str(tuned.base)).model) - tuned.logits).max() > 0.1


@pytest.mark.parametrize("name", NEW)
def test_pefts_names_are_those_of_the_hubs_tensors(tmp_path: Path, name: str) -> None:
    """Every adapted module is a matrix under its name on the hub; the way back gives the same arrays."""
    tuned = tuned_of(tmp_path, name)
    base = tuned.fusion().base
    on_hub = apart({key: mx.zeros(shape) for key, shape in base.outline.shapes.items()})
    matrices = [key.removesuffix(".weight") for key in on_hub]
    write_peft(tmp_path / "peft", tuned.spec, tuned.weights, base="b", matrices=matrices)
    stored = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
    for key, array in stored.items():
        module, leaf = key.removeprefix("base_model.model.").split(".lora_")
        outputs, inputs = on_hub[f"{module}.weight"].shape
        assert array.shape == ((4, inputs) if leaf == "A.weight" else (outputs, 4))
    spec, weights = read_peft(tmp_path / "peft")
    assert (spec.rank, spec.scale) == (4, 2.0) and weights.keys() == tuned.weights.keys()
    assert all(mx.array_equal(weights[key], array).item() for key, array in tuned.weights.items())
    loaded = load_model(str(tuned.base))
    load_adapter(loaded.model, tmp_path / "peft")
    loaded.model.eval()
    np.testing.assert_array_equal(logits(loaded.model), tuned.logits)


def test_experts_are_adapted_only_on_request_and_a_router_never(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("qwen3_moe"))
    default = adapted_layers(model, AdapterSpec("lora", 3))
    assert not [name for name in default if "switch_mlp" in name or name.endswith("mlp.gate")]
    assert {name.rpartition(".")[2] for name in default if ".layers.0." in name} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert "model.layers.1.mlp.up_proj" in default  # a layer without experts
    named = adapted_layers(model, AdapterSpec("lora", 3, targets=EXPERTS))
    assert "model.layers.0.mlp.switch_mlp.gate_proj" in named and not any(n.endswith("mlp.gate") for n in named)
    with pytest.raises(AdapterError, match=r"lora\.targets names gate, which"):
        adapted_layers(model, AdapterSpec("lora", 3, targets=("gate",)))
    for spec in (AdapterSpec("dora", 3, targets=EXPERTS), AdapterSpec("lora", 3, targets=EXPERTS, dropout=0.1)):
        with pytest.raises(AdapterError, match="cannot be used for the experts of this model"):
            add_adapter(model, spec, seed=0)
    add_adapter(model, AdapterSpec("full", 3), seed=0)
    names = trainable(model).keys()
    assert "model.layers.0.mlp.switch_mlp.up_proj.weight" in names
    assert "model.layers.0.mlp.gate.weight" not in names


def test_an_adapter_of_some_experts_is_refused(tmp_path: Path) -> None:
    tuned = tuned_of(tmp_path, "qwen3_moe")
    write_peft(tmp_path / "peft", tuned.spec, tuned.weights, base="b", matrices=[])
    file = tmp_path / "peft" / "adapter_model.safetensors"
    stored = dict(mx.load(str(file)))
    kept = {name: array for name, array in stored.items() if "layers.0.mlp.experts.3." not in name}
    assert len(kept) < len(stored)
    mx.save_safetensors(str(file), kept)
    with pytest.raises(AdapterError, match="an adapter for some of its experts only"):
        read_adapter(tmp_path / "peft")


# ---- exports


@pytest.mark.parametrize("name", NEW)
def test_a_merged_folder_is_base_and_adapter(tmp_path: Path, name: str) -> None:
    """As `hf` is written, with experts apart, and as `mlx` is, in 8 bits; each is read back, and by mlx-lm."""
    from dataclasses import replace

    tuned = tuned_of(tmp_path, name)
    if KNOWN[name].architecture is not None:
        layout = replace(full_layout(tuned.fusion(), mx.float32), apart=True)
        (tmp_path / "hf").mkdir()
        write_fused(tmp_path / "hf", layout, max_bytes=10**9, kind="pt")
        stored = mx.load(str(tmp_path / "hf" / "model.safetensors"))
        assert not any("switch_mlp" in key for key in stored)
        np.testing.assert_allclose(logits(load_model(str(tmp_path / "hf")).model), tuned.logits, atol=MERGED)
        if name != "qwen3_5":  # mlx-lm does not know the type that transformers has for the language part
            theirs, _ = their_load(tmp_path / "hf")
            np.testing.assert_allclose(logits(theirs), tuned.logits, atol=MERGED)

    (tmp_path / "mlx").mkdir()
    write_fused(tmp_path / "mlx", packed_layout(tuned.fusion(), 8, 32), max_bytes=10**9, kind="mlx")
    ours = logits(load_model(str(tmp_path / "mlx")).model)
    # A router that is rounded sends some tokens to other experts.
    most = 0.4 if name == "qwen3_5_moe" else 0.1
    assert np.linalg.norm(ours - tuned.logits) < most * np.linalg.norm(tuned.logits)
    theirs, _ = their_load(tmp_path / "mlx")
    theirs.set_dtype(mx.float32)  # of scales and norms, which are bfloat16; ours computes in float32 on a CPU
    np.testing.assert_allclose(logits(theirs), ours, atol=MERGED)


def test_transformers_knows_the_config_of_every_family() -> None:
    """transformers 5 has the class that an exported config.json names; two families bring code of their own."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    own_code = {"internlm3", "mimo"}
    assert {name for name in KNOWN if name not in CLASSES} <= own_code
    for name in [name for name in KNOWN.keys() - own_code if KNOWN[name].architecture is not None]:
        classes = CLASSES[name]
        assert KNOWN[name].architecture in (classes if isinstance(classes, tuple) else (classes,))
        AutoConfig.for_model(name)


@pytest.mark.parametrize("name", [*NEW, "gemma", "olmo2"])
def test_gguf_is_refused_by_name(name: str) -> None:
    for formats in (("gguf",), ("mlx", "gguf-lora")):
        with pytest.raises(ModelError, match=f"gguf.* cannot be written for models of type '{name}'"):
            check_writable({"model_type": name}, Export(formats=formats))
    with pytest.raises(ModelError, match=f"export.recover cannot be used for this model of type '{name}'"):
        check_writable({"model_type": name}, Export(recover=True))
    check_writable({"model_type": name}, Export(formats=("mlx", "peft", "mlx-adapter")))


def test_hf_needs_names_that_are_known() -> None:
    with pytest.raises(ModelError, match="models of type 'olmo2' cannot be exported as hf"):
        check_writable({"model_type": "olmo2"}, Export(formats=("hf",)))
    for name in NEW:
        if KNOWN[name].architecture is not None:
            check_writable({"model_type": name}, Export(formats=("hf",)))
    with pytest.raises(ModelError, match="models of type 'qwen3_5_moe' cannot be exported as hf"):
        check_writable({"model_type": "qwen3_5_moe"}, Export(formats=("hf",)))


# ---- the planner


@pytest.mark.parametrize("name", FAMILIES)
def test_the_planner_counts_the_parameters(name: str) -> None:
    """Blocks within 2 % (biases of outputs and MLPs are not counted), and the adapters' values exactly."""
    config = tiny_config(name, **({"mlp_only_layers": []} if name == "qwen3_moe" else {}))
    model = tiny_model(config)
    shape = model_shape(config)
    blocks = [sum(array.size for _, array in tree_flatten(layer.parameters())) for layer in model.layers]
    block = blocks[0] if shape.delta is None else np.mean(blocks)
    assert shape.block_values == pytest.approx(block, rel=0.02)
    for targets in (None, ("o_proj", "down_proj")):
        spec = AdapterSpec("lora", 2, rank=4, targets=targets)
        add_adapter(model, spec, seed=0)
        values = sum(array.size for array in trainable(model).values())
        planned = AdapterSpec("lora", 2, rank=4, targets=planned_targets(shape, targets))
        fused = targets is None and name in ("phi3", "glm4")  # two adapters instead of three are smaller
        if name == "qwen3_5_moe":  # the adapters of the expert that all tokens share are not counted
            values = sum(array.size for key, array in trainable(model).items() if "shared_expert" not in key)
        assert trained_values(shape, planned) == values or (fused and values < trained_values(shape, planned))


def test_a_token_meets_few_of_the_experts() -> None:
    """Qwen3-30B-A3B: 30.5 billion parameters, 3.3 of them active, as its makers say."""
    config = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "tie_word_embeddings": False,
    }  # fmt: skip
    shape = model_shape(config)
    assert shape.layers * shape.block_values + shape.outer_values == pytest.approx(30.5e9, rel=2e-3)
    assert shape.layers * shape.active_values + shape.outer_values == pytest.approx(3.3e9, rel=0.02)


def test_parameters_are_all_read(tmp_path: Path) -> None:
    """No parameter of any family is left at what its class began with."""
    for name in NEW:
        config = tiny_config(name)
        model = tiny_model(config)
        loaded = load_model(str(write_folder(tmp_path / name, config, model)))
        ours, theirs = parameters(loaded.model), parameters(model)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
