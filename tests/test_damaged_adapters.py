"""An adapter that was damaged after training: every command sees it, and its stage writes it again."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from project import Project
from test_eval import write_exam

from mlx_zh import chat, dpo, fuse, sft
from mlx_zh import eval as evaluation

SETTINGS = ["checkpoint.every_steps=2", "checkpoint.keep=4", "sft.eval_steps=2"]
WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def scale(path: Path) -> None:
    """One character that leaves the settings of an adapter readable."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["lora_parameters"]["scale"] += 1
    path.write_text(json.dumps(config), encoding="utf-8")


DAMAGE = [(WEIGHTS, flip), (WEIGHTS, cut), (WEIGHTS, Path.unlink), (CONFIG, scale), (CONFIG, cut)]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_every_command_sees_it_and_its_stage_writes_it_again(
    project: Project, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好"))
    folder = project.train(*SETTINGS)
    whole = {file.name: file.read_bytes() for file in (folder / "adapters").iterdir()}
    damage(folder / "adapters" / name)
    write_exam(Path("exam"), questions=2)
    project.recipe["evaluate"] = {"benchmarks": ["exam"], "shots": 0}
    pair = {"prompt": [{"role": "user", "content": "你好"}]}
    pair |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    project.recipe["data"]["dpo"] = {"train": ["pairs.jsonl"]}
    project.write_recipe()
    commands = {evaluation.main: ["--stage", "sft"], fuse.main: [], chat.main: [], dpo.main: []}
    for main, arguments in commands.items():
        result = project.run(main, *arguments)  # type: ignore[arg-type]
        assert result.status == 2 and "adapter" in result.err and result.err.count("\n") == 1, (main, result)
    result = project.sft(*SETTINGS)
    assert result.status == 0
    assert "warning: the adapter in runs/tiny/sft/adapters is damaged" in result.out
    assert "written again from the last checkpoint" in result.out
    assert {file.name: file.read_bytes() for file in (folder / "adapters").iterdir()} == whole
    assert (folder / "damaged-adapters").is_dir()
    assert "nothing is left to train" in project.sft(*SETTINGS).out


def test_without_a_checkpoint_nothing_is_trained_again_unasked(project: Project) -> None:
    folder = project.train()
    flip(folder / "adapters" / WEIGHTS)
    shutil.rmtree(folder / "checkpoints")
    result = project.sft()
    assert result.status == 2 and "No checkpoint is left" in result.err and "--fresh" in result.err
    assert (folder / "adapters" / WEIGHTS).exists()
    assert project.sft("--fresh").status == 0


@pytest.mark.parametrize("keep", [4, 1])
def test_the_best_adapter(project: Project, keep: int) -> None:
    """It is written again from the checkpoint of its step; where that is gone, a warning says that it is lost."""
    settings = [*SETTINGS, f"checkpoint.keep={keep}", "sft.learning_rate=1e-3"]
    folder = project.train(*settings)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    best = folder / "checkpoints" / "best"
    whole = mx.load(str(best / WEIGHTS))
    mx.eval(whole)
    flip(best / WEIGHTS)
    step = summary["best"]["step"]
    kept = (folder / "checkpoints" / f"step-{step:06d}").is_dir()
    if keep == 1:
        shutil.rmtree(folder / "checkpoints" / f"step-{step:06d}", ignore_errors=True)
        kept = False
    result = project.sft(*settings)
    assert result.status == 0 and "runs/tiny/sft/checkpoints/best is damaged" in result.out
    assert (f"from the checkpoint after step {step}" in result.out) is kept
    assert ("no checkpoint has the weights" in result.out) is not kept
    assert best.is_dir() is kept
    if kept:
        again = mx.load(str(best / WEIGHTS))
        assert again.keys() == whole.keys()
        assert all(mx.array_equal(again[name], array).item() for name, array in whole.items())


def test_the_weights_to_keep_were_damaged_before_the_end(project: Project) -> None:
    """With `load_best`, a run whose best adapter is damaged ends with the checkpoint of that step."""
    settings = [*SETTINGS, "sft.load_best=true"]
    folder = project.train(*settings)
    whole = (folder / "adapters" / WEIGHTS).read_bytes()
    flip(folder / "adapters" / WEIGHTS)
    flip(folder / "checkpoints" / "best" / WEIGHTS)
    assert project.sft(*settings).status == 0
    assert (folder / "adapters" / WEIGHTS).read_bytes() == whole


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"sft": [1]}', "{", None])
@pytest.mark.parametrize("name", ["settings.json", "summary.json"])
def test_other_files_of_a_finished_stage(project: Project, name: str, content: str | None) -> None:
    folder = project.train(*SETTINGS)
    whole = (folder / "adapters" / WEIGHTS).read_bytes()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content, encoding="utf-8")
    result = project.run(sft.main, *SETTINGS)
    assert (result.status, result.err) == (0, "")
    assert (folder / "adapters" / WEIGHTS).read_bytes() == whole
