"""An exam: subjects with worked and open questions, read from folders of CSV files.

C-Eval's files are `SPLIT/SUBJECT_SPLIT.csv` with columns id, question, A, B, C, D, answer (and explanation in dev).
CMMLU's are `SPLIT/SUBJECT.csv` with an id column without a name, then Question, A, B, C, D, Answer. An exam of one's
own has either form. A `subjects.json` beside its splits gives its subjects names and categories.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_zh.corpus.exam_table import exam_files
from mlx_zh.errors import DataError
from mlx_zh.exams.catalog import Benchmark, Entry, Row
from mlx_zh.exams.csvfile import Question, read_questions
from mlx_zh.system.digests import text_digest
from mlx_zh.system.json_text import load_json
from mlx_zh.system.links import check_file
from mlx_zh.system.storage import visible

_SHOWN = 20  # problems listed in one error


@dataclass(frozen=True, slots=True)
class Subject:
    """The worked examples and the questions of a subject."""

    key: str  # in file names
    entry: Entry
    dev: tuple[Question, ...]  # worked examples, shown to the model
    questions: tuple[Question, ...]  # asked

    @property
    def characters(self) -> int:
        """Characters of all worked examples and questions."""
        return sum(len(q.text) + sum(map(len, q.options)) for q in (*self.dev, *self.questions))

    def fingerprint(self) -> str:
        """A digest of everything that is asked or shown."""
        return text_digest(repr((self.entry.name, self.dev, self.questions)))[:16]


@dataclass(frozen=True, slots=True)
class Exam:
    """The subjects of one split of an exam."""

    key: str  # in file names
    title: str
    form: str  # whose prompts it is asked with: ceval or cmmlu
    split: str
    rows: tuple[Row, ...]
    subjects: tuple[Subject, ...]
    expected: int | None  # questions of the whole split; None for an exam of one's own

    @property
    def labelled(self) -> bool:
        """Whether all right answers are known."""
        return all(question.answer is not None for subject in self.subjects for question in subject.questions)

    def __len__(self) -> int:
        return sum(len(subject.questions) for subject in self.subjects)

    def limited(self, limit: int | None) -> Exam:
        """The exam with the first `limit` questions of every subject; None keeps all."""
        return replace(self, subjects=tuple(replace(s, questions=s.questions[:limit]) for s in self.subjects))


def load_benchmark(benchmark: Benchmark, folder: Path, *, split: str | None, shots: int) -> Exam:
    """C-Eval or CMMLU from a folder that holds `dev` and the asked split, whole or in part.

    Each subject must have at least `shots` worked examples. Raises DataError with every problem of every file.
    """
    chosen = split or benchmark.default_split
    if chosen not in benchmark.splits:
        raise DataError(f"{benchmark.title} has no split {chosen!r}; choose from {', '.join(benchmark.splits)}.")
    root = _inside(folder, chosen)
    check_file(folder, root, DataError)
    asked, problems = _read_split(root, chosen, need_answer=chosen != "test" or benchmark.default_split == "test")
    for key in sorted(set(asked) - set(benchmark.subjects)):
        problems.append(f"{root / chosen}: {benchmark.title} has no subject {key!r}.")
        del asked[key]
    subjects = _with_dev(root, asked, benchmark.subjects, shots, problems)
    _raise(problems)
    order = {key: number for number, key in enumerate(benchmark.subjects)}
    subjects = sorted(subjects, key=lambda subject: order[subject.key])
    return Exam(
        benchmark.key,
        benchmark.title,
        benchmark.form,
        chosen,
        benchmark.rows,
        tuple(subjects),
        benchmark.splits[chosen],
    )


def load_exam(path: Path, *, split: str | None, shots: int) -> Exam:
    """An exam of one's own: a folder with `dev/` and `test/` (or `val/`), or a single CSV file.

    The worked examples of a single file are beside it or in `../dev`, as `NAME_dev.csv` or `NAME.csv`. Raises
    DataError with every problem of every file.
    """
    if path.is_file():
        return _single(path, shots)
    chosen = split or next((name for name in ("test", "val") if _has(path, name)), "test")
    problems: list[str] = []
    check_file(path, path / "subjects.json", DataError)
    entries = _entries(path / "subjects.json", problems)
    asked, more = _read_split(path, chosen, need_answer=False)
    problems += more
    named: dict[str, Entry] = {key: entries.get(key, Entry(key)) for key in asked}
    if entries:
        problems += [f"{path / 'subjects.json'}: subject {k!r} is missing." for k in asked if k not in entries]
    subjects = _with_dev(path, asked, named, shots, problems)
    _raise(problems)
    return Exam(path.name, path.name, "ceval", chosen, _rows(subjects), tuple(subjects), None)


def _single(path: Path, shots: int) -> Exam:
    """An exam of one subject, from one CSV file."""
    stem, _, ending = path.stem.rpartition("_")
    key = stem if ending in ("test", "val") else path.stem
    problems: list[str] = []
    questions = read_questions(path, problems, need_answer=False)
    candidates = [path.parent / f"{key}_dev.csv", path.parent.parent / "dev" / f"{key}_dev.csv"]
    candidates.append(path.parent.parent / "dev" / f"{key}.csv")
    dev_file = next((file for file in candidates if file.is_file() and file != path), candidates[0])
    check_file(path.parent if dev_file.parent == path.parent else path.parent.parent, dev_file, DataError)
    dev = _dev(dev_file, key, shots, problems)
    _raise(problems)
    subject = Subject(key, Entry(key), dev, questions)
    return Exam(key, key, "ceval", "test", (Row("Average"),), (subject,), None)


def _inside(folder: Path, split: str) -> Path:
    """The folder that holds the splits: `folder` itself, or the only folder in it that has the split."""
    if _has(folder, split):
        return folder
    below = [child for child in visible(folder.iterdir()) if _has(child, split)] if folder.is_dir() else []
    return below[0] if len(below) == 1 else folder


def _has(folder: Path, split: str) -> bool:
    return bool(visible((folder / split).glob("*.csv")))


def _read_split(folder: Path, split: str, *, need_answer: bool) -> tuple[dict[str, tuple[Question, ...]], list[str]]:
    """Questions by subject, and every problem with file and line."""
    paths = exam_files(folder, f"{split}/*.csv")
    if not paths:
        raise DataError(f"{folder / split} holds no CSV files; {folder} must have {split}/SUBJECT_{split}.csv.")
    problems: list[str] = []
    by_subject: dict[str, tuple[Question, ...]] = {}
    for path in paths:
        key = path.stem.removesuffix(f"_{split}")
        if key in by_subject:
            problems.append(f"{path}: subject {key!r} has two files.")
        by_subject[key] = read_questions(path, problems, need_answer=need_answer)
    answered = {q.answer is not None for questions in by_subject.values() for q in questions}
    if len(answered) > 1:
        problems.append(f"{folder / split}: some files have answers and others none; give all of them or none.")
    return by_subject, problems


def _with_dev(
    folder: Path,
    asked: Mapping[str, tuple[Question, ...]],
    entries: Mapping[str, Entry],
    shots: int,
    problems: list[str],
) -> list[Subject]:
    """Subjects with their questions and the worked examples from `folder/dev`."""
    subjects = []
    for key, questions in asked.items():
        path = folder / "dev" / f"{key}_dev.csv"
        if not path.is_file():
            path = path.with_name(f"{key}.csv")
        check_file(folder, path, DataError)
        subjects.append(Subject(key, entries[key], _dev(path, key, shots, problems), questions))
    return subjects


def _dev(path: Path, key: str, shots: int, problems: list[str]) -> tuple[Question, ...]:
    """The first `shots` worked examples; a missing file or too few examples is added to `problems`."""
    if not shots:
        return ()
    remedy = "add them, or ask without examples (evaluate.shots=0)"
    if not path.is_file():
        problems.append(
            f"{path}: subject {key!r} has no dev questions, and {shots} are shown to the model; {remedy}."
        )
        return ()
    before = len(problems)
    questions = read_questions(path, problems, need_answer=True)
    if len(problems) == before and len(questions) < shots:
        problems.append(
            f"{path}: subject {key!r} has {len(questions)} dev questions, and {shots} are shown to the model; "
            f"{remedy}."
        )
    return questions[:shots]


def _entries(path: Path, problems: list[str]) -> dict[str, Entry]:
    """The subjects.json of an exam of one's own: {KEY: {name_zh, category, hard}}; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        data: Any = load_json(path)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path}: not valid JSON: {error}.")
        return {}
    entries = {}
    for key, fields in data.items() if isinstance(data, dict) else ():
        name = _name(fields.get("name_zh")) if isinstance(fields, dict) else None
        if name is None:
            problems.append(f"{path}: {key!r} needs a name_zh.")
            continue
        if fields.get("category") is not None and _name(fields["category"]) is None:
            problems.append(f"{path}: the category of {key!r} must be text, found {fields['category']!r}.")
            continue
        flags = ("hard",) if fields.get("hard") else ()
        entries[key] = Entry(name, fields.get("category"), flags)
    if not isinstance(data, dict):
        problems.append(f"{path}: must be an object, a subject a key.")
    return entries


def _name(value: Any) -> str | None:
    """The value if it is text that UTF-8 can encode (JSON may hold half of a surrogate pair), else None."""
    return value if isinstance(value, str) and value and value.encode(errors="ignore").decode() == value else None


def _rows(subjects: list[Subject]) -> tuple[Row, ...]:
    """The table of an exam of one's own: the average, the average of hard subjects, and a row for each of several
    categories.
    """
    rows = [Row("Average")]
    if any("hard" in subject.entry.flags for subject in subjects):
        rows.append(Row("Average (hard)", flag="hard"))
    categories = dict.fromkeys(subject.entry.category for subject in subjects if subject.entry.category)
    usual = [name for name in ("STEM", "Social Sciences", "Humanities", "Other") if name in categories]
    ordered = usual + [name for name in categories if name not in usual]
    if len(ordered) == 1 and all(subject.entry.category for subject in subjects):
        return tuple(rows)  # its row would equal the average
    return (*rows, *(Row(name, category=name) for name in ordered))


def _raise(problems: list[str]) -> None:
    if problems:
        more = [f"… and {len(problems) - _SHOWN} more problems."] if len(problems) > _SHOWN else []
        raise DataError("\n".join([*problems[:_SHOWN], *more]))
