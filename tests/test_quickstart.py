"""The quickstart chain on the real small model, and adapters carried to mlx-lm and back."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model as load_mlx_lm
from mlx_lm.utils import save_config, save_model
from project import TRAIN, VALIDATION, Project, losses
from tolerances import LOGITS

from mlx_zh import chat, sft
from mlx_zh.models.adapters.files import load_adapter
from mlx_zh.models.load import load_model
from mlx_zh.system.entry import entry

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "请介绍一下你自己"


def mlx_lm(*arguments: str | Path) -> str:
    """A command of mlx-lm in a process of its own, as its user runs it."""
    command = [sys.executable, "-m", "mlx_lm", *map(str, arguments)]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.network
def test_quickstart_learns_and_mlx_lm_says_the_same_with_its_adapter(smollm2_path, tmp_path, run_stage):
    for name, count in (("sft-train", 12), ("sft-validation", 5)):
        lines = (ROOT / "data" / "quickstart" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    status = run_stage(
        sft.main,
        ROOT / "recipes" / "quickstart.yaml",
        *(
            f"runs={tmp_path}",
            "sft.max_steps=3",
            "sft.batch_size=4",
            "sft.learning_rate=2e-3",
            "checkpoint.keep_best=false",
            "data.system=null",
        ),
        *(f"data.sft.train=[{tmp_path}/sft-train.jsonl]", f"data.sft.validation=[{tmp_path}/sft-validation.jsonl]"),
        *(f"evaluate.prompts=[{PROMPT}]", "evaluate.max_new_tokens=8"),
    )
    assert status == 0
    run = tmp_path / "quickstart"
    before, after = losses(run / "sft", "eval_loss")
    assert after < 0.98 * before
    answers = json.loads((run / "samples.json").read_text())["answers"]
    assert answers["base"] != answers["sft"]

    # mlx-lm does not read GGUF, so it gets the model as a folder.
    loaded = load_model(str(smollm2_path))
    folder = tmp_path / "model"
    save_model(folder, loaded.model)
    save_config(dict(loaded.config), folder / "config.json")
    loaded.tokenizer.save_pretrained(folder)
    told = mlx_lm(
        *("generate", "--model", folder, "--adapter-path", run / "sft" / "adapters"),
        *("--prompt", PROMPT, "--max-tokens", "8"),
    )
    assert told.split("==========")[1].strip().rstrip("\ufffd") == answers["sft"][0].rstrip("\ufffd")


def test_an_adapter_made_by_mlx_lm_loads_here(project: Project, monkeypatch):
    project.write_data("train.jsonl", TRAIN)
    project.write_data("valid.jsonl", VALIDATION)
    settings = {"train": True, "model": str(project.model), "data": ".", "adapter_path": "theirs", "iters": 2}
    settings |= {"batch_size": 2, "num_layers": 2, "learning_rate": 1e-2, "val_batches": 1}
    lora = importlib.import_module("mlx_lm.lora")
    lora.run(argparse.Namespace(**lora.CONFIG_DEFAULTS | settings))  # what `mlx_lm.lora --train` calls
    ours, (theirs, _) = load_model(str(project.model)).model, load_mlx_lm(project.model)
    tokens = mx.array([[1, 2, 3]])
    base = ours(tokens)
    load_adapter(ours, Path("theirs"))
    load_adapters(theirs, "theirs")
    assert mx.allclose(ours(tokens), theirs(tokens), rtol=0, atol=LOGITS)
    assert not mx.allclose(ours(tokens), base, atol=1e-2)

    answers = []
    for adapter in ("theirs", "none"):
        project.capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("你好".encode())))
        with pytest.raises(SystemExit) as stop:
            entry(chat.main, [str(project.model), "--adapter", adapter, "--temp", "0", "--max-tokens", "12"])
        out, err = project.capsys.readouterr()
        assert (stop.value.code, err) == (0, "")
        answers.append(out)
    assert answers[0] != answers[1]
