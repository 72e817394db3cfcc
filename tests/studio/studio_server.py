"""The real studio in a process of its own, as users start it."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_START = 60  # seconds in which the studio must have printed its address


@dataclass(frozen=True)
class RunningStudio:
    """A studio that listens. `address` has the token, `base` has none and no final slash."""

    address: str
    base: str
    token: str
    process: subprocess.Popen[str]
    folder: Path

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.base.rpartition(":")[2])


@contextmanager
def studio_process(folder: Path, *options: str, **environment: str) -> Iterator[RunningStudio]:
    """The real studio for a folder, started as users do, on a free port; ended when the context ends."""
    command = [sys.executable, "-m", "mlx_zh.studio", str(folder), "--no-browser", *options]
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    for name in ("PYTEST_CURRENT_TEST", "NICEGUI_USER_SIMULATION"):
        variables.pop(name, None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables, cwd=folder
    ) as process:
        try:
            address = _address(process)
            base, _, token = address.partition("/?token=")
            yield RunningStudio(address, base, token, process, folder)
        finally:
            process.terminate()
            process.wait(10)


def _address(process: subprocess.Popen[str]) -> str:
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    seen = ""
    while line := lines.get(timeout=_START):
        seen += line
        if match := re.search(r"http://\S+token=\S+", line):
            return match[0]
    raise AssertionError(f"the studio did not start:\n{seen}")
