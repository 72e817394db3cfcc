"""The second pass: chosen rows are rendered, tokenized and written as Arrow files, several batches at a time.

A file appears only when it is complete, with a JSON file of its digest and counts beside it. Files of an interrupted
run are used again if they are what was written.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlx_zh.corpus.conversation import (
    Conversation,
    Document,
    Labelled,
    Preference,
    prompt_with_system,
    with_system,
)
from mlx_zh.corpus.examples import SCHEMAS, Shards
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.rendered import Rendered, RenderedAnswer, RenderedPair
from mlx_zh.corpus.scan import Scan, characters_of
from mlx_zh.corpus.sources import Item
from mlx_zh.errors import RefusedByTemplate
from mlx_zh.system.digests import file_digest
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import load_json
from mlx_zh.system.storage import make_folder, storage_errors, write_exact_json, written_whole

ROWS = 16384  # chosen rows for each file
_BATCH = 512  # rows rendered by one thread at a time, at most
_BATCH_CHARACTERS = 1 << 18  # with these, or more, a batch ends earlier
_THREADS = 4

_NO_SEGMENTS = np.empty(0, dtype=np.int32)
Indices = npt.NDArray[np.int64]
Progress = Callable[[str, int], None]  # called with a source's name, here always "", and the rows rendered so far
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RenderSettings:
    """How rows become tokens; the fields have the meanings of `Renderer.conversation`'s arguments."""

    kind: str  # sft, dpo or kto
    train_on: str
    max_length: int | None
    on_overflow: str
    system: str | None  # the system message of rows that have none


@dataclass(frozen=True)
class Chosen:
    """The K rows to render, sorted by source and row."""

    sources: Indices  # (K,) index of the source
    rows: Indices  # (K,) number of the row in its source

    def __len__(self) -> int:
        return len(self.rows)


def write_shards(
    scans: Sequence[Scan],
    chosen: Chosen,
    renderer: Renderer,
    settings: RenderSettings,
    folder: Path,
    progress: Progress,
    *,
    skip_refused: bool = False,
) -> list[Path]:
    """Render the chosen rows into Arrow files in `folder`. Raises TemplateError, DataError or StorageError.

    With `skip_refused`, rows that the chat template refuses are dropped and counted.
    """
    with storage_errors(folder):
        make_folder(folder)
    paths = []
    with ThreadPoolExecutor(max(1, min(_THREADS, os.cpu_count() or 1))) as threads:
        for number, start in enumerate(range(0, len(chosen), ROWS)):
            path = folder / f"data-{number:05d}.arrow"
            stop = min(start + ROWS, len(chosen))
            if not _is_whole(path):
                part = Chosen(chosen.sources[start:stop], chosen.rows[start:stop])
                render = partial(_render, renderer, settings, skip_refused)
                _write(scans, part, render, settings, path, threads, partial(_report_from, progress, start))
            paths.append(path)
            progress("", stop)
    return paths


def take_rows(paths: Sequence[Path], positions: Indices, kind: str, folder: Path) -> list[Path]:
    """Copy the rows at `positions` (K,), in rising order, of rendered files into files in `folder`.

    Rows that were dropped while rendering stay counted; of those cut short, only the copied ones are.
    """
    with storage_errors(folder):
        make_folder(folder)
    counts: dict[int, Counter[str]] = {}
    for by_source in counts_of(paths):
        for source, reasons in by_source.items():
            counts.setdefault(source, Counter()).update({k: v for k, v in reasons.items() if k != CUT_SHORT})
    shards = Shards(paths)
    taken = []
    for number, start in enumerate(range(0, len(positions), ROWS)):
        part = shards.take(positions[start : start + ROWS])
        if kind == "sft":
            cut = part.filter(part.column("truncated")).column("source").to_pylist()
            for source, count in Counter(cut).items():
                counts.setdefault(source, Counter())[CUT_SHORT] += count
        path = folder / f"data-{number:05d}.arrow"
        with written_whole(path) as file, pa.ipc.new_stream(file, SCHEMAS[kind]) as writer:
            writer.write_table(part.combine_chunks())
        taken.append(path)
    for number, path in enumerate(taken):  # the reasons are of all files together
        write_exact_json(
            path.with_suffix(".json"), {"digest": file_digest(path), "counts": counts if number == 0 else {}}
        )
    return taken


def _is_whole(path: Path) -> bool:
    """Whether an earlier run has finished this file, and it is what was written."""
    try:
        about = load_json(path.with_suffix(".json"))
        counts_of([path])
        return fits(about["counts"], dict[str, dict[str, int]]) and bool(file_digest(path) == about["digest"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def counts_of(paths: Sequence[Path]) -> list[dict[int, Counter[str]]]:
    """For each file, by source: how many rows were dropped for each reason, and how many were cut short."""
    counts_by_file = []
    for path in paths:
        counts = load_json(path.with_suffix(".json"))["counts"]
        counts_by_file.append({int(source): Counter(reasons) for source, reasons in counts.items()})
    return counts_by_file


def _report_from(progress: Progress, start: int, done: int) -> None:
    progress("", start + done)


CUT_SHORT = "cut short"
_Batch = tuple[int, list[int], list[Item]]  # source, row numbers, rows
_Example = tuple[int, Rendered | RenderedPair | RenderedAnswer]  # index in the batch, and what became of that row
_Result = tuple[list[_Example], Counter[str]]


def _write(
    scans: Sequence[Scan],
    chosen: Chosen,
    render: Callable[[_Batch], _Result],
    settings: RenderSettings,
    path: Path,
    threads: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> None:
    schema = SCHEMAS[settings.kind]
    counts: dict[int, Counter[str]] = {}
    done = 0
    with written_whole(path) as file, pa.ipc.new_stream(file, schema) as writer:
        batches = chosen_batches(scans, chosen)
        for (source, rows, items), (rendered, dropped) in _ahead(render, batches, threads):
            counted = counts.setdefault(source, Counter())
            counted.update(dropped)
            counted[CUT_SHORT] += sum(isinstance(item, Rendered) and item.truncated for _, item in rendered)
            kept = [(rows[index], item) for index, item in rendered]
            writer.write_batch(_record_batch(kept, source, schema))
            done += len(items)
            progress(done)
    write_exact_json(path.with_suffix(".json"), {"digest": file_digest(path), "counts": counts})


def chosen_batches(scans: Sequence[Scan], chosen: Chosen) -> Iterator[_Batch]:
    """The chosen rows, read from the spool files, in batches of one source that have limited rows and characters."""
    for source in np.unique(chosen.sources).tolist():
        scan, rows = scans[source], chosen.rows[chosen.sources == source]
        part_of = scan.parts_of(rows)
        for part in np.unique(part_of).tolist():
            items, first = scan.items(part), int(scan.parts[part])
            numbers: list[int] = []
            characters = 0
            for number in rows[part_of == part].tolist():
                numbers.append(number)
                characters += characters_of(items[number - first])
                if len(numbers) == _BATCH or characters >= _BATCH_CHARACTERS:
                    yield source, numbers, [items[n - first] for n in numbers]
                    numbers, characters = [], 0
            if numbers:
                yield source, numbers, [items[n - first] for n in numbers]


def _render(renderer: Renderer, settings: RenderSettings, skip_refused: bool, batch: _Batch) -> _Result:
    """The examples of the rows, in their order; a document gives one for each of its pieces."""
    dropped: Counter[str] = Counter()
    examples: list[_Example] = []
    for kind, run in groupby(enumerate(batch[2]), key=lambda numbered: type(numbered[1])):
        indices, items = zip(*run, strict=True)
        if kind is Document:
            pieces = renderer.documents(items, max_length=settings.max_length)
            examples += [(i, piece) for i, cut in zip(indices, pieces, strict=True) for piece in cut]
            continue
        rendered = _accepted(renderer, settings, skip_refused, items, dropped)
        examples += [(i, item) for i, item in zip(indices, rendered, strict=True) if item is not None]
    return examples, dropped


def _accepted(
    renderer: Renderer, settings: RenderSettings, skip_refused: bool, items: Sequence[Item], dropped: Counter[str]
) -> Sequence[Rendered | RenderedPair | RenderedAnswer | None]:
    """The rendered rows, None for each that was dropped; the chat template's refusals cost their rows."""
    items = [_with_system(item, settings.system) for item in items]
    counts: Counter[str] = Counter()
    try:
        rendered = _rendered(renderer, settings, items, counts)
        dropped.update(counts)
        return rendered
    except RefusedByTemplate as error:
        if not skip_refused:
            raise type(error)(f"{error}. Correct the row, or drop such rows with data.on_invalid=skip") from error
    results: list[Rendered | RenderedPair | RenderedAnswer | None] = []
    for item in items:
        try:
            results += _rendered(renderer, settings, [item], dropped)
        except RefusedByTemplate as error:
            dropped[error.reason] += 1
            results.append(None)
    return results


def _with_system(item: Item, system: str | None) -> Item:
    if isinstance(item, Document):
        return item
    return prompt_with_system(item, system) if isinstance(item, Preference) else with_system(item, system)


def _rendered(
    renderer: Renderer, settings: RenderSettings, items: Sequence[Item], dropped: Counter[str]
) -> Sequence[Rendered | RenderedPair | RenderedAnswer | None]:
    """Each conversation, pair or answer, or None for one that is dropped."""
    if settings.kind == "dpo":
        pairs = [item for item in items if isinstance(item, Preference)]
        return renderer.preferences(pairs, max_length=settings.max_length, dropped=dropped)
    if settings.kind == "kto":
        answers = [item for item in items if isinstance(item, Labelled)]
        return renderer.answers(answers, max_length=settings.max_length, dropped=dropped)
    return renderer.conversations(
        [item for item in items if isinstance(item, Conversation)],
        train_on=settings.train_on,
        max_length=settings.max_length,
        on_overflow=settings.on_overflow,
        dropped=dropped,
    )


def _ahead(
    work: Callable[[Task], Result], tasks: Iterator[Task], threads: ThreadPoolExecutor
) -> Iterator[tuple[Task, Result]]:
    """Each task with its result, in order; a few tasks run ahead of the one that is waited for."""
    waiting: deque[tuple[Task, Future[Result]]] = deque()
    try:
        while True:
            for task in islice(tasks, threads._max_workers + 1 - len(waiting)):
                waiting.append((task, threads.submit(work, task)))
            if not waiting:
                return
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _record_batch(kept: Sequence[_Example], source: int, schema: pa.Schema) -> pa.RecordBatch:
    """The examples, each with the number of its row, as one batch."""
    columns: dict[str, Any] = {
        "source": pa.array(np.full(len(kept), source, dtype=np.int32)),
        "row": pa.array(np.array([row for row, _ in kept], dtype=np.int32)),
    }
    if "tokens" in schema.names:
        conversations = [item for _, item in kept if isinstance(item, Rendered)]
        columns["tokens"] = _lists([item.tokens for item in conversations])
        columns["trained"] = _lists([_spans(item.trained) for item in conversations])
        columns["scored"] = pa.array(
            np.array([np.count_nonzero(item.trained[1:]) for item in conversations], dtype=np.int32)
        )
        columns["segments"] = _lists(
            [_NO_SEGMENTS if item.segments is None else item.segments.ravel() for item in conversations]
        )
        columns["truncated"] = pa.array([item.truncated for item in conversations], type=pa.bool_())
    else:
        names = [name for name in ("prompt", "chosen", "rejected", "response") if name in schema.names]
        columns |= {name: _lists([getattr(item, name) for _, item in kept]) for name in names}
        if "label" in schema.names:
            columns["label"] = pa.array([item.label for _, item in kept], type=pa.bool_())  # type: ignore[union-attr]
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _lists(arrays: Sequence[npt.NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate([*arrays, np.empty(0, dtype=np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=pa.int32()))


def _spans(trained: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Where runs of true begin and end in `trained` (T,): start, end, start, end …"""
    edges = np.diff(trained.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges).astype(np.int32)
