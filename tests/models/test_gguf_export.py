"""GGUF files written here: read back by our reader, by the gguf package, and by llama.cpp."""

from __future__ import annotations

from dataclasses import replace

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import HEAD_DIM, MERGES, SPECIAL, TEXT_IDS, TOKENS, llama3_divisors, logits
from tuned import make_tuned

from mlx_zh.errors import ModelError
from mlx_zh.models.export.gguf_encoding import quantize_q8_0
from mlx_zh.models.export.gguf_file import plan_gguf, write_gguf
from mlx_zh.models.export.gguf_vocabulary import tokenizer_metadata
from mlx_zh.models.gguf_tokenizer import _CUTS, _PROBE, _cutter, cutting_rule
from mlx_zh.models.load import load_model

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = [("llama", True), ("llama", False), ("mistral", False), ("qwen2", False), ("qwen3", True)]


def export(tmp_path, kind, family="llama", **options):
    tuned = make_tuned(tmp_path, family, **options)
    path = tmp_path / "model.gguf"
    left = write_gguf(path, plan_gguf(tuned.fusion(), kind, "Tiny")).survivals
    return tuned, path, left


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_f16_read_back_is_base_and_adapter(tmp_path, family, tied):
    scaling = LLAMA31 if family == "llama" else None
    tuned, path, left = export(tmp_path, "f16", family, tied=tied, rope_scaling=scaling)
    loaded = load_model(str(path))
    # float16 keeps 11 bits: 2^-11 = 0.0005 a weight, and about ten times that of logits of size 10.
    np.testing.assert_allclose(logits(loaded.model), tuned.logits, atol=0.06)
    assert loaded.config.get("rope_scaling") == scaling
    assert all(one.kept == pytest.approx(1, abs=1e-3) for one in left) and len(left) == 14
    text = "hello 你好 12345\n\n<|im_start|>it's"
    assert loaded.tokenizer(text)["input_ids"] == tuned.fusion().base.tokenizer(text)["input_ids"]
    assert loaded.tokenizer.chat_template == tuned.fusion().base.tokenizer.chat_template


def test_q8_0_is_llama_cpps_rounding_bit_for_bit(tmp_path):
    tuned, path, _ = export(tmp_path, "q8_0", "qwen2", attention_bias=True)
    merged = {t.name: np.array(t.value) for t in tuned.fusion().tensors()}
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    up = stored["blk.1.ffn_up.weight"]
    expected = gguf.quants.quantize(merged["model.layers.1.mlp.up_proj.weight"], gguf.GGMLQuantizationType.Q8_0)
    assert up.tensor_type == gguf.GGMLQuantizationType.Q8_0 and (up.data == expected).all()
    assert (stored["blk.0.attn_q.bias"].data == merged["model.layers.0.self_attn.q_proj.bias"]).all()
    assert stored["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    zeros, _ = quantize_q8_0(mx.zeros((32,)))
    assert not zeros.any()
    found = logits(load_model(str(path)).model)
    assert np.linalg.norm(found - tuned.logits) < 0.1 * np.linalg.norm(tuned.logits)


def test_peer_bug_rope_type_is_read_and_its_factors_are_a_tensor(tmp_path):
    """mlx-lm reads rope_scaling["type"], which Llama 3.1 does not have, and so writes no factors."""
    tuned, path, _ = export(tmp_path, "f16", rope_scaling=LLAMA31)
    reader = gguf.GGUFReader(path)
    factors = next(t for t in reader.tensors if t.name == "rope_freqs.weight")
    expected = llama3_divisors(tuned.fusion().base.config, 8.0)
    assert factors.tensor_type == gguf.GGMLQuantizationType.F32 and factors.data.shape == (HEAD_DIM // 2,)
    np.testing.assert_allclose(factors.data, expected, rtol=1e-6)
    assert expected[0] == 1 and expected[-1] == 8
    assert not any(key.startswith("llama.rope.scaling") for key in reader.fields)


def test_peer_bug_the_tokenizer_has_merges_and_a_rule(tmp_path):
    """mlx-lm writes no merges and calls every tokenizer `llama`."""
    _, path, _ = export(tmp_path, "f16")
    fields = gguf.GGUFReader(path).fields
    value = {name: field.contents() for name, field in fields.items() if name.startswith(("tokenizer", "general"))}
    assert value["tokenizer.ggml.model"] == "gpt2"
    assert value["tokenizer.ggml.merges"] == MERGES
    assert value["tokenizer.ggml.pre"] == "gpt-2"
    assert value["tokenizer.ggml.tokens"] == TOKENS
    assert value["tokenizer.ggml.token_type"][: len(SPECIAL) + 1] == [3, 3, 3, 1]
    assert value["tokenizer.ggml.bos_token_id"] == 1 and value["tokenizer.ggml.eos_token_id"] == 2
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert value["general.architecture"] == "llama" and value["general.file_type"] == 1
    assert value["general.name"] == "Tiny"


def test_rows_that_no_token_uses_are_named(tmp_path):
    tuned = make_tuned(tmp_path, vocab_size=300)
    found = tokenizer_metadata(tuned.fusion().base)
    assert found["tokenizer.ggml.tokens"][288:] == [f"[PAD{n}]" for n in range(288, 300)]
    assert found["tokenizer.ggml.token_type"][288:] == [5] * 12


def test_every_rule_is_told_from_the_others():
    pieces = {name: _cutter(name).pre_tokenize_str(_PROBE) for name in _CUTS}
    same = {name: min(other for other in pieces if pieces[other] == pieces[name]) for name in pieces}
    groups = {first: sorted(n for n in same if same[n] == first) for first in set(same.values())}
    assert groups == {
        "llama-bpe": ["llama-bpe", "llama-v3", "llama3"],  # names of one rule
        "deepseek-r1-qwen": ["deepseek-r1-qwen", "qwen2"],
        "smollm": ["smollm"],
        "gpt-2": ["gpt-2"],
        "default": ["default"],
    }


def test_a_rule_that_llama_cpp_has_no_name_for_is_refused(tmp_path):
    from tokenizers import pre_tokenizers

    tuned = make_tuned(tmp_path)
    fusion = tuned.fusion()
    fusion.base.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert cutting_rule(fusion.base.tokenizer) is None
    with pytest.raises(ModelError, match=r"not one of the byte-level kinds .* convert_hf_to_gguf.py"):
        plan_gguf(fusion, "f16", "Tiny")


def test_scalings_of_positions(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    _, path, _ = export(tmp_path / "yarn", "f16", "qwen2", rope_scaling=yarn)
    assert load_model(str(path)).config["rope_scaling"] == yarn
    tuned = make_tuned(tmp_path / "other", rope_scaling={"rope_type": "linear", "factor": 2.0})
    fusion = tuned.fusion()
    assert plan_gguf(fusion, "f16", "T").metadata["llama.rope.scaling.type"] == "linear"
    fusion.base.config["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ModelError, match="'dynamic'; llama3, linear and yarn can be written"):
        plan_gguf(fusion, "f16", "T")


def test_weights_beyond_float16_are_refused(tmp_path):
    tuned = make_tuned(tmp_path)
    fusion = tuned.fusion()
    large = {
        name: array * 1e8 if name.endswith("lora_b") else array for name, array in fusion.adapter.weights.items()
    }
    fusion = replace(fusion, adapter=replace(fusion.adapter, weights=large))
    with pytest.raises(ModelError, match="beyond what F16 can hold"):
        write_gguf(tmp_path / "model.gguf", plan_gguf(fusion, "f16", "T"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_llama_cpp_agrees(tmp_path, family, tied):
    llama_cpp = pytest.importorskip("llama_cpp")
    scaling = LLAMA31 if family == "llama" else None
    tuned = make_tuned(tmp_path, family, tied=tied, rope_scaling=scaling, rope_theta=10000.0)
    text = "hello 你好 12345 it's"
    for kind, tolerance in (("f16", 0.02), ("q8_0", 0.15)):  # Q8_0 rounds activations too
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, plan_gguf(tuned.fusion(), kind, "Tiny"))
        model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
        assert model.tokenize(text.encode(), add_bos=False) == tuned.fusion().base.tokenizer(text)["input_ids"]
        model.eval(TEXT_IDS)
        found = np.array(model.scores[: len(TEXT_IDS)])
        assert np.linalg.norm(found - tuned.logits) < tolerance * np.linalg.norm(tuned.logits)
        if kind == "f16":
            assert (found.argmax(axis=-1) == tuned.logits.argmax(axis=-1)).all()
        model.close()
