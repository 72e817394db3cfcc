"""Handle Ctrl-C and other signals as requests to stop: the current work is finished first.

A terminal that is closed (a lost connection, a closed window) sends SIGHUP; a system that shuts down sends SIGTERM.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_STOPPED = 130  # exit status
_READER_ENDS = 100  # ms in which a program that reads our output ends by the same signal


def stopping() -> tuple[int, ...]:
    """The signals that ask a command to stop; without SIGHUP where that is ignored, as `nohup` asks for."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM) if ignored else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_on_interrupt(
    numbers: tuple[int, ...] = (signal.SIGINT,), noted: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], bool]]:
    """Yield `stop`. The first signal makes `stop()` true and calls `noted`; the second raises KeyboardInterrupt.

    A second SIGHUP does nothing: shell and kernel may both send one. Python delivers signals only to the main thread;
    in another thread `stop()` stays false.
    """
    requested = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if requested.is_set():
            if number != signal.SIGHUP:
                raise KeyboardInterrupt
            return
        requested.set()
        noted()

    with _handled(numbers, handle):
        yield requested.is_set


class Stopped(SystemExit):
    """A signal asks the command to end."""


STOPS = (KeyboardInterrupt, Stopped)  # what signals raise


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside this context, SIGTERM and SIGHUP raise Stopped, so that what is open is closed as after Ctrl-C."""

    def handle(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
            signal.signal(number, signal.SIG_IGN)
        raise Stopped(_STOPPED)

    with _handled(tuple(number for number in stopping() if number != signal.SIGINT), handle):
        yield


@contextmanager
def _handled(numbers: tuple[int, ...], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals inside this context."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_terminal() -> None:
    """Write to nowhere from now on where the terminal, or the program that read the output, has gone."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if _has_gone(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def _has_gone(descriptor: int) -> bool:
    """Whether a stream goes to a terminal, or to a program that has ended or ends now."""
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISFIFO(mode):
        return stat.S_ISCHR(mode)
    reader = select.poll()
    reader.register(descriptor, 0)  # errors are always reported
    return bool(reader.poll(_READER_ENDS))
