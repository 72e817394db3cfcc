"""The second pass: chosen rows are rendered, tokenized and written as Arrow files, several batches at a time.

A file appears whole or not at all, with its counts beside it; those of an interrupted run are taken as they are.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mlx_zh.corpus.conversation import Conversation, Preference, prompt_with_system, with_system
from mlx_zh.corpus.examples import SCHEMAS
from mlx_zh.corpus.render import Rendered, RenderedPair, Renderer
from mlx_zh.corpus.scan import PART, Scan
from mlx_zh.corpus.sources import Item
from mlx_zh.system.storage import write_json, written_whole

ROWS = 16384  # chosen rows of a file
_BATCH = 512  # rows rendered by one thread at a time
_THREADS = 4

Indices = npt.NDArray[np.int64]
Progress = Callable[[str, int], None]
Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class RenderSettings:
    """How rows become tokens."""

    kind: str
    train_on: str
    max_length: int | None
    on_overflow: str
    system: str | None


@dataclass(frozen=True)
class Chosen:
    """The rows to render, in the order of sources and rows: (K,) each."""

    sources: Indices
    rows: Indices

    def __len__(self) -> int:
        return len(self.rows)


def write_shards(
    scans: Sequence[Scan],
    chosen: Chosen,
    renderer: Renderer,
    settings: RenderSettings,
    folder: Path,
    progress: Progress,
) -> list[Path]:
    """Render the chosen rows into Arrow files of `folder`. Raises TemplateError, DataError, StorageError."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with ThreadPoolExecutor(max(1, min(_THREADS, os.cpu_count() or 1))) as threads:
        for number, start in enumerate(range(0, len(chosen), ROWS)):
            path = folder / f"data-{number:05d}.arrow"
            stop = min(start + ROWS, len(chosen))
            if not path.with_suffix(".json").exists():
                part = Chosen(chosen.sources[start:stop], chosen.rows[start:stop])
                _write(scans, part, renderer, settings, path, threads, partial(_beyond, progress, start))
            paths.append(path)
            progress("", stop)
    return paths


def counts_of(paths: Sequence[Path]) -> list[dict[int, Counter[str]]]:
    """What became of the rows of each file: by source, how many were dropped for what and how many cut short."""
    found = []
    for path in paths:
        counts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        found.append({int(source): Counter(reasons) for source, reasons in counts.items()})
    return found


def _beyond(progress: Progress, start: int, done: int) -> None:
    progress("", start + done)


CUT_SHORT = "cut short"


def _write(
    scans: Sequence[Scan],
    chosen: Chosen,
    renderer: Renderer,
    settings: RenderSettings,
    path: Path,
    threads: ThreadPoolExecutor,
    progress: Callable[[int], None],
) -> None:
    schema = SCHEMAS[settings.kind]
    counts: dict[int, Counter[str]] = {}
    render = partial(_render, renderer, settings)
    done = 0
    with written_whole(path) as file, pa.ipc.new_stream(file, schema) as writer:
        batches = _batches(scans, chosen)
        for (source, rows, items), (rendered, dropped) in _ahead(render, batches, threads):
            counted = counts.setdefault(source, Counter())
            counted.update(dropped)
            counted[CUT_SHORT] += sum(isinstance(one, Rendered) and one.truncated for one in rendered)
            writer.write_batch(_record_batch(rendered, source, rows, schema))
            done += len(items)
            progress(done)
    write_json(path.with_suffix(".json"), counts)


_Batch = tuple[int, list[int], list[Item]]  # source, row numbers, rows


def _batches(scans: Sequence[Scan], chosen: Chosen) -> Iterator[_Batch]:
    """The chosen rows, read from their spools, at most so many of one source at a time."""
    for source in np.unique(chosen.sources).tolist():
        rows = chosen.rows[chosen.sources == source]
        for part in np.unique(rows // PART).tolist():
            items = scans[source].items(part)
            within = (rows[rows // PART == part]).tolist()
            for first in range(0, len(within), _BATCH):
                numbers = within[first : first + _BATCH]
                yield source, numbers, [items[number - part * PART] for number in numbers]


def _render(
    renderer: Renderer, settings: RenderSettings, batch: _Batch
) -> tuple[Sequence[Rendered | RenderedPair | None], Counter[str]]:
    dropped: Counter[str] = Counter()
    if settings.kind == "dpo":
        pairs = [prompt_with_system(item, settings.system) for item in batch[2] if isinstance(item, Preference)]
        return renderer.preferences(pairs, max_length=settings.max_length, dropped=dropped), dropped
    conversations = [with_system(item, settings.system) for item in batch[2] if isinstance(item, Conversation)]
    rendered = renderer.conversations(
        conversations,
        train_on=settings.train_on,
        max_length=settings.max_length,
        on_overflow=settings.on_overflow,
        dropped=dropped,
    )
    return rendered, dropped


def _ahead(
    work: Callable[[Given], Made], given: Iterator[Given], threads: ThreadPoolExecutor
) -> Iterator[tuple[Given, Made]]:
    """`work` on each in turn, a few begun ahead of the one that is waited for."""
    waiting: deque[tuple[Given, Future[Made]]] = deque()
    try:
        while True:
            for one in islice(given, threads._max_workers + 1 - len(waiting)):
                waiting.append((one, threads.submit(work, one)))
            if not waiting:
                return
            first, made = waiting.popleft()
            yield first, made.result()
    finally:
        for _, made in waiting:
            made.cancel()


def _record_batch(
    rendered: Sequence[Rendered | RenderedPair | None], source: int, rows: Sequence[int], schema: pa.Schema
) -> pa.RecordBatch:
    kept = [(row, one) for row, one in zip(rows, rendered, strict=True) if one is not None]
    columns: dict[str, Any] = {
        "source": pa.array(np.full(len(kept), source, dtype=np.int32)),
        "row": pa.array(np.array([row for row, _ in kept], dtype=np.int32)),
    }
    if "tokens" in schema.names:
        conversations = [one for _, one in kept if isinstance(one, Rendered)]
        columns["tokens"] = _lists([one.tokens for one in conversations])
        columns["trained"] = _lists([_spans(one.trained) for one in conversations])
        columns["scored"] = pa.array(
            np.array([np.count_nonzero(one.trained[1:]) for one in conversations], dtype=np.int32)
        )
        columns["truncated"] = pa.array([one.truncated for one in conversations], type=pa.bool_())
    else:
        for name in ("prompt", "chosen", "rejected"):
            columns[name] = _lists([getattr(one, name) for _, one in kept])
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def _lists(arrays: Sequence[npt.NDArray[np.int32]]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int32)
    values = np.concatenate([*arrays, np.empty(0, dtype=np.int32)])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=pa.int32()))


def _spans(trained: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Where runs of true begin and end: start, end, start, end …"""
    edges = np.diff(trained.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(edges).astype(np.int32)
