"""The number of threads with which MLX's CPU back end computes matrix products, where OpenBLAS computes them.

OpenBLAS takes all cores and lets its threads spin. On cores that other programs use, two threads have been up to a
hundred times slower than one. So the number is measured, unless OPENBLAS_NUM_THREADS or OMP_NUM_THREADS says it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from mlx_zh.errors import StorageError
from mlx_zh.system import blas
from mlx_zh.system.json_text import read_object
from mlx_zh.system.storage import cache_folder, write_json

_ROUNDS = 5
_SAMPLE = 0.05  # seconds
_GAIN = 1.1  # more threads are taken if they are so many times as fast
_REMEMBERED = 600.0  # seconds: other programs come and go


def is_free() -> bool:
    """Whether the number of threads can be chosen: OpenBLAS computes, and the user has not said a number."""
    return blas.library() is not None and not any(os.environ.get(name) for name in VARIABLES)


VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def settle() -> int:
    """Use as many threads as are fastest now, measured within the last ten minutes; 0 where nothing can be chosen."""
    if not is_free():
        return 0
    number = _lately_measured(usable_cores())
    use(number)
    return number


def use(number: int) -> None:
    """Compute with `number` threads from now on; 0 changes nothing. Other numbers round sums otherwise."""
    if number and is_free():
        _functions().scipy_openblas_set_num_threads(number)


def current() -> int:
    """The number of threads; 0 where nothing can be chosen."""
    return int(_functions().scipy_openblas_get_num_threads()) if is_free() else 0


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fastest(cores: int, seconds_with: Callable[[int], float]) -> int:
    """The smallest of 1, 2, 4 … `cores` threads that no larger one beats clearly, by medians of rounds in turns."""
    choices = sorted({*(2**i for i in range(cores.bit_length())), cores} - {0})
    rounds = [[seconds_with(number) for number in choices] for _ in range(_ROUNDS if len(choices) > 1 else 0)]
    best, best_seconds = 1, float("inf")
    for number, seconds in zip(choices, zip(*rounds, strict=True), strict=False):
        if best_seconds == float("inf") or statistics.median(seconds) * _GAIN < best_seconds:
            best, best_seconds = number, statistics.median(seconds)
    return best


def _seconds_with(number: int) -> float:
    """Seconds of a product of the size of a small model's, with so many threads."""
    import mlx.core as mx

    use(number)
    left, right = mx.ones((256, 576)), mx.ones((576, 1536))
    mx.eval(left, right)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < _SAMPLE:
        mx.eval(left @ right)
        count += 1
    return (time.perf_counter() - began) / count


def _lately_measured(cores: int) -> int:
    """What was measured last, if that was lately and with as many cores; else it is measured and remembered."""
    file = cache_folder() / "blas" / "threads.json"
    last = read_object(file) or {}
    number, when = last.get("threads"), last.get("time")
    if is_recent(when) and last.get("cores") == cores and isinstance(number, int) and 1 <= number <= cores:
        return number
    number = fastest(cores, _seconds_with)
    with suppress(OSError, StorageError):  # then it is measured again
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"threads": number, "cores": cores, "time": time.time()})
    return number


def is_recent(when: object) -> bool:
    """Whether something measured at this time, in seconds since 1970, still holds."""
    return isinstance(when, int | float) and 0 <= time.time() - when < _REMEMBERED


@cache
def _functions() -> Any:
    import ctypes

    return ctypes.CDLL(str(blas.library()))
