"""Between the passes: which rows of all sources are dropped, which train, and which validate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus import mixing
from mlx_zh.corpus.duplicates import find_exact, find_near
from mlx_zh.corpus.scan import PART, Scan
from mlx_zh.corpus.sources import DataSource

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near duplicate"
VALIDATES = "also in the validation set"
EXAM = "exam question"
NOT_PICKED = "beyond max_samples"

Indices = npt.NDArray[np.int64]
_LISTED = 3  # duplicates named for each source and reason


@dataclass(frozen=True)
class ChoiceSettings:
    """What counts as the same, and how sources are mixed."""

    exact: bool = True
    near: float | None = 0.75
    mixing: str = "concat"
    validation_fraction: float = 0.0
    seed: int = 42


@dataclass
class Choice:
    """Rows are numbered over all sources: those of the first source, of the second, and so on."""

    train: Indices  # in the order of training; a row of a source with weight 2 stands twice
    validation: Indices
    starts: Indices  # (S + 1,) the number of each source's first row
    dropped: list[Counter[str]]  # for each source: reason -> rows
    examples: list[dict[str, list[str]]] = field(default_factory=list)  # places, and what they repeat
    exam_rows: list[dict[str, Any]] = field(default_factory=list)  # every row dropped for an exam question

    def rendered(self) -> Indices:
        """Every chosen row once, in order."""
        return np.unique(np.concatenate([self.train, self.validation]))


def choose(
    sources: Sequence[DataSource], scans: Sequence[Scan], settings: ChoiceSettings, exam_places: Sequence[str]
) -> Choice:
    """Choose among all rows of all sources; the first of equal rows is kept, validation sources first."""
    starts = np.concatenate([[0], np.cumsum([len(scan.prompts) for scan in scans])])
    choice = Choice(np.empty(0, np.int64), np.empty(0, np.int64), starts, [Counter() for _ in sources])
    choice.examples = [{} for _ in sources]
    exam = np.concatenate([scan.exam for scan in scans])
    _note_exams(choice, scans, exam, exam_places)
    order = sorted(range(len(sources)), key=lambda i: not sources[i].validation)
    kept, repeats = _without_repeats(order, scans, settings, exam < 0)
    for reason, rows, before in repeats:
        _note_repeats(choice, sources, scans, reason, rows, before)
    _split(choice, sources, scans, settings, kept)
    return choice


def _note_exams(
    choice: Choice, scans: Sequence[Scan], exam: npt.NDArray[np.int32], exam_places: Sequence[str]
) -> None:
    for row in np.flatnonzero(exam >= 0).tolist():
        source = int(np.searchsorted(choice.starts, row, side="right")) - 1
        scan, number = scans[source], row - int(choice.starts[source])
        choice.dropped[source][EXAM] += 1
        question, share = exam_places[int(exam[row])], round(float(scan.overlap[number]), 3)
        choice.exam_rows.append({"row": _place(scan, number), "question": question, "overlap": share})


def _without_repeats(
    order: Sequence[int], scans: Sequence[Scan], settings: ChoiceSettings, wanted: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], list[tuple[str, Indices, Indices]]]:
    """Which of the wanted rows are left, and (reason, rows, the rows that they repeat), numbered as sources stand."""
    sizes = np.array([len(scan.prompts) for scan in scans])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    # Looked at in another order: `number` says where each row looked at stands in the order of the sources.
    number = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
    rows = [scans[i].rows for i in order]
    kept = wanted[number]
    repeats = []
    for reason, looked_for in ((DUPLICATE, settings.exact), (NEAR_DUPLICATE, settings.near is not None)):
        if not looked_for:
            continue
        near = settings.near or 1.0
        found = find_exact(rows, kept) if reason == DUPLICATE else find_near(rows, kept, near)
        again = np.flatnonzero(found >= 0)
        kept[again] = False
        repeats.append((reason, number[again], number[found[again]]))
    left = np.zeros(len(number), dtype=bool)
    left[number] = kept
    return left, repeats


def _note_repeats(
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
        said = VALIDATES if leak else reason
        choice.dropped[source][said] += 1
        listed = choice.examples[source].setdefault(said, [])
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
    """Apply `max_samples`, split off validation rows, and mix the others."""
    hashes = np.concatenate([scan.rows.exact[:, 0] for scan in scans])
    prompts = np.concatenate([scan.prompts for scan in scans])
    train, weights, validation = [], [], []
    for i, source in enumerate(sources):
        rows = choice.starts[i] + np.flatnonzero(kept[choice.starts[i] : choice.starts[i + 1]])
        picked = mixing.pick(rows, hashes, source.max_samples, settings.seed)
        if len(picked) < len(rows):
            choice.dropped[i][NOT_PICKED] += len(rows) - len(picked)
        if source.validation:
            validation.append(picked)
            continue
        held = mixing.validates(prompts[picked], settings.validation_fraction)
        validation.append(picked[held])
        train.append(picked[~held])
        weights.append(source.weight)
    choice.train = mixing.mix(train, weights, settings.mixing, hashes, settings.seed)
    choice.validation = np.concatenate([*validation, np.empty(0, dtype=np.int64)])


def _place(scan: Scan, number: int) -> str:
    return scan.items(number // PART)[number % PART].source
