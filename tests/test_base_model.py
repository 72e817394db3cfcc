"""A base model without a chat template: raw text is prepared and learned; conversations are refused by name."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from project import Project, metrics

from mlx_zh import chat, dpo, fuse, prepare, report
from mlx_zh.system.entry import entry


@pytest.fixture
def base(project: Project) -> Project:
    """A project whose model has no chat template and whose data is a text file."""
    shutil.copytree(project.model, "base")
    Path("base/chat_template.jinja").unlink()
    project.recipe["model"]["path"] = "base"
    Path("book.txt").write_text(
        "".join(f"第{n}章：山里有座庙，庙里有个老和尚。\n\n" for n in range(200)), encoding="utf-8"
    )
    project.recipe["data"]["sft"] = {"train": ["book.txt"]}
    project.write_recipe()
    return project


def test_raw_text_is_prepared_learned_and_fused(base: Project) -> None:
    prepared = base.run(prepare.main, "--show", "1")
    assert prepared.status == 0, prepared.err
    assert "老和尚" in prepared.out
    folder = base.train(name="whole")
    assert len([line for line in metrics(folder) if "loss" in line]) > 0
    fused = base.run(fuse.main, "name=whole")
    assert fused.status == 0, fused.err
    assert base.run(report.main, "name=whole").status == 0


def test_a_conversation_among_the_text_is_refused(base: Project) -> None:
    base.recipe["data"]["sft"] = {"train": ["book.txt", "train.jsonl"]}
    base.write_recipe()
    result = base.run(prepare.main)
    assert result.status == 2 and "has no chat template" in result.err


def test_pairs_and_chat_need_a_template(base: Project) -> None:
    pair = {"prompt": "一", "chosen": "二", "rejected": "三"}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    base.recipe["data"]["dpo"] = {"train": ["pairs.jsonl"]}
    base.write_recipe()
    for main in (dpo.main, prepare.main):
        result = base.run(main, "dpo.start=base")
        assert result.status == 2 and "has no chat template" in result.err


def test_chat_needs_a_template(
    base: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("你好"))
    with pytest.raises(SystemExit) as stop:
        entry(chat.main, ["recipe.yaml", "--adapter", "none"])
    assert stop.value.code == 2 and "has no chat template" in capsys.readouterr().err
