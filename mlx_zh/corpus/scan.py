"""The first pass over a source: read, normalise, validate, and note what is needed to choose among all rows.

What is read is spooled to disk, so the second pass (rendering) reads no JSON again. Run as a program, it scans the
sources named in a task file: `python -m mlx_zh.corpus.scan TASK.json`. Memory does not depend on the file's size
but for some 50 bytes a row.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mlx_zh.corpus.contamination import ExamFilter, ExamIndex
from mlx_zh.corpus.conversation import Conversation, Message, Preference
from mlx_zh.corpus.duplicates import Rows, sketch
from mlx_zh.corpus.normalize import changed, normalize, simplifier
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.shingles import letters
from mlx_zh.corpus.sources import DataSource, Item
from mlx_zh.errors import MlxZhError
from mlx_zh.system.storage import storage_errors, write_json, written_whole

PART = 4096  # rows of one spool file
_BATCH = 512  # rows whose n-grams are made at once
_DIGITS = re.compile(r"\d+")
_REPORTED = 2000  # rows between two reports of progress

Progress = Callable[[str, int], None]  # a source's name, and how many of its rows were read


@dataclass(frozen=True)
class ScanSettings:
    """What the first pass does to every row."""

    kind: str
    on_invalid: str = "error"
    normalize: bool = True
    simplify: bool = False
    near_ngram: int | None = 3  # None: near duplicates are not looked for
    exam_index: str | None = None  # a file of ExamIndex


@dataclass(frozen=True)
class Scan:
    """What the first pass found. N rows are usable; `report` counts the others."""

    folder: Path
    report: LoadReport
    rows: Rows
    prompts: npt.NDArray[np.uint64]  # (N,) hash of the first question
    exam: npt.NDArray[np.int32]  # (N,) the exam question that a row holds, or -1
    overlap: npt.NDArray[np.float32]  # (N,) and how much of it

    def items(self, part: int) -> list[Item]:
        """The rows of one spool file: PART * part and the next."""
        text = (self.folder / f"part-{part:05d}.spool").read_text(encoding="utf-8")
        return [_item(row) for row in json.loads(text)]


def scan(source: DataSource, settings: ScanSettings, folder: Path, progress: Progress) -> None:
    """Scan a source into `folder`, unless an earlier run has. Raises DataError."""
    if (folder / "scan.json").exists():
        return
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    report = LoadReport()
    with storage_errors(folder), ExitStack() as stack:
        notes = _Notes(folder, source, settings, stack)
        for number, item in enumerate(_clean(source, settings, report), start=1):
            notes.add(item)
            if number % _REPORTED == 0:
                progress(source.name, report.rows)
        notes.flush()
    with written_whole(folder / "scan.npz") as file:
        columns: dict[str, Any] = {name: np.concatenate(parts) for name, parts in notes.columns.items()}
        np.savez(file, **columns)
    progress(source.name, report.rows)
    write_json(folder / "scan.json", asdict(report))


def open_scan(folder: Path, near: bool) -> Scan:
    """A finished scan."""
    report = LoadReport(**json.loads((folder / "scan.json").read_text(encoding="utf-8")))
    with np.load(folder / "scan.npz") as found:
        columns = {name: found[name] for name in found.files}
    signatures, bands = folder / "signatures.u16", folder / "bands.u32"
    rows = Rows(columns["exact"], columns["numbers"], signatures if near else None, bands if near else None)
    return Scan(folder, report, rows, columns["prompts"], columns["exam"], columns["overlap"])


def _clean(source: DataSource, settings: ScanSettings, report: LoadReport) -> Iterator[Item]:
    simplify = simplifier() if settings.simplify else None

    def change(text: str) -> str:
        text = normalize(text) if settings.normalize else text
        return text if simplify is None else simplify(text)

    plain = not settings.normalize and simplify is None
    for item in source.items(settings.kind, settings.on_invalid, report):
        yield item if plain else changed(item, change)


class _Notes:
    """Collects rows; writes spool, signatures and bands as it goes."""

    def __init__(self, folder: Path, source: DataSource, settings: ScanSettings, stack: ExitStack) -> None:
        self.columns: dict[str, list[npt.NDArray[Any]]] = {
            "exact": [np.empty((0, 2), np.uint64)],
            "numbers": [np.empty(0, np.uint64)],
            "prompts": [np.empty(0, np.uint64)],
            "exam": [np.empty(0, np.int32)],
            "overlap": [np.empty(0, np.float32)],
        }
        self._folder, self._parts = folder, 0
        self._ngram = settings.near_ngram if source.near_duplicates else None
        self._exams = ExamFilter(ExamIndex.load(Path(settings.exam_index))) if settings.exam_index else None
        self._batch: list[Item] = []
        self._spool: list[Any] = []
        self._files: list[BinaryIO] = []
        if self._ngram is not None:
            for name in ("signatures.u16", "bands.u32"):
                self._files.append(stack.enter_context((folder / name).open("wb")))

    def add(self, item: Item) -> None:
        """Note one row."""
        self._batch.append(item)
        self._spool.append(_row(item))
        if len(self._batch) == _BATCH:
            self._note()
        if len(self._spool) == PART:
            self._write()

    def flush(self) -> None:
        """Note and write what is left."""
        if self._batch:
            self._note()
        if self._spool:
            self._write()

    def _note(self) -> None:
        texts = [_texts(item) for item in self._batch]
        digests = [hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).digest() for parts in texts]
        asked = [[m.content for m in _prompt(item) if m.role == "user"] for item in self._batch]
        self.columns["exact"].append(np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2))
        self.columns["prompts"].append(_hashes(["".join(questions[0].split()) for questions in asked]))
        self.columns["numbers"].append(_hashes([",".join(_DIGITS.findall(" ".join(q))) for q in asked]))
        if self._ngram is not None or self._exams is not None:
            found = letters(["".join(parts) for parts in texts])
            if self._ngram is not None:
                signatures, bands = sketch(found, self._ngram)
                self._files[0].write(signatures.tobytes())
                self._files[1].write(bands.tobytes())
            if self._exams is not None:
                exam, overlap = self._exams.find(found)
                self.columns["exam"].append(exam)
                self.columns["overlap"].append(overlap)
        if self._exams is None:
            self.columns["exam"].append(np.full(len(texts), -1, np.int32))
            self.columns["overlap"].append(np.zeros(len(texts), np.float32))
        self._batch = []

    def _write(self) -> None:
        path = self._folder / f"part-{self._parts:05d}.spool"
        with storage_errors(path):
            path.write_text(json.dumps(self._spool, ensure_ascii=False), encoding="utf-8")
        self._parts += 1
        self._spool = []


def _hashes(texts: list[str]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(
        b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts), dtype=np.uint64
    )


def _prompt(item: Item) -> tuple[Message, ...]:
    return item.messages if isinstance(item, Conversation) else item.prompt


def _texts(item: Item) -> list[str]:
    """What is said in a row; a system message makes no other row of it."""
    said = [message.content.strip() for message in _prompt(item) if message.role != "system"]
    return said if isinstance(item, Conversation) else [*said, item.chosen.strip(), item.rejected.strip()]


def _row(item: Item) -> tuple[Any, ...]:
    """Plain values, as JSON has them."""
    turns = tuple((message.role, message.content) for message in _prompt(item))
    if isinstance(item, Conversation):
        return item.source, turns
    return item.source, turns, item.chosen, item.rejected


def _item(row: tuple[Any, ...]) -> Item:
    messages = tuple(Message(role, content) for role, content in row[1])
    return Conversation(messages, row[0]) if len(row) == 2 else Preference(messages, row[2], row[3], row[0])


def main(argv: list[str]) -> int:
    """Scan the sources of a task file; progress and errors go to standard output as lines of JSON."""
    task = json.loads(Path(argv[0]).read_text(encoding="utf-8"))

    def tell(**values: Any) -> None:
        sys.stdout.write(json.dumps(values, ensure_ascii=True) + "\n")
        sys.stdout.flush()

    try:
        for source, folder in task["sources"]:
            scan(
                DataSource(**source),
                ScanSettings(**task["settings"]),
                Path(folder),
                lambda name, rows: tell(name=name, rows=rows),
            )
    except MlxZhError as error:
        tell(error=type(error).__name__, message=str(error))
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
