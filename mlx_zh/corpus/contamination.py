"""Which training rows contain a question of C-Eval or CMMLU. A model that saw the questions cannot be graded by them.

A question is a set of character n-grams. The overlap of a row is the share of these n-grams that the row contains. A
short stem is searched together with its options, because "the capital is ____" alone occurs in many texts.

A share of a few n-grams is one common sentence. So a row whose overlap is large enough contains the question only if

- it has `_SURE` n-grams of the stem, and `_SURE_SHARE` of them: the stem is long and stands there nearly whole; or
- it has two of the options near the stem, or all of them one after the other; or
- the right answer stands at most `_NEARBY` letters behind the stem.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.exam_table import exam_files, read_table
from mlx_zh.corpus.shingles import Hashes, Letters, Offsets, letters
from mlx_zh.errors import DataError
from mlx_zh.system.storage import written_whole

_LETTERS = "ABCD"
_ALONE, _LONG = 12, 20  # a stem of _ALONE letters is also searched without its options; one of _LONG only without
_BOILERPLATE = 4  # an n-gram that occurs in more questions than this is a stock phrase and is ignored
_FEWEST = 4  # a question with fewer n-grams than this is not searched for
_SURE, _SURE_SHARE = 16, 0.6  # 16 n-grams of ten letters are 25 letters
_NEARBY, _OPTIONS_WITHIN = 40, 200  # letters
_SHORT_OPTION = 2  # letters; a shorter option occurs everywhere
_HALVED_OPTION = 12  # an option of so many letters is there if one half of it is: a letter may have been changed
_FILTER_BITS = 24


@dataclass(frozen=True)
class Question:
    """An exam's question: where it is, as "exam split/subject number", and the variants of its text to search for."""

    place: str
    texts: tuple[str, ...]
    stem: bool = False  # whether the first of the texts is the stem without options
    options: tuple[str, ...] = ()
    answer: int | None = None  # which of the options is right; None where it is not known
    asked: str = field(default="", compare=False)  # the stem as it is written


def read_questions(folder: Path, exam: str) -> list[Question]:
    """The questions of all CSV files under `folder`, with the columns question, A, B, C, D, from every split.

    Raises DataError if a file cannot be read or there is no question.
    """
    questions = []
    for path in exam_files(folder):
        problems: list[str] = []
        table = read_table(path, problems)
        if table is not None and table.rows and "question" not in table.columns:
            problems.append(f"{path}:1: column question is missing.")
        if table is None or problems:
            raise DataError(f"{problems[0]} An exam's CSV file is in UTF-8 and has the columns question, A, B, C, D.")
        for number, (_, row) in enumerate(table.rows, start=1):
            fields = {name: row[column] for name, column in table.columns.items() if column < len(row)}
            questions.append(_question(fields, f"{exam} {path.parent.name}/{path.stem} {number}"))
    if not questions:
        raise DataError(
            f"{folder}: no CSV file with questions of {exam}; the folder must contain dev/ and val/ or test/"
        )
    return questions


def _question(fields: Mapping[str, str], place: str) -> Question:
    stem = fields.get("question", "")
    size = sum(map(str.isalnum, stem))
    options = tuple(fields.get(letter.lower(), "") for letter in _LETTERS)
    letter = fields.get("answer", "").strip().upper()
    answer = _LETTERS.index(letter) if letter and letter in _LETTERS else None
    if size >= _LONG:
        return Question(place, (stem,), True, options, answer, stem)
    marked = [f"{letter} {option}" for letter, option in zip(_LETTERS, options, strict=True)]
    alone = (stem,) if size >= _ALONE else ()
    texts = (*alone, " ".join([stem, *options]), " ".join([stem, *marked]))
    return Question(place, texts, bool(alone), options, answer, stem)


@dataclass(frozen=True)
class ExamIndex:
    """The n-grams of Q questions in V variants, sorted, each with the variant that it is from."""

    ngram: int
    overlap: float  # a row that contains at least this share of a question's n-grams contains the question
    places: npt.NDArray[np.str_]  # (Q,)
    question_of: npt.NDArray[np.int32]  # (V,) the question that each variant writes
    sizes: npt.NDArray[np.int32]  # (V,) n-grams of each variant
    grams: Hashes  # (G,) sorted
    variants: npt.NDArray[np.int32]  # (G,) the variant that each n-gram is from
    stems: npt.NDArray[np.bool_]  # (V,) whether the variant is a stem without options
    option_letters: Hashes  # the letters of all options of all questions
    option_ends: Offsets  # (4 Q + 1,) zero, then the end of each option
    answers: npt.NDArray[np.int8]  # (Q,) which option is right, or -1

    @classmethod
    def build(cls, questions: Iterable[Question], *, ngram: int, overlap: float) -> ExamIndex:
        """Index the questions that have at least four n-grams of their own; `checked` counts these."""
        questions = list(questions)
        texts = [text for question in questions for text in question.texts]
        options = letters([text for q in questions for text in (*q.options, *[""] * len(_LETTERS))[: len(_LETTERS)]])
        owner = np.repeat(np.arange(len(questions)), [len(question.texts) for question in questions])
        grams, offsets = letters(texts).ngrams(ngram)
        variant = np.repeat(np.arange(len(texts)), np.diff(offsets))
        grams, variant = _distinct(grams, variant)
        # In how many questions each n-gram occurs; the variants of one question count once.
        once_a_question, _ = _distinct(grams, owner[variant])
        unique, counts = np.unique(once_a_question, return_counts=True)
        specific = counts[np.searchsorted(unique, grams)] <= _BOILERPLATE
        grams, variant = grams[specific], variant[specific].astype(np.int32)
        sizes = np.bincount(variant, minlength=len(texts))
        enough = sizes[variant] >= _FEWEST
        return cls(
            ngram,
            overlap,
            np.array([question.place for question in questions], dtype=np.str_),
            owner.astype(np.int32),
            np.where(sizes >= _FEWEST, sizes, 0).astype(np.int32),
            grams[enough],
            variant[enough].astype(np.int32),
            np.array([q.stem and n == 0 for q in questions for n in range(len(q.texts))], dtype=bool),
            options.hashes,
            options.ends,
            np.array([-1 if q.answer is None else q.answer for q in questions], dtype=np.int8),
        )

    @property
    def checked(self) -> int:
        """How many questions are searched for."""
        return len(np.unique(self.question_of[self.sizes > 0]))

    def save(self, path: Path) -> None:
        """Write the index; the file appears only when it is complete."""
        with written_whole(path) as file:
            np.savez(
                file,
                settings=np.array([self.ngram, self.overlap]),
                places=self.places,
                question_of=self.question_of,
                sizes=self.sizes,
                grams=self.grams,
                variants=self.variants,
                stems=self.stems,
                option_letters=self.option_letters,
                option_ends=self.option_ends,
                answers=self.answers,
            )

    @classmethod
    def load(cls, path: Path) -> ExamIndex:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            ngram, overlap = arrays["settings"]
            names = ["places", "question_of", "sizes", "grams", "variants", "stems"]
            names += ["option_letters", "option_ends", "answers"]
            return cls(int(ngram), float(overlap), *(arrays[name] for name in names))


class ExamFilter:
    """Searches rows for the questions of an index.

    Nearly all n-grams of a row are in no question. A table of bits rules them out before the binary search. The few
    rows with enough n-grams of a question are then looked at one by one, see the head of this file.
    """

    def __init__(self, index: ExamIndex) -> None:
        self._index = index
        self._bits = np.zeros(1 << (_FILTER_BITS - 3), dtype=np.uint8)
        slots = index.grams >> np.uint64(64 - _FILTER_BITS)
        np.bitwise_or.at(self._bits, slots >> np.uint64(3), _bit(slots))

    def find(self, texts: Letters) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """For each text (N,) the question that it contains, or -1, and the largest overlap with a question.

        Of several questions it is the one with the largest overlap.
        """
        grams, offsets = texts.ngrams(self._index.ngram)
        count = len(offsets) - 1
        question = np.full(count, -1, dtype=np.int32)
        share = np.zeros(count, dtype=np.float32)
        texts_of, variants, positions = self._matches(grams, offsets)
        if not len(variants):
            return question, share
        pairs = texts_of * len(self._index.sizes) + variants
        found, of_pair, matched = np.unique(pairs, return_inverse=True, return_counts=True)
        last = np.zeros(len(found), dtype=np.int64)
        np.maximum.at(last, of_pair, positions)
        text, variant = np.divmod(found, len(self._index.sizes))
        shares = matched / self._index.sizes[variant]
        np.maximum.at(share, text, shares.astype(np.float32))
        enough = np.flatnonzero(shares >= self._index.overlap)
        for pair in enough[np.argsort(-shares[enough], kind="stable")].tolist():
            row = text[pair]
            if question[row] < 0:
                row_letters = texts.hashes[texts.ends[row] : texts.ends[row + 1]]
                behind = int(last[pair]) + self._index.ngram
                if self._holds(row_letters, int(variant[pair]), int(matched[pair]), float(shares[pair]), behind):
                    question[row] = self._index.question_of[variant[pair]]
        return question, share

    def _holds(self, row: Hashes, variant: int, matched: int, share: float, behind: int) -> bool:
        """Whether a row (C,) that has `matched` n-grams of a question's variant, the last one before the letter
        `behind`, contains the question."""
        stem = bool(self._index.stems[variant])
        if stem and matched >= _SURE and share >= _SURE_SHARE:
            return True
        question = int(self._index.question_of[variant])
        ends = self._index.option_ends[question * len(_LETTERS) : (question + 1) * len(_LETTERS) + 1]
        options = [self._index.option_letters[a:b] for a, b in pairwise(ends.tolist())]
        span = _OPTIONS_WITHIN + sum(map(len, options))
        around = row[max(0, behind - span) : behind + span]
        if sum(_has_option(around, option) for option in options) > 1 or _lists(around, options):
            return True
        answer = int(self._index.answers[question])
        return stem and answer >= 0 and _has_option(row[behind : behind + _NEARBY], options[answer])

    def _matches(
        self, grams: Hashes, offsets: Offsets
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The pairs (text, variant) for each distinct n-gram of a text that is in that variant of a question, and
        where the n-gram begins in the text."""
        slots = grams >> np.uint64(64 - _FILTER_BITS)
        maybe = np.flatnonzero(self._bits[slots >> np.uint64(3)] & _bit(slots))
        indexed = self._index.grams
        first = np.searchsorted(indexed, grams[maybe], "left")
        last = np.searchsorted(indexed, grams[maybe], "right")
        text = np.searchsorted(offsets, maybe, "right") - 1
        # An n-gram that occurs several times in a text counts once.
        _, once = np.unique(text * (len(indexed) + 1) + first, return_index=True)
        text, first, last, position = text[once], first[once], last[once], maybe[once] - offsets[text[once]]
        counts = last - first
        expanded = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
        return np.repeat(text, counts), self._index.variants[expanded].astype(np.int64), np.repeat(position, counts)


def _has_option(row: Hashes, option: Hashes) -> bool:
    """Whether a row has an option's letters, or one half of those of a long option."""
    if len(option) < _SHORT_OPTION:
        return False
    half = len(option) // 2
    parts = [option[:half], option[half:]] if len(option) >= _HALVED_OPTION else [option]
    return any(_has(row, part) for part in parts)


def _lists(row: Hashes, options: Sequence[Hashes]) -> bool:
    """Whether a row has all options one after the other, with or without their letters."""
    if not all(map(len, options)):
        return False
    marks = letters([*_LETTERS]).hashes
    marked = np.concatenate([part for n, option in enumerate(options) for part in (marks[n : n + 1], option)])
    return _has(row, marked) or _has(row, np.concatenate(options))


def _has(row: Hashes, part: Hashes) -> bool:
    """Whether the letters `part` stand in the row one after the other."""
    if len(part) > len(row):
        return False
    text, sought = row.tobytes(), part.tobytes()
    place = text.find(sought)
    while place >= 0 and place % part.itemsize:
        place = text.find(sought, place + 1)
    return place >= 0


def _distinct(grams: Hashes, owners: npt.NDArray[np.int64]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """The pairs (n-gram, owner), sorted, each once."""
    order = np.lexsort((owners, grams))
    grams, owners = grams[order], owners[order]
    new = np.ones(len(grams), dtype=bool)
    new[1:] = (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])
    return grams[new], owners[new]


def _bit(slots: Hashes) -> npt.NDArray[np.uint8]:
    """The bit of each slot inside its byte of the table."""
    return np.left_shift(np.uint8(1), (slots & np.uint64(7)).astype(np.uint8))
