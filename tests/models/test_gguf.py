"""GGUF files that the `gguf` package wrote from mlx-lm's own models must give those models back."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from mlx_zh.errors import ModelError
from mlx_zh.models.gguf import read_gguf, read_tensor
from mlx_zh.models.gguf_model import _fitted_scaling, llama3_divisors
from mlx_zh.models.identity import fingerprint_of
from mlx_zh.models.load import load_config, load_model, load_tokenizer

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize(
    ("kind", "tied", "changes"),
    [
        ("llama", True, {}),
        ("llama", False, {"head_dim": 32}),
        ("llama", False, {"attention_bias": True, "num_key_value_heads": 4}),
        ("mistral", False, {}),
        ("qwen2", True, {}),
        ("qwen2", False, {}),
        ("qwen3", True, {}),
        ("qwen3", False, {}),
    ],
)
def test_logits_are_those_of_the_exported_model(
    tmp_path: Path, kind: str, tied: bool, changes: dict[str, Any]
) -> None:
    config = tiny.tiny_config(kind, tied, **changes)
    model = tiny.tiny_model(config)
    loaded = load_model(str(tiny.write_gguf(tmp_path / "m.gguf", config, model)), dtype="float32")
    np.testing.assert_allclose(tiny.logits(loaded.model), tiny.logits(model), atol=1e-5)
    assert loaded.config["tie_word_embeddings"] is tied
    assert "quantization" not in loaded.config


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_what_the_gguf_package_decodes(tmp_path: Path, kind: str) -> None:
    """Exact on the CPU, where everything becomes float32; 3e38 and 1e-30 do not fit float16 but do fit bfloat16."""
    config = tiny.tiny_config("llama", tied=False)
    model = tiny.tiny_model(config)
    if kind in ("F32", "BF16"):
        extreme = model.model.layers[0].mlp.up_proj
        extreme.weight[0, 0], extreme.weight[0, 1] = 3e38, 1e-30
    path = tiny.write_gguf(tmp_path / "m.gguf", config, model, kind)
    loaded = tiny.parameters(load_model(str(path)).model)
    expected = tiny.rounded(model, kind)
    assert loaded.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_quantized_weights_stay_quantized(tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Metal: the embedding in 8 bits and the rest in 4, computed by MLX's quantized matrix product."""
    import mlx.core as mx

    config = tiny.tiny_config(arch)
    original = tiny.tiny_model(config)
    kinds = {"token_embd.weight": "Q8_0", "blk.1.ffn_up.weight": "Q4_1", "blk.0.attn_v.weight": "F16"}
    path = tiny.write_gguf(tmp_path / "m.gguf", config, original, "Q4_0", kinds=kinds)
    loaded = load_model(str(path), dtype="float32")
    form = loaded.config["quantization"]
    assert (form["bits"], form["group_size"]) == (4, 32)
    assert form["model.embed_tokens"]["bits"] == 8
    assert form["model.layers.0.self_attn.v_proj"] is False
    reference = tiny.tiny_model(config)
    reference.load_weights([(n, mx.array(a)) for n, a in tiny.rounded(original, "Q4_0", kinds).items()])
    np.testing.assert_allclose(tiny.logits(loaded.model), tiny.logits(reference), atol=2e-4)

    monkeypatch.setattr("mlx_zh.system.device.is_cpu", lambda: False)
    on_gpu = load_model(str(path))
    assert on_gpu.model.model.layers[0].mlp.up_proj.scales.dtype == mx.bfloat16
    assert on_gpu.model.model.norm.weight.dtype == mx.bfloat16  # float32 here would widen every activation


def test_mlx_lm_reads_the_quantization_that_config_describes(tmp_path: Path) -> None:
    import json

    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model as mlx_lm_load

    config = tiny.tiny_config("llama", tied=False)
    kinds = {"token_embd.weight": "Q8_0", "output.weight": "F16"}
    path = tiny.write_gguf(tmp_path / "m.gguf", config, tiny.tiny_model(config), "Q4_1", kinds=kinds)
    loaded = load_model(str(path), dtype="float32")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(loaded.model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(loaded.config))
    theirs, _ = mlx_lm_load(tmp_path)
    np.testing.assert_array_equal(tiny.logits(theirs), tiny.logits(loaded.model))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_position_scaling(tmp_path: Path, factor: float) -> None:
    config = tiny.tiny_config("llama")
    divisors = tiny.llama3_divisors(config, factor)
    assert divisors[0] == 1.0 and divisors[-1] == factor and len(set(divisors)) > 2
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny.tiny_model(config | {"rope_scaling": scaling})
    path = tiny.write_gguf(tmp_path / "m.gguf", config, model, rope_factors=divisors)
    assert load_config(path)["rope_scaling"] == scaling
    np.testing.assert_allclose(tiny.logits(load_model(str(path)).model), tiny.logits(model), atol=1e-5)

    for number, strange in enumerate((divisors[::-1], divisors * np.nan, np.linspace(1, factor, divisors.size) ** 2)):
        other = tiny.write_gguf(tmp_path / f"{number}.gguf", config, model, rope_factors=strange)
        with pytest.raises(ModelError, match="not Llama 3's"):
            load_config(other)


@pytest.mark.parametrize("length", [2048, 4096, 16384, 32768, 131072])
@pytest.mark.parametrize(("theta", "head_dim"), [(500000.0, 128), (500000.0, 64), (1000000.0, 128)])
@pytest.mark.parametrize("high", [4.0, 8.0])
def test_llama3_position_scaling_of_any_length(length: int, theta: float, head_dim: int, high: float) -> None:
    """The file has the divisors only. What is derived from them gives the same divisors again."""
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    divisors = llama3_divisors(scaling, head_dim, theta).astype(np.float32).astype(np.float64)
    found = _fitted_scaling(divisors, head_dim, theta)
    between = ((divisors > 1.001) & (divisors < 7.99)).sum()
    assert (found is None) == (between == 0)
    if found:
        np.testing.assert_allclose(llama3_divisors(found, head_dim, theta), divisors, rtol=1e-3)
    if found and between > 1:
        assert found["original_max_position_embeddings"] == pytest.approx(length, rel=1e-3)
        assert found["high_freq_factor"] == pytest.approx(high, rel=1e-3)


@pytest.mark.parametrize(("kind", "expected"), [("linear", {}), ("yarn", {"original_max_position_embeddings": 128})])
def test_other_position_scaling(tmp_path: Path, kind: str, expected: dict[str, Any]) -> None:
    metadata = {"qwen2.rope.scaling.type": kind, "qwen2.rope.scaling.factor": 4.0}
    metadata["qwen2.rope.scaling.original_context_length"] = 128
    config = tiny.tiny_config("qwen2")
    scaled = config | {"rope_scaling": {"rope_type": kind, "factor": 4.0} | expected}
    model = tiny.tiny_model(scaled)
    path = tiny.write_gguf(tmp_path / "m.gguf", config, model, metadata=metadata)
    assert load_config(path)["rope_scaling"] == scaled["rope_scaling"]
    np.testing.assert_allclose(tiny.logits(load_model(str(path)).model), tiny.logits(model), atol=1e-5)


def test_metadata_equals_that_of_the_gguf_package(tmp_path: Path) -> None:
    import gguf

    config = tiny.tiny_config("qwen3", tied=False)
    path = tiny.write_gguf(tmp_path / "m.gguf", config, tiny.tiny_model(config), "Q4_1")
    ours, theirs = read_gguf(path), gguf.GGUFReader(str(path))
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert {t.name: (t.tensor_type.name, t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        t.name: (t.kind, t.offset, t.size) for t in ours.tensors.values()
    }


def test_q4_codes_equal_those_of_mx_load(tmp_path: Path) -> None:
    """MLX has its own reader for the types that it does read: code for code the same."""
    import mlx.core as mx

    config = tiny.tiny_config("qwen2")
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        path = tiny.write_gguf(tmp_path / f"{kind}.gguf", config, tiny.tiny_model(config), kind)
        loaded = mx.load(str(path))
        ours = read_tensor(read_gguf(path), "blk.1.ffn_down.weight")
        for part, array in ours.items():
            assert mx.array_equal(array, loaded[f"blk.1.ffn_down.{part}"]), (kind, part)  # type: ignore[index]


# ---- tokenizer


def test_tokenizer_from_metadata(tmp_path: Path) -> None:
    """Merges h+e, l+l, he+ll: "hello" is hell o. The byte-level alphabet starts after three special tokens."""
    config = tiny.tiny_config()
    path = tiny.write_gguf(tmp_path / "m.gguf", config, tiny.tiny_model(config))
    tokenizer = load_tokenizer(path)
    index = tiny.TOKENS.index
    assert tokenizer.encode("hello") == [index("hell"), index("o")]
    assert tokenizer.encode("<|im_start|>A<|im_end|>") == [1, index("A"), 2]
    text = "你好，世界 🙂\tdef f(x):\n\n  return 12345"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, index("A"), 2], skip_special_tokens=True) == "A"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == (
        "<|im_start|>",
        "<|im_end|>",
        tiny.TEMPLATE,
    )
    offsets = tokenizer("a 好", return_offsets_mapping=True)["offset_mapping"]
    assert offsets[:2] == [(0, 1), (1, 2)] and offsets[-1] == (2, 3)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("gpt-2", ["It", "'s", "Ġ2024", ",", "Ġok", "!!", "ĊĊ"]),
        ("llama-bpe", ["It", "'s", "Ġ", "202", "4", ",", "Ġok", "!!ĊĊ"]),
        ("qwen2", ["It", "'s", "Ġ", "2", "0", "2", "4", ",", "Ġok", "!!ĊĊ"]),
        ("smollm", ["It", "'s", "Ġ", "2", "0", "2", "4", ",", "Ġok", "!!", "ĊĊ"]),
    ],
)
def test_text_is_cut_as_the_family_cuts_it(tmp_path: Path, cut: str, words: list[str]) -> None:
    config = tiny.tiny_config()
    metadata = {"tokenizer.ggml.pre": cut}
    path = tiny.write_gguf(tmp_path / "m.gguf", config, tiny.tiny_model(config), metadata=metadata)
    pieces = load_tokenizer(path).backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 2024, ok!!\n\n")
    assert [word for word, _ in pieces] == words


@pytest.mark.parametrize(("asked", "cut", "starts"), [(True, "gpt-2", True), (False, "llama-bpe", False)])
def test_bos_is_added_where_the_file_says_so(tmp_path: Path, asked: bool, cut: str, starts: bool) -> None:
    config = tiny.tiny_config()
    metadata = {"tokenizer.ggml.pre": cut, "tokenizer.ggml.add_bos_token": asked}
    tokenizer = load_tokenizer(
        tiny.write_gguf(tmp_path / "m.gguf", config, tiny.tiny_model(config), metadata=metadata)
    )
    assert (tokenizer.encode("A")[0] == 1) is starts
    assert tokenizer.encode("A", add_special_tokens=False)[0] != 1


def test_llama3_takes_whole_words_before_merging(tmp_path: Path) -> None:
    """No chain of merges leads to "hey", but it is in the vocabulary: Llama 3 finds it and adds BOS by default."""
    tokens = [*tiny.TOKENS[:-1], "hey"]
    metadata = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens}
    config = tiny.tiny_config()
    path = tiny.write_gguf(tmp_path / "m.gguf", config, tiny.tiny_model(config), metadata=metadata)
    assert load_tokenizer(path).encode("hey") == [1, len(tokens) - 1]


# ---- files that cannot be used


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = tiny.tiny_config("llama", tied=False)
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    return tiny.write_gguf(path, config, tiny.tiny_model(config), "Q4_0").read_bytes()


def test_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<html>404: the page that you were looking for is not here</html>")
    refused(path, "not a GGUF file")
    path.write_bytes(b"")
    refused(path, "not a GGUF file")


@pytest.mark.parametrize("part", [0.05, 0.5, 0.999])
def test_truncated(tmp_path: Path, good: bytes, part: float) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(good[: int(len(good) * part)])
    refused(path, "truncated", "Download it again")


def test_old_version(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "old.gguf"
    path.write_bytes(good[:4] + struct.pack("<I", 1) + good[8:])
    refused(path, "version 1")


def test_unread_tensor_types_are_named(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "k.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    raw = np.zeros((4, 66), dtype=np.uint8)  # one block of 256 weights a row
    writer.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, "IQ2_XXS", "Q4_0, Q4_1, Q5_0", "Take the Q4_K_M")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.architecture": "gemma2"}, ["gemma2", "llama, qwen2, qwen3"]),
        ({"general.type": "adapter"}, ["adapter"]),
        ({"tokenizer.ggml.model": "llama"}, ["kind 'llama'", "gpt2"]),
        ({"tokenizer.ggml.pre": "viking"}, ["'viking'", "llama-bpe"]),
        ({"llama.expert_count": 8}, ["8 experts"]),
        ({"llama.rope.dimension_count": 8}, ["8 of 16"]),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, ["longrope"]),
        ({"tokenizer.ggml.eos_token_id": 9999}, ["9999", "288 tokens"]),
        ({"tokenizer.ggml.tokens": [*tiny.TOKENS, "extra"]}, ["288", "'extra'", "embedding"]),
        ({"llama.block_count": 2**31}, ["2,147,483,648 layers"]),
        ({"tokenizer.ggml.merges": ["q zz"]}, ["merges"]),
    ],
)
def test_models_that_are_refused(tmp_path: Path, metadata: dict[str, Any], words: list[str]) -> None:
    config = tiny.tiny_config()
    path = tmp_path / "m.gguf"
    if arch := metadata.pop("general.architecture", None):
        import gguf

        writer = gguf.GGUFWriter(str(path), arch)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        tiny.write_gguf(path, config, tiny.tiny_model(config), metadata=metadata)
    refused(path, *words)


def test_missing_and_unknown_tensors(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(good.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    refused(path, "blk.1.ffn_xx.weight")
    path.write_bytes(good.replace(b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight"))
    refused(path, "model.layers.1.mlp.up_proj.weight", "model.layers.7")


def test_quantizing_twice_is_refused(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    with pytest.raises(ModelError, match="quantized already"):
        load_model(str(path), quantize=(4, 64))


def test_damage_anywhere_in_the_header_is_an_error_or_harmless(tmp_path: Path, good: bytes) -> None:
    """Every file is either read or refused with a ModelError: nothing else is raised and nothing crashes."""
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    header = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    rng = random.Random(0)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(rng.choice([1, 1, 8])):
            damaged[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_config(path)
            load_tokenizer(path)
        except ModelError:
            refusals += 1
    assert refusals > 30


def test_fingerprint_follows_the_content(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(good)
    first = fingerprint_of(path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert fingerprint_of(path) != first
    path.write_bytes(good)
    assert fingerprint_of(path) == first
