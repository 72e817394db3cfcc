"""llama.cpp's own quantization by the package `llama_cpp`, in a process of its own.

llama.cpp ends the process in which it fails an assertion. The arguments are those of the program `llama-quantize`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_zh.models.export.importance import read_importance
from mlx_zh.models.export.llama_types import LLAMA_TYPES

_BUFFER = 1 << 30  # bytes of rows that llama.cpp holds at once; its own default is 8 GiB


def main(argv: list[str] | None = None) -> int:
    """Quantize one file; returns the exit status. llama.cpp writes to the standard error stream."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("kind", type=str.lower, choices=LLAMA_TYPES)
    arguments = parser.parse_args(argv)
    llama_cpp = import_module("llama_cpp")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = LLAMA_TYPES[arguments.kind].number
    if hasattr(settings, "max_buf_size"):
        settings.max_buf_size = _BUFFER
    entries = importance_entries(llama_cpp, arguments.imatrix) if arguments.imatrix else None
    if entries is not None:
        settings.imatrix = _pointer(settings, entries)
    source, target = (os.fsencode(name) for name in (arguments.source, arguments.target))
    return int(llama_cpp.llama_model_quantize(source, target, ctypes.byref(settings)))


def importance_entries(llama_cpp: Any, path: Path) -> Any:
    """The importance matrix of a file as llama.cpp's array; its last entry is empty."""
    table = read_importance(path)
    entries = (llama_cpp.llama_model_imatrix_data * (len(table) + 1))()
    for entry, (name, values) in zip(entries, table.items(), strict=False):
        numbers = (ctypes.c_float * values.size)(*values.tolist())
        entry.name, entry.data, entry.size = (
            name.encode(),
            ctypes.cast(numbers, ctypes.POINTER(ctypes.c_float)),
            len(numbers),
        )
    return entries


def _pointer(settings: Any, entries: Any) -> Any:
    """The array as the field `imatrix` takes it: a typed pointer, or an untyped one in older packages."""
    kind = next(kind for name, kind in settings._fields_ if name == "imatrix")
    return ctypes.cast(entries, kind)


if __name__ == "__main__":
    sys.exit(main())
