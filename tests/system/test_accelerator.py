"""Work that the accelerator gives up, and MLX's errors that come late."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_zh.system import accelerator
from mlx_zh.system.accelerator import REPEATS, AcceleratorError, repeated, settle

HANG = (
    "[METAL] Command buffer execution failed: Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)."
)


def failing(times: int, message: str = HANG) -> tuple[list[int], object]:
    calls: list[int] = []

    def work() -> int:
        calls.append(len(calls))
        if len(calls) <= times:
            raise RuntimeError(message)
        return 7

    return calls, work


@pytest.mark.parametrize("times", [0, 1, REPEATS])
def test_work_is_done_again(times: int) -> None:
    calls, work = failing(times)
    assert repeated(work) == 7 and len(calls) == times + 1


def test_but_not_for_ever() -> None:
    calls, work = failing(REPEATS + 1)
    with pytest.raises(AcceleratorError) as stop:
        repeated(work)
    assert (stop.value.fault.kind, str(stop.value), len(calls)) == ("watchdog", HANG, REPEATS + 1)


def test_nor_for_other_errors() -> None:
    calls, work = failing(1, "[matmul] shapes")
    with pytest.raises(RuntimeError, match="shapes"):
        repeated(work)
    assert len(calls) == 1


def test_errors_of_work_that_was_under_way_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX raises them at the next call, once each."""
    calls, work = failing(2)
    monkeypatch.setattr(mx, "synchronize", work)
    settle()
    assert len(calls) == 3


def test_it_waits_before_it_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(accelerator, "PAUSE", 2.0)
    monkeypatch.setattr(accelerator.time, "sleep", waited.append)
    repeated(failing(2)[1])
    assert waited == [2.0, 2.0]


def test_another_error_of_late_work_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "synchronize", failing(1, "[matmul] shapes")[1])
    with pytest.raises(RuntimeError, match="shapes"):
        settle()
