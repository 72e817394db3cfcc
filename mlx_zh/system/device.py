"""The device that MLX computes on. Only this module tells Metal, CUDA and CPU apart."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import psutil


def name() -> str:
    """MLX's name for its default device."""
    import mlx.core as mx

    return str(mx.default_device())


def is_cpu() -> bool:
    """Whether MLX computes on the CPU (not on Metal or CUDA)."""
    import mlx.core as mx

    return mx.default_device() == mx.Device(mx.cpu)


def back_end() -> str:
    """The kind of MLX's default device: cpu, metal or cuda."""
    import mlx.core as mx

    return "cpu" if is_cpu() else "metal" if mx.metal.is_available() else "cuda"


def identity() -> dict[str, str]:
    """What decides how the device computes: MLX's version, the chip, and the version of the system or driver."""
    import mlx.core as mx

    info = mx.device_info()
    return {
        "mlx": version("mlx"),
        "device": f"{info.get('device_name', '')} {info.get('architecture', '')}".strip(),
        "system": f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.release(),
    }


def kernels_ahead() -> int:
    """The number of kernels that MLX schedules, and allocates outputs for, before the device computes them.

    On the CPU it is 60 (measured: a hundred dispatches, about two per kernel). On a GPU it is 0: no chain of small
    kernels holds MLX back there.
    """
    return 60 if is_cpu() else 0


def logit_bytes(memory: float | None = None) -> int:
    """Bytes of float32 logits that are computed at a time, where a step may take `memory` bytes if that is known.

    An H200 takes twice as long for the same positions in chunks of 64 as in chunks of 256, so CUDA gets a 256th of
    the memory, but at least 256 rows of a vocabulary of 128,000, and at most 1,000. A Mac's GPU is busy with 64.
    """
    if back_end() != "cuda":
        return 2**25
    return int(min(max((memory or 0.0) / 256, 2**27), 2**29))


def compiles() -> bool:
    """Whether MLX compiles small functions into one kernel here; on a CPU it would need a C++ compiler."""
    import mlx.core as mx

    return bool(mx.default_device() != mx.Device(mx.cpu))


def remakes_cheaply() -> bool:
    """Whether element-wise work is nearly free beside products, so that training makes such values again by default.

    A CPU would take longer for it, so there it is done where memory is short.
    """
    return not is_cpu()


def computes_exponentials_singly() -> bool:
    """Whether an exponential takes as long as tens of multiplications, because MLX computes one number at a time.

    Its CPU back end does so on Linux. On macOS, Apple's library computes several at once.
    """
    return is_cpu() and sys.platform == "linux"


def summed_at_once() -> int:
    """The number of terms that a sum may give to one accumulator; 0 if there is no such rule.

    MLX's CPU kernels add a whole row up in a few lanes of one vector, or in one number. The kernels of Metal and CUDA
    give each of up to 1,024 threads its part of a row, so their sums are in groups already.
    """
    return 256 if is_cpu() else 0


def max_masked_queries() -> int:
    """The number of queries up to which attention must get a boolean array as its mask; 0 if there is no such rule.

    With a gradient, Metal's back end refuses fused attention with so few queries if the mask is None or "causal".
    """
    return sys.maxsize if _unfused else _rule(_MASKED_QUERIES, back_end())


def attention_tile(name: str | None = None) -> int:
    """The size of a tile of queries or keys in which attention's backward pass works; 0 if it has no such workspace.

    `name` is a back end; by default this one.
    """
    return _rule(_ATTENTION_TILES, name or back_end())


def chip() -> str:
    """The name of the chip that MLX computes on, such as "Apple M1 Max"; empty where MLX has none."""
    import mlx.core as mx

    return str(mx.device_info().get("device_name", ""))


def emulates_bfloat16() -> bool:
    """Whether the GPU has float16 but no bfloat16 arithmetic, as those of the M1, M1 Pro, M1 Max and M1 Ultra."""
    return back_end() == "metal" and chip().split()[:2] == ["Apple", "M1"]


def _rule(table: tuple[tuple[str, tuple[int, ...], int], ...], name: str) -> int:
    """The value of the first rule of `table` for the back end `name` and this version of MLX; 0 if there is none."""
    return next((value for backend, since, value in table if backend == name and mlx_version() >= since), 0)


@cache
def mlx_version() -> tuple[int, ...]:
    """Major, minor and patch version of MLX."""
    return tuple(int(part) for part in version("mlx").split(".")[:3])


# Back end, first MLX version, queries. Since 0.32.4, attention has a backward pass of its own (ml-explore/mlx#4563).
# It needs a log-sum-exp, which Metal's kernels for up to 8 queries do not produce: "the VJP path requires the
# full-attention kernel". A boolean mask takes the unfused way, with the same gradient.
_MASKED_QUERIES = (("metal", (0, 32, 4), 8),)

# Back end, first MLX version, queries and keys of a tile (MLX_SDPA_VJP_BLOCK, 1024 by default).
_ATTENTION_TILES = (("metal", (0, 32, 4), 1024),)


_unfused = False


@contextmanager
def unfused_attention(unfused: bool = True) -> Iterator[None]:
    """Inside this context, attention of any length gets a boolean array as its mask, so that it goes the unfused way.

    With `unfused` false, the context changes nothing.
    """
    global _unfused
    before, _unfused = _unfused, _unfused or unfused
    try:
        yield
    finally:
        _unfused = before


def shortens_float32() -> bool:
    """Whether products of float32 matrices may round their factors to 11 bits (TF32).

    CUDA does so, and Metal on the M5 and later chips; `MLX_ENABLE_TF32=0` forbids it.
    """
    import mlx.core as mx

    if is_cpu() or os.environ.get("MLX_ENABLE_TF32") == "0":
        return False
    if back_end() == "cuda":
        return True
    generation = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return generation is not None and int(generation[1]) >= 17


def free_bytes() -> int:
    """Memory that arrays may still take, in bytes.

    On the CPU: what the system can give without swapping, its file cache included. On a GPU: its recommended working
    set less what MLX already uses.
    """
    import mlx.core as mx

    if is_cpu():
        return int(psutil.virtual_memory().available)
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or info.get("memory_size") or 8 * 2**30
    return max(int(limit) - mx.get_active_memory(), 0)


@dataclass(frozen=True, slots=True)
class Fault:
    """An error of the accelerator that ended a piece of work, but not this process: its kind, and MLX's message."""

    kind: str  # memory, watchdog, victim, ignored or other
    message: str

    @property
    def shortens(self) -> bool:
        """Whether the same work in smaller pieces may succeed."""
        return self.kind in ("memory", "watchdog")


def fault_of(error: BaseException) -> Fault | None:
    """What MLX's error says about the accelerator; None for any other error.

    On the CPU there is no such error: the system kills a process that has no memory.
    """
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    kind = next((kind for part, kind in _FAULTS if part in text), None)
    return None if kind is None else Fault(kind, text)


# Part of MLX's message -> kind. MLX has no exception classes for these. The first five are of its allocators
# (allocator.cpp and device.cpp of Metal, allocator.cpp and utils.cpp of CUDA). The others come from a command buffer
# that was running: "[METAL] Command buffer execution failed: REASON (NUMBER:kIOGPUCommandBufferCallbackErrorNAME)."
# (before macOS 12: kIOAccel…). The reason may be in the system's language, the name is not. MLX raises them since
# 0.32 (ml-explore/mlx#3523) and can go on afterwards; earlier versions ended the process.
_FAULTS = (
    ("[malloc] Unable to allocate", "memory"),
    ("[metal::malloc] Attempting to allocate", "memory"),
    ("[metal::malloc] Resource limit", "memory"),
    ("failed: out of memory", "memory"),  # cudaMallocAsync(&data, size, stream) failed: out of memory
    ("Insufficient Memory", "memory"),
    ("CallbackErrorOutOfMemory", "memory"),
    ("CallbackErrorImpactingInteractivity", "watchdog"),  # macOS 26, ml-explore/mlx#3267: "Impacting Interactivity"
    ("CallbackErrorTimeout", "watchdog"),
    ("Caused GPU Timeout Error", "watchdog"),  # also "(IOAF code 2)"
    ("CallbackErrorHang", "watchdog"),
    ("Caused GPU Hang Error", "watchdog"),  # also "(IOAF code 3)"
    ("CallbackErrorInnocentVictim", "victim"),  # "Discarded (victim of GPU error/recovery)"
    ("CallbackErrorSubmissionsIgnored", "ignored"),  # "Ignored (for causing prior/excessive GPU errors)"
    ("[METAL] Command buffer execution failed", "other"),  # "Caused GPU Address Fault Error" (PageFault), and others
)


def wire_memory() -> int | None:
    """On macOS, keep arrays resident up to `wired_limit`.

    Near the limit MLX waits for running kernels instead of allocating ahead of them. Returns the limit in bytes, or
    None if this system has no such limit.
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
    """Bytes that training may keep resident on the Mac that `info` (from `mx.device_info`) describes.

    That is what macOS recommends, but `DESKTOP_BYTES` are always left to other programs.
    """
    memory = int(info["memory_size"])
    return min(int(info["max_recommended_working_set_size"]), memory - min(DESKTOP_BYTES, memory // 4))


# Left to macOS and other programs; on a small Mac, a quarter of its memory instead.
DESKTOP_BYTES = 4 * 2**30


@contextmanager
def awake() -> Iterator[None]:
    """Inside this context, keep an idle Mac from sleeping. Closing its lid still makes it sleep.

    `caffeinate` watches this process and ends with it, even if it is killed.
    """
    caffeinate = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if caffeinate is None:
        yield
        return
    # Ctrl-C must not reach `caffeinate`: the machine must stay awake until the current step is saved.
    command = [caffeinate, "-i", "-m", "-s", "-w", str(os.getpid())]
    nothing = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True) as child:
        try:
            yield
        finally:
            child.terminate()


def limit_cache() -> None:
    """Keep MLX's cache of freed buffers small: rows differ in length, so most buffers would never be reused."""
    import mlx.core as mx

    mx.set_cache_limit(_CACHE_BYTES)


_CACHE_BYTES = 2**30
