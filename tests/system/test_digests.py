"""Digests of files are remembered, and an edit is seen however it hides."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_zh.system import digests
from mlx_zh.system.digests import FileDigests


def in_place(path: Path) -> None:
    path.write_bytes(b"two")


def by_another_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"two")
    other.replace(path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are really read; every file counts as old enough to be remembered."""
    read: list[Path] = []
    digest = digests.file_digest
    monkeypatch.setattr(digests, "file_digest", lambda path: (read.append(path), digest(path))[1])
    monkeypatch.setattr(digests, "_FRESH", -1.0)
    return read


@pytest.mark.parametrize("edit", [in_place, by_another_file])
def test_an_edit_that_keeps_size_and_time_is_seen(
    tmp_path: Path, reads: list[Path], edit: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    for _ in range(2):
        assert FileDigests(tmp_path / "cache.json").digests([str(path)]) == {
            str(path): hashlib.sha256(b"one").hexdigest()
        }
    assert len(reads) == 1
    stat = path.stat()
    while path.stat().st_ctime_ns == stat.st_ctime_ns:  # until the file system's clock has moved on
        edit(path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert FileDigests(tmp_path / "cache.json").digests([str(path)]) == {
        str(path): hashlib.sha256(b"two").hexdigest()
    }


@pytest.mark.parametrize("damage", ["", "[]", '{"FILE": 3}', '{"FILE": []}', "{"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    path, cache = tmp_path / "file", tmp_path / "cache.json"
    path.write_bytes(b"one")
    cache.write_text(damage.replace("FILE", str(path)))
    assert FileDigests(cache).digests([str(path)])[str(path)] == hashlib.sha256(b"one").hexdigest()


def test_a_remembered_digest_with_a_flipped_bit_is_not_believed(tmp_path: Path) -> None:
    path, cache = tmp_path / "file", tmp_path / "cache.json"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    digest = hashlib.sha256(b"one").hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "_FRESH", -1e9)
        FileDigests(cache).digests([str(path)])
    stored = cache.read_text(encoding="utf-8")
    assert digest in stored
    cache.write_text(stored.replace(digest, "f" * 64), encoding="utf-8")
    assert FileDigests(cache).digests([str(path)]) == {str(path): digest}


def test_files_that_are_gone_are_forgotten(tmp_path: Path, reads: list[Path]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(b"one")
        FileDigests(tmp_path / "cache.json").digests([str(path)])
        if path == first:
            first.unlink()
    assert list(json.loads((tmp_path / "cache.json").read_text())["files"]) == [str(second)]


def test_a_large_file_is_announced_once(tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_SLOW", 3)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    told: list[tuple[Path, int]] = []
    for _ in range(2):
        FileDigests(tmp_path / "cache.json", lambda file, size: told.append((file, size))).digests([str(path)])
    assert told == [(path, 3)]
