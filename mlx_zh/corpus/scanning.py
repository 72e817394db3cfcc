"""Scans all sources of a corpus, large ones in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from mlx_zh import errors
from mlx_zh.corpus.prepared import CorpusSettings
from mlx_zh.corpus.scan import Scan, ScanSettings, open_scan, scan
from mlx_zh.corpus.sources import DataSource
from mlx_zh.errors import DataError
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.storage import (
    write_exact_json,
)

_LARGE = 32 << 20  # data files of this many bytes or more are scanned by one process a source

Event = Callable[[str, str, int], None]  # called with the pass ("scan" or "render"), a source's name, rows so far


def scan_all(
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
