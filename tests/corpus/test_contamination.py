"""Exam questions among training rows: overlaps counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlx_zh.corpus.contamination import ExamFilter, ExamIndex, Question, read_questions
from mlx_zh.corpus.shingles import letters
from mlx_zh.errors import DataError

HEAD = "id,question,A,B,C,D,answer\n"
LONG = "甲公司于二〇二一年三月购入一台设备用于生产新产品并按直线法计提折旧"  # 33 letters: 24 ten-grams


def find(index: ExamIndex, *texts: str) -> list[tuple[str | None, float]]:
    question, share = ExamFilter(index).find(letters(texts))
    places = [None if q < 0 else str(index.places[q]) for q in question]
    return list(zip(places, [round(float(s), 3) for s in share], strict=True))


@pytest.fixture
def exam(tmp_path: Path) -> Path:
    (tmp_path / "exam" / "val").mkdir(parents=True)
    (tmp_path / "exam" / "val" / "law_val.csv").write_text(
        f"\ufeff{HEAD}0,{LONG}____。,一年,两年,三年,四年,A\n1,我国最大的岛屿是____,台湾岛和钓鱼岛,海南岛,香港岛,崇明岛,A\n",
        encoding="utf-8",
    )
    return tmp_path / "exam"


def test_questions_are_read_with_their_places(exam: Path):
    first, second = read_questions(exam, "ceval")
    assert first == Question("ceval val/law_val 1", (f"{LONG}____。",))
    # Eight letters alone are no question: only with the options, with and without their letters.
    assert second.texts == (
        "我国最大的岛屿是____ 台湾岛和钓鱼岛 海南岛 香港岛 崇明岛",
        "我国最大的岛屿是____ A 台湾岛和钓鱼岛 B 海南岛 C 香港岛 D 崇明岛",
    )


def test_the_share_of_a_question_that_a_row_holds(exam: Path):
    index = ExamIndex.build(read_questions(exam, "ceval"), ngram=10, overlap=0.4)
    assert index.checked == 2
    half = LONG[:21]  # 12 of the 24 ten-grams
    assert find(index, f"请看：{LONG}。", half, LONG[:18], LONG[:9], "毫不相干的一句话而已而已而已") == [
        ("ceval val/law_val 1", 1.0),
        ("ceval val/law_val 1", 0.5),
        (None, 0.375),
        (None, 0.0),
        (None, 0.0),
    ]
    assert find(index, half * 2)[0][1] == 0.5  # said twice counts once


def test_options_belong_to_a_short_question(exam: Path):
    index = ExamIndex.build(read_questions(exam, "ceval"), ngram=10, overlap=0.4)
    listed = "我国最大的岛屿是？\nA. 台湾岛和钓鱼岛\nB. 海南岛\nC. 香港岛\nD. 崇明岛"
    assert find(index, listed, "我国最大的岛屿是哪个？它有多少人口？")[0] == ("ceval val/law_val 2", 1.0)
    assert find(index, "我国最大的岛屿是哪个？它有多少人口？") == [(None, 0.0)]


def test_the_exams_own_phrases_prove_nothing():
    """Ten-grams of five questions and more are left out, of those that share them and of what is compared."""
    phrase = "根据以上材料下列说法正确的是"
    subjects = [
        "春秋战国时期的诸子百家争鸣",
        "光合作用的暗反应的场所在哪",
        "货币政策传导的主要渠道有何",
        "唐代的三省六部制度的变迁吗",
        "牛顿第二定律的适用的范围吗",
    ]
    index = ExamIndex.build([Question(s, (s + phrase,)) for s in subjects], ngram=10, overlap=0.4)
    assert find(index, f"请回答：{phrase}哪些？") == [(None, 0.0)]
    assert find(index, subjects[1] + phrase) == [(subjects[1], 1.0)]


def test_an_index_survives_the_disk(exam: Path, tmp_path: Path):
    index = ExamIndex.build(read_questions(exam, "ceval"), ngram=8, overlap=0.6)
    index.save(tmp_path / "index.npz")
    again = ExamIndex.load(tmp_path / "index.npz")
    assert (again.ngram, again.overlap) == (8, 0.6)
    for name in ("places", "question_of", "sizes", "grams", "variants"):
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name))


@pytest.mark.parametrize("content", [b"no,columns\n1,2\n", "题".encode("gbk")])
def test_files_that_are_no_exam_are_named(exam: Path, content: bytes):
    path = exam / "val" / "other_val.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"other_val\.csv.*question"):
        read_questions(exam, "ceval")


def test_a_folder_without_questions(tmp_path: Path):
    with pytest.raises(DataError, match="no CSV file with questions of cmmlu"):
        read_questions(tmp_path, "cmmlu")


def test_real_questions_and_real_rows(samples: Path):
    """Every real question is found as it stands; of the real training rows none is taken for one."""
    from mlx_zh.corpus.formats import load_conversations

    questions = read_questions(samples / "ceval", "ceval")[::7]
    index = ExamIndex.build(questions, ngram=10, overlap=0.4)
    assert index.checked == len(questions)
    found = find(index, *(question.texts[-1] for question in questions))
    assert all(place is not None and share == 1.0 for place, share in found)
    rows, _ = load_conversations(samples / "sft" / "ruozhiba_qa2449_gpt4o.json")
    assert not any(place for place, _ in find(index, *("".join(m.content for m in row.messages) for row in rows)))
