"""C-Eval's and CMMLU's files: from a hub's archive, unpacked once into the cache folder."""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from mlx_zh.errors import DataError, DownloadError
from mlx_zh.exams.catalog import NAMES, Benchmark, benchmark
from mlx_zh.exams.exam import Exam, load_benchmark, load_exam
from mlx_zh.system import hub as hubs
from mlx_zh.system import storage
from mlx_zh.system.digests import file_digest
from mlx_zh.system.downloads import Progress
from mlx_zh.system.storage import storage_errors, sync_folder

# Only these are taken out of an archive, under names made here: nothing can land elsewhere.
_MEMBER = re.compile(r"(?:^|/)(dev|val|test)/([a-z0-9_]+)\.csv$")
_LARGEST_FILE = 8 * 2**20  # bytes; C-Eval's and CMMLU's largest files are well below 1 MB
_LARGEST_ARCHIVE = 128 * 2**20
_MOST_FILES = 1000  # C-Eval has 156


def benchmark_folder(benchmark: Benchmark, hub: str = "huggingface", progress: Progress | None = None) -> Path:
    """The folder with the benchmark's CSV files, downloaded from `hub` where it is not in the cache.

    Raises DownloadError where the archive cannot be had, is damaged, or does not hold the benchmark's files.
    """
    place = benchmark.hubs[hub]
    try:
        folder = hubs.download(
            place["repository"], hub, kind="dataset", patterns=(place["archive"],), progress=progress
        )
    except DownloadError as error:
        raise DownloadError(
            f"{error} For a copy that you have, set evaluate.folder: {{{benchmark.key}: FOLDER}}, where FOLDER holds "
            f"{', '.join(benchmark.splits)}/."
        ) from error
    archive = folder / place["archive"]
    if not archive.is_file():
        raise DownloadError(f"{place['repository']} has no file {place['archive']} on {hub}.")
    return unpack(benchmark, archive, storage.cache_folder() / "benchmarks")


def unpack(benchmark: Benchmark, archive: Path, cache: Path) -> Path:
    """The archive's CSV files as `SPLIT/NAME.csv` in a folder of `cache`; there whole or not at all."""
    target = cache / f"{benchmark.key}-{file_digest(archive)[:16]}"
    if target.is_dir():
        return target
    with storage_errors(target):
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".unpack-"))
        try:
            _extract(archive, temporary)
            _check(benchmark, archive, temporary)
            if not target.is_dir():  # another process may have been faster
                temporary.replace(target)
                sync_folder(cache)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _extract(archive: Path, folder: Path) -> None:
    total = 0
    try:
        with zipfile.ZipFile(archive) as opened:
            if len(opened.infolist()) > _MOST_FILES:
                raise DownloadError(f"{archive} holds more files than the benchmark has.")
            for member in opened.infolist():
                found = _MEMBER.search(member.filename)
                if found is None:
                    continue
                with opened.open(member) as file:
                    data = file.read(_LARGEST_FILE + 1)
                total += len(data)
                if len(data) > _LARGEST_FILE or total > _LARGEST_ARCHIVE:
                    raise DownloadError(f"{archive}: {member.filename} is larger than any file of the benchmark.")
                target = folder / found[1] / f"{found[2]}.csv"
                if target.exists():
                    raise DownloadError(f"{archive}: {member.filename} is there twice.")
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(data)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(
            f"{archive} is damaged or incomplete ({error}). Delete it and run the same command again."
        ) from error


def _check(benchmark: Benchmark, archive: Path, folder: Path) -> None:
    """Every subject must have its file in every split. Questions are counted when they are read."""
    missing = []
    for split in benchmark.splits:
        names = {path.stem.removesuffix(f"_{split}") for path in (folder / split).glob("*.csv")}
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

    From the hub every question must be there; a folder of one's own may hold a part. `limit` questions a subject.
    """
    if name not in NAMES:
        path = Path(name).expanduser()
        if not path.exists():
            raise DataError(
                f"{name!r} is no benchmark; give {', '.join(NAMES)}, or the path of an exam or a CSV file."
            )
        return load_exam(path, split=split, shots=shots).limited(limit)
    published = benchmark(name)
    if given := folders.get(name):
        return load_benchmark(published, Path(given), split=split, shots=shots).limited(limit)
    exam = load_benchmark(published, benchmark_folder(published, hub, progress), split=split, shots=shots)
    if len(exam) != exam.expected:
        raise DataError(
            f"{hub} delivered {len(exam)} questions of {exam.title} {exam.split}, which has {exam.expected}. Use "
            "another hub (evaluate.hub), or a folder that you trust (evaluate.folder)."
        )
    return exam.limited(limit)
