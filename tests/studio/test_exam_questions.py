"""The questions of an exam with all models' answers: shares, leads, filters, search, and files that are damaged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_zh.exams.csvfile import Question
from mlx_zh.recipe import Recipe
from mlx_zh.reporting.exam_questions import Wanted, counts, fits, read_questions, select, unfinished
from mlx_zh.stages.exam_texts import exam_at_hand, texts_of

TOWN = Path(__file__).resolve().parents[2] / "data" / "town" / "town-exam"


def line(number: int, choice: str | None, shares: tuple[float, ...] | None, **changes: Any) -> dict[str, Any]:
    """An answer to question `number` of a subject, whose right answer is A."""
    logprobs = None if shares is None else [math.log(share) for share in shares]
    mass = None if shares is None else sum(shares)
    about = {"subject": "law" if number < 3 else "art", "id": str(number), "truth": "A", "choice": choice}
    return {**about, "logprobs": logprobs, "mass": mass, "tokens": 9, "truncated": False, "text": None, **changes}


def write(folder: Path, stage: str, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (folder / f"{stage}-town.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Questions 0 to 3: won, lost, wrong in both, right in both. Question 3 is unsure in SFT by 0.05 / 0.9."""
    sure, other = (0.6, 0.1, 0.1, 0.1), (0.1, 0.6, 0.1, 0.1)
    write(tmp_path, "base", [line(0, "B", other), line(1, "A", sure), line(2, "B", other), line(3, "A", sure)])
    close = (0.35, 0.30, 0.15, 0.10)
    write(tmp_path, "sft", [line(0, "A", sure), line(1, "B", other), line(2, "B", other), line(3, "A", close)])
    return tmp_path


def test_shares_are_the_probabilities_and_the_lead_is_among_the_four(folder: Path):
    exam = read_questions(folder, "town", ("base", "sft", "dpo"))
    assert exam.stages == ("base", "sft") and exam.are_probabilities and exam.unreadable == {}
    given = exam.questions[3].given["sft"]
    assert given.shares == pytest.approx((0.35, 0.30, 0.15, 0.10))
    assert given.lead == pytest.approx((0.35 - 0.30) / 0.90)  # the four have 0.9 together


def test_won_lost_unsure_and_wrong(folder: Path):
    exam = read_questions(folder, "town", ("base", "sft"))
    chosen = {
        kind: select(exam, Wanted(kind, "base", "sft"), {}) for kind in ("all", "won", "lost", "unsure", "wrong")
    }
    assert chosen == {"all": [0, 1, 2, 3], "won": [0], "lost": [1], "unsure": [3], "wrong": [2]}
    assert counts(exam, Wanted("all", "base", "sft")) == {kind: len(numbers) for kind, numbers in chosen.items()}
    assert select(exam, Wanted("won", "sft", "base"), {}) == [1]  # the other way round
    assert counts(exam, Wanted("all", "base", "sft", ("art",))) == {
        "all": 1,
        "won": 0,
        "lost": 0,
        "unsure": 1,
        "wrong": 0,
    }


def test_all_words_are_looked_for_in_question_options_and_subject(folder: Path):
    exam = read_questions(folder, "town", ("base",))
    texts = {("law", "1"): Question("1", "Which River?", ("月河", "乙", "丙", "丁"), "A")}
    found = {text: select(exam, Wanted(text=text), texts) for text in ("river", "月河 which", "law", "月河 art", "")}
    assert found == {"river": [1], "月河 which": [1], "law": [0, 1, 2], "月河 art": [], "": [0, 1, 2, 3]}


def test_free_answers_and_options_have_no_probabilities(tmp_path: Path):
    write(tmp_path, "base", [line(0, None, None, text="我不知道"), line(1, "A", (0.2, 0.1, 0.05, 0.05), mass=None)])
    exam = read_questions(tmp_path, "town", ("base",))
    free, scored = exam.questions
    assert (free.given["base"].shares, free.is_right("base"), free.given["base"].text) == (None, False, "我不知道")
    assert scored.given["base"].shares == pytest.approx((0.5, 0.25, 0.125, 0.125)) and not exam.are_probabilities
    assert select(exam, Wanted(text="不知道"), {}) == [0]


@pytest.mark.parametrize(
    "broken",
    [
        '{"subject": "law", "id": "9"',  # half written
        '{"subject": "law", "id": 9, "truth": "A", "choice": "A", "logprobs": null, "mass": null}',
        '{"subject": "law", "id": "9", "truth": "A", "choice": "E", "logprobs": null, "mass": null}',
        '{"subject": "law", "id": "9", "truth": "A", "choice": "A", "logprobs": [1, 2], "mass": 1}',
        '{"subject": "law", "id": "9", "truth": "A", "choice": "A", "logprobs": [NaN, -1, -1, -1], "mass": 1}',
        "[]",
    ],
)
def test_damaged_lines_are_counted_and_left_out(folder: Path, broken: str):
    with (folder / "sft-town.jsonl").open("a", encoding="utf-8") as file:
        file.write(broken + "\n")
    exam = read_questions(folder, "town", ("base", "sft"))
    assert exam.unreadable == {"sft": 1} and len(exam.questions) == 4
    (folder / "base-town.jsonl").write_bytes(b"\xff\xfe")
    assert read_questions(folder, "town", ("base", "sft")).unreadable == {"base": -1, "sft": 1}


def test_an_exam_that_is_being_answered_is_named(tmp_path: Path):
    done = tmp_path / "subjects" / "sft-my-exam"
    done.mkdir(parents=True)
    (done / "law.json").write_text("{}")
    (tmp_path / "subjects" / "strange-thing").mkdir()
    assert [(one.stage, one.exam, one.subjects) for one in unfinished(tmp_path, ("base", "sft"))] == [
        ("sft", "my-exam", 1)
    ]
    (tmp_path / "sft-my-exam.json").write_text("{}")
    assert unfinished(tmp_path, ("base", "sft")) == [] and unfinished(tmp_path / "none", ("base",)) == []


def test_the_texts_are_those_that_were_asked(tmp_path: Path):
    shutil.copytree(TOWN, tmp_path / "exams" / "town-exam")
    recipe = Recipe.model_validate(
        {"name": "town", "model": {"path": "m"}, "evaluate": {"benchmarks": ["exams/town-exam", "ceval"]}}
    )
    exam = exam_at_hand(recipe, "town-exam", "test", tmp_path)
    assert exam is not None and exam_at_hand(recipe, "another", "test", tmp_path) is None
    texts = texts_of(exam)
    subject, number = next(iter(texts))
    folder = tmp_path / "eval"
    lines = [line(0, "A", None, subject=key[0], id=key[1], truth=text.answer) for key, text in texts.items()]
    write(folder, "base", lines)
    asked = read_questions(folder, "town", ("base",))
    assert fits(asked, texts) and len(asked.questions) == len(texts) == 48
    lines[0]["truth"] = "ABCD"[("ABCD".index(lines[0]["truth"]) + 1) % 4]
    write(folder, "base", lines)
    assert not fits(read_questions(folder, "town", ("base",)), texts), (subject, number)
