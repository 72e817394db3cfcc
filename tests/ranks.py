"""Ranks on this machine, started as `mlx.launch` starts them, but without its busy waiting.

As a program it runs stages one after another in one process: `python ranks.py '[["sft", "recipe.yaml"], ...]'`. Its
last rank is interrupted (STOP_AT=3) or killed (KILL_AT=3) at a step, gets an argument of its own (LAST_RANK), or
finds packages in a folder of its own (LAST_PATH). With `--serve` it is the process whose forks the ranks are, because
importing takes seconds.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stage_server import StageServer, imported, requests, serving

Ends = list[tuple[int, str, str]]  # exit status, output and errors, by rank
_SECONDS = 1800  # after which a rank that has not ended is ended
_STAGES = ("sft", "dpo", "eval", "sample")


def environments(count: int, folder: Path, **variables: str) -> list[dict[str, str]]:
    """Of each of `count` ranks, which form a ring on loopback; one rank alone is none."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        addresses = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    hosts = folder / "ring.json"
    hosts.write_text(json.dumps(addresses))
    common = os.environ | {"OPENBLAS_NUM_THREADS": "1", "MLX_ZH_CACHE": str(folder / "cache")} | variables
    rings = [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if count > 1 else {} for rank in range(count)]
    return [common | ring for ring in rings]


def start(count: int, *commands: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Stages one after another on `count` ranks, each a process that was started by itself."""
    command = [sys.executable, __file__, json.dumps(commands)]
    return [process(command, environment, folder) for environment in environments(count, folder)]


def process(
    command: list[str], environment: dict[str, str], folder: Path, *, own_session: bool = False
) -> subprocess.Popen[str]:
    """Start `command` in `folder`, without an input; what it prints can be read."""
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=own_session,
    )


def ends(count: int, *commands: list[str], folder: Path, folders: Sequence[Path] = (), **variables: str) -> Ends:
    """Stages one after another on `count` ranks, to their ends. They run in `folder`, or each in one of `folders`."""
    wanted = [
        {
            "commands": commands,
            "environment": environment,
            "folder": str(folders[rank] if folders else folder),
            "logs": [str(folder / f"rank-{rank}-{name}.txt") for name in ("out", "errors")],
        }
        for rank, environment in enumerate(environments(count, folder, **variables))
    ]
    statuses = _server().statuses(wanted)
    texts = [[Path(log).read_text(encoding="utf-8") for log in each["logs"]] for each in wanted]
    return [(status, out, errors) for status, (out, errors) in zip(statuses, texts, strict=True)]


def run(count: int, *commands: list[str], folder: Path, status: int = 0, **variables: str) -> Ends:
    """The same, where the end must be `status` on every rank."""
    ended = ends(count, *commands, folder=folder, **variables)
    assert [found for found, _, _ in ended] == [status] * count, ended
    return ended


class _Server(StageServer):
    def statuses(self, wanted: list[dict[str, Any]]) -> list[int]:
        """The exit status of each rank; -9 of one that was killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"ranks": wanted}) + "\n")
        self._process.stdin.flush()
        return [int(number) for number in self._process.stdout.readline().split()]


@functools.cache
def _server() -> _Server:
    """One for a process of the tests, with which it ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return _Server(stack.enter_context(serving(__file__, "--serve")))


# In the process


def serve() -> None:
    """For every line of stdin, a JSON object: fork its ranks, and answer with their exit statuses."""
    imported(_STAGES)
    for request in requests():
        children = []
        for wanted in request["ranks"]:
            children.append(os.fork())
            if children[-1] == 0:
                os._exit(become_rank(wanted))
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(*statuses, flush=True)


def become_rank(wanted: dict[str, Any]) -> int:
    """In the fork: run the stages; the exit status."""
    signal.alarm(_SECONDS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, log in enumerate(wanted["logs"], start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv = [__file__, json.dumps(wanted["commands"])]
    try:
        main(wanted["commands"])
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main(commands: list[list[Any]]) -> None:
    from mlx_zh.distributed import world
    from mlx_zh.system.entry import entry

    world.MEASURED_SECONDS = 0.2
    rank, hosts = os.environ.get("MLX_RANK", "0"), os.environ.get("MLX_HOSTFILE")
    last = hosts is None or int(rank) == len(json.loads(Path(hosts).read_text())) - 1
    own = [os.environ["LAST_RANK"]] if last and "LAST_RANK" in os.environ else []
    if last:
        sys.path[:0] = [path] if (path := os.environ.get("LAST_PATH")) else []
        for variable, number in (("STOP_AT", signal.SIGINT), ("KILL_AT", signal.SIGKILL)):
            if variable in os.environ:
                signal_at(int(os.environ[variable]), number)
    for stage, *arguments in commands:
        try:
            entry(importlib.import_module(f"mlx_zh.{stage}").main, [*arguments, *own])
        except SystemExit as stop:
            if stop.code:
                raise


def signal_at(step: int, number: signal.Signals) -> None:
    """Send this process a signal after `step`."""
    from mlx_zh.system.console import StepBar

    update = StepBar.update

    def shown(bar: StepBar, figures: dict[str, Any]) -> None:
        update(bar, figures)
        if figures["step"] == step:
            signal.raise_signal(number)

    StepBar.update = shown  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main(json.loads(sys.argv[1]))
