"""Between the two passes: which rows of all sources are dropped, which are for training, which for validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus import mixing
from mlx_zh.corpus.duplicates import find_exact, find_near
from mlx_zh.corpus.scan import Scan
from mlx_zh.corpus.sources import DataSource, Item

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near duplicate"
IN_VALIDATION = "also in the validation set"
EXAM = "exam question"
NOT_PICKED = "beyond max_samples"
NOT_SELECTED = "not selected"

Indices = npt.NDArray[np.int64]
_LISTED = 3  # duplicates listed for each source and reason
_RECORDED = 40  # rows of each source and reason that are recorded with what they resemble


class LeftOut(NamedTuple):
    """A row that was left out for what it resembles."""

    reason: str
    row: int  # its number through all sources
    like: int  # the number of the row that was kept; of an exam question its index


@dataclass(frozen=True)
class ChoiceSettings:
    """What counts as a duplicate, and how sources are mixed."""

    exact: bool = True  # drop rows that repeat an earlier row
    near: float | None = 0.75  # drop rows with at least this Jaccard similarity to an earlier row; None: keep them
    mixing: str = "concat"  # concat or interleave
    validation_fraction: float = 0.0
    seed: int = 42


class ExamRow(TypedDict):
    """A row that was dropped because it holds an exam question."""

    row: str  # file and row
    question: str  # exam, file and line of the question
    overlap: float  # share of the question's n-grams that the row holds


@dataclass
class Choice:
    """The chosen rows. Row numbers count through all sources: first the rows of the first source, and so on."""

    train: Indices  # in training order; a row of a source with weight 2 occurs twice
    validation: Indices
    starts: Indices  # (S + 1,) the number of each source's first row
    dropped: list[Counter[str]]  # for each source: reason -> rows
    examples: list[dict[str, list[str]]] = field(default_factory=list)  # for each source: reason -> "A repeats B"
    exam_rows: list[ExamRow] = field(default_factory=list)  # the rows dropped for an exam question
    left_out: list[LeftOut] = field(default_factory=list)  # the first rows of each source and reason
    picked: dict[int, Indices] = field(
        default_factory=dict
    )  # the training rows of each source, before they are mixed

    tried: int = 0  # rows that were to be rendered; with a selection, more than were chosen

    def mix(self, weights: Sequence[float], scans: Sequence[Scan], settings: ChoiceSettings) -> None:
        """Set `train` to the rows of `picked`, mixed with the weights of their sources."""
        hashes = np.concatenate([scan.rows.exact[:, 0] for scan in scans])
        self.train = mixing.mix(list(self.picked.values()), weights, settings.mixing, hashes, settings.seed)

    def rendered(self) -> Indices:
        """The numbers of all chosen rows, each once, in rising order."""
        return np.unique(np.concatenate([self.train, self.validation]))

    def candidates(self) -> Indices:
        """The numbers of all rows that could be chosen, in rising order: also those that mixing left out."""
        return np.unique(np.concatenate([*self.picked.values(), self.validation]))


def choose(
    sources: Sequence[DataSource], scans: Sequence[Scan], settings: ChoiceSettings, exam_places: Sequence[str]
) -> Choice:
    """Choose among all rows of all sources.

    Of equal rows the first is kept. Rows of validation sources count as earlier than all others, so a training row
    that repeats a validation row is dropped. `exam_places` names the questions that `Scan.exam` refers to.
    """
    starts = np.concatenate([[0], np.cumsum([len(scan.prompts) for scan in scans])])
    choice = Choice(np.empty(0, np.int64), np.empty(0, np.int64), starts, [Counter() for _ in sources])
    choice.examples = [{} for _ in sources]
    exam = np.concatenate([scan.exam for scan in scans])
    _record_exam_rows(choice, scans, exam, exam_places)
    order = sorted(range(len(sources)), key=lambda i: not sources[i].validation)
    kept, repeats = _without_repeats(order, scans, settings, exam < 0)
    for reason, rows, before in repeats:
        _record_repeats(choice, sources, scans, reason, rows, before)
    _split(choice, sources, scans, settings, kept)
    return choice


def _record_exam_rows(
    choice: Choice, scans: Sequence[Scan], exam: npt.NDArray[np.int32], exam_places: Sequence[str]
) -> None:
    opened: tuple[int, int] | None = None
    items: list[Item] = []
    for row in np.flatnonzero(exam >= 0).tolist():
        source = int(np.searchsorted(choice.starts, row, side="right")) - 1
        scan, number = scans[source], row - int(choice.starts[source])
        part = int(scan.parts_of(number))
        if opened != (source, part):
            opened, items = (source, part), scan.items(part)
        place = items[number - int(scan.parts[part])].source
        choice.dropped[source][EXAM] += 1
        if choice.dropped[source][EXAM] <= _RECORDED:
            choice.left_out.append(LeftOut(EXAM, row, int(exam[row])))
        question, share = exam_places[int(exam[row])], round(float(scan.overlap[number]), 3)
        choice.exam_rows.append({"row": place, "question": question, "overlap": share})


def _without_repeats(
    order: Sequence[int], scans: Sequence[Scan], settings: ChoiceSettings, wanted: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], list[tuple[str, Indices, Indices]]]:
    """Which of the `wanted` rows (N,) are kept, and for each reason (reason, dropped rows, the rows they repeat).

    Sources are searched in `order`, because the first of equal rows is kept. Results use the sources' own order.
    """
    sizes = np.array([len(scan.prompts) for scan in scans])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    # The row number, in the sources' own order, of each row in search order.
    number = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
    rows = [scans[i].rows for i in order]
    kept = wanted[number]
    repeats = []
    for reason, enabled in ((DUPLICATE, settings.exact), (NEAR_DUPLICATE, settings.near is not None)):
        if not enabled:
            continue
        near = settings.near or 1.0
        earlier = find_exact(rows, kept) if reason == DUPLICATE else find_near(rows, kept, near)
        repeated = np.flatnonzero(earlier >= 0)
        kept[repeated] = False
        repeats.append((reason, number[repeated], number[earlier[repeated]]))
    kept_by_number = np.zeros(len(number), dtype=bool)
    kept_by_number[number] = kept
    return kept_by_number, repeats


def _record_repeats(
    choice: Choice,
    sources: Sequence[DataSource],
    scans: Sequence[Scan],
    reason: str,
    rows: Indices,
    before: Indices,
) -> None:
    source_of = np.searchsorted(choice.starts, rows, side="right") - 1
    first_of = np.searchsorted(choice.starts, before, side="right") - 1
    for row, source, first, of in zip(
        rows.tolist(), source_of.tolist(), before.tolist(), first_of.tolist(), strict=True
    ):
        leak = sources[of].validation and not sources[source].validation
        recorded = IN_VALIDATION if leak else reason
        choice.dropped[source][recorded] += 1
        if choice.dropped[source][recorded] <= _RECORDED:
            choice.left_out.append(LeftOut(recorded, row, first))
        listed = choice.examples[source].setdefault(recorded, [])
        if len(listed) < _LISTED:
            here = _place(scans[source], row - int(choice.starts[source]))
            listed.append(f"{here} repeats {_place(scans[of], first - int(choice.starts[of]))}")


def _split(
    choice: Choice,
    sources: Sequence[DataSource],
    scans: Sequence[Scan],
    settings: ChoiceSettings,
    kept: npt.NDArray[np.bool_],
) -> None:
    """Apply `max_samples`, split off the validation rows, and mix the training rows."""
    hashes = np.concatenate([scan.rows.exact[:, 0] for scan in scans])
    prompts = np.concatenate([scan.prompts for scan in scans])
    validation = []
    for i, source in enumerate(sources):
        rows = choice.starts[i] + np.flatnonzero(kept[choice.starts[i] : choice.starts[i + 1]])
        picked = mixing.pick(rows, hashes, source.max_samples, settings.seed)
        if len(picked) < len(rows):
            choice.dropped[i][NOT_PICKED] += len(rows) - len(picked)
        if source.validation:
            validation.append(picked)
            continue
        held_out = mixing.is_validation(prompts[picked], settings.validation_fraction)
        validation.append(picked[held_out])
        choice.picked[i] = picked[~held_out]
    choice.mix([sources[i].weight for i in choice.picked], scans, settings)
    choice.validation = np.concatenate([*validation, np.empty(0, dtype=np.int64)])


def _place(scan: Scan, number: int) -> str:
    """Where a source's row number `number` stands: "file:line"."""
    part = int(scan.parts_of(number))
    return scan.items(part)[number - int(scan.parts[part])].source
