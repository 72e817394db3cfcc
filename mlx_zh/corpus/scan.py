"""The first pass over a source: read, validate and normalize its rows, and hash them for the choice among all rows.

The rows are written to disk in parts, so that the second pass (rendering) need not read the data files again. As a
program, this scans the sources of a task file: `python -m mlx_zh.corpus.scan TASK.json`. Memory grows by about 50
bytes a row.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.contamination import ExamFilter, ExamIndex
from mlx_zh.corpus.conversation import Conversation, Document, Labelled, Message, Preference
from mlx_zh.corpus.duplicates import SIDE_LETTERS, SIDES, Rows, sketch
from mlx_zh.corpus.normalize import normalize, simplifier
from mlx_zh.corpus.quality.rules import Quality, RuleReport
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.shingles import Letters, letters
from mlx_zh.corpus.sources import DataSource, Item
from mlx_zh.errors import MlxZhError
from mlx_zh.system.digests import damage, digests_of
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import load_json, parse_json
from mlx_zh.system.storage import make_folder, storage_errors, sync_tree, write_exact_json, written_whole

PART = 4096  # rows of one spool file at most
_BATCH = 512  # rows whose n-grams are computed at once, at most
_PART_CHARACTERS, _BATCH_CHARACTERS = 1 << 22, 1 << 19  # with these, or more, a part or a batch ends earlier
_DIGITS = re.compile(r"\d+")
_REPORTED = 2000  # rows between two reports of progress

Progress = Callable[[str, int], None]  # called with a source's name and the number of rows read so far


@dataclass(frozen=True)
class ScanSettings:
    """What the first pass does to every row."""

    kind: str
    on_invalid: str = "error"
    normalize: bool = True
    simplify: bool = False
    near_ngram: int | None = 3  # letters of an n-gram; None: near duplicates are not searched for
    exam_index: str | None = None  # path of a file that ExamIndex.save wrote
    quality: dict[str, str] = field(default_factory=dict)  # quality rule -> what it does; others take a sample


@dataclass(frozen=True)
class Scan:
    """The result of the first pass for a source with N usable rows; `report` counts the others too."""

    folder: Path
    report: LoadReport
    rows: Rows
    prompts: npt.NDArray[np.uint64]  # (N,) hash of the first question
    exam: npt.NDArray[np.int32]  # (N,) index of the exam question that the row contains, or -1
    overlap: npt.NDArray[np.float32]  # (N,) largest share of a question's n-grams that the row contains
    parts: npt.NDArray[np.int64]  # (P,) number of the first row of each spool file
    quality: dict[str, RuleReport]  # what each quality rule counted

    def parts_of(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The number of the spool file that holds each of these rows."""
        return np.searchsorted(self.parts, rows, side="right") - 1

    def items(self, part: int) -> list[Item]:
        """The rows of spool file number `part`: those from number parts[part] on."""
        text = (self.folder / f"part-{part:05d}.spool").read_text(encoding="utf-8")
        return [_item(row) for row in parse_json(text)]


def scan(source: DataSource, settings: ScanSettings, folder: Path, progress: Progress) -> None:
    """Scan a source into `folder`, unless an earlier run has finished it. Raises DataError, StorageError.

    `scan.json` comes last. It has the digests of the other files, so a scan that a power cut spoilt is done again.
    """
    if _is_whole(folder):
        return
    with storage_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
    report = LoadReport()
    quality = Quality(settings.quality)
    with storage_errors(folder), ExitStack() as stack:
        writer = _ScanWriter(folder, source, settings, stack)
        items = quality.kept(_normalized_items(source, settings, report), report)
        for number, item in enumerate(items, start=1):
            writer.add(item)
            if number % _REPORTED == 0:
                progress(source.name, report.rows)
        writer.flush()
    with written_whole(folder / "scan.npz") as file:
        columns: dict[str, Any] = {name: np.concatenate(parts) for name, parts in writer.columns.items()}
        np.savez(file, **columns)
    progress(source.name, report.rows)
    with storage_errors(folder):
        sync_tree(folder)
        digests = digests_of(folder, sorted(os.listdir(folder)))
    about = {"report": asdict(report), "quality": quality.report(), "digests": digests}
    write_exact_json(folder / "scan.json", about)


def _is_whole(folder: Path) -> bool:
    """Whether `folder` has a finished scan whose files are what was written."""
    try:
        about = load_json(folder / "scan.json")
        about["quality"]
        return fits(about["report"], LoadReport) and damage(folder, about["digests"]) is None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def open_scan(folder: Path, near: bool) -> Scan:
    """The finished scan in `folder`; `near` says whether it has signatures for near duplicates."""
    about = load_json(folder / "scan.json")
    report = LoadReport(**about["report"])
    with np.load(folder / "scan.npz") as file:
        columns = {name: file[name] for name in file.files}
    signatures, bands = folder / "signatures.u16", folder / "bands.u32"
    rows = Rows(columns["exact"], columns["numbers"], None, None)
    if near:
        rows = replace(
            rows, signatures=signatures, bands=bands, letters=folder / "letters.u16", sizes=columns["sizes"]
        )
    arrays = {name: columns[name] for name in ("prompts", "exam", "overlap", "parts")}
    return Scan(folder, report, rows, quality=about["quality"], **arrays)


def _normalized_items(source: DataSource, settings: ScanSettings, report: LoadReport) -> Iterator[Item]:
    simplify = simplifier() if settings.simplify else None

    def both(text: str) -> str:
        return normalize(text) if simplify is None else simplify(normalize(text))

    return source.items(settings.kind, settings.on_invalid, report, both if settings.normalize else simplify)


class _ScanWriter:
    """Hashes rows in batches, and writes the spool, signature and band files on the way."""

    def __init__(self, folder: Path, source: DataSource, settings: ScanSettings, stack: ExitStack) -> None:
        self.columns: dict[str, list[npt.NDArray[Any]]] = {
            "exact": [np.empty((0, 2), np.uint64)],
            "numbers": [np.empty(0, np.uint64)],
            "sizes": [np.empty((0, SIDES), np.uint16)],
            "prompts": [np.empty(0, np.uint64)],
            "exam": [np.empty(0, np.int32)],
            "overlap": [np.empty(0, np.float32)],
            "parts": [np.empty(0, np.int64)],
        }
        self._folder, self._parts, self._rows = folder, 0, 0
        self._ngram = settings.near_ngram if source.near_duplicates else None
        self._exams = ExamFilter(ExamIndex.load(Path(settings.exam_index))) if settings.exam_index else None
        self._batch: list[Item] = []
        self._spool: list[Any] = []
        self._batch_characters = self._spool_characters = 0
        self._opening = ""  # the first passage of the document that is being read
        self._files: list[BinaryIO] = []
        if self._ngram is not None:
            for name in ("signatures.u16", "bands.u32", "letters.u16"):
                self._files.append(stack.enter_context((folder / name).open("wb")))

    def add(self, item: Item) -> None:
        """Add one row."""
        self._batch.append(item)
        self._spool.append(_row(item))
        characters = characters_of(item)
        self._batch_characters += characters
        self._spool_characters += characters
        if len(self._batch) >= _BATCH or self._batch_characters >= _BATCH_CHARACTERS:
            self._hash_batch()
        if len(self._spool) >= PART or self._spool_characters >= _PART_CHARACTERS:
            self._write_spool()

    def flush(self) -> None:
        """Hash and write the rows that are still in memory."""
        if self._batch:
            self._hash_batch()
        if self._spool:
            self._write_spool()

    def _hash_batch(self) -> None:
        texts = [_texts(item) for item in self._batch]
        digests = [hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).digest() for parts in texts]
        self.columns["exact"].append(np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2))
        self.columns["prompts"].append(_hashes(["".join(self._subject(item).split()) for item in self._batch]))
        self.columns["numbers"].append(_hashes([_numbers(item) for item in self._batch]))
        if self._ngram is not None or self._exams is not None:
            sides = letters(["".join(side) for item in self._batch for side in sides_of(item)])
            batch_letters = Letters(sides.hashes, sides.ends[::SIDES])
            if self._ngram is not None:
                self._write_sides(sides)
                signatures, bands = sketch(batch_letters, self._ngram)
                self._files[0].write(signatures.tobytes())
                self._files[1].write(bands.tobytes())
            if self._exams is not None:
                exam, overlap = self._exams.find(batch_letters)
                self.columns["exam"].append(exam)
                self.columns["overlap"].append(overlap)
        if self._exams is None:
            self.columns["exam"].append(np.full(len(texts), -1, np.int32))
            self.columns["overlap"].append(np.zeros(len(texts), np.float32))
        self._batch, self._batch_characters = [], 0

    def _subject(self, item: Item) -> str:
        """The text that decides on the split: the first question, or the first passage of a document."""
        if not isinstance(item, Document):
            return next(message.content for message in _prompt(item) if message.role == "user")
        if item.begins:
            self._opening = item.text
        return self._opening

    def _write_sides(self, sides: Letters) -> None:
        """Write the first letters of each side."""
        sizes = np.diff(sides.ends)
        inside = np.arange(len(sides.hashes)) - np.repeat(sides.ends[:-1], sizes) < SIDE_LETTERS
        self._files[2].write((sides.hashes[inside] >> np.uint64(48)).astype(np.uint16).tobytes())
        self.columns["sizes"].append(np.minimum(sizes, SIDE_LETTERS).astype(np.uint16).reshape(-1, SIDES))

    def _write_spool(self) -> None:
        path = self._folder / f"part-{self._parts:05d}.spool"
        with storage_errors(path):
            path.write_text(json.dumps(self._spool, ensure_ascii=False), encoding="utf-8")
        self.columns["parts"].append(np.array([self._rows], np.int64))
        self._parts += 1
        self._rows += len(self._spool)
        self._spool, self._spool_characters = [], 0


def _hashes(texts: list[str]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(
        b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts), dtype=np.uint64
    )


def _prompt(item: Item) -> tuple[Message, ...]:
    if isinstance(item, Document):
        return ()
    return item.messages if isinstance(item, Conversation) else item.prompt


def _numbers(item: Item) -> str:
    """The numbers in the questions: rows with different ones are no near duplicates, nor a good and a bad answer."""
    asked = " ".join(message.content for message in _prompt(item) if message.role == "user")
    numbers = ",".join(_DIGITS.findall(asked))
    return f"{item.label} {numbers}" if isinstance(item, Labelled) else numbers


def _texts(item: Item) -> list[str]:
    """The texts of a row without the system message: rows that differ only in that are duplicates."""
    if isinstance(item, Document):
        return [item.text.strip()]
    texts = [_text(message) for message in _prompt(item) if message.role != "system"]
    if isinstance(item, Conversation):
        return [*texts, f"\x1e{item.label}"] if isinstance(item, Labelled) else texts
    return [*texts, item.chosen.strip() + item.chosen_calls, item.rejected.strip() + item.rejected_calls]


def _text(message: Message) -> str:
    text = message.content.strip() if message.trained else f"\x1e{message.content.strip()}"
    return f"{text}\x1d{message.reasoning}{message.calls}" if message.reasoning else text + message.calls


def characters_of(item: Item) -> int:
    """The characters of all texts of a row."""
    if isinstance(item, Document):
        return len(item.text)
    length = sum(sum(map(len, message.texts)) for message in _prompt(item))
    if isinstance(item, Conversation):
        return length
    return length + sum(map(len, (item.chosen, item.rejected, item.chosen_calls, item.rejected_calls)))


def sides_of(item: Item) -> tuple[list[str], list[str]]:
    """What the user says, and everything else but tools and the system message: the sides of a near duplicate."""
    if isinstance(item, Document):
        return [], [item.text]
    asked = [message.content for message in _prompt(item) if message.role == "user"]
    said = ["".join(m.texts) for m in _prompt(item) if m.role not in ("user", "system", "tools")]
    if isinstance(item, Conversation):
        return asked, said
    return asked, [*said, item.chosen, item.chosen_calls, item.rejected, item.rejected_calls]


def _row(item: Item) -> tuple[Any, ...]:
    """The item as values that JSON can hold; `_item` is the inverse."""
    if isinstance(item, Document):
        return item.source, item.text, item.begins, item.ends
    turns = tuple(map(_turn, _prompt(item)))
    if isinstance(item, Labelled):
        return item.source, turns, item.label
    if isinstance(item, Conversation):
        return item.source, turns
    calls = (item.chosen_calls, item.rejected_calls) if item.chosen_calls or item.rejected_calls else ()
    return item.source, turns, item.chosen, item.rejected, *calls


def _turn(message: Message) -> tuple[Any, ...]:
    """The fields of a message, without the last ones if they have their defaults."""
    if message.reasoning or message.calls:
        return message.role, message.content, message.trained, message.reasoning, message.calls
    return (message.role, message.content) if message.trained else (message.role, message.content, False)


def _item(row: tuple[Any, ...]) -> Item:
    if isinstance(row[1], str):
        return Document(row[1], row[0], *row[2:])
    source, turns, *answers = row
    messages = tuple(Message(*turn) for turn in turns)
    if not answers:
        return Conversation(messages, source)
    if isinstance(answers[0], bool):
        return Labelled(messages, source, answers[0])
    chosen, rejected, *calls = answers
    return Preference(messages, chosen, rejected, source, *calls)


def main(argv: list[str]) -> int:
    """Scan the sources of a task file; write progress and errors to standard output, one JSON object a line."""
    task = load_json(Path(argv[0]))

    def report(**values: Any) -> None:
        sys.stdout.write(json.dumps(values, ensure_ascii=True) + "\n")
        sys.stdout.flush()

    try:
        for source, folder in task["sources"]:
            scan(
                DataSource(**source),
                ScanSettings(**task["settings"]),
                Path(folder),
                lambda name, rows: report(name=name, rows=rows),
            )
    except MlxZhError as error:
        report(error=type(error).__name__, message=str(error))
        return 2
    return 0


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(lambda arguments: main(arguments or []))
