"""Files appear whole or not at all, also when the disk is full or the folder cannot be written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from disks import remount, small_disk
from platformdirs.macos import MacOS
from platformdirs.unix import Unix

from mlx_zh.errors import StorageError
from mlx_zh.system.digests import file_digest
from mlx_zh.system.storage import (
    cache_folder,
    folder_whole,
    storage_errors,
    sweep,
    write_arrays,
    write_json,
    write_text,
    written_whole,
)

WRITERS = {
    "text": lambda path: write_text(path, "好" * 100_000),
    "json": lambda path: write_json(path, ["好" * 100_000]),
    "arrays": lambda path: write_arrays(path, {"a": mx.ones((300, 300))}),
}
EVERY_WRITER = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system's own limit on the size of a file (EFBIG beyond it)."""
    resource: Any = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("system", "variables", "folder"),
    [
        (Unix, {}, "~/.cache/mlx-zh"),
        (MacOS, {}, "~/Library/Caches/mlx-zh"),
        (Unix, {"XDG_CACHE_HOME": "/cache"}, "/cache/mlx-zh"),
        (MacOS, {"XDG_CACHE_HOME": "/cache"}, "/cache/mlx-zh"),
        (Unix, {"XDG_CACHE_HOME": "~/own"}, "~/own/mlx-zh"),  # as it stands in a file that no shell has read
        (MacOS, {"XDG_CACHE_HOME": ""}, "~/Library/Caches/mlx-zh"),
        (Unix, {"XDG_CACHE_HOME": "/cache", "MLX_ZH_CACHE": "~/chosen"}, "~/chosen"),
    ],
)
def test_where_the_cache_is(
    system: type[Unix | MacOS], variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models and prepared data of an older version are found where they were."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: system(name).user_cache_path)
    for name in ("XDG_CACHE_HOME", "MLX_ZH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder).expanduser()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """With folders made on the way, Chinese as itself, and nothing else left beside it."""
    deep = tmp_path / "a" / "b"
    write_text(deep / "x.txt", "你好\n")
    write_json(deep / "x.json", {"名": [1, "二"]})
    write_arrays(deep / "x.safetensors", {"w": mx.arange(5), "v": mx.array([1.5])}, {"format": "mlx"})
    assert (deep / "x.txt").read_bytes() == "你好\n".encode()
    assert '"名"' in (deep / "x.json").read_text(encoding="utf-8")
    assert json.loads((deep / "x.json").read_text(encoding="utf-8")) == {"名": [1, "二"]}
    arrays, metadata = mx.load(str(deep / "x.safetensors"), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert (arrays["w"].tolist(), arrays["v"].tolist()) == ([0, 1, 2, 3, 4], [1.5])
    assert sorted(os.listdir(deep)) == ["x.json", "x.safetensors", "x.txt"]


@EVERY_WRITER
def test_an_older_file_is_replaced(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old" * 1_000_000)
    write(path)
    assert not path.read_bytes().startswith(b"old")
    assert path.stat().st_size < 1_000_000
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_changes_nothing(
    tmp_path: Path, before: bytes | None, error: type[BaseException]
) -> None:
    """Whatever was written before it raised; an older file stays what it was, and no temporary is left."""
    path = tmp_path / "x"
    if before:
        path.write_bytes(before)
    with pytest.raises(error), written_whole(path) as file:
        file.write(b"half" * 100_000)
        file.flush()
        raise error
    assert os.listdir(tmp_path) == (["x"] if before else [])
    assert not before or path.read_bytes() == before


def test_the_file_is_not_there_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with written_whole(path) as file:
        file.write(b"all of it")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"all of it"


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """Whole adapters may be among it. A process that has just ended has a number that nobody else has yet."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, other = tmp_path / f".x[1].{ended.pid}.tmp", tmp_path / f".y.{ended.pid}.tmp"
    written, mine = tmp_path / f".x[1].{os.getppid()}.tmp", tmp_path / ".x[1].backup.tmp"
    for file in (left, other, written, mine):
        file.write_bytes(b"half")
    write_text(tmp_path / "x[1]", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "x[1]", other, written, mine])


@EVERY_WRITER
def test_a_full_disk(tmp_path: Path, write: Any) -> None:
    """Said as what it is; the older file stays, and what was half-written does not hold the space."""
    with small_disk(tmp_path / "disk") as disk:
        (disk / "x").write_bytes(b"old")
        with pytest.raises(StorageError, match=r"x: no space left on disk\. .*free some space"):
            write(disk / "x")
        assert os.listdir(disk) == ["x"]
        assert (disk / "x").read_bytes() == b"old"
        write_text(disk / "small", "fits")
        assert (disk / "small").read_text() == "fits"


@EVERY_WRITER
def test_a_file_that_grows_too_large(tmp_path: Path, write: Any) -> None:
    """The same where no disk can be mounted: the operating system refuses in the middle of the file."""
    path = tmp_path / "x"
    with largest_file(20_000), pytest.raises(StorageError, match="no space left on disk"):
        write(path)
    assert os.listdir(tmp_path) == []


@EVERY_WRITER
def test_a_folder_that_cannot_be_made(tmp_path: Path, write: Any) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "runs").write_text("")
    with pytest.raises(StorageError, match=r"runs/x cannot be written: (Not a directory|File exists)"):
        write(tmp_path / "runs" / "x")


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        with small_disk(tmp_path / "disk") as disk:
            remount(disk, "ro")
            with pytest.raises(StorageError, match="x cannot be written: Read-only file system"):
                write_text(disk / "x", "")
        return
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    with pytest.raises(StorageError, match="x cannot be written: Permission denied"):
        write_text(folder / "x", "")


def test_other_errors_pass(tmp_path: Path) -> None:
    """Only the operating system's refusals are the user's; a bug keeps its own type."""
    with pytest.raises(KeyError), storage_errors(tmp_path):
        raise KeyError("x")
    with pytest.raises(StorageError, match="no space left"), storage_errors(tmp_path):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_digest(tmp_path: Path) -> None:
    """The SHA-256 of "abc" (FIPS 180-2, appendix B.1), and of a file larger than any buffer."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_digest(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    content = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "large").write_bytes(content)
    assert file_digest(tmp_path / "large") == hashlib.sha256(content).hexdigest()


def ended_process() -> int:
    """The number of a process that has just ended, and that nobody else has yet."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_a_kill_between_two_renames_loses_no_folder(tmp_path: Path) -> None:
    """The older folder is put back if the newer one is not there, and removed if it is."""
    dead = ended_process()
    for name in ("lost", "replaced"):
        (tmp_path / f".{name}.{dead}.old").mkdir()
        (tmp_path / f".{name}.{dead}.old" / "x").write_text("older")
        (tmp_path / f".{name}.{dead}.tmp").mkdir()
    (tmp_path / "replaced").mkdir()
    (tmp_path / "replaced" / "x").write_text("newer")
    alive = tmp_path / f".other.{os.getppid()}.tmp"
    alive.mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, "lost", "replaced"])
    assert [(tmp_path / name / "x").read_text() for name in ("lost", "replaced")] == ["older", "newer"]


def test_a_number_that_another_process_has_now_owns_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container every command may have the same number: the file is older than the process."""
    left = tmp_path / f".x.{os.getpid()}.tmp"
    left.write_text("half")
    monkeypatch.setattr("psutil.Process.create_time", lambda self: left.stat().st_ctime + 3600)
    sweep(tmp_path)
    assert not left.exists()


def test_a_folder_whose_rename_fails_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with folder_whole(tmp_path / "x") as folder:
        (folder / "a").write_text("older")
    replace, calls = Path.replace, []

    def refuse_second(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse_second)
    with pytest.raises(StorageError, match="x cannot be written: Input/output error"), folder_whole(tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x" / "a").read_text() == "older"
