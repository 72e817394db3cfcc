"""Ranks on this machine, started as `mlx.launch` starts them, but without its busy waiting.

As a program it runs stages one after another in one process: `python ranks.py '[["sft", "recipe.yaml"], ...]'`. Its
last rank is interrupted (STOP_AT=3) or killed (KILL_AT=3) at a step, gets an argument of its own (LAST_RANK), or
finds packages in a folder of its own (LAST_PATH).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

Ends = list[tuple[int, str, str]]  # exit status, output and errors, by rank


def start(
    count: int, *commands: list[str], folder: Path, folders: Sequence[Path] = (), **variables: str
) -> list[subprocess.Popen[str]]:
    """Stages one after another on `count` ranks, which form a ring on loopback; one rank alone is none.

    They run in `folder`, or each in its own of `folders`.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        addresses = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in sockets]
    hosts = folder / "ring.json"
    hosts.write_text(json.dumps(addresses))
    common = os.environ | {"OPENBLAS_NUM_THREADS": "1", "MLX_ZH_CACHE": str(folder / "cache")} | variables
    return [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps(commands)],
            env=common | ({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if count > 1 else {}),
            cwd=folders[rank] if folders else folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]], seconds: float = 1800) -> Ends:
    """How each rank ended; what has not ended by then is killed."""
    try:
        ends = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, *end) for process, end in zip(processes, ends, strict=True)]


def run(count: int, *commands: list[str], folder: Path, status: int = 0, **variables: str) -> Ends:
    """The same, to the end, which must be `status` on every rank."""
    ends = finish(start(count, *commands, folder=folder, **variables))
    assert [found for found, _, _ in ends] == [status] * count, ends
    return ends


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
    main(json.loads(sys.argv[1]))
