"""Runs as processes of their own: start, look for, stop and resume them. A run outlives the page and the studio.

A run is the ordinary command, `python -m mlx_zh.run RECIPE`, in a session of its own. It inherits a locked file of
the run folder, `.start`, and so holds that lock as long as it lives, even if this process is killed. Who holds a lock
is read from the system (`system.holders`), never from a process id alone: ids are used again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from mlx_zh.errors import StorageError
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system.holders import holder
from mlx_zh.system.json_text import read_object
from mlx_zh.system.links import check_file, is_readable
from mlx_zh.system.locks import NAME as LOCK
from mlx_zh.system.redaction import redact, redacted
from mlx_zh.system.storage import storage_errors

_ours: dict[Path, subprocess.Popen[bytes]] = {}  # the runs that this process started, to notice their end
_one_at_a_time = threading.Lock()
_COMMANDS = ("run", "sft", "dpo")  # those that a run can be resumed with


@dataclass(frozen=True, slots=True)
class Running:
    """A run that is at work now. `stopping`: it was asked to stop, and finishes its step."""

    process: int
    since: float  # seconds since 1970
    command: tuple[str, ...]
    stopping: bool


@dataclass(frozen=True, slots=True)
class Command:
    """What starts a run: the words after the interpreter, and the folder to start them in."""

    words: tuple[str, ...]
    folder: Path

    @property
    def text(self) -> str:
        """As a user types it."""
        stage = self.words[1].removeprefix("mlx_zh.")
        return shlex.join(["mlx-zh", stage, *self.words[2:]])


def run_command(recipe: str, project: Path, overrides: Sequence[str] = ()) -> Command:
    """The command that runs all steps of `recipe`, a path from the project's folder."""
    return Command(("-m", "mlx_zh.run", recipe, *overrides), project)


def running(run: RunFolder) -> Running | None:
    """The process at work in a run folder, whoever started it; None if there is none."""
    process = _process(run)
    if process is None:
        return None
    with suppress(psutil.Error):
        mark = _mark(process)
        asked = read_object(run.stop) or {}
        return Running(process.pid, process.create_time(), tuple(process.cmdline()), asked.get("process") == mark)
    return None


def start(run: RunFolder, command: Command, environment: dict[str, str] | None = None) -> Running:
    """Start a run, or return the one that is at work there already: two clicks start one run.

    Its output is appended to `run.log`. Raises StorageError if the folder cannot be written.
    """
    with _one_at_a_time, storage_errors(run.path):
        _reap()
        run.path.mkdir(parents=True, exist_ok=True)
        for file in (run.start, run.stop, run.log):
            check_file(run.path, file, StorageError)
        descriptor = os.open(run.start, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _locked(descriptor) or _process(run) is not None:
                return _wait_for(run)
            child = _launch(run, command, descriptor, environment)
            about = {"process": child.pid, "command": command.words, "folder": str(command.folder)}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(redacted(about)).encode(), 0)
        finally:
            os.close(descriptor)  # the child has inherited it, and with it the lock
        with suppress(FileNotFoundError):
            run.stop.unlink()
        _ours[run.path.absolute()] = child
        return Running(child.pid, time.time(), (sys.executable, *command.words), stopping=False)


def stop(run: RunFolder) -> bool:
    """Ask the run to finish its step, save and end; false if none is at work. Asking twice is asking once.

    SIGTERM and not SIGINT: of a run in a terminal, `mlx-zh run` passes only SIGTERM on to the stage at work, because
    the terminal itself sends Ctrl-C to both. The stage does the same on either signal, and on a second one it stops
    without saving.
    """
    process = _process(run)
    if process is None:
        return False
    try:
        mark = _mark(process)
        if not _first_to_ask(run, mark):
            return True
        process.send_signal(signal.SIGTERM)  # psutil compares the time of creation before it sends
        return True
    except psutil.NoSuchProcess:
        return False


def resume_command(run: RunFolder, project: Path) -> Command | None:
    """The command that began the run; None if nothing tells.

    A run of the studio recorded it. One from a terminal is resumed by its folder, which holds its recipe.
    """
    if (recorded := _recorded(run, project)) is not None:
        return recorded
    if not run.recipe.is_file():
        return None
    try:
        place = str(run.path.absolute().relative_to(project.absolute()))
    except ValueError:
        return None
    return Command(("-m", f"mlx_zh.{_stage_of(run)}", place), project)


def _recorded(run: RunFolder, project: Path) -> Command | None:
    """The command that the studio recorded. A run folder may come from elsewhere, so only one that it could give."""
    about = read_object(run.start) or {}
    words, folder = about.get("command"), about.get("folder")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or folder != str(project):
        return None
    if len(words) < 3 or words[:2] != ["-m", "mlx_zh.run"] or any(word.startswith("-") for word in words[2:]):
        return None
    inside = (project / words[2]).resolve().is_relative_to(project.resolve())
    return Command(tuple(words), project) if inside else None


def end_of_log(run: RunFolder, size: int = 20_000) -> str:
    """The last bytes of the run's output, as text. Of a progress bar, which is drawn over itself, the last state."""
    if not is_readable(run.path, run.log):
        return ""
    try:
        with run.log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - size, 0))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def _stage_of(run: RunFolder) -> str:
    """The command by which a run in a terminal was begun: `run`, or a training stage alone."""
    if run.pipeline.exists():
        return "run"
    argv = (read_object(run.manifest) or {}).get("command")
    words = [word for word in argv if isinstance(word, str)] if isinstance(argv, list) else []
    named = [Path(words[0]).stem, *words[1:2]] if words else []
    return next((word for word in named if word in _COMMANDS), "run")


def _process(run: RunFolder) -> psutil.Process | None:
    """The process to signal: the one that the studio started, else the holder of the run folder's lock."""
    return holder(run.start, left_behind=False) or holder(run.path / LOCK)


def _mark(process: psutil.Process) -> str:
    """A name for a process that no later process with the same id has."""
    return f"{process.pid} {process.create_time():.2f}"


def _first_to_ask(run: RunFolder, mark: str) -> bool:
    """Record that the process is asked to stop; false if it was asked before, by this studio or another."""
    with _one_at_a_time, storage_errors(run.path):
        check_file(run.path, run.stop, StorageError)
        descriptor = os.open(run.stop, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if (read_object(run.stop) or {}).get("process") == mark:
                return False
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"process": mark}).encode(), 0)
            return True
        finally:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether the lock is ours now; true also on a file system without locks, where the run folder's own decides."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _wait_for(run: RunFolder, seconds: float = 2.0) -> Running:
    """The run at work. Another studio that has just taken the lock may not have named its process yet."""
    for _ in range(max(int(seconds / 0.05), 1)):
        if (found := running(run)) is not None:
            return found
        time.sleep(0.05)
    raise StorageError(f"another run is at work in {run.path}. Wait until it is done, or end it.")


def _launch(
    run: RunFolder, command: Command, descriptor: int, environment: dict[str, str] | None
) -> subprocess.Popen[bytes]:
    with run.log.open("ab") as output:
        output.write(f"\n$ {redact(command.text)}\n".encode())
        output.flush()
        return subprocess.Popen(
            [sys.executable, *command.words],
            cwd=command.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(descriptor,),
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )


def _reap() -> None:
    """Collect the exit statuses of runs that have ended; otherwise they stay as zombies."""
    for path, child in list(_ours.items()):
        if child.poll() is not None:
            del _ours[path]
