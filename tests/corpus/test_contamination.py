"""Exam questions among training rows: overlaps counted by hand."""

from __future__ import annotations

from dataclasses import fields
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
    assert first == Question("ceval val/law_val 1", (f"{LONG}____。",), True, ("一年", "两年", "三年", "四年"), 0)
    # Eight letters alone are no question: only with the options, with and without their letters.
    assert second.texts == (
        "我国最大的岛屿是____ 台湾岛和钓鱼岛 海南岛 香港岛 崇明岛",
        "我国最大的岛屿是____ A 台湾岛和钓鱼岛 B 海南岛 C 香港岛 D 崇明岛",
    )


def test_the_share_of_a_question_that_a_row_holds(exam: Path):
    index = ExamIndex.build(read_questions(exam, "ceval"), ngram=10, overlap=0.4)
    assert index.checked == 2
    half = LONG[:21]  # 12 of the 24 ten-grams
    asked = f"{half}____。一年还是两年？"  # with two options
    assert find(
        index, f"请看：{LONG}。", asked, half, LONG[:18] + "一年，两年", LONG[:9], "毫不相干的一句话而已而已"
    ) == [
        ("ceval val/law_val 1", 1.0),
        ("ceval val/law_val 1", 0.5),
        (None, 0.5),
        (None, 0.375),
        (None, 0.0),
        (None, 0.0),
    ]
    assert find(index, half * 2)[0][1] == 0.5  # said twice counts once


SHORT = "在标准大气压下纯水的沸点摄氏温度"  # 16 letters: 7 ten-grams, one common sentence
CASES = {
    "one common sentence": (f"我们都知道，{SHORT}会随着海拔升高而下降，请解释原因。", False),
    "with other options far away": (f"{SHORT}{'不一样' * 100}，八十度，九十度。", False),
    "with its options": (f"{SHORT}是\nA. 八十度\nB. 九十度\nC. 一百度\nD. 一百一十度", True),
    "with its options in another order": (f"{SHORT}是\nA. 一百度\nB. 八十度\nC. 九十度\nD. 一百一十度", True),
    "with two of its options": (f"{SHORT}是八十度还是一百度？", True),
    "with its answer": (f"{SHORT}是多少？答案是一百度。", True),
    "with a wrong answer": (f"{SHORT}是多少？答案是一千度。", False),
    "in full width and with blanks": (f"{' '.join(SHORT)}是 Ａ．八十度 Ｂ．九十度", True),
}


@pytest.mark.parametrize(("row", "contained"), CASES.values(), ids=CASES)
def test_a_sentence_is_a_question_only_with_its_options_or_its_answer(row: str, contained: bool):
    options = ("八十度", "九十度", "一百度", "一百一十度")
    index = ExamIndex.build([Question("水", (SHORT,), True, options, 2)], ngram=10, overlap=0.4)
    assert (find(index, row)[0][0] is not None) == contained


@pytest.mark.parametrize(("letters_of_it", "contained"), [(24, False), (25, True), (33, True)])
def test_a_long_stem_is_a_question_by_itself(letters_of_it: int, contained: bool):
    """From 16 ten-grams on, which are 25 letters."""
    index = ExamIndex.build(
        [Question("设备", (LONG,), True, ("一年", "两年", "三年", "四年"), 0)], ngram=10, overlap=0.4
    )
    assert (find(index, f"请问{LONG[:letters_of_it]}呢")[0][0] is not None) == contained


@pytest.mark.parametrize(("row", "contained"), [("1234", True), ("A. 1 B. 2 C. 3 D. 4", True), ("1，3", False)])
def test_options_of_one_letter_count_only_all_together(row: str, contained: bool):
    index = ExamIndex.build([Question("数", (SHORT,), True, ("1", "2", "3", "4"), None)], ngram=10, overlap=0.4)
    assert (find(index, f"{SHORT}是 {row}")[0][0] is not None) == contained


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
    options = ("它的内容", "它的意义", "它的影响", "它的来源")
    index = ExamIndex.build([Question(s, (s + phrase,), True, options) for s in subjects], ngram=10, overlap=0.4)
    assert find(index, f"请回答：{phrase}：它的内容，它的意义？") == [(None, 0.0)]
    assert find(index, f"{subjects[1]}{phrase}：它的内容，它的意义") == [(subjects[1], 1.0)]


def test_an_index_survives_the_disk(exam: Path, tmp_path: Path):
    index = ExamIndex.build(read_questions(exam, "ceval"), ngram=8, overlap=0.6)
    index.save(tmp_path / "index.npz")
    again = ExamIndex.load(tmp_path / "index.npz")
    assert (again.ngram, again.overlap) == (8, 0.6)
    for name in (field.name for field in fields(ExamIndex) if field.name not in ("ngram", "overlap")):
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
    """Every real question is found with its options; of the real training rows none is taken for one."""
    from mlx_zh.corpus.formats import load_conversations

    questions = read_questions(samples / "ceval", "ceval")[::7]
    index = ExamIndex.build(questions, ngram=10, overlap=0.4)
    assert index.checked == len(questions)
    found = find(index, *(" ".join([question.texts[0], *question.options]) for question in questions))
    assert all(place is not None and share == 1.0 for place, share in found)
    rows, _ = load_conversations(samples / "sft" / "ruozhiba_qa2449_gpt4o.json")
    assert not any(place for place, _ in find(index, *("".join(m.content for m in row.messages) for row in rows)))


def test_notes_of_macos_are_no_exam(exam: Path):
    (exam / "val" / "._law_val.csv").write_bytes(b"\0\5\x16\7\xff")
    assert len(read_questions(exam, "ceval")) == 2
