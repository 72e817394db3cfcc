"""The first step's measured peak against the plan's: told once, with a line to report, and only if it matters."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import mlx.core as mx
import pytest
from project import Project, interrupt_after

from mlx_zh.language.notice import notice_of
from mlx_zh.stages import plan_check

TOLD = "the first step took "


@pytest.mark.numeric
def test_the_plan_of_a_tiny_model_is_true(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of these few megabytes, on the CPU. What earlier tests of this process hold does not count."""
    gc.collect()
    held, peak = mx.get_active_memory(), mx.get_peak_memory
    monkeypatch.setattr(mx, "get_peak_memory", lambda: peak() - held)
    monkeypatch.setattr(plan_check, "_SMALL", 0.0)
    assert TOLD not in project.sft().out


def test_less_than_100_megabytes_decide_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "get_peak_memory", lambda: int(0.09e9))
    assert TOLD not in project.sft().out


@pytest.mark.parametrize("peak", [3.0, 0.0])
def test_a_deviation_is_told_once_and_the_report_has_it(
    project: Project, monkeypatch: pytest.MonkeyPatch, peak: float
) -> None:
    """Not again when the run goes on. The line has no path in it."""
    monkeypatch.setattr(mx, "get_peak_memory", lambda: int(peak * 1e9))
    monkeypatch.setattr(plan_check, "_SMALL", 0.0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        first = project.sft()
    second = project.sft()
    assert (first.status, second.status) == (130, 0)
    assert first.out.count(TOLD) == 1 and TOLD not in second.out
    assert f"{TOLD}{peak:.2f} GB at its peak, and the plan said 0.0" in first.out
    [record] = [json.loads(line) for line in Path("runs/tiny/sft/warnings.jsonl").read_text().splitlines()]
    notice = notice_of(record)
    assert notice is not None and notice.code == "plan-deviates" and "第一步的内存峰值" in notice.text("zh")
    line = notice.values["line"]
    assert line.startswith(f"mlx {mx.__version__}") and "sft lora rank=4" in line and "rows: 1, the largest " in line
    assert str(project.model) not in line and str(Path.cwd()) not in line


def test_a_step_that_was_given_up_is_not_compared(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_zh.training import step

    gradients, calls = step.loss_and_gradients, []

    def victim(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("kIOGPUCommandBufferCallbackErrorInnocentVictim")
        return gradients(*arguments)

    monkeypatch.setattr(step, "loss_and_gradients", victim)
    monkeypatch.setattr(mx, "get_peak_memory", lambda: int(3e9))
    result = project.sft()
    assert result.status == 0 and "is done again" in result.out and TOLD not in result.out
