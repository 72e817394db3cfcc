"""The files of C-Eval and CMMLU: downloaded from a hub as an archive and unpacked once into the cache folder."""

from __future__ import annotations

import lzma
import re
import zipfile
import zlib
from collections.abc import Mapping
from os.path import expanduser
from pathlib import Path
from typing import Any

from filelock import FileLock

from mlx_zh.errors import DataError, DownloadError
from mlx_zh.exams.catalog import NAMES, Benchmark, benchmark
from mlx_zh.exams.exam import Exam, load_benchmark, load_exam
from mlx_zh.system import hub as hubs
from mlx_zh.system import storage
from mlx_zh.system.digests import damage, digests_of, file_digest
from mlx_zh.system.downloads import Progress
from mlx_zh.system.json_text import load_json
from mlx_zh.system.links import check_file
from mlx_zh.system.storage import folder_whole, make_folder, storage_errors, visible, write_json

# Only these members are unpacked, under names made here, so that no file can be written outside the folder.
_MEMBER = re.compile(r"(?:^|/)(dev|val|test)/([a-z0-9_]+)\.csv$")
_LARGEST_FILE = 8 * 2**20  # bytes; C-Eval's and CMMLU's largest files are well below 1 MB
_LARGEST_ARCHIVE = 128 * 2**20
_DIGESTS = "digests.json"  # SHA-256 of each unpacked file, by name
_MOST_FILES = 1000  # C-Eval has 156


def benchmark_folder(benchmark: Benchmark, hub: str = "auto", progress: Progress | None = None) -> Path:
    """The folder with the benchmark's CSV files; downloads them from `hub` where they are not in the cache.

    Raises DownloadError where the archive cannot be downloaded, is damaged, or lacks files of the benchmark.
    """
    try:
        folder = hubs.download(benchmark.title, hub, progress=progress, **_request(benchmark))
    except DownloadError as error:
        raise DownloadError(
            f"{error} For a copy that you have, set evaluate.folder: {{{benchmark.key}: FOLDER}}, where FOLDER holds "
            f"{', '.join(benchmark.splits)}/."
        ) from error
    names = {place["archive"] for place in benchmark.hubs.values()}
    archive = next((folder / name for name in sorted(names) if (folder / name).is_file()), None)
    if archive is None:
        raise DownloadError(f"{benchmark.title}: the download in {folder} holds no {' or '.join(sorted(names))}.")
    check_file(folder, archive, DownloadError)
    return unpack(benchmark, archive, storage.cache_folder() / "benchmarks")


def is_cached(benchmark: Benchmark, hub: str = "auto") -> bool:
    """Whether `benchmark_folder` needs no network."""
    return hubs.cached(benchmark.title, hub, **_request(benchmark)) is not None


def _request(benchmark: Benchmark) -> dict[str, Any]:
    """Where the archive is, as `hub.download` takes it."""
    places = benchmark.hubs.items()
    ids = {place: about["repository"] for place, about in places}
    return {"ids": ids, "kind": "dataset", "patterns": {place: (about["archive"],) for place, about in places}}


def unpack(benchmark: Benchmark, archive: Path, cache: Path) -> Path:
    """Unpack the archive's CSV files as `SPLIT/NAME.csv` into a folder of `cache`, which appears whole or not at all.

    Files that are no longer what was unpacked are unpacked again.

    Raises DownloadError where the archive is damaged or lacks files of the benchmark, and StorageError.
    """
    target = cache / f"{benchmark.key}-{file_digest(archive)[:16]}"
    if _is_whole(target):
        return target
    with storage_errors(target):
        make_folder(cache)
        with FileLock(cache.with_name(f".{cache.name}.lock")):
            if not _is_whole(target):  # another process may have been faster
                with folder_whole(target) as folder:
                    _extract(archive, folder)
                    _check(benchmark, archive, folder)
                    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.csv"))]
                    write_json(folder / _DIGESTS, digests_of(folder, names))
    return target


def _is_whole(folder: Path) -> bool:
    """Whether the unpacked files are here, and are what was written."""
    try:
        return damage(folder, load_json(folder / _DIGESTS)) is None
    except (OSError, ValueError, AttributeError):
        return False


def _extract(archive: Path, folder: Path) -> None:
    total = 0
    try:
        with zipfile.ZipFile(archive) as opened:
            if len(opened.infolist()) > _MOST_FILES:
                raise DownloadError(f"{archive} holds more files than the benchmark has.")
            for member in opened.infolist():
                match = _MEMBER.search(member.filename)
                if match is None:
                    continue
                with opened.open(member) as file:
                    data = file.read(_LARGEST_FILE + 1)
                total += len(data)
                if len(data) > _LARGEST_FILE or total > _LARGEST_ARCHIVE:
                    raise DownloadError(f"{archive}: {member.filename} is larger than any file of the benchmark.")
                target = folder / match[1] / f"{match[2]}.csv"
                if target.exists():
                    raise DownloadError(f"{archive}: {member.filename} is there twice.")
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(data)
    # A damaged bzip2 stream is an OSError without a number; those of the disk have one.
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DownloadError(
            f"{archive} is damaged or incomplete ({error}). Delete it and run the same command again."
        ) from error


def _check(benchmark: Benchmark, archive: Path, folder: Path) -> None:
    """Raises DownloadError where a subject has no file in a split. Questions are counted when they are read."""
    missing = []
    for split in benchmark.splits:
        names = {path.stem.removesuffix(f"_{split}") for path in visible((folder / split).glob("*.csv"))}
        missing += [f"{split}/{key}" for key in benchmark.subjects if key not in names]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise DownloadError(
            f"{archive} is not {benchmark.title}'s archive: it lacks {', '.join(missing[:8])}{more}. Delete it and "
            "run the same command again, or set evaluate.folder."
        )


def open_exam(
    name: str,
    *,
    folders: Mapping[str, str],
    hub: str,
    split: str | None,
    shots: int,
    limit: int | None,
    progress: Progress | None = None,
) -> Exam:
    """The exam called `name`: ceval or cmmlu (from its folder in `folders`, else from `hub`), or a path to one's own.

    From the hub every question must be there; a folder of one's own may hold a part. `split` None is the exam's usual
    one, `shots` is the number of worked examples, `limit` the number of questions a subject (None: all).
    Raises DataError for a name or files that cannot be used, and DownloadError.
    """
    if name not in NAMES:
        path = Path(expanduser(name))
        if not path.exists():
            raise DataError(
                f"{name!r} is no benchmark; give {', '.join(NAMES)}, or the path of an exam or a CSV file."
            )
        return load_exam(path, split=split, shots=shots).limited(limit)
    published = benchmark(name)
    if folder := folders.get(name):
        return load_benchmark(published, Path(folder), split=split, shots=shots).limited(limit)
    exam = load_benchmark(published, benchmark_folder(published, hub, progress), split=split, shots=shots)
    if len(exam) != exam.expected:
        raise DataError(
            f"The hub delivered {len(exam)} questions of {exam.title} {exam.split}, which has {exam.expected}. Use "
            "another hub (evaluate.hub), or a folder that you trust (evaluate.folder)."
        )
    return exam.limited(limit)
