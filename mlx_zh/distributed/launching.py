"""`mlx-zh STAGE RECIPE --hosts FILE`, short for `mlx.launch --hostfile FILE -- python -m mlx_zh.STAGE RECIPE`.

Beside being short, it gives the exit status of the ranks, which `mlx.launch` does not, and Ctrl-C reaches every rank
so that the step in hand is finished and saved.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mlx_zh.errors import DistributedError

INTERRUPT = b"\x03"  # what a terminal makes of Ctrl-C; `mlx.launch` passes its input on to every rank
LISTEN = "MLX_ZH_LISTEN"  # set for ranks whose input is no terminal's
_ENDED = re.compile(rb"Node with rank (\d+) exited with code (-?\d+)")


def add_machines(parser: argparse.ArgumentParser) -> None:
    """`--hosts` and `--processes`, which stages understand that several machines can share."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--hosts", metavar="FILE", help="on all machines of an mlx.launch hostfile: docs/distributed.md"
    )
    group.add_argument("--processes", type=int, metavar="N", help="in N processes on this machine, one for each GPU")


def launch(stage: str, arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run a stage on all ranks; returns 0, or the exit status of one that failed. Raises DistributedError."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_machines(parser)
    _, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    where = _hosts(arguments.hosts) if arguments.hosts else _processes(arguments.processes)
    command = [*_launcher(), *where, "--env", f"{LISTEN}=1", "--", sys.executable, "-m", f"mlx_zh.{stage}", *rest]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, start_new_session=True) as child:
        assert child.stdin is not None and child.stderr is not None
        sink = child.stdin.fileno()

        def forward(_number: int, _frame: object) -> None:
            with suppress(OSError):
                os.write(sink, INTERRUPT)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        ended: list[int] = []
        try:
            for line in child.stderr:
                ended += [int(code) for _, code in _ENDED.findall(line)]
                sys.stderr.write(line.decode(errors="replace"))
                sys.stderr.flush()
            status = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    failed = [code for code in ended if code > 0] or [1 for _ in ended] or [status]
    return failed[0]


def _launcher() -> list[str]:
    beside = Path(sys.executable).with_name("mlx.launch")
    return [str(beside)] if beside.exists() else ["mlx.launch"]


def _hosts(file: str) -> list[str]:
    if not Path(file).is_file():
        raise DistributedError(
            f"--hosts {file}: there is no such file; docs/distributed.md says how `mlx.distributed_config` makes it."
        )
    return ["--hostfile", file]


def _processes(count: int) -> list[str]:
    if count < 1:
        raise DistributedError(f"--processes {count}: write how many, 1 or more.")
    return ["-n", str(count), "--starting-port", str(_free_ports(count))]


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for first in range(32323, 60000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
            return first
    raise DistributedError(f"no {count} free ports in a row were found on this machine.")


def listen() -> None:
    """Let Ctrl-C in the launcher's terminal interrupt this process; and end it, in its own way, with the launcher."""
    if os.environ.get(LISTEN) and not os.isatty(0):
        threading.Thread(target=_listen, name="launcher", daemon=True).start()


def _listen() -> None:
    while data := os.read(0, 1):
        if data == INTERRUPT:
            os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
