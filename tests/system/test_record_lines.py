"""Files of JSON lines that several programs write."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_zh.errors import StorageError
from mlx_zh.system import record_lines
from mlx_zh.system.record_lines import append_record

WRITER = """
import sys
from pathlib import Path
from mlx_zh.system.record_lines import append_record
name, count = sys.argv[2], int(sys.argv[3])
for number in range(count):
    append_record(Path(sys.argv[1]), {"by": name, "number": number, "text": "你好" * 2000})
    print(number, flush=True)
"""


def values(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)], stdout=subprocess.PIPE, text=True
    )


def test_two_writers_lose_nothing_and_write_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "new" / "f.jsonl"
    running = [writer(path, name, 40) for name in ("a", "b")]
    assert [process.wait() for process in running if process.communicate()] == [0, 0]
    rows = [(row["by"], row["number"]) for row in values(path)]  # type: ignore[index]
    for name in ("a", "b"):
        assert [number for by, number in rows if by == name] == list(range(40))
    assert len(rows) == 80


@pytest.mark.parametrize("after", [0, 3, 11])
def test_a_killed_writer_loses_no_line_that_it_had_acknowledged(tmp_path: Path, after: int) -> None:
    path = tmp_path / "f.jsonl"
    append_record(path, {"first": True})
    with writer(path, "a", 10_000) as process:
        assert process.stdout is not None
        seen = -1
        for line in process.stdout:
            seen = int(line)
            if seen >= after:
                os.kill(process.pid, signal.SIGKILL)
                break
    append_record(path, {"last": True})
    first, *rows, last = values(path)
    assert (first, last) == ({"first": True}, {"last": True})
    numbers = [row["number"] for row in rows]  # type: ignore[index]
    assert numbers == list(range(len(numbers))) and len(numbers) >= seen + 1


lines = st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=9), max_size=2), max_size=4)


@given(lines, st.data())
def test_wherever_a_write_was_cut_off_the_lines_before_and_after_it_are_whole(
    before: list[dict[str, str]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder) / "f.jsonl", Path(folder) / "whole.jsonl"
        for value in [*before, {"kind": "feedback", "text": "你好\n"}]:
            append_record(whole, value)
        content = whole.read_bytes()
        last = len(content[:-1].rpartition(b"\n")[0])
        cut = data.draw(st.integers(last + 1 if before else 0, len(content)))
        path.write_bytes(content[:cut])
        append_record(path, {"next": "1"})
        kept = before if cut < len(content) - 1 else [*before, {"kind": "feedback", "text": "你好\n"}]
        assert values(path) == [*[json.loads(json.dumps(v, ensure_ascii=False)) for v in kept], {"next": "1"}]


def test_a_text_without_an_end_of_its_last_line_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("my notes")
    append_record(path, {"a": 1})
    assert path.read_text() == 'my notes\n{"a": 1}\n'


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.jsonl"
    append_record(path, {"a": 1})
    write = os.write

    def half(file: int, data: bytes) -> int:
        return write(file, data[: len(data) // 2])

    monkeypatch.setattr(record_lines.os, "write", half)
    with pytest.raises(StorageError, match="no space left"):
        append_record(path, {"b": 2})
    monkeypatch.undo()
    assert values(path) == [{"a": 1}]


def test_a_lock_that_is_never_released_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.jsonl"
    append_record(path, {"a": 1})
    monkeypatch.setattr(record_lines, "_WAIT", 0.05)
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="held its lock"):
            append_record(path, {"b": 2})
    append_record(path, {"c": 3})
    assert values(path) == [{"a": 1}, {"c": 3}]


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(record_lines.fcntl, "flock", refused)
    append_record(tmp_path / "f.jsonl", {"a": 1})
    assert values(tmp_path / "f.jsonl") == [{"a": 1}]


def test_secrets_are_not_written(tmp_path: Path) -> None:
    append_record(tmp_path / "f.jsonl", {"text": "hf_" + "a1B2" * 9})
    assert "a1B2" not in (tmp_path / "f.jsonl").read_text()
