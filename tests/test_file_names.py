"""Names that are no files to read: pipes, devices, folders, and names that are not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROW = '{"prompt": "几点？", "response": "九点。"}\n'
LATIN = os.fsdecode(b"\xc4\xe3.jsonl")


def ended(folder: Path, module: str, *arguments: str) -> str:
    """The error of a command, which may not wait for what never comes."""
    done = subprocess.run(
        [sys.executable, "-m", f"mlx_zh.{module}", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env=os.environ | {"MLX_ZH_LANG": "en"},
    )
    assert done.returncode == 2, done
    return done.stderr


@pytest.fixture
def here(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.yaml")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "r.yaml").write_text("name: x\nmodel: {path: smollm2-135m-instruct}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("pipe.yaml", "pipe.yaml is a pipe, a socket or a device. Give a recipe file"),
        ("/dev/zero", "/dev/zero is a pipe, a socket or a device. Give a recipe file"),
        ("folder.yaml", "folder.yaml is a folder without a recipe"),
    ],
)
def test_what_is_no_file_is_no_recipe(here: Path, recipe: str, words: str):
    assert words in ended(here, "sft", recipe, "--print")


@pytest.mark.parametrize("data", ["pipe.jsonl", "/dev/zero"])
def test_what_is_no_file_is_no_data(here: Path, data: str):
    words = f"{data} is a pipe, a socket or a device. Give a file that is stored on a disk."
    assert words in ended(here, "init", data, "--yes")
    assert words in ended(here, "prepare", "r.yaml", f"data.sft.train=[{data}]")


@pytest.mark.skipif(sys.platform == "darwin", reason="file names of macOS are UTF-8")
def test_a_name_that_is_not_utf8_is_to_be_changed(here: Path):
    (here / LATIN).write_text(ROW)
    assert "the name is not UTF-8, and a recipe cannot hold it" in ended(here, "init", LATIN, "--yes")
    for key in (f"data.sft.train=[{LATIN}]", f"model.path={LATIN}"):
        error = ended(here, "prepare", "r.yaml", key)
        assert "the name is not UTF-8" in error and "quotes" not in error


@pytest.mark.skipif(sys.platform == "darwin", reason="file names of macOS are UTF-8")
def test_a_folder_with_such_a_name_is_used_without_it(tmp_path: Path, run_stage, monkeypatch: pytest.MonkeyPatch):
    from mlx_zh import init

    monkeypatch.chdir(tmp_path)
    for name in (LATIN, "a.jsonl", "b.jsonl"):
        Path(name).write_text(ROW * 3)
    assert run_stage(init.main, ".", "--yes", "--name", "mine") == 0
    text = Path("mine.yaml").read_text(encoding="utf-8")
    assert "a.jsonl" in text and "b.jsonl" in text
