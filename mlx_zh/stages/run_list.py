"""The runs in the folders of a project: what state each is in, and its main figures."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system.holders import holder
from mlx_zh.system.json_text import parse_json, read_object
from mlx_zh.system.links import is_readable
from mlx_zh.system.locks import NAME as LOCK

RunState = Literal["running", "done", "stopped", "failed", "waiting"]

KILLED = "its process ended without a word: it was killed, or the machine was switched off."


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a list of runs shows of one. Figures that are not known are None."""

    key: str  # an opaque id, the same as long as the folder keeps its place
    path: Path
    name: str
    state: RunState
    why: str | None  # of a run that failed, or was killed: an English sentence, see `in_readers_language`
    process: int | None  # that works in it now
    model: str | None  # as the recipe names it
    data: tuple[str, ...]  # training data as the recipe names them
    stages: tuple[str, ...]  # training stages that were begun: sft, dpo
    step: int | None  # of the newest of them, so far
    hours: float | None  # of all steps together
    best_loss: float | None  # lowest validation loss of the newest stage
    exam: str | None  # the exam of `exam_gain`
    exam_gain: float | None  # the newest tuned model's macro average minus the base's, a share
    changed: float  # when the run last wrote, seconds since 1970

    @property
    def folder(self) -> RunFolder:
        """The paths in the run folder."""
        return RunFolder(self.path)


class RunList:
    """The runs below `folders`, each a project, a folder of runs or a run. What did not change is not read again."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [folder.resolve() for folder in folders]
        self._known: dict[Path, tuple[object, RunInfo]] = {}
        self._keys: dict[str, Path] = {}
        self._free: dict[Path, object] = {}  # lock files that nobody holds, as they were when that was found out
        self.outside: list[Path] = []  # run folders that a link names and that are elsewhere: they are left out

    def read(self) -> list[RunInfo]:
        """The runs: those at work first, then those that wrote last."""
        runs = [self._info(path) for path in self._paths()]
        return sorted(runs, key=lambda run: (run.state != "running", -run.changed))

    def one(self, key: str) -> RunInfo | None:
        """The run with a key, as it is now; None if there is none."""
        path = self._keys.get(key)
        if path is None or path.resolve() != path or not _is_run(path):
            self._paths()
            path = self._keys.get(key)
        return None if path is None else self._info(path)

    def _paths(self) -> list[Path]:
        """The run folders, each once, links resolved."""
        paths: dict[Path, None] = {}
        self.outside = []
        for folder in self._folders:
            for path in (folder, *_children(folder), *_children(folder / "runs")):
                if not _is_run(path):
                    continue
                real = path.resolve()
                if any(real.is_relative_to(each) for each in self._folders):
                    paths[real] = None
                else:
                    self.outside.append(path)
        self._keys = {key_of(path): path for path in paths}
        return list(paths)

    def _info(self, path: Path) -> RunInfo:
        run = RunFolder(path)
        process = self._process(run)
        signature = (process, [_stamp(file) for file in _files(run)])
        known = self._known.get(path)
        if known is None or known[0] != signature:
            try:
                info = _Reading(run, process).info()
            except OSError as error:  # a run of another user, or on a disk that fails; the others are shown
                info = _unreadable(path, process, error)
            known = self._known[path] = (signature, info)
        return known[1]

    def _process(self, run: RunFolder) -> int | None:
        """The id of the process at work in the run."""
        for path, left_behind in ((run.start, False), (run.path / LOCK, True)):
            stamp = _stamp(path)
            if stamp is None or self._free.get(path) == stamp:
                continue
            if (process := holder(path, left_behind=left_behind)) is not None:
                return process.pid
            self._free[path] = stamp
        return None


def key_of(path: Path) -> str:
    """The key of a run folder, whose links are resolved: 16 hex digits."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _children(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.name[:1] != "." and _is_folder(entry))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle, or into a folder of another user
        return False


def _is_run(path: Path) -> bool:
    run = RunFolder(path)
    return any(os.path.lexists(file) for file in (run.pipeline, run.manifest, run.prepared, run.start, path / LOCK))


def _files(run: RunFolder) -> list[Path]:
    """The files and folders whose change can change what a list shows."""
    stages = [run.stage(name) for name in TUNED]
    own = [run.pipeline, run.manifest, run.recipe, run.ended, run.exams, run.path / LOCK]
    return own + [file for stage in stages for file in (stage.metrics, stage.summary, stage.adapter)]


def _unreadable(path: Path, process: int | None, error: OSError) -> RunInfo:
    """What a list shows of a run whose files cannot be read."""
    state: RunState = "failed" if process is None else "running"
    why = f"files of this run cannot be read: {error.strerror}. Check who may read {error.filename}."
    unknown: dict[str, Any] = dict.fromkeys(("model", "step", "hours", "best_loss", "exam", "exam_gain"))
    about = _stamp(path)
    changed = about[2] / 1e9 if isinstance(about, tuple) else 0.0
    return RunInfo(key_of(path), path, path.name, state, why, process, data=(), stages=(), changed=changed, **unknown)


def _stamp(path: Path) -> object:
    """What changes when a file is written; None where it is missing."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns


class _Reading:
    """Reads one run folder. A damaged file counts as missing, and so does a link out of the folder."""

    def __init__(self, run: RunFolder, process: int | None) -> None:
        self._run, self._process = run, process
        self._pipeline = self._object(run.pipeline).get("stages")
        self._records = {
            str(name): record
            for name, record in (self._pipeline.items() if isinstance(self._pipeline, dict) else ())
            if isinstance(record, dict)
        }
        self._begun = tuple(name for name in TUNED if run.stage(name).metrics.exists())

    def info(self) -> RunInfo:
        """What the list shows of the run."""
        run = self._run
        state, why = self._state()
        model, data = self._recipe()
        line = self._last_line(self._begun[-1]) if self._begun else {}
        exam, gain = self._exam()
        changed = max((about[2] / 1e9 for file in _files(run) if (about := _stamp(file))), default=0.0)  # type: ignore[index]
        return RunInfo(
            key=key_of(run.path),
            path=run.path,
            name=run.path.name,
            state=state,
            why=why,
            process=self._process,
            model=model,
            data=data,
            stages=self._begun,
            step=int(step) if (step := _number(line.get("step"))) is not None else None,
            hours=self._hours(),
            best_loss=self._best_loss(),
            exam=exam,
            exam_gain=gain,
            changed=changed,
        )

    def _state(self) -> tuple[RunState, str | None]:
        run = self._run
        if self._process is not None:
            return "running", None
        ended = self._object(run.ended)
        why = ended.get("why") if isinstance(ended.get("why"), str) else None
        if ended.get("how") == "failed":
            return "failed", why
        if ended.get("how") == "stopped":
            return "stopped", None
        if _stamp(run.path / LOCK) is not None:
            return "stopped", KILLED
        if self._records:
            finished = all(record.get("outputs") is not None for record in self._records.values())
            return ("done" if finished and "report" in self._records else "stopped"), None
        if self._begun:
            return ("done" if all(run.stage(name).is_finished for name in self._begun) else "stopped"), None
        return "waiting", None

    def _recipe(self) -> tuple[str | None, tuple[str, ...]]:
        """The model and the training data as the recipe names them."""
        recipe = self._yaml(self._run.recipe)
        model = _mapping(recipe.get("model")).get("path")
        sources = [_mapping(_mapping(recipe.get("data")).get(stage)).get("train") for stage in TUNED]
        if not recipe:
            inputs = [_mapping(record.get("inputs")) for record in self._records.values()]
            model = next((named for each in inputs if (named := each.get("model.path"))), None)
            sources = [each.get(f"data.{stage}.train") for each in inputs for stage in TUNED]
        names = [
            str(source.get("name") or source.get("path"))
            for listed in sources
            for source in (listed if isinstance(listed, list) else [])
            if isinstance(source, dict) and (source.get("name") or source.get("path"))
        ]
        return (str(model) if model else None), tuple(dict.fromkeys(names))

    def _hours(self) -> float | None:
        seconds = {name: _number(record.get("seconds")) or 0.0 for name, record in self._records.items()}
        for stage in self._begun:  # a step's time is recorded when it ends; its metrics know it before
            elapsed = _number(self._last_line(stage).get("elapsed_seconds")) or 0.0
            seconds[stage] = max(seconds.get(stage, 0.0), elapsed)
        total = sum(seconds.values())
        return total / 3600 if total > 0 else None

    def _best_loss(self) -> float | None:
        for stage in reversed(self._begun):
            losses = list(map(float, _EVAL_LOSS.findall(self._bytes(self._run.stage(stage).metrics))))
            if losses:
                return min(losses)
        return None

    def _exam(self) -> tuple[str | None, float | None]:
        """The newest tuned model's exam and its difference to the base, as the exam's own report has it."""
        for stage in reversed(TUNED):
            for path in sorted(self._run.exams.glob(f"{stage}-*.json"), key=_exam_order):
                report = self._object(path)
                gain = _number(_mapping(_mapping(report.get("against")).get("base")).get("difference"))
                if gain is not None:
                    return str(report.get("benchmark", "")), gain
        return None, None

    def _last_line(self, stage: str) -> Mapping[str, object]:
        """The last step in a stage's metrics; empty where there is none."""
        for line in reversed(self._bytes(self._run.stage(stage).metrics, last=_TAIL).splitlines()):
            try:
                values = parse_json(line)
            except ValueError:
                continue
            if isinstance(values, dict) and "loss" in values:
                return values
        return {}

    def _object(self, path: Path) -> Mapping[str, Any]:
        return (read_object(path) or {}) if is_readable(self._run.path, path) else {}

    def _yaml(self, path: Path) -> Mapping[str, Any]:
        import yaml

        try:
            return _mapping(yaml.load(self._bytes(path, last=_LARGEST), Loader=_loader()))
        except (yaml.YAMLError, ValueError, RecursionError):
            return {}

    def _bytes(self, path: Path, last: int | None = None) -> bytes:
        """A file of the run, or its last bytes; empty where it is missing."""
        if not is_readable(self._run.path, path):
            return b""
        try:
            with path.open("rb") as file:
                if last is not None:
                    file.seek(max(file.seek(0, os.SEEK_END) - last, 0))
                return file.read()
        except OSError:
            return b""


_HUGE = 1e15  # what no step, time or gain of a run reaches
_TAIL = 8192  # bytes that hold the last step's line
_LARGEST = 2**18  # bytes of a recipe that are read
_EVAL_LOSS = re.compile(rb'"eval_loss": (-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*[,}]')


def _exam_order(path: Path) -> tuple[int, str]:
    name = path.stem.partition("-")[2]
    return {"ceval": 0, "cmmlu": 1}.get(name, 2), name


def _loader() -> Any:
    """YAML's reader of plain values; the one in C where it is there, which is ten times faster."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    """A number that can be computed with; None for anything else, such as NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < _HUGE else None  # type: ignore[arg-type]
