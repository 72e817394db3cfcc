"""Reading exams: the three forms of folders, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_zh.errors import DataError
from mlx_zh.exams.catalog import benchmark
from mlx_zh.exams.csvfile import Question, read_questions
from mlx_zh.exams.exam import load_benchmark, load_exam

QUICKSTART = Path(__file__).resolve().parents[2] / "data" / "quickstart" / "exam"
HEADER = "id,question,A,B,C,D,answer\n"
GOOD = HEADER + "0,一,甲,乙,丙,丁,A\n1,二,甲,乙,丙,丁,D\n"


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Writes files below an exam's folder."""

    def write(**files: str | bytes) -> Path:
        for name, text in files.items():
            path = tmp_path / "exam" / name.replace("__", "/").replace("_csv", ".csv")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / "exam"

    return write


def load(folder: Path, shots: int = 0, split: str | None = None):
    return load_exam(folder, split=split, shots=shots)


# What is known of the benchmarks


def test_catalog_counts():
    ceval, cmmlu = benchmark("ceval"), benchmark("cmmlu")
    assert Counter(entry.category for entry in ceval.subjects.values()) == {
        **{"STEM": 20, "Social Sciences": 10, "Humanities": 11, "Other": 11},
    }
    assert sum("hard" in entry.flags for entry in ceval.subjects.values()) == 8
    assert ceval.splits == {"dev": 260, "val": 1346, "test": 12342}
    assert Counter(entry.category for entry in cmmlu.subjects.values()) == {
        **{"STEM": 17, "Social Sciences": 22, "Humanities": 13, "Other": 15},
    }
    assert sum("china_specific" in entry.flags for entry in cmmlu.subjects.values()) == 15
    assert cmmlu.splits == {"dev": 335, "test": 11582}
    assert [row.name for row in ceval.rows] == [
        *("Average", "Average (hard)", "STEM", "Social Sciences", "Humanities", "Other"),
    ]
    assert [row.name for row in cmmlu.rows] == [
        *("Average", "STEM", "Social Sciences", "Humanities", "Other", "China-specific"),
    ]


@pytest.mark.parametrize("key", ["ceval", "cmmlu"])
def test_catalog_names_are_the_published_ones(samples: Path, key: str):
    published = json.loads((samples / key / "subjects.json").read_text(encoding="utf-8"))
    flag = {"ceval": "hard", "cmmlu": "china_specific"}[key]
    assert {name: entry.name for name, entry in benchmark(key).subjects.items()} == {
        name: fields["zh"] for name, fields in published.items()
    }
    for name, fields in published.items():
        entry = benchmark(key).subjects[name]
        assert entry.category == fields["category"].replace("Science", "Sciences")
        assert (flag in entry.flags) == fields[flag]


# Real files


@pytest.mark.parametrize(
    ("key", "split", "subjects", "questions"), [("ceval", "val", 26, 688), ("cmmlu", "test", 34, 5664)]
)
def test_half_of_the_real_questions(samples: Path, key: str, split: str, subjects: int, questions: int):
    exam = load_benchmark(benchmark(key), samples / key, split=None, shots=5)
    assert (exam.split, len(exam.subjects), len(exam)) == (split, subjects, questions)
    assert all(len(subject.dev) == 5 for subject in exam.subjects)
    assert exam.labelled and exam.expected == benchmark(key).splits[split]
    order = list(benchmark(key).subjects)
    assert sorted(exam.subjects, key=lambda subject: order.index(subject.key)) == list(exam.subjects)


def test_the_bundled_exam():
    exam = load(QUICKSTART, shots=5)
    assert (exam.key, exam.form, exam.split, len(exam.subjects), len(exam)) == ("exam", "ceval", "test", 5, 120)
    assert [row.name for row in exam.rows] == [
        *("Average", "Average (hard)", "STEM", "Social Sciences", "Humanities", "Other"),
    ]
    names = {subject.key: subject.entry.name for subject in exam.subjects}
    assert names["natural_science"] == "自然常识"
    first = next(subject for subject in exam.subjects if subject.key == "natural_science").dev[1]
    assert first.text == "在标准大气压下，水的沸点是" and first.answer == "A"
    assert len(exam.limited(7)) == 35


# Forms


def test_ceval_form_and_cmmlu_form_read_alike(put: Callable[..., Path]):
    expected = (Question("0", "一,\n二", ("甲", "乙", "丙", "丁 "), "A"),)
    ceval = put(test__a_test_csv=HEADER + '0,"一,\n二",甲,乙,丙,丁 ,A\n')
    assert load(ceval).subjects[0].questions == expected
    cmmlu = put(test__a_test_csv='\ufeff,Question,A,B,C,D,Answer\r\n0,"一,\n二",甲,乙,丙,丁 ,A\r\n\r\n')
    assert load(cmmlu).subjects[0].questions == expected


def test_a_single_file_finds_its_worked_examples(put: Callable[..., Path]):
    folder = put(dev__law_dev_csv=GOOD, test__law_test_csv=GOOD)
    exam = load(folder / "test" / "law_test.csv", shots=2)
    assert (exam.key, len(exam.subjects[0].dev), len(exam)) == ("law", 2, 2)
    beside = put(alone_csv=GOOD, alone_dev_csv=GOOD)
    assert len(load(beside / "alone.csv", shots=1).subjects[0].dev) == 1


def test_a_folder_in_a_folder_as_archives_have_it(put: Callable[..., Path]):
    folder = put(inner__val__law_val_csv=GOOD, inner__dev__law_dev_csv=GOOD)
    exam = load_benchmark(benchmark("ceval"), folder, split=None, shots=1)
    assert [subject.key for subject in exam.subjects] == ["law"]


def test_questions_without_answers_are_unlabelled(put: Callable[..., Path]):
    folder = put(test__law_test_csv="id,question,A,B,C,D\n0,一,甲,乙,丙,丁\n")
    exam = load_benchmark(benchmark("ceval"), folder, split="test", shots=0)
    assert not exam.labelled and exam.subjects[0].questions[0].answer is None


# What can be wrong


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("id,question,A,B,D,answer\n0,一,甲,乙,丁,A\n", ":1: column C is missing; the columns are: id, question, A"),
        (HEADER + "0,一,甲,乙,丙,丁,E\n", ":2: the answer must be A, B, C or D, found 'E'."),
        (HEADER + "0,一,甲,乙,丙,丁,a\n", ":2: the answer must be A, B, C or D, found 'a'."),
        (HEADER + "0,一,甲,乙,丙,丁,\n", ":2: the answer must be A, B, C or D, found ''."),
        (HEADER + '0,"一\n二",甲,乙,丙,丁,A\n1,三,甲, ,丙,,B\n', ":4: choice B, D is empty."),
        (HEADER + "0, ,甲,乙,丙,丁,A\n", ":2: the question is empty."),
        (HEADER + "0,一,甲,乙,丙,A\n", ":2: 6 fields where the header has 7."),
        (HEADER + "0,一,甲,乙,丙,丁,A\n0,二,甲,乙,丙,丁,A\n", ":3: id '0' is there twice (first on line 2)."),
        (HEADER + '0,"一,甲,乙,丙,丁,A\n1,二,甲,乙,丙,丁,A\n', ":2: "),
        (
            "id,question,A,B,C,D,E,answer\n0,一,甲,乙,丙,丁,戊,A\n",
            ":1: column E: a question has the four choices A, B, C and D.",
        ),
        ("id,question,A,B,C,D,Answer,answer\n0,一,甲,乙,丙,丁,A,B\n", ":1: column answer is there twice."),
        (HEADER + "0,一,甲,乙,丙,丁,Ａ\n", ":2: the answer must be A, B, C or D, found 'Ａ'."),
        (HEADER, ": holds no questions."),
        ("", ":1: column question, A, B, C, D is missing; the columns are: none."),
        (GOOD.replace("question", "题").encode("gb18030"), ":1: not UTF-8 text; it looks like GBK"),
        (GOOD.encode("utf-16"), ":1: not UTF-8 text; it looks like UTF-16"),
        (b"\xff" + GOOD.encode() + b"\xff", ":1: not UTF-8 text; "),
    ],
)
def test_bad_files(put: Callable[..., Path], text: str | bytes, complaint: str):
    folder = put(test__a_test_csv=text)
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(folder / "test" / "a_test.csv") + complaint in str(caught.value)


def test_gbk_is_told_where_it_begins_and_how_to_mend_it(put: Callable[..., Path]):
    folder = put(test__a_test_csv=HEADER.encode() + "0,一,甲,乙,丙,丁,A\n".encode("gbk"))
    with pytest.raises(DataError, match=r"a_test.csv:2: not UTF-8 text; it looks like GBK: convert it, `mv "):
        load(folder)


def test_dev_questions_are_needed_only_where_they_are_shown(put: Callable[..., Path]):
    folder = put(test__law_test_csv=GOOD)
    assert len(load(folder, shots=0)) == 2
    with pytest.raises(DataError, match=r"law.csv: subject 'law' has no dev questions, and 5 .*evaluate.shots=0"):
        load(folder, shots=5)
    put(dev__law_dev_csv=GOOD)
    with pytest.raises(DataError, match=r"law_dev.csv: subject 'law' has 2 dev questions, and 5 are shown"):
        load(folder, shots=5)
    assert len(load(folder, shots=2).subjects[0].dev) == 2


def test_all_problems_of_all_files_are_told_at_once(put: Callable[..., Path]):
    folder = put(
        test__a_test_csv=HEADER + "0,一,甲,乙,丙,丁,X\n1,二,,乙,丙,丁,Y\n",
        test__b_test_csv=GOOD.encode("gbk"),
        test__c_test_csv=GOOD,
    )
    with pytest.raises(DataError) as caught:
        load(folder, shots=1)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7 and sum("dev questions" in line for line in lines) == 3


def test_notes_of_macos_and_columns_of_one_s_own_are_passed_over(put: Callable[..., Path]):
    folder = put(test__a_test_csv="id,question,A,B,C,D,answer,source\n0,一,甲,乙,丙,丁,A,书\n1,二,甲,乙,丙,丁,D,书\n")
    (folder / "test" / "._a_test.csv").write_bytes(b"\0\5\x16\7\xff")
    (folder / "test" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1\xff")
    assert [subject.key for subject in load(folder).subjects] == ["a"] and len(load(folder)) == 2


def test_a_long_list_of_problems_is_cut(put: Callable[..., Path]):
    folder = put(test__a_test_csv=HEADER + "".join(f"{n},一,甲,乙,丙,丁,X\n" for n in range(50)))
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(caught.value).endswith("… and 30 more problems.")


def test_answers_for_some_subjects_only(put: Callable[..., Path]):
    folder = put(test__a_test_csv=GOOD, test__b_test_csv="id,question,A,B,C,D\n0,一,甲,乙,丙,丁\n")
    with pytest.raises(DataError, match="some files have answers and others none"):
        load(folder)


def test_subjects_that_the_benchmark_does_not_have(put: Callable[..., Path]):
    folder = put(val__law_val_csv=GOOD, val__cooking_val_csv=GOOD)
    with pytest.raises(DataError, match="C-Eval has no subject 'cooking'"):
        load_benchmark(benchmark("ceval"), folder, split=None, shots=0)


def test_a_split_that_is_not_there(put: Callable[..., Path]):
    folder = put(test__a_test_csv=GOOD)
    with pytest.raises(DataError, match=r"val holds no CSV files"):
        load(folder, split="val")
    with pytest.raises(DataError, match="CMMLU has no split 'val'; choose from dev, test"):
        load_benchmark(benchmark("cmmlu"), folder, split="val", shots=0)
    with pytest.raises(DataError, match="holds no CSV files"):
        load(folder / "nothing")


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("{", "subjects.json: not valid JSON"),
        ("[]", "subjects.json: must be an object"),
        ('{"a": {"category": "STEM"}}', "subjects.json: 'a' needs a name_zh"),
        ('{"b": {"name_zh": "乙"}}', "subjects.json: subject 'a' is missing"),
    ],
)
def test_bad_subject_tables(put: Callable[..., Path], table: str, complaint: str):
    folder = put(test__a_test_csv=GOOD)
    (folder / "subjects.json").write_text(table, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load(folder)
    assert complaint in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(DataError, match=r"nothing.csv cannot be read"):
        read_questions(tmp_path / "nothing.csv", [], need_answer=True)


def test_the_fingerprint_sees_every_character(put: Callable[..., Path]):
    folder = put(test__a_test_csv=GOOD, dev__a_dev_csv=GOOD)
    seen = {load(folder, shots=shots).subjects[0].fingerprint() for shots in (0, 1, 2)}
    put(test__a_test_csv=GOOD.replace("丁,D", "丁 ,D"))
    seen.add(load(folder).subjects[0].fingerprint())
    assert len(seen) == 4
