"""Rows that were left out because they resemble another row or an exam question, with the texts of both.

A corpus keeps a few of them for its reader. The record is bounded: the first rows of each source and reason, in at
most `_PARTS` spool files, with the beginning of each text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from mlx_zh.corpus.choosing import EXAM, Choice, LeftOut
from mlx_zh.corpus.contamination import Question
from mlx_zh.corpus.conversation import Document, Preference
from mlx_zh.corpus.scan import Scan
from mlx_zh.corpus.sources import DataSource, Item

FILE = "left-out.json"
_PARTS = 24  # spool files that are read for the record; reading one takes about 20 ms
_TURNS, _CHARACTERS = 8, 400  # turns of a row, and characters of each


class Said(TypedDict):
    """A turn of a row, or a part of an exam question."""

    role: str  # system, user, assistant, tool, tools, chosen, rejected, text; of a question: question, or a letter
    text: str


class LeftOutRow(TypedDict):
    """A row that was left out, beside what it resembles."""

    reason: str  # as in `SourceReport.dropped`
    source: str
    row: str  # file and row
    said: list[Said]
    like: str  # file and row of the row that was kept, or the place of the question
    like_said: list[Said]
    overlap: float | None  # share of the question's n-grams that the row holds; None beside another row


def record(
    choice: Choice, sources: Sequence[DataSource], scans: Sequence[Scan], questions: Sequence[Question]
) -> list[LeftOutRow]:
    """The rows of `choice.left_out` with their texts, in the order of their sources."""
    chosen = _within(choice, scans, choice.left_out)
    wanted = {row for left in chosen for row in (left.row, left.like if left.reason != EXAM else left.row)}
    items = _items(choice, scans, wanted)
    rows: list[LeftOutRow] = []
    for left in chosen:
        item = items[left.row]
        source = int(np.searchsorted(choice.starts, left.row, side="right")) - 1
        if left.reason == EXAM:
            question = questions[left.like]
            like, said = question.place, _asked(question)
            overlap = round(float(scans[source].overlap[left.row - int(choice.starts[source])]), 3)
        else:
            like, said, overlap = items[left.like].source, _said(items[left.like]), None
        about: LeftOutRow = {
            "reason": left.reason,
            "source": sources[source].name,
            "row": item.source,
            "said": _said(item),
            "like": like,
            "like_said": said,
            "overlap": overlap,
        }
        rows.append(about)
    return rows


def _within(choice: Choice, scans: Sequence[Scan], left_out: Iterable[LeftOut]) -> list[LeftOut]:
    """The rows whose texts lie in the first `_PARTS` spool files that are needed."""
    parts: set[tuple[int, int]] = set()
    chosen = []
    for left in left_out:
        rows = [left.row] if left.reason == EXAM else [left.row, left.like]
        needed = {_part(choice, scans, row) for row in rows}
        if len(parts | needed) <= _PARTS:
            parts |= needed
            chosen.append(left)
    return chosen


def _part(choice: Choice, scans: Sequence[Scan], row: int) -> tuple[int, int]:
    """The source and the spool file that hold a row."""
    source = int(np.searchsorted(choice.starts, row, side="right")) - 1
    return source, int(scans[source].parts_of(row - int(choice.starts[source])))


def _items(choice: Choice, scans: Sequence[Scan], rows: Iterable[int]) -> Mapping[int, Item]:
    """The items of these rows; each spool file is read once."""
    items: dict[int, Item] = {}
    opened: tuple[int, int] | None = None
    spooled: list[Item] = []
    for row in sorted(rows):
        place = _part(choice, scans, row)
        if place != opened:
            opened, spooled = place, scans[place[0]].items(place[1])
        source, part = place
        items[row] = spooled[row - int(choice.starts[source]) - int(scans[source].parts[part])]
    return items


def _said(item: Item) -> list[Said]:
    if isinstance(item, Document):
        return _cut([("text", item.text)])
    turns = item.prompt if isinstance(item, Preference) else item.messages
    said = [(m.role, "\n".join(text for text in m.texts if text)) for m in turns]
    if isinstance(item, Preference):
        said += [("chosen", item.chosen + item.chosen_calls), ("rejected", item.rejected + item.rejected_calls)]
    return _cut(said)


def _asked(question: Question) -> list[Said]:
    return _cut([("question", question.asked), *zip("ABCD", question.options, strict=False)])


def _cut(said: Sequence[tuple[str, str]]) -> list[Said]:
    """The first and the last turns, each cut: a long row says at its end what it taught."""
    turns = [*said[: _TURNS - 1], said[-1]] if len(said) > _TURNS else said
    return [{"role": role, "text": _shortened(text)} for role, text in turns]


def _shortened(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + "…"
