"""`mlx-zh STAGE RECIPE --hosts FILE`, short for `mlx.launch --hostfile FILE -- python -m mlx_zh.STAGE RECIPE`.

Also `--processes N` on NVIDIA GPUs, whose NCCL `mlx.launch` sets up; elsewhere `local.started` starts the processes.
Unlike `mlx.launch`, it returns the exit status of the ranks. It also passes Ctrl-C on to every rank, so that the
current step is finished and saved.
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

INTERRUPT = b"\x03"  # the byte that Ctrl-C sends in a terminal; `mlx.launch` passes its input on to every rank
LISTEN = "MLX_ZH_LISTEN"  # environment variable of ranks that read INTERRUPT from their standard input
_RANK_EXITED = re.compile(rb"Node with rank (\d+) exited with code (-?\d+)")


_ASKED = "MLX_ZH_PROCESSES"  # environment variable: the `--processes` that `mlx-zh run` passes on to its stages


def add_machines(parser: argparse.ArgumentParser) -> None:
    """Add `--hosts` and `--processes`, the options of stages that can run on several machines."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--hosts", metavar="FILE", help="run on all machines of an mlx.launch hostfile; see docs/distributed.md"
    )
    add_processes(group)


def add_processes(parser: argparse._ActionsContainer) -> None:
    """Add `--processes`."""
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="compute in N processes on this machine, one for each GPU (default: 1, and on the CPU what is fastest)",
    )


def processes_asked(arguments: argparse.Namespace) -> int | None:
    """The number of `--processes` of a stage, or of `mlx-zh run` which started it; None if it is not given.

    Raises DistributedError for one below 1.
    """
    given, inherited = arguments.processes, os.environ.get(_ASKED, "")
    count: int | None = given if given is not None else int(inherited) if inherited.isdigit() else None
    if count is not None and count < 1:
        raise DistributedError(f"--processes {count}: give a number of 1 or more.")
    return count


def ask_stages(arguments: argparse.Namespace) -> None:
    """Let all stages that this process starts compute in the number of processes of `--processes`, if it is given.

    Raises DistributedError as `processes_asked` does.
    """
    if (count := processes_asked(arguments)) is not None:
        os.environ[_ASKED] = str(count)


def command_of(stage: str, argv: Sequence[str] | None) -> list[str]:
    """The command of a rank: the stage with its arguments, without `--hosts` and `--processes`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    add_machines(parser)
    _, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    return [sys.executable, "-m", f"mlx_zh.{stage}", *rest]


def launch(stage: str, arguments: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run a stage on all ranks with `mlx.launch`; returns 0, or the exit status of a rank that failed.

    Raises DistributedError when the hostfile is missing or no ports are free.
    """
    placement = _hosts(arguments.hosts) if arguments.hosts else _processes(arguments.processes)
    command = [*_launcher(), *placement, "--env", f"{LISTEN}=1", "--", *command_of(stage, argv)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, start_new_session=True) as child:
        assert child.stdin is not None and child.stderr is not None
        child_input = child.stdin.fileno()

        def forward(_number: int, _frame: object) -> None:
            with suppress(OSError):
                os.write(child_input, INTERRUPT)

        handlers = {number: signal.signal(number, forward) for number in _stopping()}
        codes: list[int] = []  # exit codes of the ranks that `mlx.launch` has reported
        try:
            for line in child.stderr:
                codes += [int(code) for _, code in _RANK_EXITED.findall(line)]
                with suppress(OSError):  # the terminal may have been closed
                    sys.stderr.write(line.decode(errors="replace"))
                    sys.stderr.flush()
            status = child.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    failed = [code for code in codes if code > 0] or [1 for _ in codes] or [status]
    return failed[0]


def _stopping() -> tuple[int, ...]:
    """The signals that ask the ranks to stop; without SIGHUP where that is ignored, as `nohup` asks for."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))


def _launcher() -> list[str]:
    in_environment = Path(sys.executable).with_name("mlx.launch")
    return [str(in_environment)] if in_environment.exists() else ["mlx.launch"]


def _hosts(file: str) -> list[str]:
    if not Path(file).is_file():
        raise DistributedError(
            f"--hosts {file}: there is no such file; make it with `mlx.distributed_config` (docs/distributed.md)."
        )
    return ["--hostfile", file]


def _processes(count: int) -> list[str]:
    return ["-n", str(count), "--starting-port", str(_free_ports(count))]


def _free_ports(count: int) -> int:
    """The first of `count` consecutive free ports. Raises DistributedError when there are none."""
    for first in range(32323, 60000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                socket.create_server(("127.0.0.1", port)).close()
            return first
    raise DistributedError(f"no {count} consecutive ports from 32323 to 60000 are free; close other servers.")


def listen() -> None:
    """Let Ctrl-C in the launcher's terminal interrupt this process, and end the process when the launcher ends.

    Either way the process handles it as a signal, so it can save its work.
    """
    if os.environ.get(LISTEN) and not os.isatty(0):
        threading.Thread(target=_listen, name="launcher", daemon=True).start()


def _listen() -> None:
    while data := os.read(0, 1):
        if data == INTERRUPT:
            os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
