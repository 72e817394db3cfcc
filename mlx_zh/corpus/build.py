"""From sources to examples on disk: scan the rows, choose among them, render the chosen ones.

The folder `KEY.work` beside that of the corpus (prepared.py) holds the finished parts of an interrupted run, so the
next run continues from there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from mlx_zh.corpus import choosing, left_out
from mlx_zh.corpus.contamination import ExamIndex, Question, read_questions
from mlx_zh.corpus.finishing import finish
from mlx_zh.corpus.joined_encoding import JoinedEncoder, Vocabulary, vocabulary_of
from mlx_zh.corpus.prepared import (
    MANIFEST,
    Corpus,
    CorpusContent,
    CorpusSettings,
    Exams,
    corpus_key,
    damage_of,
    open_corpus,
)
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.scanning import Event, scan_all
from mlx_zh.corpus.selection import Scorer, Selecting, select
from mlx_zh.corpus.shards import Chosen, write_shards
from mlx_zh.corpus.sources import DataSource
from mlx_zh.corpus.statistics import ExamCheck
from mlx_zh.language.notice import Notice
from mlx_zh.system.storage import (
    make_folder,
    remove,
    set_damaged_aside,
    storage_errors,
    write_exact_json,
)

_WORK_KEPT = 30 * 24 * 3600.0  # seconds for which the parts of an interrupted run are kept
_MANY = 20_000  # with more rows than this, the faster encoder saves more time than its setup costs


def prepare(
    sources: Sequence[DataSource],
    settings: CorpusSettings,
    renderer: Renderer,
    cache: Path,
    event: Event,
    vocabulary: Callable[[], Vocabulary | None] | None = None,
    scorer: Scorer | None = None,
) -> Corpus:
    """The corpus of these sources, taken from the cache folder or built there.

    `vocabulary` returns the tokenizer's Vocabulary for the faster encoder, or None if there is none; by default it is
    derived from the renderer's tokenizer. `scorer` is needed if rows are selected by `ifd`. Two processes that
    prepare the same corpus wait for each other.

    Raises DataError for rows that cannot be used (with file and row), TemplateError for conversations that the chat
    template refuses, StorageError if the cache folder cannot be written.
    """
    key, values = corpus_key(sources, settings, renderer, cache)
    folder, kind = cache / key, settings.render.kind
    _sweep(cache)
    if damage_of(folder) is None:
        return open_corpus(folder, kind, ready=True)
    with storage_errors(cache):
        make_folder(cache)
        lock = FileLock(cache / f".{key}.lock")
        lock.acquire()
    try:
        reason = damage_of(folder)  # another process may have made it meanwhile
        if reason is None:
            return open_corpus(folder, kind, ready=True)
        remarks: tuple[Notice, ...] = ()
        if folder.exists():
            set_damaged_aside(folder)
            remarks = (Notice("corpus-damaged", folder=str(folder), reason=reason),)
        get_vocabulary = vocabulary or (lambda: vocabulary_of(renderer.tokenizer_json()))
        _build(sources, settings, renderer, folder, values, event, get_vocabulary, scorer)
        remove(folder.with_name(f"damaged-{key}"))
        return replace(open_corpus(folder, kind, ready=False), remarks=remarks)
    finally:
        lock.release()


def _sweep(cache: Path) -> None:
    """Remove what killed processes left: work whose corpus is finished, or that nobody went on with for weeks."""
    for left in (*cache.glob("*.work"), *cache.glob("damaged-*")):
        key = left.name.removesuffix(".work").removeprefix("damaged-")
        with suppress(OSError, Timeout):
            unfinished = left.suffix == ".work" and not (cache / key / MANIFEST).exists()
            if unfinished and time.time() - _changed(left) < _WORK_KEPT:
                continue
            with FileLock(cache / f".{key}.lock", timeout=0):
                remove(left)


def _changed(folder: Path) -> float:
    """When something in a folder was changed last, in seconds since the epoch."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _build(
    sources: Sequence[DataSource],
    settings: CorpusSettings,
    renderer: Renderer,
    folder: Path,
    values: CorpusContent,
    event: Event,
    get_vocabulary: Callable[[], Vocabulary | None],
    scorer: Scorer | None,
) -> None:
    work = folder.with_name(f"{folder.name}.work")
    try:
        with storage_errors(work):
            make_folder(work)
        questions, exam_report = _index_exams(settings.exams, work)
        scans = scan_all(sources, settings, bool(questions), work, event)
        choice = choosing.choose(sources, scans, settings.choice, [question.place for question in questions])
        write_exact_json(work / left_out.FILE, {"rows": left_out.record(choice, sources, scans, questions)})
        rows = choice.rendered() if settings.select is None else choice.candidates()
        choice.tried = len(rows)
        if len(rows) > _MANY and (vocabulary := get_vocabulary()) is not None:
            renderer.encode_with(JoinedEncoder(vocabulary))
        source_of = np.searchsorted(choice.starts, rows, side="right") - 1
        chosen = Chosen(source_of, rows - choice.starts[source_of])
        paths = write_shards(
            scans,
            chosen,
            renderer,
            settings.render,
            work / "shards",
            lambda name, done: event("render", name, done),
            skip_refused=settings.on_invalid == "skip",
        )
        selection = None
        if settings.select is not None:
            chosen_by = Selecting(settings.select, settings.choice, settings.render, scorer)
            selection, paths = select(chosen_by, sources, scans, choice, paths, work / "selected")
        finish(sources, settings, scans, choice, paths, renderer, values, exam_report, selection, folder)
    except Exception:
        # After an error the user changes the data or the settings, so the key changes and this folder is of no use.
        # A run that was interrupted raises no Exception: its folder stays.
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _index_exams(exams: Exams, work: Path) -> tuple[list[Question], ExamCheck]:
    """Write the index of all questions; returns the questions and their part of the report."""
    questions = [q for name, folder in exams.folders.items() for q in read_questions(Path(folder), name)]
    report: ExamCheck = {"exams": list(exams.folders), "missing": exams.missing, "questions": len(questions)}
    if questions:
        index = ExamIndex.build(questions, ngram=exams.ngram, overlap=exams.overlap)
        index.save(work / "exams.npz")
        report["checked"] = index.checked
    return questions, report
