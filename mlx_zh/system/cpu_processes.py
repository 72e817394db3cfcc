"""How many processes with one BLAS thread each are fastest together, where MLX computes on the CPU with OpenBLAS.

In one process only the matrix products use several cores; all else computes on one. Several processes use them for
everything, but share caches and memory, and other programs may be at work. So it is measured: each process computes a
sample like a training step's, alone with the threads that are fastest, and all together.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from mlx_zh.errors import StorageError
from mlx_zh.system import cpu_threads
from mlx_zh.system.json_text import read_object
from mlx_zh.system.storage import cache_folder, write_json

MOST = 4  # each holds a copy of the model
_GAIN = 1.15  # more processes are taken if they do so many times the work
_ROUNDS, _SECONDS = 5, 0.2


@dataclass(frozen=True, slots=True)
class Fastest:
    """The number of processes that is fastest, and how many times the work of one process they do."""

    processes: int = 1
    gain: float = 1.0


def fastest() -> Fastest:
    """What is fastest now, measured within the last ten minutes. It takes some seconds."""
    cores = cpu_threads.usable_cores()
    if cores < 2:
        return Fastest()
    threads = cpu_threads.settle()
    file = cache_folder() / "blas" / "processes.json"
    if (last := _lately(file, cores)) is not None:
        return last
    try:
        choice = measured(cores, threads)
    except (OSError, EOFError):  # a process did not start, or was killed
        return Fastest()
    with suppress(OSError, StorageError):  # then it is measured again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**asdict(choice), "cores": cores, "time": time.time()})
    return choice


def chosen(alone: float, together: Mapping[int, float]) -> Fastest:
    """The smallest number of processes that no larger one beats clearly, by the work that each number does."""
    best, rate = 1, alone
    for number, work in sorted(together.items()):
        if work >= _GAIN * rate:
            best, rate = number, work
    return Fastest(best, round(rate / alone, 2))


def measured(cores: int, threads: int) -> Fastest:
    """What is fastest by medians of rounds in turns: one process with `threads`, or several with one each."""
    numbers = sorted({2, min(cores, MOST)})
    with ExitStack() as stack:
        samples = [stack.enter_context(_Sample()) for _ in range(max(numbers))]
        for sample in samples:
            sample.line()
        alone: list[float] = []
        together: dict[int, list[float]] = {number: [] for number in numbers}
        for _ in range(_ROUNDS):
            alone.append(_work(samples[:1], threads))
            for number in numbers:
                together[number].append(_work(samples[:number], 1))
    return chosen(statistics.median(alone), {n: statistics.median(rates) for n, rates in together.items()})


def _work(samples: Sequence[_Sample], threads: int) -> float:
    """The work of so many processes at the same time, in samples a second: all wait for the slowest."""
    for sample in samples:
        sample.begin(threads)
    return len(samples) * min(float(sample.line()) for sample in samples)


class _Sample:
    """A process that computes samples when it is told so."""

    def __enter__(self) -> _Sample:
        free = {name: value for name, value in os.environ.items() if name not in cpu_threads.VARIABLES}
        command = [sys.executable, "-m", "mlx_zh.system.cpu_processes"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=free, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, bufsize=1
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def begin(self, threads: int) -> None:
        """Let it compute with so many threads for a while."""
        _stream(self._process.stdin).write(f"{threads}\n")

    def line(self) -> str:
        """The next line that it writes. Raises EOFError when it has ended."""
        line = _stream(self._process.stdout).readline()
        if not line:
            raise EOFError
        return line


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _lately(file: Path, cores: int) -> Fastest | None:
    """What was measured last, if that was lately and with as many cores."""
    last = read_object(file) or {}
    number, gain = last.get("processes"), last.get("gain")
    if not cpu_threads.is_recent(last.get("time")) or last.get("cores") != cores:
        return None
    if not isinstance(number, int) or not 1 <= number <= MOST or not isinstance(gain, int | float):
        return None
    return Fastest(number, float(gain))


def _unit() -> Callable[[], None]:
    """Work like that of a training step: five products and two SwiGLU pieces, in time about three to two."""
    import mlx.core as mx

    states, weights = mx.random.normal((128, 576)), mx.random.normal((576, 1536))
    gate, up = mx.random.normal((2, 128, 1536))
    mx.eval(states, weights, gate, up)

    def compute() -> None:
        for _ in range(5):
            mx.eval(states @ weights)
        for _ in range(2):
            mx.eval(gate * mx.sigmoid(gate) * up)

    return compute


def _main() -> None:
    """Say that this process is ready; then for each number of threads that is read, say how many units a second."""
    compute = _unit()
    compute()
    _say("ready")
    for line in sys.stdin:
        cpu_threads.use(int(line))
        count, began = 0, time.perf_counter()
        while (seconds := time.perf_counter() - began) < _SECONDS:
            compute()
            count += 1
        _say(str(count / seconds))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _main()
