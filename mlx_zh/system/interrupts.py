"""Handle Ctrl-C as a request to stop: the current work is finished first."""

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
    """Yield `stop`. The first signal makes `stop()` true and calls `noted`; the second raises KeyboardInterrupt.

    Python delivers signals only to the main thread; in another thread `stop()` stays false.
    """
    requested = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        noted()

    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield requested.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
