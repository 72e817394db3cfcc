"""Ctrl-C as a wish: the work in hand is finished first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_interrupt(
    numbers: tuple[int, ...] = (signal.SIGINT,), noted: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], bool]]:
    """Within it the first signal makes `stop()` true and calls `noted`; the second raises KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, `stop()` stays false.
    """
    asked = threading.Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        noted()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
