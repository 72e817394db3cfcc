"""What a command line names: a recipe, or an earlier run by its name or folder; and what is said otherwise."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from project import Project

from mlx_zh import chat, dpo, fuse, plan, report, sft
from mlx_zh.errors import RecipeError
from mlx_zh.stages.command import find_recipe
from mlx_zh.system.entry import entry

RECIPE = "name: x\nmodel: {path: m}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(folder: str, text: str = RECIPE) -> None:
    Path(folder).mkdir(parents=True)
    Path(folder, "recipe.yaml").write_text(text)


@pytest.mark.parametrize("target", ["x", "runs/x", "runs/x/", "./runs/x"])
def test_a_run_is_found_by_its_name_and_by_its_folder(here: Path, target: str) -> None:
    write_run("runs/x", RECIPE + "seed: 7\n")
    recipe = find_recipe(target, ["sft.epochs=2"])
    assert (recipe.seed, recipe.sft.epochs, recipe.run_folder()) == (7, 2, Path("runs/x"))


def test_a_run_elsewhere_keeps_its_results_where_they_are(here: Path) -> None:
    write_run("backup/old")
    assert find_recipe("backup/old").run_folder() == Path("backup/old")
    assert find_recipe("old", ["runs=backup"]).run_folder() == Path("backup/old")
    assert find_recipe("backup/old", ["name=new"]).run_folder() == Path("backup/new")


def test_paths_in_a_runs_recipe_are_those_of_the_folder_it_was_started_in(here: Path) -> None:
    """A run has a folder `data` of its own, which is not the data that it learned from."""
    write_run("runs/x", RECIPE + "data: {sft: {train: [data]}}\n")
    for folder in ("data", "runs/x/data"):
        Path(folder).mkdir()
    assert find_recipe("x").data.sft.train[0].path == "data"


def test_a_recipe_file_goes_before_a_run_of_the_same_name(here: Path) -> None:
    Path("x").write_text(RECIPE + "seed: 1\n")
    write_run("runs/x", RECIPE + "seed: 2\n")
    assert find_recipe("x").seed == 1


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("my-rum", "there is no recipe at my-rum, and no run of this name in runs: did you mean my-run?"),
        ("zzz", "there is no recipe at zzz, and no run of this name in runs: its runs are my-run."),
        ("none.yaml", "there is no recipe at none.yaml."),
        ("empty", "empty is a folder without a recipe, so it is no run."),
        ("sft.epochs=2", "RECIPE is missing: name a recipe file or an earlier run"),
        ("a" * 300, "there is no recipe at aaa"),
        ("~nobody-here/x", "there is no recipe at ~nobody-here/x"),
    ],
)
def test_what_is_neither_is_said(here: Path, target: str, expected: str) -> None:
    write_run("runs/my-run")
    Path("empty").mkdir()
    with pytest.raises(RecipeError) as refused:
        find_recipe(target)
    assert str(refused.value).startswith(expected)


@pytest.mark.parametrize("main", [sft.main, dpo.main, report.main, plan.main, fuse.main, chat.main])
def test_a_command_alone_says_that_a_recipe_is_missing(main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        entry(main, [])
    assert stop.value.code == 2
    said = capsys.readouterr().err.rpartition("error: ")[2]
    assert said.startswith("RECIPE is missing: name a recipe file or an earlier run, for example `mlx-zh ")
    assert "recipes/quickstart.yaml" in said and "KEY=VALUE" not in said


def test_an_option_of_another_program_is_said_in_this_ones_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry(sft.main, ["r.yaml", "--iters", "600", "--batch-size=4", "--num_train_epochs=2"])
    said = capsys.readouterr().err
    assert "--iters is a setting, written as KEY=VALUE. Here it is sft.max_steps." in said
    assert "--num_train_epochs is a setting, written as KEY=VALUE. Here it is sft.epochs." in said


def test_a_command_that_does_not_train_says_what_fresh_belongs_to(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry(report.main, ["r.yaml", "--fresh"])
    assert "--fresh is an option of the commands that train: run, sft and dpo." in capsys.readouterr().err


def test_the_commands_take_a_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run, without its recipe file: report, chat and SFT go by its name alone."""
    project.train()
    Path("recipe.yaml").unlink()
    for main, arguments in ((report.main, ["tiny"]), (sft.main, ["runs/tiny"]), (plan.main, ["tiny", "--quick"])):
        with pytest.raises(SystemExit) as stop:
            entry(main, arguments)
        assert stop.value.code == 0
    shown = project.capsys.readouterr().out
    assert "runs/tiny/report.html" in shown and "runs/tiny/sft is finished" in shown
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("你好".encode()), isatty=lambda: False))
    assert chat.main(["tiny", "--max-tokens", "2", "--verbose"]) == 0
    assert "adapter: sft (runs/tiny/sft/adapters)" in project.capsys.readouterr().err
    assert json.loads(Path("runs/tiny/manifest.json").read_text())["data"].keys() == {
        "train.jsonl",
        "validation.jsonl",
    }
