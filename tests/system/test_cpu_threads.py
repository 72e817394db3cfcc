"""The number of BLAS threads: measured, remembered, and kept by a run that resumes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from mlx_zh.system import cpu_threads
from mlx_zh.system.storage import cache_folder


def test_more_threads_are_taken_only_where_they_are_clearly_faster() -> None:
    def chosen(**seconds: float) -> int:
        return cpu_threads.fastest(len(seconds), lambda number: seconds[f"t{number}"])

    assert chosen(t1=1.0) == 1
    assert chosen(t1=1.0, t2=0.6) == 2
    assert chosen(t1=1.0, t2=0.95) == 1
    assert chosen(t1=1.0, t2=30.0) == 1  # they wait for each other
    assert chosen(t1=1.0, t2=0.6, t3=0.59) == 2
    assert cpu_threads.fastest(4, {1: 1.0, 2: 0.97, 4: 0.4}.__getitem__) == 4


def test_one_disturbed_round_decides_nothing() -> None:
    calls = {1: 0, 2: 0}

    def seconds(number: int) -> float:
        calls[number] += 1
        return 50.0 if calls[number] == 2 else {1: 1.0, 2: 0.5}[number]

    assert cpu_threads.fastest(2, seconds) == 2


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """As on Linux where nobody said a number; returns the numbers that were used."""
    used: list[int] = []
    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_threads, "is_free", lambda: True)
    monkeypatch.setattr(cpu_threads, "use", used.append)
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(cpu_threads, "_seconds_with", lambda number: 1 / number)
    return used


def test_what_was_measured_is_remembered_for_a_while(free: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_threads.settle() == 4
    file = cache_folder() / "blas" / "threads.json"
    monkeypatch.setattr(cpu_threads, "_seconds_with", lambda number: 1.0 * number)
    assert cpu_threads.settle() == 4
    for change in (
        {"time": time.time() - 700},
        {"time": time.time() + 50},
        {"cores": 8},
        {"threads": 9},
        {"time": "x"},
    ):
        file.write_text(json.dumps({"threads": 4, "cores": 4, "time": time.time()} | change), encoding="utf-8")
        assert cpu_threads.settle() == 1, change
    for text in ("", "{", "[]"):
        file.write_text(text, encoding="utf-8")
        assert cpu_threads.settle() == 1
    assert free == [4, 4, *[1] * 8]


def test_a_number_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert (cpu_threads.settle(), cpu_threads.current()) == (0, 0)
    cpu_threads.use(7)  # changes nothing


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is for Linux")
def test_the_library_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if not cpu_threads.is_free():
        pytest.skip("MLX computes with another BLAS here")
    before = cpu_threads.current()
    try:
        for number in (1, 2, 1):
            cpu_threads.use(number)
            assert cpu_threads.current() == number
    finally:
        cpu_threads.use(before)
