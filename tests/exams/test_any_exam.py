"""Any bytes as a CSV file or as subjects.json: an exam, or an error that names the file."""

from __future__ import annotations

import hypothesis
import strategies
from hypothesis import strategies as st

from mlx_zh.exams.csvfile import read_questions
from mlx_zh.exams.exam import load_exam

CSV = 'id,question,A,B,C,D,answer\n0,"谁""?",甲,乙,丙,丁,A\n1,几个？,一,二,三,四,B\n'.encode()
cells = st.lists(
    st.sampled_from([*",\"\r\n\0;'ABCD", "id", "question", "answer", "\ufeff", "=1+1"]) | st.text(max_size=3),
    max_size=30,
)


@hypothesis.given(
    strategies.damaged(CSV)
    | cells.map(lambda found: CSV + "".join(found).encode(errors="replace"))
    | st.binary(max_size=40)
)
def test_any_bytes_as_an_exam(told, tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "exam" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "subject_test.csv"
    path.write_bytes(content)
    for source in (path, folder.parent):
        error = told(lambda source=source: load_exam(source, split=None, shots=0))
        assert error is None or "subject_test.csv" in error
    problems: list[str] = []
    for question in read_questions(path, problems, need_answer=True):
        assert (
            question.text.strip()
            and question.answer in ("A", "B", "C", "D")
            and all(map(str.strip, question.options))
        )


@hypothesis.given(strategies.values | st.dictionaries(st.just("subject"), strategies.values))
def test_any_names_of_subjects(told, tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "named"
    (folder / "test").mkdir(parents=True, exist_ok=True)
    (folder / "test" / "subject_test.csv").write_bytes(CSV)
    (folder / "subjects.json").write_text(strategies.as_json(value), encoding="utf-8")
    told(lambda: load_exam(folder, split=None, shots=0))
