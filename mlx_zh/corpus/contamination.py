"""Which training rows hold an exam's question: C-Eval and CMMLU must be answered by models that never saw them.

A question is a set of character n-grams; the share of them that a row holds is the overlap. Short stems are looked
for together with their options, since "the capital is ____" alone is no question yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.exam_table import read_table
from mlx_zh.corpus.shingles import Hashes, Letters, Offsets, letters
from mlx_zh.errors import DataError
from mlx_zh.system.storage import written_whole

_LETTERS = "ABCD"
_ALONE, _LONG = 12, 20  # letters from which on a stem is looked for by itself, and from which on only so
_BOILERPLATE = 4  # an n-gram of more questions than this is the exams' own phrase, and proves nothing
_FEWEST = 4  # n-grams that a question must have left to be looked for
_FILTER_BITS = 24


@dataclass(frozen=True)
class Question:
    """An exam's question: its place, and the ways in which it may be written."""

    place: str
    texts: tuple[str, ...]


def read_questions(folder: Path, exam: str) -> list[Question]:
    """Every question of an exam's CSV files (question, A, B, C, D), whichever split they lie in."""
    found = []
    for path in sorted(folder.rglob("*.csv")):
        problems: list[str] = []
        table = read_table(path, problems)
        if table is not None and table.rows and "question" not in table.columns:
            problems.append(f"{path}:1: column question is missing.")
        if table is None or problems:
            raise DataError(f"{problems[0]} An exam's CSV file is in UTF-8 and has the columns question, A, B, C, D.")
        for number, (_, row) in enumerate(table.rows, start=1):
            fields = {name: row[place] for name, place in table.columns.items() if place < len(row)}
            found.append(_question(fields, f"{exam} {path.parent.name}/{path.stem} {number}"))
    if not found:
        raise DataError(f"{folder}: no CSV file with questions of {exam}; it must hold dev/ and val/ or test/")
    return found


def _question(fields: Mapping[str, str], place: str) -> Question:
    stem = fields.get("question", "")
    size = sum(map(str.isalnum, stem))
    if size >= _LONG:
        return Question(place, (stem,))
    options = [fields.get(letter.lower(), "") for letter in _LETTERS]
    marked = [f"{letter} {option}" for letter, option in zip(_LETTERS, options, strict=True)]
    alone = (stem,) if size >= _ALONE else ()
    return Question(place, (*alone, " ".join([stem, *options]), " ".join([stem, *marked])))


@dataclass(frozen=True)
class ExamIndex:
    """The n-grams of all questions, sorted, each with the questions that it is from."""

    ngram: int
    overlap: float  # of a question's n-grams, from which on a row counts as holding it
    places: npt.NDArray[np.str_]  # (Q,)
    question_of: npt.NDArray[np.int32]  # (V,) for each way of writing one
    sizes: npt.NDArray[np.int32]  # (V,) n-grams of each way of writing
    grams: Hashes  # (G,) sorted
    variants: npt.NDArray[np.int32]  # (G,) the way of writing that each n-gram is from

    @classmethod
    def build(cls, questions: Iterable[Question], *, ngram: int, overlap: float) -> ExamIndex:
        """Index questions; those of fewer than four telling n-grams are left out (`checked` counts the others)."""
        questions = list(questions)
        texts = [text for question in questions for text in question.texts]
        owner = np.repeat(np.arange(len(questions)), [len(question.texts) for question in questions])
        grams, offsets = letters(texts).ngrams(ngram)
        variant = np.repeat(np.arange(len(texts)), np.diff(offsets))
        grams, variant = _distinct(grams, variant)
        # Questions that share a phrase: counted once a question, however many ways it is written.
        asked, _ = _distinct(grams, owner[variant])
        phrases, counts = np.unique(asked, return_counts=True)
        telling = counts[np.searchsorted(phrases, grams)] <= _BOILERPLATE
        grams, variant = grams[telling], variant[telling].astype(np.int32)
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
        )

    @property
    def checked(self) -> int:
        """How many questions can be found."""
        return len(np.unique(self.question_of[self.sizes > 0]))

    def save(self, path: Path) -> None:
        """Write the index, whole."""
        with written_whole(path) as file:
            np.savez(
                file,
                settings=np.array([self.ngram, self.overlap]),
                places=self.places,
                question_of=self.question_of,
                sizes=self.sizes,
                grams=self.grams,
                variants=self.variants,
            )

    @classmethod
    def load(cls, path: Path) -> ExamIndex:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as found:
            ngram, overlap = found["settings"]
            names = ("places", "question_of", "sizes", "grams", "variants")
            return cls(int(ngram), float(overlap), *(found[name] for name in names))


class ExamFilter:
    """Looks rows up in an index. A bit table first: nearly all n-grams of nearly all rows are in no question."""

    def __init__(self, index: ExamIndex) -> None:
        self._index = index
        self._bits = np.zeros(1 << (_FILTER_BITS - 3), dtype=np.uint8)
        places = index.grams >> np.uint64(64 - _FILTER_BITS)
        np.bitwise_or.at(self._bits, places >> np.uint64(3), _bit(places))

    def find(self, texts: Letters) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """For each text (N,) the question that it holds most of (-1: none), and how much of it (0 to 1)."""
        grams, offsets = texts.ngrams(self._index.ngram)
        count = len(offsets) - 1
        question = np.full(count, -1, dtype=np.int32)
        share = np.zeros(count, dtype=np.float32)
        texts_of, variants = self._matches(grams, offsets)
        if not len(variants):
            return question, share
        keys, held = np.unique(texts_of * len(self._index.sizes) + variants, return_counts=True)
        text, variant = np.divmod(keys, len(self._index.sizes))
        shares = held / self._index.sizes[variant]
        order = np.argsort(shares, kind="stable")  # the best of each text is written last
        text, variant, shares = text[order], variant[order], shares[order]
        share[text] = shares
        question[text] = np.where(shares >= self._index.overlap, self._index.question_of[variant], -1)
        return question, share

    def _matches(self, grams: Hashes, offsets: Offsets) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(text, way of writing) for each distinct n-gram of a text that is in a question."""
        places = grams >> np.uint64(64 - _FILTER_BITS)
        maybe = np.flatnonzero(self._bits[places >> np.uint64(3)] & _bit(places))
        known = self._index.grams
        first = np.searchsorted(known, grams[maybe], "left")
        last = np.searchsorted(known, grams[maybe], "right")
        text = np.searchsorted(offsets, maybe, "right") - 1
        # An n-gram that a text repeats counts once.
        _, once = np.unique(text * (len(known) + 1) + first, return_index=True)
        text, first, last = text[once], first[once], last[once]
        counts = last - first
        expanded = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
        return np.repeat(text, counts), self._index.variants[expanded].astype(np.int64)


def _distinct(grams: Hashes, owners: npt.NDArray[np.int64]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """Sorted pairs of n-gram and owner, each once."""
    order = np.lexsort((owners, grams))
    grams, owners = grams[order], owners[order]
    new = np.ones(len(grams), dtype=bool)
    new[1:] = (grams[1:] != grams[:-1]) | (owners[1:] != owners[:-1])
    return grams[new], owners[new]


def _bit(places: Hashes) -> npt.NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))
