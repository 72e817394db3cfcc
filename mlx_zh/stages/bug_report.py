"""The file that `doctor --report` writes: what a bug report needs, without secrets and without the home folder."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from os.path import expanduser, isdir
from pathlib import Path
from typing import Any

from mlx_zh.errors import StorageError
from mlx_zh.stages.checkup import Check
from mlx_zh.stages.run_folder import TUNED, RunFolder, StageFolder
from mlx_zh.system.escaping import text_lines
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.redaction import hide, hide_all
from mlx_zh.system.storage import storage_errors, write_text

DEFAULT = "mlx-zh-report.md"
_TITLE = "# mlx-zh doctor --report"
_PACKAGES = (
    *("mlx", "mlx-metal", "mlx-cpu", "mlx-cuda-13", "mlx-lm", "transformers", "tokenizers", "numpy"),
    *("datasets", "huggingface_hub", "modelscope"),
)
_VARIABLES = re.compile(
    r"(MLX|HF|HUGGING|MODELSCOPE|METAL|MTL|AGX|OMP|OPENBLAS|VECLIB|CUDA|LC|TOKENIZERS)_|LANG|(https?|all|no)_proxy",
    re.IGNORECASE,
)
# Only what cannot be a secret is shown: numbers and switches, and the values of these variables.
_SWITCH = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?|true|false|on|off|yes|no|auto|cpu|gpu|", re.IGNORECASE)
_SHOWN = (
    *("LANG", "LC_ALL", "LC_CTYPE", "MLX_ZH_CACHE", "MLX_DEFAULT_DEVICE", "OPENBLAS_CORETYPE"),
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE"),
)
_RUNS, _WARNINGS = 5, 20  # runs and warnings that are listed: the last ones


def destination(path: str) -> Path:
    """The file to write. Raises StorageError if that would replace a file which is no earlier report."""
    file = Path(expanduser(path))
    if isdir(file):
        file = file / DEFAULT
    if file.suffix not in (".md", ".txt"):
        raise StorageError(f"--report {path}: the name must end with .md or .txt, for example {DEFAULT}.")
    with storage_errors(file):
        if file.exists() and not _is_report(file):
            raise StorageError(f"{file} exists and is not a report of doctor. Choose another name.")
    return file


def _is_report(file: Path) -> bool:
    """Whether an earlier report is there; a pipe or device is not read, because that may wait for ever."""
    return file.is_file() and file.read_bytes().startswith(_TITLE.encode())


def write_report(file: Path, checks: Sequence[Check], runs: Path, run: str | None) -> None:
    """Write the report on `checks`, the environment and the runs in the folder `runs`; of `run` also its warnings.

    Raises StorageError if the file cannot be written, or if there is no such run.
    """
    named = None if run is None else run_folder(runs, run)
    lines = [
        _TITLE,
        "",
        f"Written {time.strftime('%Y-%m-%d %H:%M %z')}. Secrets and the home folder are left out.",
        "",
    ]
    lines += ["## Checks", "", *_table(("", "check", "result"), _check_rows(checks))]
    lines += ["## Packages", "", *_table(("package", "version"), _packages())]
    lines += ["## Environment", "", *_table(("variable", "value"), environment())]
    lines += ["## Runs", "", *_table(("run", "stage", "state"), _runs(runs, named))]
    if named is not None:
        lines += [f"## Warnings of {named.path.name}", "", *_warnings(named), ""]
    write_text(file, hide("\n".join(lines)))


def run_folder(runs: Path, run: str) -> RunFolder:
    """The folder of a run by its name or path. Raises StorageError if there is none."""
    for path in (runs / run, Path(expanduser(run))):
        if isdir(path):
            return RunFolder(path)
    names = ", ".join(folder.path.name for folder in _folders(runs)) or "none"
    raise StorageError(f"there is no run {run!r} in {runs}; the runs there are: {names}.")


def environment() -> list[tuple[str, str]]:
    """Variables that change what MLX and the hubs do, sorted by name; values that may be secrets are not shown."""
    chosen = {name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)}
    shown = {
        name: value if name in _SHOWN or _SWITCH.fullmatch(value) else "(set; not shown)"
        for name, value in chosen.items()
    }
    return list(hide_all(shown).items())


def _check_rows(checks: Sequence[Check]) -> Iterator[tuple[str, str, str]]:
    for check in checks:
        yield check.level, check.name, f"{check.text} -> {check.remedy}" if check.remedy else check.text


def _packages() -> Iterator[tuple[str, str]]:
    yield "python", sys.version.split()[0]
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _folders(runs: Path) -> list[RunFolder]:
    """The runs in a folder, the last changed first."""
    try:
        paths = [path for path in runs.iterdir() if (path / "recipe.yaml").is_file()]
        return [RunFolder(path) for path in sorted(paths, key=lambda path: -path.stat().st_mtime)]
    except OSError:
        return []


def _runs(runs: Path, named: RunFolder | None) -> Iterator[tuple[str, str, str]]:
    for folder in [named] if named is not None else _folders(runs)[:_RUNS]:
        for stage in TUNED:
            yield folder.path.name, stage, _state(folder.stage(stage))


def _state(stage: StageFolder) -> str:
    """How far a stage is."""
    last = [line for line in _json_lines(stage.metrics) if "loss" in line][-1:]
    step = f"step {last[0].get('step')}" if last else "no step"
    if stage.is_finished:
        return f"finished, {step}"
    return f"not finished, {step}" if stage.path.exists() else "not begun"


def _warnings(run: RunFolder) -> list[str]:
    lines = [
        f"- {stage}: {_one_line(str(line.get('text', '')))}"
        for stage in TUNED
        for line in _json_lines(run.stage(stage).warnings)
    ]
    return lines[-_WARNINGS:] or ["None."]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none of a file that is missing, and not those of damaged lines."""
    objects = []
    try:
        lines = list(text_lines(path.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return []
    for line in lines:
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in row) + " |" for row in cells] + [""]


def _one_line(text: str) -> str:
    return " ".join(text.split())
