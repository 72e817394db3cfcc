"""Adapters with tables of their own (`lora.modules_to_save`): stored, loaded by others, fused."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import TEXT_IDS, logits
from tuned import make_tuned

from mlx_zh.errors import AdapterError
from mlx_zh.models.adapters.files import adapter_damage, load_adapter, read_adapter
from mlx_zh.models.adapters.peft import read_peft, write_peft
from mlx_zh.models.export.folder_files import full_layout, write_folder
from mlx_zh.models.export.gguf_file import plan_gguf, write_gguf
from mlx_zh.models.load import load_model

BOTH = ("embed_tokens", "lm_head")
CASES = [(False, BOTH), (False, ("lm_head",)), (False, ("embed_tokens",)), (True, BOTH)]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def export(tmp_path, *, tied, saved):
    tuned = make_tuned(tmp_path, tied=tied, saved=saved)
    matrices = tuned.fusion().base.outline.matrices
    write_peft(tmp_path / "peft", tuned.spec, tuned.weights, base="b", matrices=matrices, tied=tied)
    return tuned, tmp_path / "peft"


@pytest.mark.parametrize(("tied", "saved"), CASES)
@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_there_and_back_is_the_same(tmp_path, tied, saved, form):
    tuned, peft = export(tmp_path, tied=tied, saved=saved)
    expected = {EMBEDDING} if tied else {EMBEDDING if name == "embed_tokens" else HEAD for name in saved}
    assert {name for name in tuned.weights if name.endswith(".weight")} == expected
    loaded = load_model(str(tuned.base))
    spec = load_adapter(loaded.model, tuned.adapter if form == "mlx" else peft)
    loaded.model.eval()
    assert spec.saved == (("embed_tokens",) if tied else tuple(name for name in BOTH if name in saved))
    np.testing.assert_array_equal(logits(loaded.model), tuned.logits)


def test_a_tied_models_table_is_stored_for_both_modules_in_pefts_form(tmp_path):
    tuned, folder = export(tmp_path, tied=True, saved=("embed_tokens",))
    stored = mx.load(str(folder / "adapter_model.safetensors"))
    for module in ("model.embed_tokens", "lm_head"):
        assert mx.array_equal(stored[f"base_model.model.{module}.weight"], tuned.weights[EMBEDDING]).item()
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == list(BOTH)
    stored["base_model.model.lm_head.weight"] += 1
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), stored)
    with pytest.raises(AdapterError, match="one table for both"):
        load_adapter(load_model(str(tuned.base)).model, folder)


def test_a_table_that_the_settings_name_and_the_file_lacks(tmp_path):
    _, folder = export(tmp_path, tied=False, saved=BOTH)
    stored = mx.load(str(folder / "adapter_model.safetensors"))
    del stored["base_model.model.lm_head.weight"]
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), stored)
    with pytest.raises(AdapterError, match="lm_head is missing"):
        read_peft(folder)


def test_a_table_of_another_vocabulary_does_not_fit_and_changes_nothing(tmp_path):
    tuned, folder = export(tmp_path, tied=False, saved=BOTH)
    stored = mx.load(str(folder / "adapter_model.safetensors"))
    stored["base_model.model.lm_head.weight"] = mx.zeros((300, 64))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), stored)
    loaded = load_model(str(tuned.base))
    before = logits(loaded.model)
    with pytest.raises(AdapterError, match=r"lm_head.weight is \[300, 64\], the model needs \[288, 64\]"):
        load_adapter(loaded.model, folder)
    np.testing.assert_array_equal(logits(loaded.model), before)


def test_a_flipped_bit_of_a_table_is_seen(tmp_path):
    tuned = make_tuned(tmp_path, tied=False, saved=BOTH)
    assert adapter_damage(tuned.adapter) is None
    path = tuned.adapter / "adapters.safetensors"
    data = bytearray(path.read_bytes())
    table = tuned.weights[EMBEDDING]
    at = data.find(np.array(table[17]).tobytes())
    assert at > 0
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(AdapterError, match="damaged"):
        read_adapter(tuned.adapter)


@pytest.mark.parametrize(("tied", "saved"), CASES)
def test_mlx_lm_loads_it_or_refuses_it_by_name(tmp_path, tied, saved):
    """By mlx-lm's own steps it is exact; its `load_adapters` may refuse what is no LoRA weight, but loses nothing."""
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model as mlx_lm_model

    tuned = make_tuned(tmp_path, tied=tied, saved=saved)
    settings = json.loads((tuned.adapter / "adapter_config.json").read_text())
    model, _ = mlx_lm_model(tuned.base)
    linear_to_lora_layers(model, settings["num_layers"], settings["lora_parameters"])
    model.load_weights(str(tuned.adapter / "adapters.safetensors"), strict=False)
    model.eval()
    np.testing.assert_allclose(logits(model), tuned.logits, atol=1e-5)
    fresh, _ = mlx_lm_model(tuned.base)
    try:
        fresh = load_adapters(fresh, str(tuned.adapter))
    except ValueError as error:
        assert next(name for name in tuned.weights if name.endswith(".weight")) in str(error)
    else:
        fresh.eval()
        np.testing.assert_allclose(logits(fresh), tuned.logits, atol=1e-5)


@pytest.mark.parametrize(("tied", "saved"), CASES)
def test_the_fused_folder_has_the_tables(tmp_path, tied, saved):
    tuned = make_tuned(tmp_path, tied=tied, saved=saved)
    out = tmp_path / "fused"
    out.mkdir()
    survivals = write_folder(out, full_layout(tuned.fusion(), mx.float32), max_bytes=1 << 30, kind="pt")
    fused = load_model(str(out))
    np.testing.assert_allclose(logits(fused.model), tuned.logits, atol=1e-4)
    tables = [name for name in tuned.weights if name.endswith(".weight")]
    assert len(survivals) == 7 * 2 + len(tables)
    for name in tables:
        stored = mx.load(str(out / "model.safetensors"))[name]
        assert mx.array_equal(stored, tuned.weights[name]).item()


@pytest.mark.parametrize(("tied", "saved"), CASES)
def test_a_quantized_base_is_fused_with_the_tables_in_full(tmp_path, tied, saved):
    """The trained tables are merged, so they are no longer the base's codes."""
    tuned = make_tuned(tmp_path, tied=tied, saved=saved, quantize=(4, 32))
    fusion = tuned.fusion(quantize=(4, 32))
    tables = {name for name in tuned.weights if name.endswith(".weight")}
    merged = {tensor.name: tensor for tensor in fusion.tensors(sorted(tables))}
    assert merged.keys() == tables and not {f"{path}.weight" for path in fusion.untouched} & tables
    for name, tensor in merged.items():
        assert mx.array_equal(tensor.value, tuned.weights[name]).item() and tensor.before is not None


@pytest.mark.parametrize(("tied", "saved"), CASES)
def test_the_gguf_file_has_the_tables(tmp_path, tied, saved):
    tuned = make_tuned(tmp_path, tied=tied, saved=saved)
    write_gguf(tmp_path / "model.gguf", plan_gguf(tuned.fusion(), "f16", "t"))
    stored = mx.load(str(tmp_path / "model.gguf"))
    names = {EMBEDDING: "token_embd.weight", HEAD: "output.weight"}
    for name in (name for name in tuned.weights if name.endswith(".weight")):
        expected = tuned.weights[name].astype(mx.float16)
        assert mx.array_equal(stored[names[name]].reshape(expected.shape).astype(mx.float16), expected).item()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("tied", "saved"), CASES)
def test_peft_loads_it_and_agrees(tmp_path, tied, saved):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tuned, folder = export(tmp_path, tied=tied, saved=saved)
    base = AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        found = model(torch.tensor([TEXT_IDS])).logits[0].numpy()
    np.testing.assert_allclose(found, tuned.logits, atol=2e-4)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_peft_saved_is_read(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    tuned = make_tuned(tmp_path, tied=False)
    base = AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.float32)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=list(BOTH), init_lora_weights=False)
    model = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
        expected = model(torch.tensor([TEXT_IDS])).logits[0].numpy()
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_model(str(tuned.base))
    spec = load_adapter(loaded.model, tmp_path / "theirs")
    assert spec.saved == BOTH
    np.testing.assert_allclose(logits(loaded.model), expected, atol=2e-4)
