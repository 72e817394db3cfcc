"""Every question of an exam with the answers of all models of a run: read, filtered and searched."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_zh.exams.csvfile import LETTERS, Question
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.json_text import parse_json

UNSURE = 0.1  # a lead of the chosen letter below this is no clear choice
KINDS = ("all", "won", "lost", "unsure", "wrong")
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError)  # what reading a damaged line raises

Key = tuple[str, str]  # a subject's key and the question's id
Texts = Mapping[Key, Question]


@dataclass(frozen=True, slots=True)
class Given:
    """A model's answer to a question."""

    choice: str | None  # a letter; None where a free answer gives none
    shares: tuple[float, ...] | None  # of A, B, C and D; None for a free answer
    lead: float | None  # how far the likeliest letter is before the second, as shares of the four together
    text: str | None  # a free answer


@dataclass(frozen=True, slots=True)
class AskedQuestion:
    """A question and the answers to it by stage."""

    subject: str
    id: str
    truth: str | None  # None where the right answer is not known
    given: Mapping[str, Given]

    @property
    def key(self) -> Key:
        """What names the question in its exam."""
        return self.subject, self.id

    def is_right(self, stage: str) -> bool | None:
        """Whether a stage's answer is right; None where there is none, or nobody knows."""
        given = self.given.get(stage)
        if given is None or self.truth is None:
            return None
        return given.choice == self.truth


@dataclass(frozen=True)
class AskedExam:
    """All questions of an exam that some model of a run answered."""

    stages: tuple[str, ...]  # models whose answers can be read, in the order of a run
    questions: Sequence[AskedQuestion]
    unreadable: Mapping[str, int]  # stage -> lines that are damaged; -1 where the file cannot be read
    are_probabilities: bool  # of the letters; False: shares of the options' likelihoods a character

    @property
    def subjects(self) -> list[str]:
        """The keys of the subjects, in the order of the exam."""
        return list(dict.fromkeys(question.subject for question in self.questions))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which questions of an exam are shown."""

    kind: str = "all"  # one of KINDS
    before: str = ""  # the stage that `won` and `lost` compare with
    after: str = ""  # the stage that they are about, and that is `unsure`
    subjects: Collection[str] = ()  # empty: all
    text: str = ""  # words that the question holds, all of them

    def words(self) -> list[str]:
        """The words to look for."""
        return self.text.casefold().split()


def read_questions(folder: Path, exam: str, stages: Sequence[str]) -> AskedExam:
    """The questions of `exam` in `folder` (`runs/NAME/eval`) with the answers of `stages`.

    Damaged lines are counted.
    """
    truths: dict[Key, str | None] = {}
    answers: dict[Key, dict[str, Given]] = {}
    unreadable: dict[str, int] = {}
    kinds: set[bool] = set()
    present = []
    for stage in stages:
        lines, damaged = _lines(folder / f"{stage}-{exam}.jsonl")
        if damaged:
            unreadable[stage] = damaged
        if lines:
            present.append(stage)
        for line in lines:
            key = line["subject"], line["id"]
            truths.setdefault(key, line["truth"])
            answers.setdefault(key, {})[stage] = _given(line)
            if line["logprobs"] is not None:
                kinds.add(line["mass"] is not None)
    questions = [AskedQuestion(*key, truths[key], given) for key, given in answers.items()]
    return AskedExam(tuple(present), questions, unreadable, kinds != {False})


def select(exam: AskedExam, wanted: Wanted, texts: Texts) -> list[int]:
    """The numbers of the wanted questions, in the order of the exam; those that are unsure, the most unsure first."""
    words = wanted.words()
    chosen = [
        number
        for number, question in enumerate(exam.questions)
        if (not wanted.subjects or question.subject in wanted.subjects)
        and _is_of_kind(question, wanted)
        and (not words or _holds(question, texts.get(question.key), words))
    ]
    if wanted.kind == "unsure":
        chosen.sort(key=lambda number: _lead(exam.questions[number], wanted.after))
    return chosen


def counts(exam: AskedExam, wanted: Wanted) -> dict[str, int]:
    """How many questions of the wanted subjects are of each kind."""
    inside = [q for q in exam.questions if not wanted.subjects or q.subject in wanted.subjects]
    sides = {kind: Wanted(kind, wanted.before, wanted.after) for kind in KINDS}
    return {kind: sum(_is_of_kind(question, side) for question in inside) for kind, side in sides.items()}


def fits(exam: AskedExam, texts: Texts) -> bool:
    """Whether `texts` are of these questions: all are there, with the answers that were known then."""
    asked = ((texts.get(question.key), question.truth) for question in exam.questions)
    return all(text is not None and text.answer == truth for text, truth in asked)


def _is_of_kind(question: AskedQuestion, wanted: Wanted) -> bool:
    before, after = question.is_right(wanted.before), question.is_right(wanted.after)
    if wanted.kind == "won":
        return before is False and after is True
    if wanted.kind == "lost":
        return before is True and after is False
    if wanted.kind == "unsure":
        return _lead(question, wanted.after) < UNSURE
    if wanted.kind == "wrong":
        return bool(question.given) and all(question.is_right(stage) is False for stage in question.given)
    return True


def _lead(question: AskedQuestion, stage: str) -> float:
    given = question.given.get(stage)
    return math.inf if given is None or given.lead is None else given.lead


def _holds(question: AskedQuestion, text: Question | None, words: Sequence[str]) -> bool:
    """Whether all words are in the question, its options, its subject or its number, or in a free answer to it."""
    parts = [question.subject, question.id, *(given.text or "" for given in question.given.values())]
    if text is not None:
        parts += [text.text, *text.options]
    whole = "\n".join(parts).casefold()
    return all(word in whole for word in words)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The answers in a file, and how many lines are damaged; -1 if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return [], 0
    except (OSError, ValueError):
        return [], -1
    lines, damaged = [], 0
    for content in text_lines(text):
        try:
            lines.append(_checked(parse_json(content)))
        except _DAMAGED:
            damaged += 1
    return lines, damaged


def _checked(line: Any) -> dict[str, Any]:
    """A line with the values that are used. Raises one of `_DAMAGED`."""
    logprobs = line["logprobs"]
    if logprobs is not None:
        logprobs = [float(value) for value in logprobs]
        if len(logprobs) != len(LETTERS) or not all(math.isfinite(value) and value <= 0 for value in logprobs):
            raise ValueError("no log-probs of four letters")
    for key in ("subject", "id"):
        if not isinstance(line[key], str):
            raise TypeError(key)
    letters = {key: line[key] for key in ("truth", "choice")}
    if any(value not in (*LETTERS, None) for value in letters.values()):
        raise ValueError("no letter")
    text = line.get("text")
    about = {"subject": line["subject"], "id": line["id"], "mass": line["mass"], "logprobs": logprobs}
    return {**about, **letters, "text": text if isinstance(text, str) else None}


def _given(line: Mapping[str, Any]) -> Given:
    logprobs = line["logprobs"]
    if logprobs is None:
        return Given(line["choice"], None, None, line["text"])
    exponents = [math.exp(value - max(logprobs)) for value in logprobs]
    among = [value / sum(exponents) for value in exponents]
    first, second = sorted(among, reverse=True)[:2]
    shares = [math.exp(value) for value in logprobs] if line["mass"] is not None else among
    return Given(line["choice"], tuple(shares), first - second, line["text"])


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An exam that a stage has begun and not finished."""

    stage: str
    exam: str
    subjects: int  # finished


def unfinished(folder: Path, stages: Sequence[str]) -> list[Unfinished]:
    """The exams in `folder` that have answers to some subjects and no result yet."""
    return list(_unfinished(folder, stages))


def _unfinished(folder: Path, stages: Sequence[str]) -> Iterator[Unfinished]:
    try:
        begun = sorted(path for path in (folder / "subjects").iterdir() if path.is_dir())
    except OSError:
        return
    for path in begun:
        stage, _, exam = path.name.partition("-")
        if stage in stages and exam and not (folder / f"{path.name}.json").exists():
            yield Unfinished(stage, exam, sum(1 for file in path.glob("*.json")))
