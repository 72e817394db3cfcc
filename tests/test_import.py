"""`mlx-zh import` as its user runs it: in an empty home, in both languages, and then the run."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_zh import run
from mlx_zh.recipe import load_recipe
from mlx_zh.system.entry import entry

PROJECT = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset": "问答",
    "template": "qwen",
    "cutoff_len": 128,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "num_train_epochs": 2.0,
    "plot_loss": True,
    "pissa_init": True,
}


@pytest.fixture
def made(tmp_path: Path, model_folder: Callable[..., Path]) -> Path:
    """A LLaMA-Factory project of a folder with examples and a folder with data, and an empty home."""
    for name in ("home", "examples", "data"):
        (tmp_path / name).mkdir()
    rows = [{"instruction": f"第{n}个字？", "output": "好的"} for n in range(12)]
    (tmp_path / "data/qa.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "data/dataset_info.json").write_text(json.dumps({"问答": {"file_name": "qa.json"}}), encoding="utf-8")
    values = {"model_name_or_path": str(model_folder()), **PROJECT}
    (tmp_path / "examples/我的 训练.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return tmp_path


def command(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "OPENBLAS_NUM_THREADS") if name in os.environ}
    environment = {**kept, "HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(
        [str(Path(sys.executable).parent / "mlx-zh"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def test_import_then_dry_run_in_an_empty_home(made: Path) -> None:
    """The file of a Chinese name with a blank becomes a recipe whose name is a folder's, and its run is planned."""
    shown = command(made, "import", "examples/我的 训练.yaml", MLX_ZH_LANG="zh")
    assert shown.returncode == 0, shown.stderr
    assert "per_device_train_batch_size: 1, gradient_accumulation_steps: 4" in shown.stdout
    assert "`mlx-zh report` 会画出损失曲线" in shown.stdout and "pissa_init: true" in shown.stdout
    written = made / "examples/imported-mlx.yaml"
    recipe = load_recipe(written)
    assert (recipe.name, recipe.sft.batch_size, recipe.sft.epochs) == ("imported-mlx", 4, 2)
    dry = command(made, "run", "examples/imported-mlx.yaml", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "sft" in dry.stdout and not (made / "runs").exists()
    again = command(made, "import", "examples/我的 训练.yaml")
    assert again.returncode == 2 and "never overwritten" in again.stderr
    assert command(made, "import", "none.yaml").stderr == "error: none.yaml: there is no such file.\n"


def test_the_table_and_the_recipe_in_the_readers_language(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    texts = {}
    for language in ("en", "zh"):
        monkeypatch.setenv("MLX_ZH_LANG", language)
        importlib.import_module("mlx_zh.import").main(["examples/我的 训练.yaml", "--out", f"{language}.yaml"])
        texts[language] = capsys.readouterr().out, Path(f"{language}.yaml").read_text(encoding="utf-8")
    assert "What differs" in texts["en"][1] and "有差别" in texts["zh"][1]
    assert "Not needed in a recipe:" in texts["en"][0] and "配方里不需要的：" in texts["zh"][0]
    assert "有差别" not in texts["en"][0] + texts["en"][1]
    recipes: list[Any] = [load_recipe(f"{language}.yaml") for language in ("en", "zh")]
    assert recipes[0].model_copy(update={"name": "zh-mlx"}) == recipes[1]


def test_foreign_names_in_a_recipe_are_answered_from_the_same_table(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(made)
    Path("r.yaml").write_text("name: r\nmodel: {path: m}\nsft: {use_galore: true}\ncutoff_len: 5\npissa_init: true\n")
    for language, words in (("en", "Here it is data.max_length."), ("zh", "这里叫 data.max_length。")):
        monkeypatch.setenv("MLX_ZH_LANG", language)
        with pytest.raises(SystemExit):
            entry(run.main, ["r.yaml"])
        told = capsys.readouterr().err
        assert words in told and ("AdamW" in told)
        assert ("适配器从零开始" if language == "zh" else "Adapters begin at zero") in told
