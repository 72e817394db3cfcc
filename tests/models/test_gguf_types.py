"""GGUF in 4 and 5 bits: MLX's codes kept bit for bit, the gguf package's rounding, and llama.cpp's own types."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from tiny_models import logits, tiny_config, tiny_model, write_folder
from tuned import make_tuned

from mlx_zh.errors import ModelError
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.models.build import dequantize
from mlx_zh.models.export import importance, in_llama_cpp, llama_quantizer
from mlx_zh.models.export.fidelity import held_out
from mlx_zh.models.export.folder_files import Layout, packed_layout
from mlx_zh.models.export.folder_files import write_folder as write_mlx
from mlx_zh.models.export.gguf_encoding import keep_codes
from mlx_zh.models.export.gguf_file import About, plan_gguf, write_gguf
from mlx_zh.models.export.merge import Adapter, Fusion
from mlx_zh.models.export.source import Source, open_source
from mlx_zh.models.gguf_model import permute
from mlx_zh.models.load import load_model

llama_cpp = pytest.mark.skipif(not in_llama_cpp.is_installed(), reason="llama-cpp-python is not installed")


def mlx_model(folder: Path, bits: int, group: int, dtype: mx.Dtype, family: str = "llama") -> Source:
    """A tuned model as `fuse` writes it in MLX's format."""
    fusion = make_tuned(folder / "tuned", family, tied=False, hidden_size=128, intermediate_size=256).fusion()
    (folder / "mlx").mkdir()
    layout = packed_layout(fusion, bits, group)
    write_mlx(folder / "mlx", Layout(fusion, dtype, layout.packing), max_bytes=10**9, kind="mlx")
    return open_source(folder / "mlx", "tiny")


def no_adapter(folder: Path) -> Adapter:
    return Adapter(folder, AdapterSpec("lora", 0), {})


def dense(source: Source) -> dict[str, mx.array]:
    weights = source.stored()
    dequantize(weights, source.outline.packing, mx.float32)
    return {name: array.astype(mx.float32) for name, array in weights.items()}


def by_package(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("bits", "group", "dtype", "kind"),
    [
        (4, 32, mx.bfloat16, "q4_1"),
        (4, 64, mx.bfloat16, "q4_1"),
        (4, 128, mx.float16, "q4_1"),
        (5, 64, mx.bfloat16, "q5_1"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_mlx_model_becomes_the_same_weights_bit_for_bit(tmp_path, bits, group, dtype, kind, family):
    """By our reader and by the gguf package; q and k of Llama are in llama.cpp's order there."""
    source = mlx_model(tmp_path, bits, group, dtype, family)
    path = tmp_path / "m.gguf"
    outcome = write_gguf(path, plan_gguf(Fusion(source, no_adapter(tmp_path)), kind, "Tiny"))
    assert outcome.rounded == 0 and outcome.kept > 0
    expected, ours, theirs = dense(source), dense(open_source(path, "tiny")), by_package(path)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["token_embd.weight"] == types["output.weight"] == types["blk.1.attn_q.weight"] == kind.upper()
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.array(ours[name]), np.array(array), err_msg=name)
    for name, gguf_name in (
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"),
        ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ):
        np.testing.assert_array_equal(theirs[gguf_name], np.array(permute(name, expected[name], source.config)))


def test_scales_that_float16_cannot_hold_are_rounded_and_counted():
    """2^-17 * 1.5 + 2^-25 has a bit below float16's smallest step of 2^-24; 2^-10 has none."""
    packed, scales, biases = mx.quantize(mx.random.normal((2, 64)), group_size=64, bits=4)
    form = {"group_size": 64, "bits": 4, "mode": "affine"}
    scales = mx.array([[2.0**-10], [2.0**-17 + 2.0**-25]])
    encoded = keep_codes([packed, scales, mx.zeros((2, 1))], form, "w")
    assert encoded.rounded == 2  # one group of 64 is two blocks
    assert 0 < encoded.error < 2.0**-8
    with pytest.raises(ModelError, match="beyond what Q4_1 can hold"):
        keep_codes([packed, mx.full((2, 1), 1e6), biases], form, "w")


@pytest.mark.parametrize("kind", ["q4_0", "q5_0", "q5_1", "q8_0"])
def test_other_types_are_the_gguf_packages_rounding(tmp_path, kind):
    tuned = make_tuned(tmp_path)
    path = tmp_path / "m.gguf"
    write_gguf(path, plan_gguf(tuned.fusion(), kind, "Tiny"))
    merged = {t.name: np.array(t.value) for t in tuned.fusion().tensors()}
    number = gguf.GGMLQuantizationType[kind.upper()]
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}["blk.1.ffn_up.weight"]
    assert stored.tensor_type == number
    assert (stored.data == gguf.quants.quantize(merged["model.layers.1.mlp.up_proj.weight"], number)).all()
    found = np.array(dense(open_source(path, "tiny"))["model.layers.1.mlp.up_proj.weight"])
    np.testing.assert_array_equal(found, gguf.quants.dequantize(stored.data, number))


def test_bfloat16_keeps_weights_that_float16_cannot(tmp_path):
    config = tiny_config("llama", False)
    model = tiny_model(config)
    model.model.layers[0].mlp.up_proj.weight[0, 0] = 2.0**100
    source = open_source(write_folder(tmp_path / "base", config, model), "tiny")
    path = tmp_path / "m.gguf"
    write_gguf(path, plan_gguf(Fusion(source, no_adapter(tmp_path)), "bf16", "Tiny"))
    assert by_package(path)["blk.0.ffn_up.weight"][0, 0] == 2.0**100


def make_importance(tmp_path: Path, seed: int = 1):
    tuned = make_tuned(tmp_path, hidden_size=256, intermediate_size=512)
    rng = np.random.default_rng(seed)
    text = held_out(
        [(rng.integers(3, 280, 20).astype(np.int32), np.arange(20) > 2)] * 2, max_tokens=100, row_tokens=24
    )
    return tuned, text


def test_importance_is_the_mean_square_of_each_input(tmp_path):
    """Of q it is the normed embedding's, which is known without the rest of the model."""
    tuned, text = make_importance(tmp_path)
    model = load_model(str(tuned.base)).model
    before = logits(model)
    table = importance.measure_importance(model, text)
    assert len(table) == 14 and (logits(model) == before).all()
    layer, tokens = model.layers[0], np.concatenate([np.array(row.tokens) for row in text.rows])
    normed = np.array(layer.input_layernorm(model.model.embed_tokens(mx.array(tokens))))
    np.testing.assert_allclose(table["blk.0.attn_q.weight"], (normed**2).mean(0), rtol=1e-4)
    path = tmp_path / "i.dat"
    importance.write_importance(path, table)
    again = importance.read_importance(path)
    assert again.keys() == table.keys() and all((again[name] == table[name]).all() for name in table)


@llama_cpp
@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"])
def test_llama_cpps_own_types_are_written_and_read_back(tmp_path, kind):
    tuned, _ = make_importance(tmp_path)
    path = tmp_path / "m.gguf"
    plan = plan_gguf(tuned.fusion(), "f16", "Tiny")
    left = llama_quantizer.quantize(path, plan, kind, None, step=lambda: None)
    assert len(left) == 14 and np.mean([one.kept for one in left]) == pytest.approx(1, abs=0.05)
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []
    expected = by_package(path)["blk.1.ffn_down.weight"]
    found = np.array(dense(open_source(path, "tiny"))["model.layers.1.mlp.down_proj.weight"])
    np.testing.assert_array_equal(found, expected)


@llama_cpp
def test_the_importance_matrix_is_used(tmp_path):
    """The weighted error of the rounding is smaller with it, summed over all matrices."""
    tuned, text = make_importance(tmp_path)
    table = dict(importance.measure_importance(load_model(str(tuned.base)).model, text))
    table = {name: values * np.geomspace(1, 1e4, values.size, dtype=np.float32) for name, values in table.items()}
    plan = plan_gguf(tuned.fusion(), "f16", "Tiny")
    write_gguf(tmp_path / "full.gguf", plan)
    full, errors = by_package(tmp_path / "full.gguf"), []
    for number, given in enumerate((None, table)):
        path = tmp_path / f"{number}.gguf"
        llama_quantizer.quantize(path, plan, "q4_k_m", given, step=lambda: None)
        rounded = by_package(path)
        errors.append(sum(float((((rounded[n] - full[n]) ** 2) * values).sum()) for n, values in table.items()))
    assert errors[1] < 0.9 * errors[0]


def test_without_llama_cpp_the_way_is_named(monkeypatch):
    monkeypatch.setattr(in_llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    llama_quantizer.check("q4_1")
    with pytest.raises(ModelError, match=r"pip install llama-cpp-python.*choose q4_1"):
        llama_quantizer.check("q4_k_m")


def test_the_file_says_what_it_is_and_what_it_is_made_of(tmp_path):
    about = About(base="Tiny-1B", owner="someone", licence="apache-2.0", tags=("chat",), languages=("zh", "en"))
    plan = plan_gguf(make_tuned(tmp_path).fusion(), "q5_1", "Mine", about)
    write_gguf(tmp_path / "m.gguf", plan)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "name": "Mine",
        "basename": "Tiny-1B",
        "finetune": "Mine",
        "license": "apache-2.0",
        "base_model.count": 1,
        "base_model.0.name": "Tiny-1B",
        "base_model.0.organization": "someone",
        "tags": ["chat"],
        "languages": ["zh", "en"],
        "file_type": 9,
        "quantization_version": 2,
    }
    assert {key: fields[f"general.{key}"] for key in expected} == expected
    assert "general.base_model.0.repo_url" not in fields


@pytest.mark.parametrize(
    ("bits", "kind", "expected"), [(4, "q4_0", "Q4_1"), (8, "q4_0", "Q8_0"), (4, "q8_0", "Q4_1")]
)
def test_matrices_without_an_adapter_are_not_quantized_more_coarsely(tmp_path, bits, kind, expected):
    tuned = make_tuned(tmp_path, hidden_size=128, intermediate_size=256, targets=("q_proj",), quantize=(bits, 32))
    path = tmp_path / "m.gguf"
    write_gguf(path, plan_gguf(tuned.fusion(quantize=(bits, 32)), kind, "Tiny"))
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_up.weight"] == types["output.weight"] == expected
    assert types["blk.0.attn_q.weight"] == kind.upper()
