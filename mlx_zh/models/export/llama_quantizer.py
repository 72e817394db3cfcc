"""The types of GGUF that llama.cpp itself writes, by the package `llama_cpp` or the program `llama-quantize`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_zh.errors import ModelError
from mlx_zh.models.build import dequantize
from mlx_zh.models.export import in_llama_cpp
from mlx_zh.models.export.gguf_file import GGUFPlan, write_gguf
from mlx_zh.models.export.importance import Importance, write_importance
from mlx_zh.models.export.llama_types import LLAMA_TYPES
from mlx_zh.models.export.merge import Fusion, Survival, survival
from mlx_zh.models.gguf import read_gguf
from mlx_zh.models.gguf_model import gguf_packing, gguf_weights

PROGRAM = "llama-quantize"
_LINES = 3  # of llama.cpp's messages that an error shows


def command() -> list[str] | None:
    """How llama.cpp's quantization is started here: its package, else its program; None if neither is installed."""
    if in_llama_cpp.is_installed():
        return [sys.executable, "-m", "mlx_zh.models.export.llama_library"]
    program = shutil.which(PROGRAM)
    return [program] if program else None


def check(kind: str) -> None:
    """Raise ModelError if the type needs llama.cpp and it is not installed."""
    if kind in LLAMA_TYPES and command() is None:
        raise ModelError(
            f"export.gguf_type: {kind} is written by llama.cpp itself, and neither its package nor the program "
            f"{PROGRAM} is installed. Run `pip install llama-cpp-python` (it needs a C++ compiler; on a Mac, "
            "`xcode-select --install`) or `brew install llama.cpp`, or choose q4_1, q5_1 or q8_0."
        )


def quantize(
    path: Path, plan: GGUFPlan, kind: str, importance: Importance | None, *, step: Callable[[], None]
) -> list[Survival]:
    """Write the plan's f16 file beside `path`, and let llama.cpp quantize it to `path`.

    Returns what is left of the adapter's change. `step` is called once for each tensor. Raises ModelError with
    llama.cpp's last messages, StorageError.
    """
    program = command()
    if program is None:
        raise ModelError(f"Neither the package llama_cpp nor the program {PROGRAM} is installed.")
    full, matrix = path.with_suffix(".f16.part"), path.with_suffix(".imatrix.part")
    try:
        write_gguf(full, plan, step=step)
        options = []
        if importance is not None:
            write_importance(matrix, importance)
            options = ["--imatrix", str(matrix)]
        called = [*program, *options, str(full), str(path), kind.upper()]
        done = subprocess.run(called, capture_output=True, text=True, errors="replace", check=False)
    finally:
        full.unlink(missing_ok=True)
        matrix.unlink(missing_ok=True)
    if done.returncode or not path.is_file():
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-_LINES:])
        raise ModelError(
            f"llama.cpp could not quantize the model to {kind} (status {done.returncode}): {said}. Choose q4_1, q5_1 "
            "or q8_0, or update llama-cpp-python."
        )
    return survivals(plan.fusion, path)


def survivals(fusion: Fusion, path: Path) -> list[Survival]:
    """What is left in a GGUF file of the adapter's change to each changed matrix."""
    file = read_gguf(path)
    stored = gguf_weights(file, fusion.source.config)
    packing = gguf_packing(file) or {}
    common = {key: packing[key] for key in ("group_size", "bits", "mode") if key in packing}
    forms = {
        name.removesuffix(".scales"): packing.get(name.removesuffix(".scales"), common)
        for name in stored
        if name.endswith(".scales")
    }
    dequantize(stored, forms, mx.float32)
    names = [name for name in fusion.source.outline.shapes if name in fusion.adapter.tensors]
    left = []
    for tensor in fusion.tensors(names):
        written = stored.pop(tensor.name).astype(mx.float32)
        if tensor.before is not None and (one := survival(tensor.before, tensor.value, written)):
            left.append(one)
    return left
