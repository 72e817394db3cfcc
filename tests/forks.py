"""A process that has imported what scripts need and runs each in a fork of it, because importing takes seconds."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Forks:
    """The process, as the test that started it sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(
        self, script: str, arguments: Sequence[str], folder: Path, environment: dict[str, str], seconds: int
    ) -> subprocess.CompletedProcess[str]:
        """`python -c SCRIPT ARGUMENTS` in a folder, with changes to the environment; SIGALRM ends it after a time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        logs = [folder / f"fork-{name}.txt" for name in ("out", "errors")]
        wanted = {"script": script, "arguments": arguments, "folder": str(folder), "environment": environment}
        self._process.stdin.write(json.dumps(wanted | {"logs": list(map(str, logs)), "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        out, errors = (log.read_text(encoding="utf-8") for log in logs)
        for log in logs:
            log.unlink()
        return subprocess.CompletedProcess([script, *arguments], status, out, errors)


@contextmanager
def forks(modules: Sequence[str], environment: dict[str, str]) -> Iterator[Forks]:
    """A process with this environment that has imported `modules`."""
    command = [sys.executable, __file__, *modules]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield Forks(process)
        assert process.stdin is not None
        process.stdin.close()


# In the process


def _become(wanted: dict[str, Any]) -> int:
    """In the fork: run the script; its exit status."""
    for number, log in enumerate(wanted["logs"], start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    signal.alarm(wanted["seconds"])
    os.chdir(wanted["folder"])
    os.environ.update(wanted["environment"])
    sys.argv = ["-c", *wanted["arguments"]]
    try:
        exec(wanted["script"], {"__name__": "__main__"})
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(modules: Sequence[str]) -> None:
    """For every line of stdin, a JSON object: fork, and answer with the script's exit status."""
    for module in modules:
        importlib.import_module(module)
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            status = _become(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
