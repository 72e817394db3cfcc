"""What a data file holds, before anything is prepared: its columns, usable rows, and what is wrong with others."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mlx_zh.corpus.columns import FORMATS, Guess, columns_of, given_columns, guess_columns
from mlx_zh.corpus.conversation import Conversation, Document, Labelled
from mlx_zh.corpus.excel_rows import is_workbook, sheet_info
from mlx_zh.corpus.invalid_row import LeftOut
from mlx_zh.corpus.preferences import as_preference
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.row_messages import Row
from mlx_zh.corpus.rows import open_rows, parse_rows
from mlx_zh.corpus.sources import Item

HEAD = 200  # rows from which the columns are guessed
MOST = 100_000  # rows that are looked at
_LISTED = 5  # unusable rows that are named
_HEADER_ENDS = ("?", "？", "。", "！", "!")  # the name of a column does not end so; a question or an answer does
_LONG_NAME = 30  # characters


class Unusable(NamedTuple):
    """A row that cannot be used."""

    place: str
    reason: str
    detail: str


class Head(NamedTuple):
    """The first rows of a file, and how to go on from them."""

    rows: Sequence[Row]
    sheet: str | None  # of a workbook with several sheets
    titles: tuple[str, ...]  # above the names of the columns

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return columns_of(self.rows)

    def examples(self) -> dict[str, str]:
        """For each column the first value that is not empty, as text."""
        examples = {}
        for name in self.columns:
            values = (row[name] for row in self.rows if row.get(name) not in (None, ""))
            examples[name] = " ".join(str(next(values, "")).split())
        return examples

    def without_names(self) -> bool:
        """Whether the first row seems to be a question and its answer, and not the names of the columns."""
        return any(name.endswith(_HEADER_ENDS) or len(name) > _LONG_NAME for name in self.columns)


@dataclass
class Survey:
    """A file's columns and rows. `samples` are three usable rows, chosen at random but always the same."""

    path: Path
    head: Head
    guess: Guess
    max_samples: int | None = None  # rows that are used at most
    rows: int = 0
    usable: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # why rows cannot be used
    unusable: list[Unusable] = field(default_factory=list)  # the first few
    repeated: int = 0  # usable rows that are equal to an earlier one
    samples: list[Item] = field(default_factory=list)
    characters: int = 0  # of the longest usable row
    cut: bool = False  # whether the file has more than MOST rows


def read_head(path: Path, sheet: str | None = None) -> Head:
    """The first rows of a file. Raises DataError if it cannot be read or has no rows with named columns."""
    titles: tuple[str, ...] = ()
    if is_workbook(path):
        about = sheet_info(path, sheet)
        titles, sheet = about.titles, sheet or (None if about.alone else about.name)
    rows = [row for _, row in islice(open_rows(path, sheet=sheet), HEAD) if isinstance(row, dict)]
    return Head(rows, sheet, titles)


def guess_of(head: Head, given: Mapping[str, str] | None) -> Guess | None:
    """How the file is to be read: with the user's mapping, else as guessed."""
    return given_columns(given, head.rows) if given else guess_columns(head.rows)


def survey(path: Path, head: Head, guess: Guess) -> Survey:
    """Read a file's rows as `guess` says. Raises DataError."""
    result = Survey(path, head, guess)
    form: Any = FORMATS[guess.kind][guess.format]
    chooser, seen = random.Random(0), set()
    places: list[tuple[int, Item]] = []
    rows = open_rows(path, guess.columns, head.sheet)
    for place, parsed in parse_rows(rows, form, columns=guess.columns):
        if result.rows == MOST:
            result.cut = True
            break
        result.rows += 1
        if isinstance(parsed, InvalidRow):
            result.reasons[parsed.reason] += 1
            if len(result.unusable) < _LISTED and not isinstance(parsed, LeftOut):
                result.unusable.append(Unusable(place, parsed.reason, str(parsed)))
            continue
        result.usable += 1
        for parsed_item in parsed:
            item = as_item(guess.kind, parsed_item, place)
            texts = texts_of(item)
            key = hash(texts)
            result.repeated += key in seen
            seen.add(key)
            result.characters = max(result.characters, sum(map(len, texts)))
            _keep(places, (result.usable, item), chooser)
    result.samples = [item for _, item in sorted(places, key=lambda place: place[0])]
    return result


def as_item(kind: str, parsed: Any, place: str) -> Item:
    """What a format's parser returns, as a conversation, a document, a pair or a labelled answer."""
    if isinstance(parsed, Document):
        return replace(parsed, source=place)
    if kind == "sft":
        return Conversation(parsed, place)
    if kind == "kto":
        return Labelled(parsed.messages, place, parsed.label)
    return as_preference(parsed, place)


def texts_of(item: Item) -> tuple[str, ...]:
    """All texts of a row."""
    if isinstance(item, Document):
        return (item.text,)
    return tuple("".join(message.texts) for message in item.messages)


def _keep(places: list[tuple[int, Item]], place: tuple[int, Item], chooser: random.Random, count: int = 3) -> None:
    """Keep `count` rows of those given so far, each with the same probability."""
    if len(places) < count:
        places.append(place)
    elif (slot := chooser.randrange(place[0])) < count:
        places[slot] = place
