"""The fuse stage as its user runs it: formats, measurement, warnings, what is refused, and nothing by halves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_zh import dpo, fuse
from mlx_zh.language.notice import notice_of
from mlx_zh.models.adapters.files import load_adapter, read_adapter, save_adapter
from mlx_zh.models.build import dequantize
from mlx_zh.models.export import in_llama_cpp
from mlx_zh.models.export.source import open_source
from mlx_zh.models.load import load_model
from mlx_zh.system import storage

FUSED = Path("runs/tiny/fused")
TOKENS = mx.array([[3, 40, 41, 7, 200, 90, 12]])


@pytest.fixture
def run(project):
    """`mlx-zh fuse recipe.yaml ARGUMENTS` after training."""
    project.train()

    def call(*arguments):
        return project.run(fuse.main, *map(str, arguments))

    return call


def ran(result):
    assert (result.status, result.err) == (0, ""), result
    return result


def logits(model):
    return np.array(model(TOKENS)[0].astype(mx.float32))


def tuned(project, adapter="runs/tiny/sft/adapters"):
    loaded = load_model(str(project.model))
    load_adapter(loaded.model, Path(adapter))
    loaded.model.eval()
    return logits(loaded.model)


def weights(model):
    """Its tensors in float32."""
    source = open_source(model, "tiny")
    stored = source.stored()
    dequantize(stored, source.outline.packing, mx.float32)
    return {name: np.array(array.astype(mx.float32)) for name, array in stored.items()}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def summary():
    return json.loads((FUSED / "summary.json").read_text(encoding="utf-8"))


def with_merges(model, copy):
    """A copy of a model whose tokenizer merges; llama.cpp wants that, and the project's has a token a byte."""
    shutil.copytree(model, copy)
    path = Path(copy, "tokenizer.json")
    state = json.loads(path.read_text(encoding="utf-8"))
    state["model"] |= {"vocab": state["model"]["vocab"] | {"zq": 290}, "merges": [["z", "q"]]}
    path.write_text(json.dumps(state), encoding="utf-8")


@pytest.fixture
def merging(project):
    with_merges(project.model, "merging")
    project.model = Path("merging").absolute()
    project.recipe["model"]["path"] = "merging"
    project.write_recipe()


SYSTEM = ("data.variables={x: 好}", "data.system=你{{x}}")


def test_every_format(merging, project, run):
    result = ran(run("export.formats=[mlx, hf, gguf, peft]", "export.gguf_type=f16", *SYSTEM))
    assert files(FUSED) == ["gguf", "hf", "mlx", "peft", "summary.json"]
    model = ["README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert files(FUSED / "mlx") == files(FUSED / "hf") == [*model, "tokenizer.json", "tokenizer_config.json"]
    assert files(FUSED / "gguf") == ["Modelfile", "README.md", "tiny-F16.gguf"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(files(FUSED / "peft"))

    expected = tuned(project)
    for place in ("mlx", "hf", "gguf"):
        found = logits(load_model(str(FUSED / place)).model)
        # bfloat16 keeps 8 bits of every weight, float16 11 bits.
        assert np.linalg.norm(found - expected) < (0.002 if place == "gguf" else 0.02) * np.linalg.norm(expected)
    for kind in ("mlx", "hf", "gguf"):
        told = summary()[kind]["fidelity"]
        assert told["kl"] < 1e-3 < told["moved"] and told["top1"] > 0.9
        assert told["tokens"] == (12 + 1) + (3 + 1)  # bytes of the two answers, each with its end of turn
        assert told["fused_perplexity"] == pytest.approx(told["perplexity"], rel=0.01)
        assert summary()[kind]["warnings"] == []
    assert summary()["peft"]["fidelity"] is None
    assert 'SYSTEM """你好"""' in (FUSED / "gguf" / "Modelfile").read_text(encoding="utf-8")
    assert "KL is measured from it" in result.out and "warning" not in result.out
    card = (FUSED / "hf" / "README.md").read_text(encoding="utf-8")
    assert "LoRA of rank 4 by SFT" in card and "`train.jsonl` (SHA-256" in card and str(Path.cwd()) not in card


def test_dpo_goes_before_sft_and_a_given_adapter_before_both(project, run):
    spec, weights = read_adapter(Path("runs/tiny/sft/adapters"))
    for folder, factor in (("runs/tiny/dpo/adapters", 3), ("other", -3)):
        changed = {name: array * factor if name.endswith("lora_b") else array for name, array in weights.items()}
        save_adapter(Path(folder), changed, spec, {})
    ran(run("--no-measure"))
    found = logits(load_model(str(FUSED / "mlx")).model)
    expected = tuned(project, "runs/tiny/dpo/adapters")
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    result = ran(run("--no-measure", "--adapter", "other"))
    found, expected = logits(load_model(str(FUSED / "mlx")).model), tuned(project, "other")
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert summary()["mlx"]["fidelity"] is None and "  -  " in result.out


def test_a_peft_adapter_is_taken_like_any_other(project, run):
    ran(run("--no-measure", "export.formats=[peft]"))
    shutil.copytree(FUSED / "peft", "from-peft")
    ran(run("--no-measure", "--adapter", "from-peft"))
    found, expected = logits(load_model(str(FUSED / "mlx")).model), tuned(project)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_a_four_bit_base_is_warned_of_raised_or_merged_into_its_original(project, run, model_folder):
    """The peer's fault, whole: a small change, merged into 4 bits, is gone; six bits or the original keep it."""
    quantized = model_folder(quantized=4)
    base = load_model(str(quantized)).fingerprint
    spec, weights = read_adapter(Path("runs/tiny/sft/adapters"))
    small = {name: array * 0.3 if name.endswith("lora_b") else array for name, array in weights.items()}
    save_adapter(Path("small"), small, spec, {"base_fingerprint": base})
    recipe = (f"model.path={quantized}", "--adapter", "small")

    result = ran(run(*recipe, "export.bits=4"))
    lost = summary()["mlx"]
    assert lost["bits"] == 4 and lost["left"]["kept_mean"] < 0.9 and len(lost["warnings"]) == 1
    assert "warning: mlx, 4-bit: " in result.out
    assert list(map(notice_of, lost["warning_codes"])) == lost["warnings"] and lost["unmeasured_code"] is None
    assert "Write it with export.bits=6; base and adapter used side by side lose nothing. " in result.out
    assert "Or merge into the full-precision original with --from MODEL. With export.recover=true" in result.out

    result = ran(run(*recipe))
    raised = summary()["mlx"]
    assert raised["bits"] > 4 and raised["warnings"] == []
    assert raised["fidelity"]["kl"] < lost["fidelity"]["kl"] / 3

    ran(run(*recipe, "export.bits=4", "--from", project.model))
    original = summary()["mlx"]
    assert original["bits"] == 4 and original["left"]["kept_mean"] == pytest.approx(1, abs=0.1)
    assert "full precision" in (FUSED / "mlx" / "README.md").read_text(encoding="utf-8")


def test_a_warning_and_its_table_are_chinese_throughout(project, run, model_folder, monkeypatch):
    """Names of formats, keys, options and files are the only Latin words."""
    monkeypatch.setenv("MLX_ZH_LANG", "zh")
    recipe = (f"model.path={model_folder(quantized=4)}", "export.bits=4", "--no-measure")
    small = Path("small")
    spec, weights = read_adapter(Path("runs/tiny/sft/adapters"))
    save_adapter(small, {k: a * 0.3 if k.endswith("lora_b") else a for k, a in weights.items()}, spec, {})
    lines = ran(run(*recipe, "--adapter", small)).out.splitlines()
    (head,) = [line for line in lines if "top-1" in line]
    assert head.split() == ["格式", "GB", "KL", "top-1", "困惑度", "保留的改动", "文件夹"]
    assert any(line.split()[:3] == ["mlx", "4", "位"] for line in lines)
    (warning,) = [line for line in lines if line.startswith("警告：mlx")]
    assert warning.startswith("警告：mlx，4 位：适配器的改动在其中只保留了")
    assert warning.endswith("加上 export.recover=true，少量位数也能保住微调效果。")
    assert "。请改用 export.bits=6 写出；" in warning and "。也可以用 --from MODEL 合并进全精度的原模型。" in warning


def test_a_model_quantized_on_load_is_merged_into_what_lies_on_disk(project, run):
    project.recipe["model"]["quantize"] = {"bits": 4, "group_size": 32}
    project.recipe["name"] = "packed"
    project.write_recipe()
    project.train(name="packed")
    ran(run("--no-measure"))
    told = json.loads(Path("runs/packed/fused/summary.json").read_text())["mlx"]
    assert told["bits"] == 4 and told["left"]["kept_mean"] == pytest.approx(1, abs=0.1)


def test_bundled_text_where_nothing_is_held_out(project, run):
    project.recipe["data"]["sft"].pop("validation")
    project.recipe["data"]["validation_fraction"] = 0
    project.write_recipe()
    ran(run())
    assert summary()["mlx"]["fidelity"]["tokens"] > 1000


def test_what_is_refused_before_anything_is_written(project, run, monkeypatch):
    def refused(*arguments):
        result = run(*arguments)
        assert result.status == 2 and not FUSED.exists(), result
        return result.err

    assert "has no adapter yet. Run `mlx-zh sft recipe.yaml name=nothing` first" in refused("name=nothing")
    assert "nowhere is not an adapter folder" in refused("--adapter", "nowhere")
    assert "There is no model at 'nowhere'" in refused("--from", "nowhere")
    assert "export.formats" in refused("export.formats=[onnx]")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "no access token for Hugging Face" in refused("--push-to-hub", "me/tiny")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    assert "GB are free. Nothing was written" in refused()


def test_a_failure_leaves_the_earlier_model(project, run, monkeypatch):
    ran(run("--no-measure"))
    before = (FUSED / "mlx" / "model.safetensors").read_bytes()

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_zh.models.export.folder_files.write_configs", fail)
    result = run("--no-measure")
    assert result.status == 2 and "no space left on disk" in result.err
    assert (FUSED / "mlx" / "model.safetensors").read_bytes() == before
    assert files(FUSED) == ["mlx", "summary.json"]


def test_what_a_killed_run_left_is_cleared(project, run):
    left = FUSED / ".mlx.4711.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    ran(run("--no-measure"))
    assert not left.exists()


def test_an_adapter_of_another_base_is_told(project, run):
    spec, weights = read_adapter(Path("runs/tiny/sft/adapters"))
    save_adapter(Path("other"), weights, spec, {"base_fingerprint": "0" * 16})
    assert "trained on another model" in ran(run("--no-measure", "--adapter", "other")).out


def test_several_formats_are_uploaded_under_names_of_their_own(project, run, monkeypatch):
    pushed = []
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr(
        "mlx_zh.models.export.upload.push",
        lambda folder, name, hub, public: pushed.append((str(folder), name, hub, public)) or "done",
    )
    result = ran(run("--no-measure", "export.formats=[mlx, peft]", "--push-to-hub", "me/tiny", "--public"))
    assert pushed == [
        ("runs/tiny/fused/mlx", "me/tiny-mlx", "huggingface", True),
        ("runs/tiny/fused/peft", "me/tiny-peft", "huggingface", True),
    ]
    assert "hf_secret" not in result.out


def test_a_system_message_that_ollama_cannot_read_as_a_value_goes_into_the_template(
    merging, project, run, monkeypatch
):
    monkeypatch.setattr("mlx_zh.models.export.in_llama_cpp.is_installed", lambda: False)
    project.recipe["data"]["system"] = '翻译三引号里的文字：\n"""\nFROM /etc/passwd\n"""\n'
    project.recipe["name"] = "quotes"
    project.write_recipe()
    project.train(name="quotes")
    result = ran(run("export.formats=[gguf]"))
    assert "gguf, Q8_0: the table shows the fidelity of the weights alone." in result.out
    folder = Path("runs/quotes/fused/gguf")
    modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
    assert "SYSTEM" not in modelfile and "# The system message is in the template." in modelfile
    written = json.loads(Path("runs/quotes/fused/summary.json").read_text(encoding="utf-8"))["gguf"]
    assert written["warning_codes"] == []
    assert "the fidelity of the weights alone" in (folder / "README.md").read_text(encoding="utf-8")


def test_what_llama_cpp_computes_is_shown_where_it_is_installed(merging, project, run, monkeypatch):
    from mlx_zh.models.export.fidelity import Distance

    monkeypatch.setattr(in_llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(in_llama_cpp, "measure", lambda path, text, tuned: Distance(0.0712, 0.9, 3.25))
    result = ran(run("export.formats=[gguf]"))
    assert "gguf, Q8_0, as llama.cpp computes it: KL 0.0712, top-1 90.0%, perplexity 3.250." in result.out
    assert "as llama.cpp computes it, its predictions are 0.071 nats a token away" in result.out
    assert summary()["gguf"]["llama_cpp"] == {"kl": 0.0712, "top1": 0.9, "perplexity": 3.25}

    def fail(path, text, tuned):
        raise OSError("libllama is broken")

    monkeypatch.setattr(in_llama_cpp, "measure", fail)
    result = ran(run("export.formats=[gguf]"))
    assert "the GGUF file could not be measured with llama.cpp: libllama is broken." in result.out
    assert summary()["gguf"]["llama_cpp"] is None


def test_the_originals_licence_goes_with_the_export(project, run, model_folder):
    quantized, original = model_folder(quantized=4), Path("original")
    shutil.copytree(project.model, original)
    (original / "LICENSE").write_text("the original's licence")
    (original / "USE_POLICY.md").write_text("its policy")
    ran(run("--no-measure", f"model.path={quantized}", "--from", original))
    assert (FUSED / "mlx" / "LICENSE").read_text() == "the original's licence"
    assert (FUSED / "mlx" / "USE_POLICY.md").read_text() == "its policy"


@pytest.mark.parametrize("name", ["LICENSE.txt", "vocab.json", "chat_template.jinja"])
def test_a_link_in_the_base_is_refused_and_nothing_is_written(project, run, name):
    shutil.copytree(project.model, "evil")
    Path("key").write_text("PRIVATE KEY of the user")
    Path("evil", name).unlink(missing_ok=True)
    Path("evil", name).symlink_to("../key")
    result = run("--no-measure", "model.path=evil")
    assert result.status == 2 and f"evil/{name} is a link out of the folder, to " in result.err
    assert not FUSED.exists()


@pytest.mark.parametrize("on_load", [False, True])
def test_recover_keeps_the_tuning_in_four_bits(project, run, model_folder, on_load):
    base = project.model if on_load else model_folder(quantized=4)
    more = ("model.quantize={bits: 4, group_size: 32}",) if on_load else ()
    recipe = (f"model.path={base}", *more, "name=packed")
    project.train(*recipe[:-1], name="packed")
    folder = Path("runs/packed/fused")

    def told(*arguments):
        result = run(*recipe, "export.bits=4", *arguments)
        assert result.status == 0, result
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))["mlx"], result.out

    (plain, _), (recovered, out) = told(), told("--recover")
    assert recovered["fidelity"]["kl"] < 0.5 * plain["fidelity"]["kl"]
    assert recovered["detail"] == "4-bit, recovered" and recovered["recovered"]["tokens"] > 300
    assert "Recovered in" in out and plain["recovered"] is None
    assert "rounded together" in (folder / "mlx" / "README.md").read_text(encoding="utf-8")
    assert files(folder) == ["mlx", "summary.json"]  # the finished blocks are gone


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export.bits=16"], "with 16 bits nothing is lost"),
        (["export.formats=[hf]"], "export.formats asks for none"),
        (["export.formats=[hf, gguf]", "export.gguf_type=q8_0"], "export.formats asks for none"),
        (["export.formats=[mlx, gguf]", "export.gguf_type=q4_1", "export.bits=6"], "write export.bits=4"),
    ],
)
def test_recover_without_anything_to_recover_is_refused(run, arguments, said):
    result = run("--recover", *arguments)
    assert result.status != 0 and said in result.err and not FUSED.exists()


def test_recover_writes_a_gguf_file_without_an_mlx_folder(project, run, model_folder):
    """Its weights are those of the recovered `mlx` folder bit for bit, and so is its measure of the change."""
    with_merges(model_folder(quantized=4), "four")
    recipe = ("model.path=four", "name=packed", "export.gguf_type=q4_1", "--recover")
    project.train(recipe[0], name="packed")
    folder = Path("runs/packed/fused")

    def told(formats):
        result = run(*recipe, f"export.formats={formats}")
        assert result.status == 0, result
        assert not (folder / ".recover").exists()
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))

    alone, file = told("[gguf]"), folder / "gguf" / "packed-Q4_1.gguf"
    content = file.read_bytes()
    both = told("[gguf, mlx]")
    assert file.read_bytes() == content and list(alone) == ["gguf"]
    mlx, gguf = weights(folder / "mlx"), weights(file)
    assert mlx.keys() == gguf.keys()
    for name, array in mlx.items():
        np.testing.assert_array_equal(gguf[name], array, err_msg=name)
    assert alone["gguf"]["detail"] == "Q4_1, recovered" and alone["gguf"]["fidelity"] == both["gguf"]["fidelity"]
    assert alone["gguf"]["left"] == both["gguf"]["left"] == both["mlx"]["left"]
    assert "rounded together" in (folder / "gguf" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "detail"),
    [
        (["--to", "ollama"], "Q4_1, recovered"),
        (["--recover", "export.formats=[gguf]"], "Q4_1, recovered"),
        (["export.formats=[gguf]"], "Q8_0"),
        (["--to", "ollama", "export.gguf_type=q8_0"], "Q8_0"),
        (["--to", "ollama", "export.recover=false"], "Q8_0"),
    ],
)
def test_ollama_gets_four_bits_that_keep_the_tuning_of_a_four_bit_base(
    project, run, model_folder, monkeypatch, arguments, detail
):
    monkeypatch.setattr("mlx_zh.stages.placing.shutil.which", lambda name: None)
    with_merges(model_folder(quantized=4), "four")
    project.train("model.path=four", name="packed")
    result = run("model.path=four", "name=packed", "--no-measure", *arguments)
    assert result.status == 0, result
    told = json.loads(Path("runs/packed/fused/summary.json").read_text(encoding="utf-8"))
    assert list(told) == ["gguf"] and told["gguf"]["detail"] == detail


def test_the_importance_matrix_has_an_effect_or_is_refused(merging, run):
    """Also without a measurement of the result; the types that llama.cpp does not write do not take it."""
    result = run("--no-measure", "export.formats=[gguf]", "export.imatrix=true")
    assert result.status != 0 and "export.imatrix is for the types that llama.cpp writes" in result.err
    if in_llama_cpp.is_installed():
        contents = []
        for given in ("true", "false"):
            result = run(
                "--no-measure", "export.formats=[gguf]", "export.gguf_type=q4_k_m", f"export.imatrix={given}"
            )
            assert result.status == 0, result
            contents.append((FUSED / "gguf" / "tiny-Q4_K_M.gguf").read_bytes())
        assert contents[0] != contents[1]


def test_mixed_bits_are_chosen_within_a_size(project, run, model_folder):
    recipe = (f"model.path={model_folder(quantized=4)}", "name=packed")
    project.train(recipe[0], name="packed")
    result = run(*recipe, "export.bits=mixed")
    assert result.status == 0, result
    told = json.loads(Path("runs/packed/fused/summary.json").read_text(encoding="utf-8"))["mlx"]
    assert told["detail"].startswith("mixed, ") and 4 < float(told["detail"][7:10]) < 8
    described = json.loads(Path("runs/packed/fused/mlx/config.json").read_text(encoding="utf-8"))["quantization"]
    assert {4} < {described["bits"], *(m["bits"] for m in described.values() if isinstance(m, dict))}
    for wrong in (["export.bits=mixed", "export.size_gb=0.001"], ["export.bits=8", "export.size_gb=1"]):
        result = run(*recipe, *wrong)
        assert result.status != 0 and "export.size_gb" in result.err


def recovered(project, *arguments):
    """What summary.json says of a recovered 4-bit model, made in the run `tiny` of a full-precision base."""
    ran(project.run(fuse.main, "--recover", *arguments))
    return summary()["mlx"]["recovered"]


def test_recover_adjusts_to_one_short_row(project):
    project.write_data("train.jsonl", (("问？", "好"),))
    project.train()
    assert 0 < recovered(project)["tokens"] < 40


def test_recover_adjusts_to_preferred_answers_where_there_was_no_sft(project):
    rows = [{"prompt": [{"role": "user", "content": f"问{n}"}]} for n in range(3)]
    answers = {key: [{"role": "assistant", "content": text}] for key, text in (("chosen", "好"), ("rejected", "不"))}
    text = "".join(json.dumps(row | answers, ensure_ascii=False) + "\n" for row in rows)
    Path("pairs.jsonl").write_text(text, encoding="utf-8")
    project.recipe["data"] = {"dpo": {"train": ["pairs.jsonl"]}, "max_length": 128}
    project.recipe["dpo"] = {"batch_size": 3, "max_steps": 2, "learning_rate": 1e-2}
    project.write_recipe()
    ran(project.run(dpo.main))
    assert recovered(project)["tokens"] > 10


def test_recover_adjusts_to_raw_text_and_to_personal_variables(project):
    Path("book.txt").write_text("第一章。天气很好。\n\n" * 30, encoding="utf-8")
    project.write_data("train.jsonl", (("你是谁？", "我是{{name}}。"),))
    project.recipe["data"] |= {"sft": {"train": ["book.txt", "train.jsonl"]}, "variables": {"name": "小城"}}
    project.write_recipe()
    project.train()
    assert recovered(project)["tokens"] > 20


def test_recover_without_any_data_says_what_it_needs(project):
    project.train()
    project.recipe["data"] = {}
    project.write_recipe()
    result = project.run(fuse.main, "--recover", "--adapter", "runs/tiny/sft/adapters")
    assert result.status == 2 and "need text that the adapter was trained on" in result.err
    assert not FUSED.exists()
