"""The terminal: progress bars, and sentences that fit its width."""

from __future__ import annotations

import io
import os
import sys

import pytest
from wcwidth import wcswidth

from mlx_zh.system import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_finished_bar_shows_the_last_steps_loss_and_not_the_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    bar = console.StepBar("SFT", 1, 0)
    bar.update({"loss": 1.25, "tokens_per_second": 100.0, "peak_memory_gb": 2.0})
    bar.note("validating 3/3")
    bar.close()
    last = out.getvalue().rstrip("\n").rpartition("\r")[2]
    assert last.endswith("loss 1.250, 100 tok/s, 2.00 GB") and "100%" in last


def test_a_paragraph_fits_the_terminal_and_goes_whole_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "macro average over subjects " * 4 + "一二三四五六七八九十" * 4
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert console.terminal_width() is None and console.paragraph(text) == f"  {text}"
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(console.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    lines = console.paragraph(text).split("\n")
    assert len(lines) == 3 and all(line.startswith("  ") and wcswidth(line) <= 80 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
