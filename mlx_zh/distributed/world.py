"""Several machines as one, on MLX's distributed engine: the one place that knows ranks and back ends.

Every rank runs the same program. A world of one is what every program runs in that was not started by `mlx.launch`;
its methods give back what they are given, and MLX's engine is not touched.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from mlx_zh.distributed import launching
from mlx_zh.distributed.heartbeat import PATIENCE, Door, Heartbeat, connect
from mlx_zh.errors import DistributedError, MlxZhError
from mlx_zh.language.notice import Notice

if TYPE_CHECKING:
    import mlx.core as mx

    Arrays = dict[str, mx.array]

T = TypeVar("T")
Item = TypeVar("Item")

MEASURED_SECONDS = 10.0
_BUFFER_BYTES = 64 * 2**20  # arrays are summed in flat buffers of this size
_ROUND = 4  # pieces of work a rank between two merges: what a killed pass loses


class World:
    """The ranks of a run, and this process among them.

    `speeds` (size,) are in proportion to what each rank computes in a second. `transfer_seconds` were spent in
    collectives when all ranks were there; `waiting_seconds`, on average over the ranks, until the last one was.
    """

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group
        self.rank = group.rank() if group else 0
        self.size = group.size() if group else 1
        self.speeds = [1.0] * self.size
        self.ends = False  # whether all ranks know that the run ends here
        self.transfer_seconds = self.waiting_seconds = 0.0
        self._free = time.monotonic()  # when the last collective ended

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """The pieces of work of this rank, in rising order, so that ranks finish together.

        The longest piece first, each to the rank that would have done it first: the same on every rank.
        """
        if self.size == 1:
            return list(range(len(costs)))
        loads = [0.0] * self.size
        mine = []
        for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            ends = [(load + costs[piece]) / speed for load, speed in zip(loads, self.speeds, strict=True)]
            rank = ends.index(min(ends))
            loads[rank] += costs[piece]
            if rank == self.rank:
                mine.append(piece)
        return sorted(mine)

    def rounds(self, pieces: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Work in parts, after each of which results are merged."""
        several = 1 if self.size == 1 else _ROUND * self.size
        for start in range(0, len(pieces), several):
            yield pieces[start : start + several]

    def sum(self, arrays: Arrays) -> Arrays:
        """Each array added up over all ranks, in few large buffers. Names and shapes are the same on every rank."""
        if self.size == 1:
            return arrays
        import mlx.core as mx

        mx.eval(arrays)
        self._meet()
        began = time.monotonic()
        total: Arrays = {}
        for names in _buffers(arrays):
            flat = self._all_sum(mx.concatenate([arrays[name].reshape(-1) for name in names]))
            ends = np.cumsum([arrays[name].size for name in names]).tolist()
            for name, part in zip(names, mx.split(flat, ends[:-1]), strict=True):
                total[name] = part.reshape(arrays[name].shape)
        mx.eval(total)
        self._free = time.monotonic()
        self.transfer_seconds += self._free - began
        return total

    def add(self, values: Mapping[str, float]) -> dict[str, float]:
        """Plain numbers, added up over all ranks."""
        everywhere = self.collect(dict(values))
        return {name: sum(each[name] for each in everywhere) for name in values}

    def broadcast(self, arrays: Arrays) -> Arrays:
        """Rank 0's arrays, on every rank."""
        import mlx.core as mx

        return self.sum(arrays if self.first else {name: mx.zeros_like(array) for name, array in arrays.items()})

    def collect(self, value: T) -> list[T]:
        """Every rank's plain value (as in JSON), by rank."""
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
        """What `make` gives on rank 0, a plain value; where it raises there, all ranks end."""
        if self.size == 1:
            return make()
        answer: Any = None
        error: MlxZhError | None = None
        if self.first:
            try:
                answer = make()
            except MlxZhError as raised:
                error = raised
        failed, answer = self.collect((error is not None, answer))[0]
        self.ends = failed
        if error is not None:
            raise error
        if failed:
            raise SystemExit(2)  # rank 0 tells why
        found: T = answer
        return found

    def any(self, here: bool) -> bool:
        """Whether it is so on some rank."""
        return here if self.size == 1 else bool(self._gather(float(here)).any())

    def min(self, value: int) -> int:
        """The smallest of all ranks' values."""
        return min(self.collect(value))

    def folder(self, folder: Path, files: Sequence[str]) -> Path:
        """A folder that holds rank 0's `files` of `folder`: that one on rank 0, a temporary copy on others."""
        if self.size == 1:
            return folder
        import mlx.core as mx

        sizes = self.broadcast_result(lambda: {name: (folder / name).stat().st_size for name in files})
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
        """Set `speeds` from how much of `work` (which returns its amount) each rank does in some seconds."""
        if self.size == 1:
            return
        work()  # warm-up: compilation, first use of the weights
        self._gather(0.0)
        began, done = time.monotonic(), 0.0
        while (elapsed := time.monotonic() - began) < MEASURED_SECONDS:
            done += work()
        self.speeds = self._gather(done / elapsed).tolist()

    def _meet(self) -> None:
        """Wait until all ranks are here, and note how long they did on average."""
        busy = self._gather(time.monotonic() - self._free)
        self.waiting_seconds += float(busy.max() - busy.mean())

    def _gather(self, value: float, kind: type[np.number[Any]] = np.float32) -> npt.NDArray[Any]:
        """A number of every rank, (size,)."""
        import mlx.core as mx

        row = np.zeros(self.size, dtype=kind)
        row[self.rank] = value
        return np.array(self._all_sum(mx.array(row)))

    def _all_sum(self, array: mx.array) -> mx.array:
        """Evaluated before and after, so that no kernel on an accelerator waits for another machine: Metal ends
        those that take long."""
        import mlx.core as mx

        mx.eval(array)
        try:
            total = mx.distributed.all_sum(array, group=self._group)
            mx.eval(total)
        except RuntimeError as error:
            time.sleep(_GRACE)  # the heartbeat knows better, and ends the process
            raise DistributedError(f"the connection to another rank is lost: {error}.") from error
        self._free = time.monotonic()
        return total


_GRACE = PATIENCE + 5  # seconds; a process that ends drops MLX's connections long before its last one
ALONE = World()


def _buffers(arrays: Arrays) -> Iterator[list[str]]:
    """Names, in order, of the arrays that are summed together: of one type, up to `_BUFFER_BYTES`."""
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
    """The world that this process was started in. Only rank 0's output is shown; `warn` is called on rank 0.

    Raises DistributedError where the ranks do not find each other. A rank that is gone later ends the process.
    """
    if not _launched():
        yield World()
        return
    import mlx.core as mx

    launching.listen()
    try:
        world = World(mx.distributed.init())
    except RuntimeError as error:
        raise DistributedError(f"the ranks did not find each other: {error}.") from error
    heartbeat = _heartbeat(world, warn)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(sys.stdout if world.first else nowhere):
        try:
            yield world
            world.ends = True
        except MlxZhError as error:
            if not world.first:
                error.args = (f"rank {world.rank} ({socket.gethostname()}): {error}",)
            raise
        finally:
            if world.ends:
                heartbeat.close()


def _heartbeat(world: World, warn: Callable[[str], None]) -> Heartbeat:
    door = Door(_address_of_rank_0()) if world.first else None
    key = world.broadcast_result(lambda: door.key if door else "")
    peers = {} if door else connect(key, world.rank)
    reached = world.collect(door is not None or bool(peers))
    if door:
        peers = door.accept(sum(reached) - 1)
        for rank in [rank for rank, here in enumerate(reached) if not here]:
            warn(Notice("rank-without-heartbeat", rank=rank))
    return Heartbeat(peers)


def _launched() -> bool:
    """Whether this process is one of several: the variables that `mlx.launch` and MPI set."""
    ring = os.environ.get("MLX_HOSTFILE")
    if ring and not Path(ring).read_text(encoding="utf-8").strip():
        return False  # a ring of one
    return any(name in os.environ for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK"))


def _address_of_rank_0() -> str:
    """Where the other ranks reach rank 0, as the back end was told; empty where it was not (MPI)."""
    if ring := os.environ.get("MLX_HOSTFILE"):
        place: str = json.loads(Path(ring).read_text(encoding="utf-8"))[0][0]
    else:
        place = os.environ.get("MLX_JACCL_COORDINATOR") or os.environ.get("NCCL_HOST_IP") or ""
    return place.partition(":")[0]
