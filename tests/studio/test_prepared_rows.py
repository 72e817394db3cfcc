"""The prepared data of a run: rows as they are trained, filters, search, and data that is not there any more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from prepared_project import SCRIPT

from mlx_zh.errors import DataError
from mlx_zh.reporting.differences import marked
from mlx_zh.stages.command import find_recipe
from mlx_zh.stages.prepared_rows import PreparedData, Search, View, open_prepared, pieces, preview, reports
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system.storage import cache_folder


@pytest.fixture
def run(tea: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("MLX_ZH_CACHE", str(tea / "cache"))
    return RunFolder(tea / "runs" / "tea")


def opened(run: RunFolder, stage: str = "sft") -> PreparedData:
    return open_prepared(run, stage, find_recipe(str(run.path)), run.path.parent.parent)


def found(data: PreparedData, words: str, view: View | None = None) -> list[str]:
    """The answers of the rows that a search gives."""
    view = view or View()
    search = Search(data, view, words)
    while not search.done:
        search.step(0)
    return [said(data, view.split, int(number)) for number in search.get_hits()]


def said(data: PreparedData, split: str, number: int) -> str:
    """What is learned of a row."""
    part = data.row(split, number).parts[-1]
    return "".join(piece.text for piece in pieces(data, part, 0, 10_000) if piece.learned)


def test_a_row_is_shown_as_it_is_trained(run: RunFolder):
    data = opened(run)
    assert data.sizes() == {"train": 6} and data.same_tokenizer and data.sources == ["rows.jsonl"]
    row = data.row("train", 0)
    text = [(piece.text, piece.learned) for piece in pieces(data, row.parts[0], 0, 10_000)]
    assert "".join(part for part, _ in text).endswith("<|im_start|>assistant\n你好！很高兴见到你。<|im_end|>")
    learned = "你好！很高兴见到你。<|im_end|>"
    assert "".join(part for part, is_learned in text if is_learned) == learned
    # A token a byte, and one for the mark: 10 characters of 3 bytes.
    assert (row.learned, row.source, row.label) == (31, "rows.jsonl", None)
    shown = preview(data, row.parts[0])
    assert shown[-1] == ("你好！很高兴见到你。", True) and "你好" in shown[-2][0] and "<|" not in shown[-2][0]


def test_a_pair_has_a_prompt_and_two_answers(run: RunFolder):
    data = opened(run, "dpo")
    parts = data.row("train", 0).parts
    assert [part.role for part in parts] == ["prompt", "chosen", "rejected"]
    assert [bool(part.learned.all()) for part in parts] == [False, True, True]
    assert [len(found(data, words)) for words in ("好的", "不好", "第1个", "没有")] == [3, 3, 1, 0]


def test_orders_and_filters(run: RunFolder):
    data = opened(run)
    longest = [data.row("train", int(number)).tokens for number in data.numbers(View(order="longest"))]
    shortest = [data.row("train", int(number)).tokens for number in data.numbers(View(order="shortest"))]
    assert longest == sorted(longest, reverse=True) == shortest[::-1] and len(longest) == 6
    assert data.numbers(View(only="cut short")).tolist() == [] == data.numbers(View(source=1)).tolist()
    assert data.numbers(View(split="validation")).tolist() == []


def test_a_search_finds_all_words_in_any_order_and_letters(run: RunFolder):
    data = opened(run)
    assert found(data, "you see") == ["See You<|im_end|>"]
    assert found(data, "<think> 51") == ["<think>\n17×3=51\n</think>\n\n答案是 51。<|im_end|>"]
    assert found(data, SCRIPT.split()[0]) == ["<img src=x onerror=alert(1)><|im_end|>"]
    longest = found(data, "。", View(order="longest"))
    assert len(longest) == 4 and "老和尚" in longest[0] and found(data, "茶 老和尚") == []


def test_left_out_rows_stand_beside_what_they_resemble(run: RunFolder):
    left = opened(run).left_out()
    assert left is not None and [row["reason"] for row in left] == ["duplicate", "near duplicate"]
    assert [(row["row"], row["like"]) for row in left] == [
        ("rows.jsonl:4", "rows.jsonl:1"),
        ("rows.jsonl:3", "rows.jsonl:2"),
    ]
    near, kept = (side[-1]["text"] for side in (left[1]["said"], left[1]["like_said"]))
    assert [text for text, same in marked(near, kept) if not same] == ["明"]


def test_runs_of_the_same_text_are_marked_by_hand():
    assert marked("abXcd", "abYcd") == [("ab", True), ("X", False), ("cd", True)]
    assert marked("", "abc") == [] and marked("abc", "") == [("abc", False)]
    assert marked("same", "same") == [("same", True)]
    assert "".join(text for text, _ in marked("a-b-c-d", "d-c-b-a")) == "a-b-c-d"


@pytest.fixture
def other(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of the run with a cache of its own."""
    shutil.copytree(cache_folder(), tmp_path / "cache")
    shutil.copytree(run.path, tmp_path / "runs" / "tea")
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path / "cache"))
    return RunFolder(tmp_path / "runs" / "tea")


def test_data_that_was_removed_or_damaged_is_said(other: RunFolder):
    folder = cache_folder() / "corpus" / reports(other)["sft"]["key"]
    (folder / "left-out.json").unlink()  # as an earlier version left it
    assert opened(other).left_out() is None
    (folder / "left-out.json").write_text('[{"rows"', encoding="utf-8")
    assert opened(other).left_out() == []
    arrow = next(folder.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match="is damaged"):
        opened(other)
    (folder / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is damaged"):
        opened(other)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match="any more"):
        opened(other)


@pytest.mark.parametrize("key", ["../../etc", "/etc", "A" * 32, "", None, 3, ["a"], "0" * 31 + "\n"])
def test_no_key_of_a_report_leads_elsewhere(other: RunFolder, key: object):
    other.prepared.write_text(json.dumps({"sft": {"key": key, "folder": "/etc"}}), encoding="utf-8")
    with pytest.raises(DataError, match="names no prepared data"):
        opened(other)


def test_without_the_tokenizer_the_rows_are_still_there(other: RunFolder):
    data = open_prepared(other, "sft", None, other.path)
    assert data.text is None and data.row("train", 0).learned == 31
    assert pieces(data, data.row("train", 0).parts[0], 0, 10) == [] and Search(data, View(), "a").done
