"""The draft of a recipe: what the user set outlasts new data, and nothing is overwritten."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.errors import MlxZhError, StorageError, StudioError
from mlx_zh.studio.draft import BUDGETS, Draft, nearest_budget, opened, recipes
from mlx_zh.studio.uploads import LARGEST, SUFFIXES, data_files, safe_name, store

FIRST = """\
name: one        # results
budget: 8h
model:
  path: qwen3-4b
data:
  sft:
    train:       # 12 rows
      - data/a.xlsx
"""


def draft_in(project: Path) -> Draft:
    draft = Draft(project, name="one", model="qwen3-4b")
    draft.generated(FIRST)
    return draft


def test_what_was_set_outlasts_new_data(tmp_path: Path) -> None:
    draft = draft_in(tmp_path)
    draft.set("sft.epochs", 5)
    draft.set("budget", "2h")
    draft.generated(FIRST.replace("a.xlsx", "b.csv"))
    assert draft.value("sft.epochs") == 5 and draft.budget == "2h" and draft.value("budget") == "2h"
    assert draft.value("data.sft.train") == ["data/b.csv"]
    assert "# results" in draft.text


def test_a_text_written_by_hand_keeps_its_comments_with_new_data(tmp_path: Path) -> None:
    draft = draft_in(tmp_path)
    draft.edited("# mine\n" + FIRST.replace("one", "two") + "seed: 7  # lucky\n")
    assert draft.name == "two" and draft.named
    draft.generated(FIRST.replace("a.xlsx", "b.csv"))
    assert draft.text.startswith("# mine\n") and "seed: 7  # lucky" in draft.text
    assert draft.value("data.sft.train") == ["data/b.csv"]


def test_a_change_does_not_take_back_another_that_waits(tmp_path: Path) -> None:
    """The text still has the old model when a name is set; the model that was chosen stays."""
    draft = draft_in(tmp_path)
    draft.model = "qwen3-8b"
    draft.set("name", "other")
    assert draft.model == "qwen3-8b" and draft.name == "other"


def test_a_default_is_not_written(tmp_path: Path) -> None:
    draft = draft_in(tmp_path)
    draft.set("sft.epochs", 1.0, default=1.0)
    assert draft.text == FIRST
    draft.set("sft.epochs", 2, default=1.0)
    draft.set("sft.epochs", 1.0, default=1.0)  # it is there now, so it is changed
    assert draft.value("sft.epochs") == 1.0
    draft.unset("sft.epochs")
    assert draft.text.strip() == FIRST.strip()


def test_a_field_cannot_change_a_text_that_cannot_be_read(tmp_path: Path) -> None:
    draft = draft_in(tmp_path)
    draft.edited("name: [")
    with pytest.raises(MlxZhError, match="cannot be read"):
        draft.set("sft.epochs", 2)
    assert draft.text == "name: ["


def test_neither_a_run_nor_a_recipe_is_overwritten(tmp_path: Path) -> None:
    draft = draft_in(tmp_path)
    assert not draft.taken()
    draft.write()
    assert not draft.taken()  # the same recipe: to start it again changes nothing
    draft.set("seed", 1)
    assert draft.taken()
    with pytest.raises(MlxZhError):
        draft.write()
    assert (tmp_path / "one.yaml").read_text(encoding="utf-8") == FIRST
    (tmp_path / "runs" / "one-2").mkdir(parents=True)
    (tmp_path / "one-3.yaml").write_text("")
    assert draft.unused_name() == "one-4"


def test_a_recipe_that_could_not_be_written_whole_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = draft_in(tmp_path)
    opened_file = Path.open

    def full(path: Path, *arguments: Any, **options: Any) -> Any:
        file = opened_file(path, *arguments, **options)
        file.write = lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(StorageError, match="no space left"):
            draft.write()
    assert not draft.path.exists() and not draft.taken()
    assert draft.write().read_text(encoding="utf-8") == draft.text


def test_runs_outside_the_project_are_refused(tmp_path: Path) -> None:
    draft = draft_in(tmp_path)
    for runs in ("../elsewhere", "/tmp", "~/runs"):
        draft.edited(FIRST + f"runs: {runs}\n")
        recipe, findings = draft.checked()
        assert recipe is None and findings[0].dotted == "runs"
    draft.edited(FIRST + "runs: my/runs\n")
    assert draft.checked()[1] == []


def test_recipes_of_the_project_can_be_opened_and_no_others(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "recipes").mkdir(parents=True)
    (project / "recipes" / "a.yaml").write_text(FIRST.replace("8h", "90m"), encoding="utf-8")
    (project / "registry.yaml").write_text("set: {hub: url}")
    (tmp_path / "outside.yaml").write_text(FIRST, encoding="utf-8")
    (project / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    assert recipes(project) == ["recipes/a.yaml"]
    draft = opened(project, "recipes/a.yaml")
    assert draft.name == "one" and draft.budget == "1h30m" and draft.file == "recipes/one.yaml"
    for name in ("../outside.yaml", "link.yaml", "registry.yaml", ""):
        with pytest.raises(StudioError):
            opened(project, name)


def test_the_slider_stands_at_the_nearest_time() -> None:
    assert BUDGETS[nearest_budget("8h")] == "8h"
    assert BUDGETS[nearest_budget("7h40m")] == "8h"
    assert nearest_budget(None) == len(BUDGETS) - 1
    assert BUDGETS[nearest_budget("9d")] == "2d"


# ---- uploads


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def stored(project: Path, name: str, content: bytes = b"a,b\n") -> str:
    return str(asyncio.run(store(project, name, chunks(content), len(content))))


def test_a_file_is_stored_and_never_replaced(tmp_path: Path) -> None:
    assert stored(tmp_path, "问答.csv", b"1") == "data/问答.csv"
    assert stored(tmp_path, "问答.csv", b"1") == "data/问答.csv"  # the same again
    assert stored(tmp_path, "问答.csv", b"2") == "data/问答-2.csv"
    assert (tmp_path / "data" / "问答.csv").read_bytes() == b"1"
    assert data_files(tmp_path) == ["data/问答-2.csv", "data/问答.csv"]
    assert [path.name for path in (tmp_path / "data").iterdir() if path.name.startswith(".")] == []


def test_a_link_in_the_way_is_not_written_through(tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (tmp_path / "secret.csv").write_text("mine")
    (project / "data" / "a.csv").symlink_to(tmp_path / "secret.csv")
    assert stored(project, "a.csv") == "data/a-2.csv"
    assert (tmp_path / "secret.csv").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "data").symlink_to(tmp_path)
    with pytest.raises(StudioError, match="link"):
        stored(other, "b.csv")
    assert not (tmp_path / "b.csv").exists()


def test_what_is_too_large_or_no_data_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StudioError, match="no data file"):
        stored(tmp_path, "run.py")
    with pytest.raises(StudioError, match="GB"):
        asyncio.run(store(tmp_path, "a.csv", chunks(b"x"), LARGEST + 1))
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_what_a_killed_studio_left_of_an_upload_is_removed_and_one_at_work_is_not(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, age in ((".upload-old", 7200), (".upload-new", 60), ("upload.csv", 7200)):
        (data / name).write_bytes(b"half")
        written = time.time() - age
        os.utime(data / name, (written, written))
    stored(tmp_path, "a.csv")
    assert sorted(path.name for path in data.iterdir()) == [".upload-new", "a.csv", "upload.csv"]


@given(st.text(max_size=300), st.sampled_from(SUFFIXES))
def test_any_name_becomes_one_of_a_file_in_the_folder(name: str, suffix: str) -> None:
    made = safe_name(name + suffix)
    assert made.endswith(suffix) and not made.startswith((".", "-"))
    assert not set(made) & set("/\\\0\n\r\t:*?\"<>|'$`;& ")
    assert len(made.encode("utf-8", "surrogateescape")) <= 255
    assert safe_name(made) == made
