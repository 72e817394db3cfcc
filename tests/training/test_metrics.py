"""The metrics file: lines as they were given, and a run taken back to where it was saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mlx_zh.errors import StorageError
from mlx_zh.training.metrics import MetricsLog


def test_lines_are_json_in_order(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "sft" / "metrics.jsonl")
    assert (log.size(), log.read()) == (0, [])
    lines = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-300, "名": "值"}]
    for line in lines:
        log.append(line)
    text = (tmp_path / "sft" / "metrics.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.splitlines()] == lines == log.read()
    assert log.size() == len(text.encode())


def test_cut_takes_back_whole_and_half_lines(tmp_path: Path) -> None:
    """Three lines, saved after the first; a kill in the middle of a fourth. What follows joins the first."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1})
    size = log.size()
    log.append({"step": 2})
    log.append({"step": 3})
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')
    log.cut(size)
    log.append({"step": 2, "again": True})
    assert log.read() == [{"step": 1}, {"step": 2, "again": True}]


def test_cut_never_makes_a_file_longer(tmp_path: Path) -> None:
    """Truncating a file beyond its end fills it with zeros, which are no JSON."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.cut(100)
    assert log.read() == []
    log.append({"step": 1})
    log.cut(100)
    log.append({"step": 2})
    assert log.read() == [{"step": 1}, {"step": 2}]


def test_a_loss_that_is_no_number_can_be_read_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    (line,) = log.read()
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "sft").write_text("")
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written"):
        MetricsLog(tmp_path / "sft" / "metrics.jsonl").append({})
