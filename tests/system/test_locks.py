"""The run folder's lock: held against everyone else, shared with one's own stages, and gone with its holder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from project import Project, contents

from mlx_zh import eval, fuse, prepare
from mlx_zh.errors import StorageError
from mlx_zh.system import locks
from mlx_zh.system.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from mlx_zh.system.locks import locked
with locked(Path("runs/tiny"), "sft") as lock:
    if sys.argv[1:]:
        import subprocess
        child = subprocess.Popen(["sleep", "30"], pass_fds=(lock.descriptor,))
        print(child.pid)
    print("held", flush=True)
    time.sleep(30)
"""


@contextmanager
def holder(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Another process that holds runs/tiny, and the lines that it said before."""
    command = [sys.executable, "-c", HOLD, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        said = [line.strip() for line in iter(process.stdout.readline, "held\n")]
        try:
            yield process, said
        finally:
            process.kill()


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs/tiny")


def test_nothing_is_left_of_it(run_folder: Path) -> None:
    with locked(run_folder, "sft") as lock:
        assert os.listdir(run_folder) == [".lock"]
        assert (lock.left_by, lock.works) == (None, True)
    assert not Path("runs").exists()
    run_folder.mkdir(parents=True)
    (run_folder / "recipe.yaml").touch()
    for _ in range(2):
        with locked(run_folder, "sft"):
            pass
        assert os.listdir(run_folder) == ["recipe.yaml"]


def test_two_folders_are_two_locks(run_folder: Path) -> None:
    with locked(run_folder, "sft"), locked(Path("runs/other"), "sft"):
        pass


def test_every_stage_is_refused_while_another_works_and_touches_nothing(project: Project) -> None:
    with holder() as (process, _):
        before = contents(Path("runs"))
        for stage in (prepare, eval, fuse):
            result = project.run(stage.main)
            assert result.status == 2
            assert result.err.startswith(
                f"error: another run is at work in runs/tiny: sft, process {process.pid}, since "
            )
            assert "Wait until it is done, or end it, then run the same command again." in result.err
        assert project.sft().status == 2
        assert contents(Path("runs")) == before
    assert project.sft("sft.max_steps=1").status == 0


@pytest.mark.parametrize("written", [None, b"", b"{", b"[1]", json.dumps({"what": "sft"}).encode()])
def test_a_lock_left_behind_is_taken_over(run_folder: Path, written: bytes | None) -> None:
    """By kill -9, or by a power cut that left any bytes in it: what counts is that nobody holds it."""
    if written is None:
        with holder() as (process, _):
            process.send_signal(signal.SIGKILL)
            process.wait()
    else:
        run_folder.mkdir(parents=True)
        (run_folder / ".lock").write_bytes(written)
    assert (run_folder / ".lock").exists()
    with locked(run_folder, "dpo") as lock:
        if written is None:
            assert str(lock.left_by).startswith(f"sft, process {process.pid}, since ")
        else:
            assert lock.left_by is None
    assert not (run_folder / ".lock").exists()


def test_the_user_is_told_of_a_run_that_was_killed(project: Project) -> None:
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/.lock").write_text('{"what": "dpo", "process": 77, "since": "2026-01-02 03:04"}')
    result = project.sft("sft.max_steps=1")
    told = "The last run here did not end by itself (dpo, process 77, since 2026-01-02 03:04); going on"
    assert result.status == 0 and told in result.out


def test_a_stage_that_outlives_its_pipeline_still_holds_the_folder(run_folder: Path) -> None:
    """After kill -9 of the pipeline its stage goes on, and nothing else may begin there until it ends."""
    with holder("with a child") as (process, said):
        stage = int(said[0])
        process.kill()
        process.wait()
        try:
            with pytest.raises(StorageError, match="another run is at work"), locked(run_folder, "sft"):
                pass
        finally:
            os.kill(stage, signal.SIGKILL)
    for _ in range(100):  # the kernel ends the stage, which is nobody's child now, when it gets to it
        try:
            with locked(run_folder, "sft"):
                return
        except StorageError:
            time.sleep(0.02)
    raise AssertionError("the lock outlived its holders")


def test_a_stage_works_in_the_folder_that_its_pipeline_holds(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in no other one that somebody holds, whatever the environment says."""
    with locked(run_folder, "run") as lock:
        for name, value in lock.environment.items():
            monkeypatch.setenv(name, value)
        with locked(run_folder, "sft") as shared:
            assert shared.descriptor == lock.descriptor
        assert (run_folder / ".lock").exists()
        other = Path("runs/other")
        refused = pytest.raises(StorageError, match="another run is at work in runs/other")
        with locked(other, "sft"), refused, locked(other, "sft"):
            pass
    with locked(run_folder, "sft") as lock:  # the descriptor of before is closed, or another file's by now
        assert lock.works


def test_a_file_system_without_locks_is_told(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(locks, "fcntl", SimpleNamespace(flock=refuse, LOCK_EX=2, LOCK_NB=4))
    result = project.sft("sft.max_steps=1")
    assert result.status == 0 and "warning: the file system of runs/tiny has no locks" in result.out


def test_a_lock_whose_file_was_just_removed_does_not_count(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder ends between our opening of its file and our locking of it: a third process would make a new one."""
    run_folder.mkdir(parents=True)
    flock, calls = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not calls:
            (run_folder / ".lock").unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(run_folder, "sft") as lock:
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(lock.descriptor), (run_folder / ".lock").stat())
