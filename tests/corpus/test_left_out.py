"""The rows that a corpus left out, beside what they resemble: what is recorded, and how much at most."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_zh.corpus import left_out
from mlx_zh.corpus.build import prepare
from mlx_zh.corpus.choosing import ChoiceSettings
from mlx_zh.corpus.prepared import Corpus, CorpusSettings, Exams
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.shards import RenderSettings
from mlx_zh.corpus.sources import DataSource

STEM = "甲公司于二〇二一年三月购入一台设备用于生产新产品并按直线法计提折旧，折旧年限应当为____。"
OPTIONS = ("三年", "五年", "十年", "二十年")
LONG = "从前有一座山，山上有一座庙，庙里有一个老和尚在给小和尚讲故事，故事讲了很久很久，一直讲到天亮。"
SETTINGS = CorpusSettings(
    RenderSettings("sft", "assistant", 4000, "truncate", None), ChoiceSettings(), Exams({}, {}), on_invalid="error"
)


@pytest.fixture
def corpus(tmp_path: Path, tokenizer_of: Any) -> Any:
    def make(rows: list[tuple[str, str]], place: str = "cache") -> Corpus:
        path = tmp_path / "rows.jsonl"
        turns = [{"instruction": asked, "input": "", "output": said} for asked, said in rows]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in turns), encoding="utf-8")
        exam = tmp_path / "exam" / "val"
        exam.mkdir(parents=True, exist_ok=True)
        line = f"0,{STEM},{','.join(OPTIONS)},C\n"
        (exam / "accountant_val.csv").write_text("id,question,A,B,C,D,answer\n" + line, encoding="utf-8")
        settings = replace(SETTINGS, exams=Exams({"ceval": str(tmp_path / "exam")}, {}))
        source = DataSource("rows", (str(path),))
        return prepare([source], settings, Renderer(tokenizer_of("llama3")), tmp_path / place, lambda *_: None)

    return make


def recorded(corpus: Corpus) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((corpus.folder / left_out.FILE).read_text(encoding="utf-8"))["rows"]
    return rows


def test_each_row_stands_beside_what_it_resembles(corpus: Any):
    rows = [
        ("讲个故事", LONG),
        ("你好", "你好！"),
        ("你好", "你好！"),
        ("讲个故事", LONG.replace("天亮", "天明")),
        (STEM, "十年"),
    ]
    exam, same, near = recorded(corpus(rows))
    place = same["row"].removesuffix(":3")
    assert (same["reason"], same["row"], same["like"]) == ("duplicate", f"{place}:3", f"{place}:2")
    assert (
        same["said"]
        == same["like_said"]
        == [
            {"role": "user", "text": "你好"},
            {"role": "assistant", "text": "你好！"},
        ]
    )
    assert (near["reason"], near["row"], near["like"]) == ("near duplicate", f"{place}:4", f"{place}:1")
    assert (near["said"][1]["text"][-3:], near["like_said"][1]["text"][-3:]) == ("天明。", "天亮。")
    assert (exam["reason"], exam["row"], exam["like"]) == (
        "exam question",
        f"{place}:5",
        "ceval val/accountant_val 1",
    )
    assert exam["like_said"] == [
        {"role": "question", "text": STEM},
        *(
            {"role": letter, "text": text}
            for letter, text in zip("ABCD", ("三年", "五年", "十年", "二十年"), strict=True)
        ),
    ]
    assert (exam["overlap"], same["overlap"], near["overlap"]) == (1.0, None, None)


def test_the_record_is_bounded_and_the_same_each_time(corpus: Any):
    rows = [("字" * 900, "好")] + [("字" * 900, "好")] * 60
    first, again = corpus(rows), corpus(rows, "another cache")
    assert first.manifest["report"]["sources"][0]["dropped"] == {"duplicate": 60}
    assert len(recorded(first)) == 40
    assert {len(turn["text"]) for row in recorded(first) for turn in row["said"]} == {401, 1}  # 400 and an ellipsis
    assert recorded(first) == recorded(again)


def test_few_spool_files_are_read(corpus: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlx_zh.corpus.scan.PART", 2)  # rows of a spool file
    monkeypatch.setattr(left_out, "_PARTS", 3)
    rows = [(f"第{'一二三四五六七八九十'[n]}个问题", f"{n}号回答") for n in range(10)]
    # The repeats of rows 0 and 1 lie in part 5. Those of rows 9 and 2 lie in part 6, beside parts 4 and 1: too many.
    kept = recorded(corpus([*rows, rows[0], rows[1], rows[9], rows[2]]))
    assert [row["said"][0]["text"] for row in kept] == [rows[0][0], rows[1][0]]


def test_a_changed_record_is_damage(corpus: Any):
    made = corpus([("你好", "你好！"), ("你好", "你好！")])
    (made.folder / left_out.FILE).write_text('{"rows": []}', encoding="utf-8")
    again = corpus([("你好", "你好！"), ("你好", "你好！")])
    assert not again.ready and len(recorded(again)) == 1
