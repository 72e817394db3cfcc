"""The ranks of a run, on top of `mlx.core.distributed`. No other module knows its back ends.

Every rank runs the same program. A program that `mlx.launch` did not start runs in a world of one rank: its methods
return their arguments, and MLX's distributed back end is not used.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from mlx_zh.distributed import launching, local
from mlx_zh.distributed.heartbeat import PATIENCE, TOLD_AFTER, Heartbeat, Listener, connect, exit_now
from mlx_zh.errors import DistributedError, MlxZhError
from mlx_zh.language.notice import Notice
from mlx_zh.language.translation import in_readers_language

if TYPE_CHECKING:
    import mlx.core as mx

    Arrays = dict[str, mx.array]

T = TypeVar("T")
V = TypeVar("V")
Item = TypeVar("Item")

MEASURED_SECONDS = 10.0
_BUFFER_BYTES = 64 * 2**20  # arrays are summed in flat buffers of this size
_ROUND = 4  # pieces of work per rank between two merges; a run that is killed loses at most these


class World:
    """The ranks of a run, and the rank of this process.

    `speeds` (size,) are proportional to the work that each rank does in a second. `transfer_seconds` is the time
    spent in collectives after all ranks had arrived; `waiting_seconds` is the time, as a mean over the ranks, spent
    waiting for the last rank to arrive.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1
        self.speeds = [1.0] * self.size
        self.here = local.ranks_here() if group else 1  # of them on this machine, as far as rank 0 started them
        self.orderly_end = False  # all ranks know why the run ends, so none reports the others as lost
        self.last_words: Callable[[str], None] = lambda text: None  # called with why the run ends when a rank is lost
        self.transfer_seconds = self.waiting_seconds = 0.0
        self._last_collective = time.monotonic()  # when it ended

    def start_clock(self) -> None:
        """Count as waiting only what comes from here on, not what a rank did before it began to compute."""
        self._last_collective = time.monotonic()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that writes files."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """Indices of this rank's share of the pieces of work with these `costs`, in ascending order.

        The pieces are dealt out from the most to the least expensive. Each goes to the rank that would finish it
        first at its speed, so that all ranks finish at about the same time. Every rank computes the same shares.
        """
        if self.size == 1:
            return list(range(len(costs)))
        loads = [0.0] * self.size
        share = []
        for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            ends = [(load + costs[piece]) / speed for load, speed in zip(loads, self.speeds, strict=True)]
            rank = ends.index(min(ends))
            loads[rank] += costs[piece]
            if rank == self.rank:
                share.append(piece)
        return sorted(share)

    def rounds(self, pieces: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Cut `pieces` into rounds. The ranks merge their results after each round."""
        count = 1 if self.size == 1 else _ROUND * self.size
        for start in range(0, len(pieces), count):
            yield pieces[start : start + count]

    def sum(self, arrays: Arrays) -> Arrays:
        """Each array summed over all ranks (all-reduce). Names, shapes and types must be the same on every rank.

        The arrays are sent in a few large buffers, because many small messages are slow.
        """
        if self.size == 1:
            return arrays
        import mlx.core as mx

        mx.eval(arrays)
        self._barrier()
        began = time.monotonic()
        total: Arrays = {}
        for names in _buffers(arrays):
            flat = self._all_sum(mx.concatenate([arrays[name].reshape(-1) for name in names]))
            ends = np.cumsum([arrays[name].size for name in names]).tolist()
            for name, part in zip(names, mx.split(flat, ends[:-1]), strict=True):
                total[name] = part.reshape(arrays[name].shape)
        mx.eval(total)
        self._last_collective = time.monotonic()
        self.transfer_seconds += self._last_collective - began
        return total

    def add(self, values: Mapping[str, float]) -> dict[str, float]:
        """Plain numbers summed over all ranks, by name."""
        by_rank = self.collect(dict(values))
        return {name: sum(each[name] for each in by_rank) for name in values}

    def broadcast(self, arrays: Arrays) -> Arrays:
        """Rank 0's arrays. The other ranks pass arrays of the same names, shapes and types."""
        import mlx.core as mx

        return self.sum(arrays if self.first else {name: mx.zeros_like(array) for name, array in arrays.items()})

    def collect(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank. `value` must be JSON-serializable."""
        if self.size == 1:
            return [value]
        import mlx.core as mx

        data = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
        ends = np.cumsum(self._gather(data.size, np.int64))
        whole = np.zeros(int(ends[-1]), dtype=np.uint8)
        whole[ends[self.rank] - data.size : ends[self.rank]] = data
        merged = np.array(self._all_sum(mx.array(whole)))
        return [json.loads(part.tobytes()) for part in np.split(merged, ends[:-1])]

    def broadcast_result(self, make: Callable[[], T]) -> T:
        """The JSON-serializable result of `make`, which is called on rank 0 only.

        When it raises MlxZhError, rank 0 raises that error and the other ranks raise SystemExit.
        """
        if self.size == 1:
            return make()
        result: Any = None
        error: MlxZhError | None = None
        if self.first:
            try:
                result = make()
            except MlxZhError as raised:
                error = raised
        failed, result = self.collect((error is not None, result))[0]
        self.orderly_end = failed
        if error is not None:
            raise error
        if failed:
            raise SystemExit(2)  # rank 0 prints the error
        broadcast: T = result
        return broadcast

    def each(self, work: Callable[[], T]) -> T:
        """The result of `work`, which every rank does by itself, without a collective.

        Raises DistributedError on every rank, with the ranks and their reasons, when any raises MlxZhError; when all
        give the same reason, each raises its own error.
        """
        if self.size == 1:
            return work()
        error: MlxZhError | None = None
        try:
            result = work()
        except MlxZhError as raised:
            error = raised
        reasons = self.collect(None if error is None else (socket.gethostname(), str(error)))
        failed = [(rank, *reason) for rank, reason in enumerate(reasons) if reason is not None]
        self.orderly_end = bool(failed)
        if error is not None and len(failed) == self.size and len({text for _, _, text in failed}) == 1:
            raise error
        if failed:
            told = "\n".join(f"rank {rank} ({host}): {text}" for rank, host, text in failed)
            raise DistributedError(told) from error
        return result

    def agree(self, values: V, differences: Callable[[V, V], str], advice: str) -> None:
        """Raise DistributedError on every rank if the JSON-serializable `values` are not the same on all.

        `differences` names those between two ranks' values, empty if there are none, and is called on rank 0;
        `advice` is a sentence that says what to do.
        """
        if self.size == 1:
            return
        everywhere = self.collect((socket.gethostname(), values))

        def compare() -> str:
            mine = everywhere[0][1]
            named = [(rank, host, differences(mine, theirs)) for rank, (host, theirs) in enumerate(everywhere)]
            return "\n".join(
                f"rank {rank} ({host}) differs from rank 0: {text}. {advice}" for rank, host, text in named if text
            )

        if text := self.broadcast_result(compare):
            self.orderly_end = True
            raise DistributedError(text)

    def any(self, value: bool) -> bool:
        """Whether `value` is true on any rank."""
        return value if self.size == 1 else bool(self._gather(float(value)).any())

    def min(self, value: int) -> int:
        """The smallest value of all ranks."""
        return min(self.collect(value))

    def sharing(self) -> int:
        """How many ranks run on this machine, this one included."""
        if self.size == 1:
            return 1
        machine = [socket.gethostname(), uuid.getnode()]
        return sum(other == machine for other in self.collect(machine))

    def folder(self, folder: Path, files: Sequence[str]) -> Path:
        """A folder with the `files` of rank 0's `folder`: that folder, or a temporary copy on other machines."""
        if self.size == 1:
            return folder
        import mlx.core as mx

        sizes = self.broadcast_result(lambda: {name: (folder / name).stat().st_size for name in files})
        if self.here == self.size:
            return folder
        arrays = {name: mx.zeros(size, mx.uint8) for name, size in sizes.items()}
        if self.first:
            arrays = {name: mx.array(np.fromfile(folder / name, np.uint8)) for name in sizes}
        arrays = self.sum(arrays)
        if self.first:
            return folder
        copy = Path(tempfile.mkdtemp(prefix="mlx-zh-"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        for name, array in arrays.items():
            np.array(array).tofile(copy / name)
        return copy

    def measure(self, work: Callable[[], float]) -> None:
        """Set `speeds` from the amount of `work` that each rank does in `MEASURED_SECONDS`.

        Each call of `work` returns the amount of work that it has done, in any unit.
        """
        if self.size == 1:
            return
        work()  # warm-up: kernels are compiled and weights are read
        self._gather(0.0)
        began, done = time.monotonic(), 0.0
        while (elapsed := time.monotonic() - began) < MEASURED_SECONDS:
            done += work()
        self.speeds = self._gather(done / elapsed).tolist()

    def _barrier(self) -> None:
        """Wait for all ranks, and add the mean waiting time of the ranks to `waiting_seconds`."""
        busy = self._gather(time.monotonic() - self._last_collective)
        self.waiting_seconds += float(busy.max() - busy.mean())

    def _gather(self, value: float, kind: type[np.number[Any]] = np.float32) -> npt.NDArray[Any]:
        """The values of all ranks, (size,)."""
        import mlx.core as mx

        row = np.zeros(self.size, dtype=kind)
        row[self.rank] = value
        return np.array(self._all_sum(mx.array(row)))

    def _all_sum(self, array: mx.array) -> mx.array:
        """`array` summed over all ranks.

        It is evaluated before and after, so that no GPU kernel waits for another machine: Metal aborts kernels that
        take too long. Raises DistributedError when the connection is lost.
        """
        import mlx.core as mx

        mx.eval(array)
        try:
            total = mx.distributed.all_sum(array, group=self._group)
            mx.eval(total)
        except RuntimeError as error:
            time.sleep(_GRACE)  # the heartbeat usually ends the process first, with an error that names the rank
            raise DistributedError(
                f"the connection to another rank is lost: {error}. Run the same command again to resume."
            ) from error
        self._last_collective = time.monotonic()
        return total


_GRACE = PATIENCE + 5  # seconds; MLX may notice a lost rank long before the heartbeat does
ALONE = World()


def _buffers(arrays: Arrays) -> Iterator[list[str]]:
    """Names of the arrays of each buffer, which have one type and up to `_BUFFER_BYTES` in all."""
    for kind in dict.fromkeys(array.dtype for array in arrays.values()):
        names: list[str] = []
        size = 0
        for name, array in arrays.items():
            if array.dtype != kind:
                continue
            if names and size + array.nbytes > _BUFFER_BYTES:
                yield names
                names, size = [], 0
            names.append(name)
            size += array.nbytes
        yield names


@contextmanager
def joined(warn: Callable[[str], None]) -> Iterator[World]:
    """The world of this process, as a context. Other ranks than rank 0 print nothing; `warn` is called on rank 0.

    Raises DistributedError when the ranks cannot connect, and SystemExit on a rank that rank 0 started when rank 0
    reports the error. When a rank is lost later, the heartbeat ends the process.
    """
    if not _launched():
        yield World()
        return
    import mlx.core as mx

    launching.listen()
    try:
        with _saying_for_whom(), local.joining():
            world = World(mx.distributed.init())
    except RuntimeError as error:
        raise DistributedError(
            f"the ranks could not connect to each other: {error}. Check the hostfile and the network between the "
            "machines (docs/distributed.md)."
        ) from error
    heartbeat = _heartbeat(world, warn)
    with ExitStack() as stack:
        if not world.first:
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(null))
            if local.follows():
                stack.enter_context(redirect_stderr(null))
        try:
            yield world
            world.orderly_end = True
        except MlxZhError as error:
            if local.follows() and world.orderly_end:
                raise SystemExit(2) from error
            if not world.first and not world.orderly_end:
                error.args = (f"rank {world.rank} ({socket.gethostname()}): {error}",)
            raise
        finally:
            if world.orderly_end or (world.first and world.here == world.size):  # then rank 0 ends the others
                heartbeat.close()


def _heartbeat(world: World, warn: Callable[[str], None]) -> Heartbeat:
    listener = Listener(_address_of_rank_0()) if world.first else None
    key = world.broadcast_result(lambda: listener.key if listener else "")
    peers = {} if listener else connect(key, world.rank)
    reached = world.collect(listener is not None or bool(peers))
    if listener:
        ranks = [rank for rank, connected in enumerate(reached) if connected and rank != 0]
        peers = listener.accept(ranks, lambda missing: warn(Notice("waiting-for-ranks", ranks=_named(missing))))
        for rank in [rank for rank, connected in enumerate(reached) if not connected]:
            warn(Notice("rank-without-heartbeat", rank=rank))

    def lost(text: str) -> None:
        try:
            world.last_words(text)
        finally:
            exit_now(text)

    return Heartbeat(peers, lost)


@contextmanager
def _saying_for_whom() -> Iterator[None]:
    """Inside this context, say after `TOLD_AFTER` seconds for which ranks this one waits.

    MLX waits in silence and lets no other thread of Python run meanwhile, so another process says it.
    """
    if local.follows():  # rank 0 says it
        yield
        return
    text = Notice("waiting-for-ranks", ranks=_named(_other_ranks()))
    code = f"__import__('time').sleep({TOLD_AFTER}); print({in_readers_language(text)!r})"
    command = [sys.executable, "-Sc", code]
    with subprocess.Popen(command, env=os.environ | {"PYTHONIOENCODING": "utf-8:replace"}) as speaker:
        try:
            yield
        finally:
            speaker.kill()


def _other_ranks() -> list[int]:
    """The ranks beside this one, as far as the environment tells."""
    own = int(os.environ.get("MLX_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)
    count = len(_hosts()) or int(os.environ.get("MLX_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 0)
    return [rank for rank in range(count) if rank != own]


def _named(ranks: Sequence[int]) -> list[str]:
    """Ranks with their addresses where these are known: `1 (10.0.0.2)`."""
    hosts = _hosts()
    return [f"{rank} ({hosts[rank]})" if rank < len(hosts) else str(rank) for rank in ranks]


def _hosts() -> list[str]:
    """The address of each rank by MLX's ring; empty with another back end."""
    try:
        rows = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8"))
        return [str(addresses[0]).partition(":")[0] for addresses in rows]
    except (KeyError, OSError, ValueError, TypeError, IndexError):
        return []


def _launched() -> bool:
    """Whether this process is one of several, by the environment variables that `mlx.launch` and MPI set."""
    ring = os.environ.get("MLX_HOSTFILE")
    if ring and not Path(ring).read_text(encoding="utf-8").strip():
        return False  # `mlx.launch` writes an empty file for a single process
    return local.is_rank()


def _address_of_rank_0() -> str:
    """The address at which the back end reaches rank 0; empty where it is not known, as with MPI."""
    if ring := os.environ.get("MLX_HOSTFILE"):
        address: str = json.loads(Path(ring).read_text(encoding="utf-8"))[0][0]
    else:
        address = os.environ.get("MLX_JACCL_COORDINATOR") or os.environ.get("NCCL_HOST_IP") or ""
    return address.partition(":")[0]
