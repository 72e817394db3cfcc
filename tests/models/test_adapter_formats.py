"""The adapter alone, as GGUF and for mlx-lm, read by the programs that load it."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader
from tiny_models import TEXT_IDS, logits
from tuned import make_tuned

from mlx_zh.errors import AdapterError
from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.adapters.peft import write_peft
from mlx_zh.models.export import in_llama_cpp
from mlx_zh.models.export.gguf_file import plan_gguf, write_gguf
from mlx_zh.models.export.gguf_lora import write_gguf_lora
from mlx_zh.models.export.merge import Fusion, open_adapter
from mlx_zh.models.export.mlx_adapter import write_mlx_adapter
from mlx_zh.models.export.source import open_source
from mlx_zh.models.load import load_model


def fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def matrices(path: Path) -> dict[str, np.ndarray]:
    return {t.name: np.array(t.data, np.float32) for t in GGUFReader(path).tensors}


def with_lora(base: dict[str, np.ndarray], lora: dict[str, np.ndarray], alpha: float) -> dict[str, np.ndarray]:
    """What llama.cpp computes with: W + alpha / r * B A, where r is the number of columns of B."""
    merged = dict(base)
    for name in {name.rpartition(".")[0] for name in lora}:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        merged[name] = base[name] + alpha / b.shape[1] * (b @ a)
    return merged


def written(tmp_path: Path, fusion: Fusion) -> Path:
    write_gguf_lora(tmp_path / "lora.gguf", fusion, "Tiny")
    return tmp_path / "lora.gguf"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_base_and_lora_are_the_merged_file(tmp_path, family):
    """Both sides in float16: W and W + dW each round by half an ulp (2^-11) of at most the largest weight, and the
    rounding of A and B moves dW by at most 2^-10 of the sum of |B| |A|."""
    tuned = make_tuned(tmp_path, family)
    fusion = tuned.fusion()
    write_gguf(tmp_path / "merged.gguf", plan_gguf(fusion, "f16", "Tiny"))
    untuned = Fusion(fusion.base, open_adapter(zero_adapter(tmp_path, tuned), fusion.base))
    write_gguf(tmp_path / "base.gguf", plan_gguf(untuned, "f16", "Tiny"))
    path = written(tmp_path, fusion)
    lora, about = matrices(path), fields(GGUFReader(path))
    assert about["general.type"] == "adapter" and about["adapter.type"] == "lora"
    assert about["adapter.lora.alpha"] == 8.0  # scale 2 times rank 4
    assert about["general.architecture"] == fields(GGUFReader(tmp_path / "base.gguf"))["general.architecture"]
    merged, expected = with_lora(matrices(tmp_path / "base.gguf"), lora, 8.0), matrices(tmp_path / "merged.gguf")
    assert len(lora) == 2 * 7 * 2  # A and B of seven matrices in two blocks
    assert merged.keys() == expected.keys()
    for name, matrix in expected.items():
        a, b = lora.get(f"{name}.lora_a"), lora.get(f"{name}.lora_b")
        product = 0 if a is None else (2.0 * np.abs(b) @ np.abs(a)).max()
        limit = 2**-11 * 2 * (np.abs(matrix).max() + product) + 2**-10 * product
        np.testing.assert_allclose(merged[name], matrix, rtol=0, atol=limit)
        if a is not None:
            # Without the adapter, or with rows in another order, the difference is far beyond the limit.
            assert np.abs(matrices(tmp_path / "base.gguf")[name] - matrix).max() > 20 * limit


def zero_adapter(tmp_path: Path, tuned: Any) -> Path:
    from mlx_zh.models.adapters.files import save_adapter

    zero = {n: mx.zeros_like(a) if n.endswith("lora_b") else a for n, a in tuned.weights.items()}
    save_adapter(tmp_path / "zero", zero, tuned.spec, {})
    return tmp_path / "zero"


def test_a_matrix_that_float16_cannot_hold_is_written_in_float32(tmp_path):
    tuned = make_tuned(tmp_path, size=1e-7)  # below float16's smallest normal number, 6e-5
    path = written(tmp_path, tuned.fusion())
    kinds = {t.name.rpartition(".")[2]: t.tensor_type.name for t in GGUFReader(path).tensors}
    assert kinds == {"lora_a": "F16", "lora_b": "F32"}
    name = "model.layers.0.mlp.down_proj"
    np.testing.assert_array_equal(
        matrices(path)["blk.0.ffn_down.weight.lora_b"], np.array(tuned.weights[f"{name}.lora_b"].T)
    )


def test_ranks_alphas_and_rslora_of_a_peft_folder_become_one_alpha(tmp_path):
    """rsLoRA: the scale is alpha / sqrt(rank), also of the module with a rank and an alpha of its own."""
    tuned = make_tuned(tmp_path, targets=("q_proj",))
    folder = tmp_path / "peft"
    write_peft(folder, tuned.spec, tuned.weights, base="b", matrices=tuned.fusion().base.outline.matrices)
    stored = dict(mx.load(str(folder / "adapter_model.safetensors")))
    keys = [f"base_model.model.model.layers.1.self_attn.q_proj.lora_{x}.weight" for x in "AB"]
    stored[keys[0]], stored[keys[1]] = stored[keys[0]][:2], stored[keys[1]][:, :2]
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), stored)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"use_rslora": True, "rank_pattern": {"layers.1": 2}, "alpha_pattern": {"layers.1": 6}}
    config |= {"rank_pattern": {r".*\.1\..*q_proj": 2}, "alpha_pattern": {r".*\.1\..*q_proj": 6}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    base = open_source(tuned.base, "base")
    path = written(tmp_path, Fusion(base, open_adapter(folder, base)))
    lora, alpha = matrices(path), fields(GGUFReader(path))["adapter.lora.alpha"]
    assert alpha / 4 == 8 / 2  # 8 / sqrt(4)
    product = alpha / 4 * lora["blk.1.attn_q.weight.lora_b"] @ lora["blk.1.attn_q.weight.lora_a"]
    a, b = (np.array(stored[key]) for key in keys)
    heads = base.config["num_attention_heads"]
    expected = (6 / np.sqrt(2) * b @ a).reshape(heads, 2, -1, a.shape[1]).swapaxes(1, 2).reshape(product.shape)
    np.testing.assert_allclose(product, expected, rtol=0, atol=2**-9 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kind": "dora"}, "DoRA"),
        ({"kind": "full"}, "full fine-tuning"),
        ({"saved": ("embed_tokens",)}, "embed_tokens"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold_is_refused_by_name(tmp_path, options, word):
    with pytest.raises(AdapterError, match=rf"{word}.*`gguf-lora` cannot be written.*Export `gguf`"):
        write_gguf_lora(tmp_path / "lora.gguf", make_tuned(tmp_path, **options).fusion(), "Tiny")
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("form", ["mlx", "peft"])
def test_mlx_lm_loads_the_mlx_adapter(tmp_path, kind, form):
    from mlx_lm.utils import load_adapters

    tuned = make_tuned(tmp_path, kind=kind, layers=1)
    fusion = tuned.fusion()
    if form == "peft":
        if kind == "full":
            pytest.skip("PEFT has no format for a full fine-tuning")
        write_peft(tmp_path / "peft", tuned.spec, tuned.weights, base="b", matrices=fusion.base.outline.matrices)
        fusion = Fusion(fusion.base, open_adapter(tmp_path / "peft", fusion.base))
    (tmp_path / "out").mkdir()
    write_mlx_adapter(tmp_path / "out", fusion)
    loaded = load_model(str(tuned.base))
    load_adapters(loaded.model, str(tmp_path / "out"))
    loaded.model.eval()
    np.testing.assert_array_equal(logits(loaded.model), tuned.logits)
    again = load_model(str(tuned.base))
    assert load_adapter(again.model, tmp_path / "out").num_layers <= 2


def test_mlx_lm_refuses_tables_beside_an_adapter_and_so_does_the_export(tmp_path):
    tuned = make_tuned(tmp_path, saved=("embed_tokens",))
    from mlx_lm.utils import load_adapters

    with pytest.raises(ValueError, match="not an adapter parameter"):
        load_adapters(load_model(str(tuned.base)).model, str(tuned.adapter))
    with pytest.raises(AdapterError, match=r"trained tables \(embed_tokens\)"):
        write_mlx_adapter(tmp_path, tuned.fusion())


def llama_cpp_logits(path: Path, lora: Path | None = None) -> np.ndarray:
    llama_cpp = import_module("llama_cpp")
    model = llama_cpp.Llama(
        str(path), lora_path=None if lora is None else str(lora), n_ctx=64, logits_all=True, verbose=False
    )
    try:
        model.eval(list(TEXT_IDS))
        return np.array(model.scores[: len(TEXT_IDS)], np.float32)
    finally:
        model.close()


@pytest.mark.skipif(not in_llama_cpp.is_installed(), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_llama_cpp_agrees_with_base_and_adapter(tmp_path, family):
    """Weights and adapter are in float16, activations too: a relative error of 2^-11 in each of some ten steps."""
    tuned = make_tuned(tmp_path, family)
    fusion = tuned.fusion()
    write_gguf(tmp_path / "merged.gguf", plan_gguf(fusion, "f16", "Tiny"))
    untuned = Fusion(fusion.base, open_adapter(zero_adapter(tmp_path, tuned), fusion.base))
    write_gguf(tmp_path / "base.gguf", plan_gguf(untuned, "f16", "Tiny"))
    over_base = llama_cpp_logits(tmp_path / "base.gguf", written(tmp_path, fusion))
    merged = llama_cpp_logits(tmp_path / "merged.gguf")
    limit = 10 * 2**-11 * np.linalg.norm(tuned.logits)
    assert np.linalg.norm(over_base - merged) < limit
    assert np.linalg.norm(over_base - tuned.logits) < limit
    assert np.linalg.norm(llama_cpp_logits(tmp_path / "base.gguf") - merged) > 20 * limit


@pytest.mark.skipif(not in_llama_cpp.is_installed(), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("scaled", [False, True])
def test_llama_cpp_agrees_over_a_base_in_four_bits(tmp_path, scaled):
    """The base is Q4_1 on both sides, shaped as Llama 3.1 if `scaled`. For such weights llama.cpp rounds activations
    to 8 bits: a relative error of up to 2^-8 in each of fourteen products."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8}
    tuned = make_tuned(tmp_path, **({"rope_scaling": rope} if scaled else {}))
    source = tuned.fusion().base
    untuned = Fusion(source, open_adapter(zero_adapter(tmp_path, tuned), source))
    write_gguf(tmp_path / "base.gguf", plan_gguf(untuned, "q4_1", "Tiny"))
    base = open_source(tmp_path / "base.gguf", "base")
    ours = load_model(str(tmp_path / "base.gguf"))
    load_adapter(ours.model, tuned.adapter)
    ours.model.eval()
    expected = logits(ours.model)
    fusion = Fusion(base, open_adapter(tuned.adapter, base))
    write_gguf(tmp_path / "merged.gguf", plan_gguf(fusion, "f16", "Tiny"))
    limit = 14 * 2**-8 * np.linalg.norm(expected)
    over_base = llama_cpp_logits(tmp_path / "base.gguf", written(tmp_path, fusion))
    assert np.linalg.norm(over_base - expected) < limit
    assert np.linalg.norm(over_base - llama_cpp_logits(tmp_path / "merged.gguf")) < limit
    assert np.linalg.norm(llama_cpp_logits(tmp_path / "base.gguf") - expected) > 5 * limit
