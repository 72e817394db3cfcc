"""Model folders, as Hugging Face and mlx-lm write them, and what is said of those that cannot be used."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny

from mlx_zh.errors import ModelError
from mlx_zh.models.folder import weight_files
from mlx_zh.models.load import LoadedModel, load_config, load_model, load_tokenizer, resolve_model

FAMILIES = [(kind, tied) for kind in ("llama", "mistral", "qwen2", "qwen3") for tied in (True, False)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny.tiny_config("llama", tied=False)
    return tiny.write_folder(tmp_path_factory.mktemp("original") / "tiny", config, tiny.tiny_model(config))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
def test_logits_are_those_of_mlx_lm(tmp_path: Path, kind: str, tied: bool, shards: int) -> None:
    config = tiny.tiny_config(kind, tied)
    model = tiny.tiny_model(config)
    loaded = load_model(str(tiny.write_folder(tmp_path, config, model, shards)))
    np.testing.assert_array_equal(tiny.logits(loaded.model), tiny.logits(model))


def test_loaded_model_is_frozen_and_complete(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert isinstance(loaded, LoadedModel)
    assert tiny.flat(loaded.model.trainable_parameters()) == []
    assert not loaded.model.training
    assert (loaded.path, loaded.source, loaded.eos_token_ids) == (folder, str(folder), (2,))
    assert loaded.tokenizer.chat_template == tiny.TEMPLATE
    assert loaded.tokenizer("你", return_offsets_mapping=True)["offset_mapping"] == [(0, 1)] * 3
    assert loaded.config == json.loads((folder / "config.json").read_text())


def test_config_and_tokenizer_need_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert load_config(folder)["hidden_size"] == 64
    assert load_tokenizer(folder).encode("hello") == [tiny.TOKENS.index("hell"), tiny.TOKENS.index("o")]


# ---- dtype and quantization


def test_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    config = tiny.tiny_config()
    model = tiny.tiny_model(config)
    model.set_dtype(mx.bfloat16)
    path = str(tiny.write_folder(tmp_path, config, model))

    def dtypes(**options: Any) -> set[mx.Dtype]:
        return {array.dtype for _, array in tiny.flat(load_model(path, **options).model.parameters())}

    assert dtypes() == {mx.float32}
    assert dtypes(dtype="float16") == {mx.float16}
    assert dtypes(dtype="bfloat16") == {mx.bfloat16}
    monkeypatch.setattr("mlx_zh.system.device.is_cpu", lambda: False)
    assert dtypes() == {mx.bfloat16}  # as stored
    with pytest.raises(ModelError, match="'fp8' is not known"):
        load_model(path, dtype="fp8")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("group_size", [32, 64])
def test_quantize_on_load_is_what_mlx_lm_does(tmp_path: Path, kind: str, group_size: int) -> None:
    """Rows of 96 do not divide into groups of 64, so there down_proj stays as it is, here as in mlx-lm."""
    from mlx_lm.utils import quantize_model

    config = tiny.tiny_config(kind, tied=False)
    path = tiny.write_folder(tmp_path, config, tiny.tiny_model(config))
    theirs, _ = quantize_model(tiny.tiny_model(config), dict(config), group_size, 4)
    ours = load_model(str(path), dtype="float32", quantize=(4, group_size))
    np.testing.assert_array_equal(tiny.logits(ours.model), tiny.logits(theirs))
    assert ours.config["quantization"]["bits"] == 4
    assert ours.config["quantization"]["group_size"] == group_size
    assert (ours.config["quantization"].get("model.layers.0.mlp.down_proj") is False) is (group_size == 64)
    on_cpu = load_model(str(path), quantize=(4, group_size))  # the same rounded weights, as float32
    assert "quantization" not in on_cpu.config
    np.testing.assert_allclose(tiny.logits(on_cpu.model), tiny.logits(theirs), atol=2e-4)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mixed"])
@pytest.mark.parametrize("tied", [True, False])
def test_folder_quantized_by_mlx_lm(tmp_path: Path, mode: str, tied: bool) -> None:
    from mlx_lm.utils import quantize_model

    config = tiny.tiny_config("llama", tied)
    forms = {
        "affine": (64, 4, "affine"),
        "mxfp4": (32, 4, "mxfp4"),
        "nvfp4": (16, 4, "nvfp4"),
        "mixed": (32, 4, "affine"),
    }
    group_size, bits, name = forms[mode]

    def mixed(path: str, module: Any) -> bool | dict[str, int]:
        return {"group_size": 64, "bits": 8} if "embed" in path or "lm_head" in path else "mlp" in path

    predicate = mixed if mode == "mixed" else None
    model, described = quantize_model(
        tiny.tiny_model(config), dict(config), group_size, bits, mode=name, quant_predicate=predicate
    )
    path = tiny.write_folder(tmp_path, described, model)
    expected = tiny.logits(model)
    dense = load_model(str(path))
    assert "quantization" not in dense.config and "quantization_config" not in dense.config
    np.testing.assert_allclose(tiny.logits(dense.model), expected, atol=2e-4)
    kept = load_model(str(path), dtype="float32")
    np.testing.assert_array_equal(tiny.logits(kept.model), expected)
    assert (kept.config["quantization"]["bits"], kept.config["quantization"]["mode"]) == (bits, name)
    with pytest.raises(ModelError, match="quantized already"):
        load_model(str(path), quantize=(4, 64))


def test_quantize_with_impossible_values(folder: Path) -> None:
    with pytest.raises(ModelError, match="7 bits in groups of 64"):
        load_model(str(folder), quantize=(7, 64))
    with pytest.raises(ModelError, match="groups of 48"):
        load_model(str(folder), quantize=(4, 48))


# ---- configs that mlx-lm would misread


def test_rope_parameters_of_transformers_5(tmp_path: Path) -> None:
    """transformers 5 nests rope_theta; mlx-lm's Llama would fall back to 10000 without a word."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny.tiny_config("llama")
    model = tiny.tiny_model(config | {"rope_scaling": scaling})
    nested = {key: value for key, value in config.items() if key != "rope_theta"}
    nested["rope_parameters"] = scaling | {"rope_theta": config["rope_theta"]}
    loaded = load_model(str(tiny.write_folder(tmp_path, nested, model)))
    np.testing.assert_array_equal(tiny.logits(loaded.model), tiny.logits(model))


def test_untied_head_is_kept_where_config_does_not_say(folder: Path) -> None:
    """mlx-lm's default is tied, and then it drops lm_head.weight; Hugging Face's default is the opposite."""
    expected = tiny.logits(load_model(str(folder)).model)
    edit(folder / "config.json", tie_word_embeddings=...)
    np.testing.assert_array_equal(tiny.logits(load_model(str(folder)).model), expected)


def test_every_end_of_turn_is_found(folder: Path) -> None:
    """Tokenizer: <|im_end|> (2). config.json: 0. generation_config.json: a list, as Llama 3.1 has it."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0]}))
    edit(folder / "config.json", eos_token_id=0)
    assert load_model(str(folder)).eos_token_ids == (2, 7, 0)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")  # the template still ends turns with 2
    (folder / "generation_config.json").unlink()
    assert load_model(str(folder)).eos_token_ids == (0, 2)


def test_no_code_of_the_folder_runs(folder: Path) -> None:
    marker = folder / "ran"
    code = f"open({str(marker)!r}, 'w').close()\nclass Model: pass\nModelArgs = Tok = Model\n"
    (folder / "evil.py").write_text(code)
    edit(
        folder / "config.json", model_file="evil.py", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Model"}
    )
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", "evil.Tok"]})
    with contextlib.suppress(ModelError):
        load_model(str(folder))
    assert not marker.exists()


def test_fingerprint_follows_the_content(folder: Path) -> None:
    first = load_model(str(folder)).fingerprint
    assert load_model(str(folder), dtype="bfloat16").fingerprint == first
    config = tiny.tiny_config("llama", tied=False)
    tiny.write_folder(folder, config, tiny.tiny_model(config, seed=1))
    assert load_model(str(folder)).fingerprint != first


# ---- what cannot be used


def refused(path: Path | str, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./tiny", "~/models/x", "model.gguf", "org/model.gguf", "gpt2", ""]
)
def test_nothing_there(path: str) -> None:
    refused(path, "There is no model at", "smollm2-135m-instruct")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    refused(path, str(path), "neither a folder nor a .gguf file")


def test_folder_with_one_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert resolve_model(str(tmp_path)) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    refused(tmp_path, "2 .gguf files", "a.gguf, b.gguf")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, str(folder), "no config.json")
    (folder / "adapters.safetensors").touch()
    refused(folder, "holds an adapter")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n "a": 1,\n "b"', ["config.json, line 3", "not valid JSON"]),
        ("[]", ["JSON object", "list"]),
        ('{"model_type": "gemma2"}', ["'gemma2'", "llama, mistral, qwen2, qwen3"]),
        ("{}", ["None"]),
    ],
)
def test_bad_config(folder: Path, text: str, words: list[str]) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, *words)


def test_config_that_makes_no_model(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=...)
    refused(folder, "no llama model can be made", "hidden_size")


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8"])
def test_foreign_quantization(folder: Path, method: str) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": method})
    refused(folder, repr(method), "full-precision")


def test_sliding_attention(folder: Path) -> None:
    edit(folder / "config.json", layer_types=["full_attention", "linear_attention"])
    refused(folder, "linear_attention")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")
    (folder / "pytorch_model.bin").touch()
    refused(folder, "pytorch_model.bin", "pickles", "safetensors")


def test_missing_shard(tmp_path: Path) -> None:
    config = tiny.tiny_config()
    folder = tiny.write_folder(tmp_path, config, tiny.tiny_model(config), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "lacks 1 of the 3 files", "model-00002-of-00003.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, str(path), "truncated", "Download it again")


def test_damaged_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"#" + content[9:])
    refused(folder, str(path), "header cannot be parsed")
    path.write_bytes(content.replace(b'"F32"', b'"F16"', 1))
    refused(folder, str(path), "size that is not that of their shape")
    path.write_bytes(content.replace(b'"F32"', b'"F64"', 1))
    refused(folder, str(path), "F64")


def test_git_lfs_pointer(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, str(path), "git lfs pull")


def test_all_bad_tensors_are_named_at_once(folder: Path) -> None:
    import mlx.core as mx

    path = str(folder / "model.safetensors")
    weights = mx.load(path)
    assert isinstance(weights, dict)
    del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.mlp.gate_proj.weight"] = mx.zeros((96, 32))
    weights["model.layers.0.router.weight"] = mx.zeros((4, 64))
    mx.save_safetensors(path, weights)
    refused(
        folder,
        "2 missing: model.layers.1.mlp.up_proj.weight (96, 64), model.norm.weight (64,)",
        "1 unexpected: model.layers.0.router.weight (4, 64)",
        "1 of the wrong shape: model.layers.0.mlp.gate_proj.weight is (96, 32), should be (96, 64)",
    )


def test_quantized_tensors_that_do_not_fit(tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import quantize_model

    config = tiny.tiny_config()
    model, described = quantize_model(tiny.tiny_model(config), dict(config), 32, 4)
    folder = tiny.write_folder(tmp_path, described, model)
    path = str(folder / "model.safetensors")
    weights = mx.load(path)
    assert isinstance(weights, dict)
    weights["model.layers.0.mlp.up_proj.scales"] = mx.zeros((96, 3))
    mx.save_safetensors(path, weights)
    refused(folder, "1 quantized tensors do not fit", "model.layers.0.mlp.up_proj")


def test_tokenizer_problems(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["far away"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(folder, "do not belong together", "288 rows", "500")
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "tokenizer", str(folder))
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer")


def test_notes_of_macos_are_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "._weights.safetensors").write_bytes(b"\0\5\x16\7\xff")
    assert [path.name for path in weight_files(folder)] == ["weights.safetensors"]
