"""Figures, tripwires and tables from constructed answers."""

from __future__ import annotations

import math

import pytest
from wcwidth import wcswidth

from mlx_zh.exams import figures, tables
from mlx_zh.exams.answers import Answer
from mlx_zh.exams.catalog import Entry, Row
from mlx_zh.exams.csvfile import LETTERS, Question
from mlx_zh.exams.exam import Exam, Subject
from mlx_zh.exams.statistics import compare
from mlx_zh.system import console

ROWS = (
    Row("Average"),
    Row("Average (hard)", flag="hard"),
    Row("STEM", category="STEM"),
    Row("Other", category="Other"),
)
ENTRIES = {"maths": Entry("数学", "STEM", ("hard",)), "physics": Entry("物理", "STEM"), "cooking": Entry("烹饪")}


def exam(sizes: dict[str, int], expected: int | None = None, labelled: bool = True) -> Exam:
    subjects = tuple(
        Subject(
            key,
            ENTRIES[key],
            (),
            tuple(
                Question(str(n), "?", ("a", "b", "c", "d"), LETTERS[n % 4] if labelled else None) for n in range(size)
            ),
        )
        for key, size in sizes.items()
    )
    return Exam("e", "Exam", "ceval", "test", ROWS, subjects, expected)


def answers(
    asked: Exam, right: dict[str, int] | None = None, *, choice: str | None = "right", mass: float = 0.9, cut: int = 0
) -> list[Answer]:
    """The first `right` of each subject answered right (default: all), the rest wrong or with `choice`."""
    found = []
    for subject in asked.subjects:
        for number, question in enumerate(subject.questions):
            truth = question.answer
            wrong = LETTERS[(LETTERS.index(truth) + 1) % 4] if truth else "B"
            good = number < (right or {}).get(subject.key, len(subject.questions))
            said = (truth if good else wrong) if choice == "right" else choice
            share = [math.log(mass * (0.7 if letter == said else 0.1)) for letter in LETTERS]
            logprobs = None if said is None else tuple(share)
            found.append(
                Answer(
                    subject.key,
                    question.id,
                    truth,
                    said,
                    logprobs,
                    None if said is None else mass,
                    10,
                    number < cut,
                )
            )
    return found


def measured(asked: Exam, given: list[Answer]) -> figures.ExamFigures:
    return figures.exam_figures(asked, given, samples=500, seed=0)


def test_rows_are_macro_with_micro_beside():
    asked = exam({"maths": 4, "physics": 20, "cooking": 8})
    found = measured(asked, answers(asked, {"maths": 1, "physics": 10, "cooking": 8}))
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["Average"]["macro"] == pytest.approx((0.25 + 0.5 + 1) / 3)
    assert rows["Average"]["micro"] == pytest.approx(19 / 32)
    assert rows["STEM"]["macro"] == pytest.approx((0.25 + 0.5) / 2)
    assert rows["STEM"]["micro"] == pytest.approx(11 / 24)
    assert rows["Average"]["members"] == ["maths", "physics", "cooking"]
    assert rows["STEM"]["members"] == ["maths", "physics"]
    assert (rows["Average (hard)"]["subjects"], rows["Average (hard)"]["macro"]) == (1, 0.25)
    assert rows["Other"] == {
        **{"name": "Other", "macro": None, "interval": None, "micro": None, "subjects": 0, "questions": 0},
        "members": [],
    }
    assert found["subjects"]["cooking"] == {"accuracy": 1.0, "questions": 8}
    # Said with probability 0.7 among the letters; right in 19 of 32.
    assert found["calibration_error"] == pytest.approx(abs(0.7 - 19 / 32))


def test_letters_truth_and_constant_baselines():
    asked = exam({"maths": 6, "physics": 4})  # truth: A B C D A B, and A B C D
    found = measured(asked, answers(asked, choice="C"))
    assert found["letters"]["predicted"] == {"A": 0, "B": 0, "C": 10, "D": 0, "none": 0}
    assert found["letters"]["true"] == {"A": 3, "B": 3, "C": 2, "D": 2}
    assert found["letters"]["always"]["A"] == pytest.approx((2 / 6 + 1 / 4) / 2)
    assert found["rows"][0]["macro"] == pytest.approx(found["letters"]["always"]["C"])


def wires(asked: Exam, given: list[Answer]) -> list[str]:
    return measured(asked, given)["tripwires"]


def test_nothing_is_said_where_nothing_is_wrong():
    asked = exam({"maths": 100}, expected=100)
    assert wires(asked, answers(asked, {"maths": 60})) == []


def test_every_tripwire_fires():
    asked = exam({"maths": 100}, expected=100)
    (guess,) = wires(asked, answers(asked, {"maths": 26}))
    assert guess.startswith("accuracy 26.0% is what guessing gives (1")
    (worse,) = wires(asked, answers(asked, {"maths": 5}))
    assert worse.startswith("accuracy 5.0% is less than guessing gives (1")
    assert "100% of the answers are C." in wires(asked, answers(asked, choice="C"))
    (mass,) = wires(asked, answers(asked, mass=0.49))
    assert mass.startswith("the four letters have 49.0% of the probability on average: the prompt does not elicit")
    assert wires(asked, answers(asked, mass=0.51)) == []
    assert wires(asked, answers(asked, cut=3)) == ["3 of 100 prompts were too long and were cut."]
    assert "100 of 100 answers give no letter; they count as wrong." in wires(asked, answers(asked, choice=None))
    part = exam({"maths": 100}, expected=1346)
    assert wires(part, answers(part)) == ["100 questions were asked; Exam test has 1346."]


def test_a_letter_is_a_habit_above_six_tenths():
    asked = exam({"maths": 100}, expected=100)
    given = answers(asked)
    for number in range(100):  # 60 A, then 61
        given[number] = answers(asked, choice="A" if number < 60 else "B")[number]
    assert not any("of the answers are" in wire for wire in wires(asked, given))
    given[60] = answers(asked, choice="A")[60]
    assert any(wire == "61% of the answers are A." for wire in wires(asked, given))


def test_unlabelled_answers_have_no_accuracy_and_make_a_submission():
    asked = exam({"maths": 2, "cooking": 1}, labelled=False)
    given = answers(asked, choice="D")
    found = measured(asked, given)
    assert "rows" not in found and found["letters"]["predicted"]["D"] == 3
    # hkust-nlp/ceval, submission_example.json: subject -> id as text -> letter.
    assert figures.submission(given) == {"maths": {"0": "D", "1": "D"}, "cooking": {"0": "D"}}


def test_answers_survive_json():
    asked = exam({"maths": 2})
    for answer in (*answers(asked), *answers(asked, choice=None)):
        assert Answer.of(answer.as_dict()) == answer


def test_tables_side_by_side():
    asked = exam({"maths": 4, "physics": 4})
    before, after = answers(asked, {"maths": 2, "physics": 2}), answers(asked, {"maths": 3, "physics": 2})
    stages = {"base": measured(asked, before), "sft": measured(asked, after)}
    text = console.table(tables.results(stages))
    assert text.splitlines()[0].split() == ["%", "base", "sft", "questions"]
    assert (
        "50.00 [" in text.splitlines()[1] and "62.50 [" in text.splitlines()[1] and "(62.50)" in text.splitlines()[1]
    )
    assert text.splitlines()[4].split() == ["Other", "–", "–", "0"]
    shown = console.table(tables.letters(stages)).splitlines()
    assert shown[0].split()[:5] == ["letters", "A", "B", "C", "D"] and shown[3].split() == ["truth", *"2222"]
    assert shown[4].split()[:4] == ["always", "it", "25.0%", "25.0%"]

    found = compare(figures.by_subject(before), figures.by_subject(after), 200, seed=0)
    sentence = tables.verdict("base", "sft", found)
    assert sentence.startswith("sft against base: +12.50 points [")
    assert sentence.endswith("1 questions won, 0 lost, p = 0.716: within noise")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_fit_the_terminal(count: int, width: int):
    """Also with Chinese names of categories and thousands of questions; a wide terminal shows everything."""
    asked = exam({"maths": 6000, "physics": 5582})
    names = ["base", "sft", "dpo", "fused"][:count]
    stages = {name: measured(asked, answers(asked, {"maths": 3000, "physics": 2000})) for name in names}
    for figures_of_stage in stages.values():
        figures_of_stage["rows"][1]["name"] = "社会科学与人文学科"
    form = tables.fitting(stages, width, console.table)
    for table in (tables.results(stages, form), tables.letters(stages, form)):
        assert max(wcswidth(line) for line in console.table(table).splitlines()) <= width
    shown = console.table(tables.results(stages, form))
    assert "42.91" in shown and "11582" in shown and "社会科学与人文学科" in shown
    assert form == tables.FORMS[0] if width == 200 else form.legend.startswith("macro average")
    assert tables.fitting(stages, None, console.table) == tables.FORMS[0]


def test_a_stacked_table_has_each_interval_below_its_average():
    asked = exam({"maths": 100})
    stages = {name: measured(asked, answers(asked, {"maths": 50})) for name in ("base", "sft")}
    rows = tables.results(stages, tables.FORMS[-1])
    low, high = (round(100 * value) for value in stages["base"]["rows"][0]["interval"])
    assert rows[1] == ["Average", "50.00", "50.00", "100"]
    assert rows[2] == ["", f"[{low}–{high}]", f"[{low}–{high}]", ""]
    assert "micro" not in tables.FORMS[-1].legend


def test_unlabelled_answers_fit_too():
    asked = exam({"maths": 2}, labelled=False)
    assert tables.fitting({"base": measured(asked, answers(asked, choice="D"))}, 80, console.table) == tables.FORMS[0]


def test_a_real_difference_is_called_one():
    asked = exam({"maths": 100})
    before, after = figures.by_subject(answers(asked, {"maths": 30})), figures.by_subject(answers(asked))
    better = tables.verdict("base", "dpo", compare(before, after, 100, seed=0))
    assert better.endswith("70 questions won, 0 lost, p = 0.020: better")
    assert tables.verdict("base", "dpo", compare(after, before, 100, seed=0)).endswith("p = 0.020: worse")


def test_each_stage_meets_the_base_and_the_one_before():
    assert tables.pairs(["base"]) == []
    assert tables.pairs(["base", "sft", "dpo"]) == [("base", "sft"), ("base", "dpo"), ("sft", "dpo")]
