"""What this machine computes with: the one place that knows Metal, CUDA and CPU apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil


def name() -> str:
    """What MLX computes on here, as MLX calls it."""
    import mlx.core as mx

    return str(mx.default_device())


def is_cpu() -> bool:
    """Whether MLX computes on the CPU here (no Metal, no CUDA)."""
    import mlx.core as mx

    return mx.default_device() == mx.Device(mx.cpu)


def kernels_ahead() -> int:
    """How many kernels MLX schedules, and allocates outputs for, ahead of what the device computes.

    On the CPU 60 (measured; a hundred dispatches, about two a kernel). A GPU's commands are cut by bytes too, so that
    large arrays end one early: 0 means that nothing need be done about it.
    """
    return 60 if is_cpu() else 0


def free_bytes() -> int:
    """Memory that arrays may still take, in bytes.

    On the CPU what the system could give without swapping, its file cache included; else of the accelerator.
    """
    import mlx.core as mx

    if is_cpu():
        return int(psutil.virtual_memory().available)
    info = mx.device_info()
    most = info.get("max_recommended_working_set_size") or info.get("memory_size") or 8 * 2**30
    return max(int(most) - mx.get_active_memory(), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX raised `error` because the accelerator has no room left. On the CPU the system ends the process."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


# MLX has no class for it, so these are parts of what its back ends say (allocator.cpp and device.cpp of Metal,
# allocator.cpp and utils.cpp of CUDA). "Insufficient Memory" is of a command buffer that had begun: an error that MLX
# hands to the caller since 0.32; before, it ended the process.
_OUT_OF_MEMORY = (
    "[malloc] Unable to allocate",
    "[metal::malloc] Attempting to allocate",
    "[metal::malloc] Resource limit",
    "Insufficient Memory",  # (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)
    "failed: out of memory",  # cudaMallocAsync(&data, size, stream) failed: out of memory
)


def wire_memory() -> int | None:
    """On macOS, keep arrays resident up to what the system recommends, and leave `DESKTOP_BYTES` to everything else.

    Near that limit MLX waits for running kernels instead of allocating ahead of them. Returns the limit in bytes;
    None where there is none to set.
    """
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    limit = wired_limit(mx.device_info())
    mx.set_memory_limit(limit)
    try:
        mx.set_wired_limit(limit)
    except (RuntimeError, ValueError):  # before macOS 15
        return None
    return limit


def wired_limit(info: Mapping[str, str | int]) -> int:
    """What training keeps resident on a Mac that `mx.device_info` describes so, in bytes."""
    memory = int(info["memory_size"])
    return min(int(info["max_recommended_working_set_size"]), memory - min(DESKTOP_BYTES, memory // 4))


# Left to macOS and the programs on the desktop; on a small Mac a quarter of its memory.
DESKTOP_BYTES = 4 * 2**30


@contextmanager
def awake() -> Iterator[None]:
    """Inside, a Mac that is left alone does not go to sleep; closing its lid still sends it there.

    `caffeinate` watches this process and ends with it, also when it is killed.
    """
    caffeinate = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if caffeinate is None:
        yield
        return
    # A session of its own: Ctrl-C is for us, and the machine must stay awake until the step in hand is saved.
    command = [caffeinate, "-i", "-m", "-s", "-w", str(os.getpid())]
    nothing = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True) as child:
        try:
            yield
        finally:
            child.terminate()


def bound_cache() -> None:
    """Keep MLX's cache of freed buffers small: rows differ in length, so most of it would never be used again."""
    import mlx.core as mx

    mx.set_cache_limit(_CACHE_BYTES)


_CACHE_BYTES = 2**30
