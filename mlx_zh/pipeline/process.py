"""Runs a stage in a process of its own, so that its memory is freed when it ends, and passes signals on to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from mlx_zh.system.interrupts import leave_terminal, stopping
from mlx_zh.system.locks import Lock


def run_stage(stage: str, arguments: Sequence[str], lock: Lock) -> int:
    """Run `python -m mlx_zh.STAGE ARGUMENTS` and return its exit status, 128 + N when signal N ended it.

    The stage inherits the lock of the run folder, so a stage that outlives its pipeline still holds the lock.
    """
    command = [sys.executable, "-m", f"mlx_zh.{stage}", *arguments]
    environment = os.environ | lock.environment
    sys.stdout.flush()
    with (
        _Forwarding() as forwarding,
        subprocess.Popen(command, pass_fds=(lock.descriptor,), env=environment) as child,
    ):
        forwarding.follow(child)
        status = child.wait()
    return status if status >= 0 else 128 - status


class _Forwarding:
    """Passes SIGINT, SIGTERM and SIGHUP on to a child process.

    A terminal sends Ctrl-C to the child as well. That SIGINT is not passed on, because a second one would stop the
    child before it has saved its work.
    """

    def __enter__(self) -> _Forwarding:
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []  # signals received before the child existed
        self._handlers = {number: signal.signal(number, self._forward) for number in stopping()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def follow(self, child: subprocess.Popen[bytes]) -> None:
        """Send `child` the signals received so far, and those that follow."""
        self._child = child
        for number in self._early:
            child.send_signal(number)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if number == signal.SIGINT and in_foreground():
            return
        if self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)


def in_foreground() -> bool:
    """Whether this process is in the foreground group of its terminal, which Ctrl-C goes to."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
