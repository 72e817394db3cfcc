"""Ranks on this machine that rank 0 starts: the process which the user started is rank 0 itself.

So its signals, output, exit status and locks are those of a single process. The other ranks write no files and print
nothing, leave Ctrl-C and other requests to stop to rank 0, and never outlive it.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mlx_zh.errors import DistributedError

_HERE = "MLX_ZH_RANKS_HERE"  # environment variable: the number of ranks, all of them on this machine
_FIRST = "MLX_ZH_RANK_0"  # environment variable of the other ranks: the process of rank 0
_RANK = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")  # environment variables of ranks, from `mlx.launch` and MPI
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_START_SECONDS, _JOIN_SECONDS, _END_SECONDS = 120.0, 60.0, 10.0
_READY = b"ready"


def is_rank() -> bool:
    """Whether this process is one of several ranks already."""
    return any(name in os.environ for name in _RANK)


def ranks_here() -> int:
    """How many ranks of this run share the machine's memory and cores, as far as this program started them."""
    return int(os.environ.get(_HERE, 1))


def follows() -> bool:
    """Whether this process is a rank that rank 0 started."""
    return _FIRST in os.environ


@contextmanager
def started(
    count: int, command: Sequence[str], variables: Mapping[str, str] | None = None
) -> Iterator[Callable[[], None]]:
    """Start ranks 1 to `count` - 1 with `command`; inside this context, this process is rank 0 of their world.

    `variables` are set for all ranks. The function that is yielded is called when all ranks have joined. An error
    ends the ranks at once. Raises DistributedError if one does not start.
    """
    descriptor, name = tempfile.mkstemp(prefix="mlx-zh-ring-", suffix=".json")
    os.write(descriptor, json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]).encode())
    os.close(descriptor)
    hosts = Path(name)
    common = {**(variables or {}), _HERE: str(count), "MLX_HOSTFILE": name}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        ranks += [_start(rank, command, common) for rank in range(1, count)]
        _wait_until_ready(ranks)
        with _environment({**common, "MLX_RANK": "0"}):
            yield lambda: hosts.unlink(missing_ok=True)
        _wait_until_ended(ranks)
    finally:
        hosts.unlink(missing_ok=True)
        for rank in ranks:
            rank.kill()
            rank.communicate()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _start(rank: int, command: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a rank in this process group, so that Ctrl-Z stops it too, with the other signals blocked."""
    environment = os.environ | variables | {"MLX_RANK": str(rank), _FIRST: str(os.getpid())}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # a child begins with the signals of its parent
    try:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_until_ready(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for what each rank writes just before it joins: MLX waits for ever for a rank that has ended."""
    until = time.monotonic() + _START_SECONDS
    for number, rank in enumerate(ranks, start=1):
        assert rank.stdout is not None
        ready, _, _ = select.select([rank.stdout], [], [], max(until - time.monotonic(), 0.0))
        if not ready or rank.stdout.read(len(_READY)) != _READY:
            raise DistributedError(
                f"--processes {len(ranks) + 1}: process {number + 1} did not start. Give a smaller number."
            )


def _wait_until_ended(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + _END_SECONDS
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.wait(max(until - time.monotonic(), 0.0))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def joining() -> Iterator[None]:
    """Around the call that joins the ranks: a rank that rank 0 started says that it is ready, and ends with it.

    While MLX waits for another rank, Python handles no signal. If ranks of this machine do not meet in a minute, one
    has been killed in between, and the alarm ends the process.
    """
    if _HERE not in os.environ:
        yield
        return
    if follows():
        _end_with(int(os.environ[_FIRST]))
        os.write(1, _READY)
        # Only what Python reports goes on to the terminal: MLX writes several lines when rank 0 is killed.
        sys.stderr = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="replace", buffering=1)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
    signal.setitimer(signal.ITIMER_REAL, _JOIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _end_with(process: int) -> None:
    """Let the kernel end this process when its parent ends, where it can (Linux); the heartbeat does so too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != process:
        os._exit(2)


_PR_SET_PDEATHSIG = 1
