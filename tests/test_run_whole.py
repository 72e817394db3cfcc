"""The whole pipeline with its real stages, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from project import Project, message, run_stages_here

from mlx_zh import run
from mlx_zh.pipeline import runner
from mlx_zh.pipeline.steps import steps
from mlx_zh.recipe import load_recipe
from mlx_zh.stages.run_folder import RunFolder

EXAM = Path(__file__).resolve().parent.parent / "data" / "quickstart" / "exam"
ONLY_SFT = """
from mlx_zh import run
from mlx_zh.system.entry import entry
from mlx_zh.pipeline import steps

steps.NAMES = ("sft",)
entry(run.main)
"""


@pytest.fixture
def whole(project: Project) -> Project:
    """A recipe with every stage."""
    rows = [
        {
            "prompt": [message("user", f"第{n}个字？")],
            "chosen": [message("assistant", "好的")],
            "rejected": [message("assistant", "不知道")],
        }
        for n in range(8)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    evaluate = {"benchmarks": [str(EXAM)], "limit": 1, "bootstrap": 50, "prompts": ["你好"], "max_new_tokens": 4}
    changes: dict[str, Any] = {
        "dpo": {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-3},
        "evaluate": evaluate,
        "export": {"formats": ["mlx"], "bits": 16},
    }
    project.recipe["data"]["dpo"] = {"train": ["pairs.jsonl"]}
    project.recipe["sft"]["max_steps"] = 2
    project.recipe |= changes
    project.write_recipe()
    return project


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Stages run in this process, which spares their imports; gives what ran since the last look."""
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))

    def name(stage: str, arguments: Sequence[str]) -> str:
        return f"{stage}-{arguments[-1]}" if "--stage" in arguments else stage

    return run_stages_here(monkeypatch, [runner], name)


@pytest.mark.slow
def test_one_command_from_recipe_to_report(whole, ran):
    recipe = load_recipe("recipe.yaml")
    expected = [step.name for step in steps(recipe, RunFolder.of(recipe))]
    assert run.main(["recipe.yaml"]) == 0
    assert ran() == expected
    assert {"eval-base", "sft", "eval-sft", "dpo", "eval-dpo", "fuse", "report"} <= set(expected)

    folder = Path("runs/tiny")
    page = (folder / "report.html").read_text(encoding="utf-8")
    sections = ("benchmarks", "sft", "dpo", "answers", "data", "export", "run")
    assert all(f'id="{section}"' in page for section in sections) and 'data-exam="exam"' in page
    assert len(list((folder / "plots").glob("*.png"))) == 7
    assert {path.name for path in (folder / "eval").glob("*.jsonl")} == {
        f"{m}-exam.jsonl" for m in ("base", "sft", "dpo")
    }

    assert run.main(["recipe.yaml"]) == 0 and ran() == []
    assert run.main(["recipe.yaml", "dpo.beta=0.3"]) == 0
    assert ran() == expected[expected.index("dpo") :]
    assert (folder / "dpo-old1").is_dir() and not (folder / "sft-old1").exists()


@pytest.mark.thorough
def test_a_run_stopped_in_its_training_goes_on_there(whole):
    """In processes of their own: the stage is told, finishes its step and saves, and the next run takes it up."""
    command = [sys.executable, "-c", ONLY_SFT, "recipe.yaml", "evaluate={}", "sft.max_steps=150", "name=stopped"]
    log, records = Path("runs/stopped/sft/metrics.jsonl"), Path("runs/stopped/pipeline.json")
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (log.exists() and log.read_bytes().count(b'"loss"') >= 3):
        time.sleep(0.01)
        assert child.poll() is None
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(60) == 130
    assert json.loads(records.read_text())["stages"]["sft"]["outputs"] is None
    before = log.read_text().splitlines()
    assert 3 <= len(before) < 150

    rest = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert "sft: not finished" in rest.stdout and "Going on after step" in rest.stdout
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert log.read_text().splitlines()[: len(before)] == before
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 151))
