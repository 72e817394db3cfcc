"""How many processes are fastest together: chosen by their work, measured with real ones, and remembered."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mlx_zh.system import cpu_processes, cpu_threads
from mlx_zh.system.cpu_processes import Fastest, chosen
from mlx_zh.system.storage import cache_folder


def test_more_processes_are_taken_only_for_clearly_more_work() -> None:
    assert chosen(10.0, {2: 17.0}) == Fastest(2, 1.7)
    assert chosen(10.0, {2: 11.4}) == Fastest(1, 1.0)
    assert chosen(10.0, {2: 6.0}) == Fastest(1, 1.0)  # the cores are busy, or share their units
    assert chosen(10.0, {4: 30.0, 2: 18.0}) == Fastest(4, 3.0)
    assert chosen(10.0, {2: 18.0, 4: 19.0}) == Fastest(2, 1.8)
    assert chosen(10.0, {2: 9.0, 4: 14.0}) == Fastest(4, 1.4)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[int, int]]:
    """Two cores; returns the cores and threads of each measurement, which says that two processes are fastest."""
    calls: list[tuple[int, int]] = []

    def measured(cores: int, threads: int) -> Fastest:
        calls.append((cores, threads))
        return Fastest(2, 1.5)

    monkeypatch.setenv("MLX_ZH_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 2)
    monkeypatch.setattr(cpu_threads, "settle", lambda: 2)
    monkeypatch.setattr(cpu_processes, "measured", measured)
    return calls


def test_what_was_measured_is_remembered_for_a_while(two_cores: list[tuple[int, int]]) -> None:
    assert cpu_processes.fastest() == cpu_processes.fastest() == Fastest(2, 1.5)
    assert two_cores == [(2, 2)]
    file = cache_folder() / "blas" / "processes.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    changes = [{"time": time.time() - 700}, {"cores": 8}, {"processes": 9}, {"processes": "2"}, {"gain": None}]
    for number, change in enumerate(changes, start=2):
        file.write_text(json.dumps(stored | change), encoding="utf-8")
        assert cpu_processes.fastest() == Fastest(2, 1.5)
        assert len(two_cores) == number, change


def test_one_core_and_failing_processes_mean_one(two_cores: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch):
    def fails(cores: int, threads: int) -> Fastest:
        raise EOFError

    monkeypatch.setattr(cpu_processes, "measured", fails)
    assert cpu_processes.fastest() == Fastest()
    monkeypatch.setattr(cpu_threads, "usable_cores", lambda: 1)
    monkeypatch.setattr(cpu_processes, "measured", lambda cores, threads: Fastest(2, 1.5))
    assert cpu_processes.fastest() == Fastest()


def test_real_processes_compute_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is faster here; a process that ends is noticed."""
    monkeypatch.setattr(cpu_processes, "_ROUNDS", 1)
    choice = cpu_processes.measured(2, 1)
    assert choice.processes in (1, 2) and choice.gain >= 1.0
    with cpu_processes._Sample() as sample:
        assert sample.line() == "ready\n"
        sample.begin(0)  # no thread is meant, and one unit at least is computed
        assert float(sample.line()) > 0
        sample._process.kill()
        with pytest.raises(EOFError):
            sample.line()
