"""PEFT's format: written, read back, and loaded by PEFT itself."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import TEXT_IDS, logits
from tuned import make_tuned

from mlx_zh.errors import AdapterError
from mlx_zh.models.adapters import peft as peft_format
from mlx_zh.models.adapters.files import load_adapter, read_adapter
from mlx_zh.models.adapters.peft import read_peft, write_peft
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.load import load_model

ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def export(tmp_path, **options):
    tuned = make_tuned(tmp_path, **options)
    matrices = tuned.fusion().base.outline.matrices
    write_peft(tmp_path / "peft", tuned.spec, tuned.weights, base="org/base", matrices=matrices)
    return tuned, tmp_path / "peft"


def config(folder, **changes):
    path = folder / "adapter_config.json"
    known = json.loads(path.read_text())
    if changes:
        path.write_text(json.dumps(known | changes))
    return known


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_there_and_back_is_the_same(tmp_path, kind):
    tuned, folder = export(tmp_path, kind=kind)
    spec, weights = read_peft(folder)
    assert (spec.kind, spec.rank, spec.scale) == (kind, 4, 2.0)
    assert weights.keys() == tuned.weights.keys()
    assert all((weights[name] == array).all() for name, array in tuned.weights.items())
    loaded = load_model(str(tuned.base))
    load_adapter(loaded.model, folder)  # as chat, eval and fuse read any adapter
    loaded.model.eval()
    np.testing.assert_array_equal(logits(loaded.model), tuned.logits)


def test_the_settings_are_pefts(tmp_path):
    _, folder = export(tmp_path)
    found = config(folder)
    assert (found["r"], found["lora_alpha"], found["use_rslora"], found["use_dora"]) == (4, 8.0, False, False)
    assert found["target_modules"] == ALL and found["layers_to_transform"] is None
    assert found["base_model_name_or_path"] == "org/base" and found["task_type"] == "CAUSAL_LM"
    stored = mx.load(str(folder / "adapter_model.safetensors"))
    name = "base_model.model.model.layers.0.mlp.down_proj"
    assert stored[f"{name}.lora_A.weight"].shape == (4, 96)  # (r, in)
    assert stored[f"{name}.lora_B.weight"].shape == (64, 4)  # (out, r)


def test_fewer_layers_and_targets(tmp_path):
    _, folder = export(tmp_path, layers=1, targets=("q_proj", "v_proj"))
    found = config(folder)
    assert (found["target_modules"], found["layers_to_transform"]) == (["q_proj", "v_proj"], [1])
    uneven = {f"model.layers.{n}.self_attn.{p}_proj" for n, p in ((0, "q"), (1, "q"), (1, "v"))}
    weights = {f"{path}.{leaf}": mx.zeros((64, 64)) for path in uneven for leaf in ("lora_a", "lora_b")}
    matrices = [f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qkvo"]
    write_peft(tmp_path / "uneven", AdapterSpec("lora", 2), weights, base="b", matrices=matrices)
    assert config(tmp_path / "uneven")["target_modules"] == sorted(uneven)


def test_ranks_and_alphas_of_their_own(tmp_path):
    """One module with rank 2 and alpha 6 among rank 4 and alpha 8: its scale is 3 instead of 2."""
    tuned, folder = export(tmp_path, targets=("q_proj",))
    special = "model.layers.1.self_attn.q_proj"
    stored = dict(mx.load(str(folder / "adapter_model.safetensors")))
    a, b = (f"base_model.model.{special}.lora_{x}.weight" for x in "AB")
    stored[a], stored[b] = stored[a][:2], stored[b][:, :2]
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), stored)
    config(folder, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={r".*\.1\..*q_proj": 6})
    spec, weights = read_peft(folder)
    product = spec.scale * weights[f"{special}.lora_b"].T @ weights[f"{special}.lora_a"].T
    np.testing.assert_allclose(product, 3 * stored[b] @ stored[a], rtol=1e-5, atol=1e-6)
    other = "model.layers.0.self_attn.q_proj.lora_b"
    assert (weights[other] == tuned.weights[other]).all()


def test_rslora_divides_by_the_root_of_the_rank(tmp_path):
    _, folder = export(tmp_path)
    config(folder, use_rslora=True)
    assert read_adapter(folder)[0].scale == 4.0  # 8 / sqrt(4)


# Every key of PEFT's LoraConfig (0.9 to 0.21): values with which the adapter is plain LoRA or DoRA, and others.
READ = {
    "alora_invocation_tokens": [None, []],
    "alpha_pattern": [{}, None, {"q_proj": 8}],
    "arrow_config": [None],
    "auto_mapping": [None, {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}],
    "base_model_name_or_path": ["x", None],
    "bias": ["none"],
    "corda_config": [None, {"corda_method": "kpm"}],
    "ensure_weight_tying": [False, True],
    "eva_config": [None, {"rho": 2.0}],
    "exclude_modules": [None, ["lm_head"]],
    "fan_in_fan_out": [False],
    "inference_mode": [True, False],
    "init_lora_weights": [True, False, None, "gaussian", "orthogonal", "eva", "mica"],
    "kasa_config": [None],
    "layer_replication": [None],
    "layers_pattern": [None, "layers", ["layers"]],
    "layers_to_transform": [None, 1, [0, 1]],
    "loftq_config": [{}, {"loftq_bits": 4}],
    "lora_alpha": [8, 0.5],
    "lora_bias": [False],
    "lora_dropout": [0.0, 0.1],
    "lora_ga_config": [None, {"direction": "ArB2r"}],
    "megatron_config": [None],
    "megatron_core": ["megatron.core"],
    "monteclora_config": [None],
    "modules_to_save": [None, []],
    "peft_type": ["LORA"],
    "peft_version": ["0.18.0"],
    "qalora_group_size": [16],
    "r": [4],
    "rank_pattern": [{}, None],
    "revision": [None, "main"],
    "runtime_config": [None, {"ephemeral_gpu_offload": False}],
    "target_modules": ["all-linear", r".*_proj", ["q_proj"]],
    "target_parameters": [None, []],
    "task_type": ["CAUSAL_LM", None],
    "trainable_token_indices": [None],
    "use_bdlora": [None],
    "use_dora": [False],
    "use_qalora": [False],
    "use_rslora": [False, True],
    "velora_config": [None],
    "lora_dtype": ["bfloat16"],  # of another program
}
REFUSED = {
    "alora_invocation_tokens": [[1, 2]],
    "arrow_config": [{"top_k": 3}],
    "bias": ["all", "lora_only"],
    "fan_in_fan_out": [True],
    "init_lora_weights": ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "something_new", "PiSSA"],
    "invocation_string": ["<|start|>"],
    "kasa_config": [{"beta": 0.0001}],
    "layer_replication": [[[0, 1], [0, 2]]],
    "lora_bias": [True],
    "megatron_config": [{"hidden_size": 64}],
    "modules_to_save": [["score"], ["embed_tokens", "norm"]],
    "monteclora_config": [{"num_samples": 8}],
    "peft_type": ["IA3", "VERA", "LOHA", "LOKR", "ADALORA", "PROMPT_TUNING", "PREFIX_TUNING", "OFT", "BONE", "XLORA"],
    "target_parameters": [["experts.gate_up_proj"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [3]}],
    "something_new_config": [{"x": 1}],
    "use_bdlora": [{"nblocks": 2}],
    "use_qalora": [True],
    "use_something_new": [True],
    "velora_config": [{"num_groups": 64}],
}
CONVERTIBLE = ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "PiSSA")  # by PEFT, to plain LoRA
NEVER_MERGED = ("PROMPT_TUNING", "PREFIX_TUNING", "XLORA")


def test_every_setting_of_pefts_is_read_or_refused_by_name(tmp_path):
    _, folder = export(tmp_path)
    original = config(folder)
    path = folder / "adapter_config.json"
    for key, values in READ.items():
        for value in values:
            path.write_text(json.dumps(original | {key: value}))
            read_peft(folder)
    for key, values in REFUSED.items():
        for value in values:
            path.write_text(json.dumps(original | {key: value}))
            with pytest.raises(AdapterError, match=rf"{key} {re.escape(repr(value))}") as error:
                read_peft(folder)
            merged = value not in NEVER_MERGED if key == "peft_type" else key not in peft_format._NEVER_MERGED
            assert ("Merge it with PEFT (merge_and_unload)" in str(error.value)) == merged
            assert ("PEFT cannot merge it either" in str(error.value)) == (not merged)
            convertible = key == "init_lora_weights" and value in CONVERTIBLE
            assert ("path_initial_model_for_weight_conversion" in str(error.value)) == convertible


@pytest.mark.oracle
def test_the_tables_know_every_setting_of_the_installed_peft():
    peft = pytest.importorskip("peft")
    assert set(peft.LoraConfig(r=4).to_dict()) <= READ.keys() | REFUSED.keys()


def test_settings_without_a_rank_are_damage(tmp_path):
    _, folder = export(tmp_path)
    config(folder, r=None)
    with pytest.raises(AdapterError, match="is damaged or no PEFT adapter"):
        read_peft(folder)


def test_other_tensors_and_damage_are_refused(tmp_path):
    _, folder = export(tmp_path)
    file = folder / "adapter_model.safetensors"
    stored = dict(mx.load(str(file)))
    mx.save_safetensors(
        str(file), stored | {"base_model.model.model.embed_tokens.lora_embedding_A": mx.zeros((2, 2))}
    )
    with pytest.raises(AdapterError, match="lora_embedding_A"):
        read_peft(folder)
    del stored[next(key for key in stored if key.endswith("lora_B.weight"))]
    mx.save_safetensors(str(file), stored)
    with pytest.raises(AdapterError, match="not complete"):
        read_peft(folder)
    file.write_bytes(b"\x08")
    with pytest.raises(AdapterError, match="damaged"):
        read_peft(folder)


def test_full_fine_tuning_has_no_peft_format(tmp_path):
    tuned = make_tuned(tmp_path, kind="full")
    with pytest.raises(AdapterError, match="full fine-tuning is no adapter"):
        write_peft(tmp_path / "peft", tuned.spec, tuned.weights, base="b", matrices=[])


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("family", "layers"), [("llama", 2), ("qwen2", 1), ("qwen3", 2)])
def test_peft_loads_it_and_agrees(tmp_path, family, layers, kind):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tuned, folder = export(tmp_path, family=family, kind=kind, layers=layers)
    base = AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        found = model(torch.tensor([TEXT_IDS])).logits[0].numpy()
    np.testing.assert_allclose(found, tuned.logits, atol=2e-4)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_peft_made_is_read(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tuned = make_tuned(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 6},
        use_rslora=True,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        expected = model(torch.tensor([TEXT_IDS])).logits[0].numpy()
    model.save_pretrained(tmp_path / "made")
    loaded = load_model(str(tuned.base))
    load_adapter(loaded.model, tmp_path / "made")
    loaded.model.eval()
    np.testing.assert_allclose(logits(loaded.model), expected, atol=2e-4)


def test_a_pickled_adapter_is_named_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(AdapterError, match=r"only as adapter_model\.bin\. .* pickle.* safe_serialization=True"):
        read_adapter(tmp_path)
