"""A process that has imported the stages and forks one for each request, because importing takes seconds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Modules that stages import late
_HEAVY = ("tuning", "memory_check", "first_adapter", "reference_pass", "data", "examination")
# What the caches of all runs share: it is made by processes of their own, which take seconds
SHARED = ("blas", "tokenizers")

Request = dict[str, Any]  # stage, arguments, cache, log, and what a server of its own adds


class StageServer:
    """The process, as the test that started it sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, line: str = "") -> int:
        """Send a line; the number that is answered."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def request(self, **wanted: Any) -> int:
        """Send a request; the number that is answered."""
        return self.ask(json.dumps(wanted))


@contextmanager
def serving(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A script that reads requests, until the context ends."""
    command = [sys.executable, script, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


# In the process


def imported(stages: Sequence[str], *late: str) -> dict[str, Callable[[list[str]], int | None]]:
    """The `main` of each stage, with what they import late, and the modules `late`, imported too."""
    for name in (*(f"mlx_zh.stages.{module}" for module in _HEAVY), *late):
        importlib.import_module(name)
    return {name: importlib.import_module(f"mlx_zh.{name}").main for name in stages}


def requests() -> Iterator[Request]:
    """The requests on stdin."""
    while line := sys.stdin.readline():
        yield json.loads(line)


def become_stage(wanted: Request) -> int:
    """In the forked child: what is printed goes to the request's log, and its cache is used. The log's descriptor."""
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["MLX_ZH_CACHE"] = wanted["cache"]
    return log


def share_cache(cache: Path) -> None:
    """Link into a new cache what all caches share."""
    for name in SHARED:
        place = Path(os.environ["MLX_ZH_CACHE"]) / name
        place.mkdir(exist_ok=True)
        (cache / name).symlink_to(place)
