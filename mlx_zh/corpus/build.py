"""From sources to examples on disk: scan the rows, choose among them, render the chosen ones.

A prepared corpus is a folder of Arrow files, which `datasets.load_from_disk` opens too. The folder is named by a
digest of everything that the corpus depends on, and it appears only when it is complete. The folder `KEY.work` beside
it holds the finished parts of an interrupted run, so the next run continues from there.

A corpus is read only if each file's SHA-256 is that in the manifest; else it is set aside and made again. This check
reads all files once when a stage starts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from filelock import FileLock, Timeout

from mlx_zh import errors
from mlx_zh.corpus import choosing, left_out, statistics
from mlx_zh.corpus.contamination import ExamIndex, Question, read_questions
from mlx_zh.corpus.exam_table import exam_files
from mlx_zh.corpus.examples import (
    OPENED,
    SCHEMAS,
    Answers,
    AnySplit,
    Conversations,
    Pairs,
    Shards,
    content_digest,
    positions_of,
)
from mlx_zh.corpus.joined_encoding import JoinedEncoder, Vocabulary, vocabulary_of
from mlx_zh.corpus.render import Renderer
from mlx_zh.corpus.scan import Scan, ScanSettings, open_scan, scan
from mlx_zh.corpus.selecting import SelectSettings
from mlx_zh.corpus.selection import Scorer, Selecting, SelectionReport, select
from mlx_zh.corpus.shards import Chosen, RenderSettings, counts_of, write_shards
from mlx_zh.corpus.sources import DataSource
from mlx_zh.corpus.statistics import CorpusReport, ExamCheck
from mlx_zh.errors import DataError
from mlx_zh.language.notice import Notice
from mlx_zh.system.digests import FileDigests, damage, digests_of, value_digest
from mlx_zh.system.json_text import load_json, parse_json
from mlx_zh.system.storage import (
    make_folder,
    remove,
    set_damaged_aside,
    storage_errors,
    sync_folder,
    write_exact_json,
    written_whole,
)

VERSION = 5  # part of the key; raise it when the same input would give another corpus
_WORK_KEPT = 30 * 24 * 3600.0  # seconds for which the parts of an interrupted run are kept
_MANIFEST = "manifest.json"
_LARGE = 32 << 20  # data files of this many bytes or more are scanned by one process a source
_MANY = 20_000  # with more rows than this, the faster encoder saves more time than its setup costs

Event = Callable[[str, str, int], None]  # called with the pass ("scan" or "render"), a source's name, rows so far


@dataclass(frozen=True)
class Exams:
    """The exams whose questions are removed from the training data."""

    folders: dict[str, str]  # exam -> folder with its CSV files
    missing: dict[str, str]  # exam whose questions are not available -> the reason
    ngram: int = 10  # letters and digits of an n-gram
    overlap: float = 0.4  # a row is dropped if it contains at least this share of a question's n-grams


@dataclass(frozen=True)
class CorpusSettings:
    """Everything that a corpus depends on, apart from its sources and the tokenizer."""

    render: RenderSettings
    choice: choosing.ChoiceSettings
    exams: Exams
    near_ngram: int = 3
    on_invalid: str = "error"
    normalize: bool = True
    simplify: bool = False
    quality: dict[str, str] | None = None  # quality rule -> what it does, for those that the recipe sets
    select: SelectSettings | None = None


class CorpusContent(TypedDict):
    """Everything that a corpus depends on; its key is a digest of it."""

    version: int
    rendering: str  # fingerprint of tokenizer and chat template
    sources: list[dict[str, Any]]  # the fields of each DataSource, with SHA-256 digests for its files
    settings: dict[str, Any]  # the fields of CorpusSettings without places
    exams: dict[str, list[str]]  # exam -> SHA-256 of its files


class Manifest(TypedDict):
    """`manifest.json` of a prepared corpus. The key that names its folder says which version wrote it."""

    files: list[str]  # Arrow files in the folder, in order
    digests: dict[str, str]  # SHA-256 of each Arrow file and of the files with the rows of each split
    made_of: CorpusContent
    report: CorpusReport
    content: str  # `content_digest` of the splits
    check: str  # digest of all the other values


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus; its rows stay on disk."""

    folder: Path
    key: str
    manifest: Manifest
    splits: dict[str, AnySplit]  # train and validation
    ready: bool  # whether it came from the cache
    remarks: tuple[Notice, ...] = ()  # about an earlier copy that was damaged

    @property
    def content(self) -> str:
        """A digest of what came out: all tokens and which of them are trained, in order; 64 hex digits."""
        return self.manifest["content"]

    def conversations(self, split: str) -> Conversations:
        """The examples of a split ("train" or "validation") of a corpus for SFT."""
        examples = self.splits[split]
        assert isinstance(examples, Conversations)
        return examples

    def pairs(self, split: str) -> Pairs:
        """The pairs of a split ("train" or "validation") of a corpus for DPO."""
        pairs = self.splits[split]
        assert isinstance(pairs, Pairs)
        return pairs

    def answers(self, split: str) -> Answers:
        """The labelled answers of a split ("train" or "validation") of a corpus for KTO."""
        answers = self.splits[split]
        assert isinstance(answers, Answers)
        return answers


def corpus_key(
    sources: Sequence[DataSource], settings: CorpusSettings, renderer: Renderer, cache: Path
) -> tuple[str, CorpusContent]:
    """A digest of everything that the corpus depends on, and the values that went into the digest."""
    exams = {name: list(map(str, exam_files(Path(folder)))) for name, folder in settings.exams.folders.items()}
    every = [path for source in sources for path in source.files] + [
        path for paths in exams.values() for path in paths
    ]
    digests = FileDigests(cache / "fingerprints.json").digests(every)
    values: CorpusContent = {
        "version": VERSION,
        "rendering": renderer.fingerprint,
        "sources": [_fields_of(source) | {"files": [digests[path] for path in source.files]} for source in sources],
        "settings": _settings_fields(settings),
        "exams": {name: [digests[path] for path in paths] for name, paths in exams.items()},
    }
    return value_digest(values)[:32], values


def _fields_of(source: DataSource) -> dict[str, Any]:
    """The fields of a source; those that came later are left out while unset, so that older corpora stay valid."""
    fields = asdict(replace(source, files=()))
    return {name: value for name, value in fields.items() if value or name not in ("sheet", "variables")}


def _settings_fields(settings: CorpusSettings) -> dict[str, Any]:
    """The settings without places; later ones are left out while unset, so that older corpora stay valid."""
    fields = asdict(replace(settings, exams=replace(settings.exams, folders={}, missing={})))
    return {name: value for name, value in fields.items() if value or name not in ("quality", "select")}


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


def damage_of(folder: Path) -> str | None:
    """Why a prepared corpus cannot be used: it is missing, incomplete, or not what was written. None if it can."""
    try:
        manifest = load_json(folder / _MANIFEST)
        check = manifest.pop("check")
        if value_digest(manifest) != check:
            return f"{_MANIFEST} is not what was written"
        return damage(folder, manifest["digests"])
    except OSError as error:
        return f"{_MANIFEST}: {error.strerror or error}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"


def _sweep(cache: Path) -> None:
    """Remove what killed processes left: work whose corpus is finished, or that nobody went on with for weeks."""
    for left in (*cache.glob("*.work"), *cache.glob("damaged-*")):
        key = left.name.removesuffix(".work").removeprefix("damaged-")
        with suppress(OSError, Timeout):
            unfinished = left.suffix == ".work" and not (cache / key / _MANIFEST).exists()
            if unfinished and time.time() - _changed(left) < _WORK_KEPT:
                continue
            with FileLock(cache / f".{key}.lock", timeout=0):
                remove(left)


def _changed(folder: Path) -> float:
    """When something in a folder was changed last, in seconds since the epoch."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def open_corpus(folder: Path, kind: str, *, ready: bool) -> Corpus:
    """A finished corpus; its rows stay on disk."""
    manifest: Manifest = load_json(folder / _MANIFEST)
    shards = Shards([folder / name for name in manifest["files"]])
    splits = {split: OPENED[kind](shards, np.load(folder / f"{split}.npy")) for split in ("train", "validation")}
    return Corpus(folder, folder.name, manifest, splits, ready)


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
        scans = _scan_all(sources, settings, bool(questions), work, event)
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
        _finish(sources, settings, scans, choice, paths, renderer, values, exam_report, selection, folder)
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


def _scan_all(
    sources: Sequence[DataSource], settings: CorpusSettings, exams: bool, work: Path, event: Event
) -> list[Scan]:
    """Scan every source. Large data is scanned by one process a source."""
    scan_settings = ScanSettings(
        settings.render.kind,
        settings.on_invalid,
        settings.normalize,
        settings.simplify,
        settings.near_ngram if settings.choice.near is not None else None,
        str(work / "exams.npz") if exams else None,
        settings.quality or {},
    )
    folders = [work / f"scan-{i:03d}" for i in range(len(sources))]
    size = sum(os.path.getsize(path) for source in sources for path in source.files)
    if size < _LARGE or len(sources) < 2:
        for source, folder in zip(sources, folders, strict=True):
            scan(source, scan_settings, folder, lambda name, rows: event("scan", name, rows))
    else:
        _scan_in_processes(sources, scan_settings, folders, event)
    near = scan_settings.near_ngram is not None
    return [open_scan(f, near and s.near_duplicates) for s, f in zip(sources, folders, strict=True)]


def _scan_in_processes(
    sources: Sequence[DataSource], settings: ScanSettings, folders: Sequence[Path], event: Event
) -> None:
    running: list[subprocess.Popen[str]] = []

    def run(index: int) -> None:
        task = folders[index].with_suffix(".task.json")
        write_exact_json(
            task, {"sources": [(asdict(sources[index]), str(folders[index]))], "settings": asdict(settings)}
        )
        command = [sys.executable, "-m", "mlx_zh.corpus.scan", str(task)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            running.append(process)
            assert process.stdout is not None
            for line in process.stdout:
                message = parse_json(line)
                if "error" in message:
                    raise getattr(errors, message["error"])(message["message"])
                event("scan", message["name"], message["rows"])
        if process.returncode:
            raise DataError(
                f"{sources[index].name}: the process that reads this source ended with status {process.returncode} "
                "(a negative status is a signal; -9 often means that memory ran out); its messages are above"
            )

    def size(i: int) -> int:
        return sum(os.path.getsize(path) for path in sources[i].files)

    largest_first = sorted(range(len(sources)), key=size, reverse=True)
    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, len(sources)))) as threads:
        try:
            futures = [threads.submit(run, index) for index in largest_first]
            for future in as_completed(futures):
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise


def _finish(
    sources: Sequence[DataSource],
    settings: CorpusSettings,
    scans: Sequence[Scan],
    choice: choosing.Choice,
    paths: Sequence[Path],
    renderer: Renderer,
    values: CorpusContent,
    exam_report: ExamCheck,
    selection: SelectionReport | None,
    folder: Path,
) -> None:
    """Write which rows of the files belong to each split, write the report, and give the folder its final name."""
    shards = Shards(paths)
    rendered = choice.starts[shards.numbers("source")] + shards.numbers("row")  # numbers of the rows in the files
    splits = {"train": positions_of(choice.train, rendered), "validation": positions_of(choice.validation, rendered)}
    if not len(splits["train"]):
        raise DataError(_nothing_left(sources, scans, choice, paths))
    work = paths[0].parent
    for split, positions in splits.items():
        with written_whole(work / f"{split}.npy") as file:
            np.save(file, positions)
    rendering: dict[int, Counter[str]] = {}
    for counts in counts_of(paths):
        for source, reasons in counts.items():
            rendering.setdefault(source, Counter()).update(reasons)
    kind = settings.render.kind
    opened: dict[str, Any] = {split: OPENED[kind](shards, positions) for split, positions in splits.items()}
    report: CorpusReport = {
        **statistics.describe(sources, scans, choice, rendering, opened["train"], opened["validation"]),
        "exam_questions": exam_report,
        "tokens_per_chinese_character": statistics.tokens_per_character(scans, choice, renderer),
    }
    if selection is not None:
        report["selection"] = selection
    names = [f"data-{i:05d}-of-{len(paths):05d}.arrow" for i in range(len(paths))]
    with storage_errors(folder):
        for path, name in zip(paths, names, strict=True):
            path.rename(work / name)
            path.with_suffix(".json").unlink()
        (work.parent / left_out.FILE).replace(work / left_out.FILE)
        digests = digests_of(work, [*names, *(f"{split}.npy" for split in splits), left_out.FILE])
    _write_datasets_files(work, folder.name, kind, names)
    manifest = {"files": names, "digests": digests, "made_of": values, "report": report}
    manifest = parse_json(json.dumps(manifest | {"content": content_digest(opened)}))  # as it will be read
    write_exact_json(work / _MANIFEST, manifest | {"check": value_digest(manifest)})
    with storage_errors(folder):
        work.replace(folder)
        sync_folder(folder.parent)


def _nothing_left(
    sources: Sequence[DataSource], scans: Sequence[Scan], choice: choosing.Choice, paths: Sequence[Path]
) -> str:
    reasons: Counter[str] = Counter()
    for scan_, dropped in zip(scans, choice.dropped, strict=True):
        reasons.update(scan_.report.dropped)
        reasons.update(dropped)
    for counts in counts_of(paths):
        for counted in counts.values():
            reasons.update(counted)
    counted_reasons = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    names = ", ".join(source.name for source in sources if not source.validation)
    return (
        f"nothing is left to learn from in {names} ({counted_reasons or 'no row was read'}). Change the setting that "
        "drops the rows, or add data."
    )


def _write_datasets_files(folder: Path, key: str, kind: str, names: Sequence[str]) -> None:
    """Write the two JSON files that `datasets.load_from_disk` reads."""
    features: dict[str, Any] = {}
    for field in SCHEMAS[kind]:
        value = {"dtype": "int32", "_type": "Value"}
        whole = {"dtype": str(field.type), "_type": "Value"}
        features[field.name] = {"feature": value, "_type": "List"} if "list" in str(field.type) else whole
    write_exact_json(folder / "dataset_info.json", {"features": features})
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": key[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_exact_json(folder / "state.json", state)
