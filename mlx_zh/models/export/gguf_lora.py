"""Write an adapter alone as a GGUF file, which llama.cpp (`--lora`) and Ollama (`ADAPTER`) put over a base model.

Names, shapes and metadata are those of llama.cpp's convert_lora_to_gguf.py: A is (r, in), B is (out, r), and the
product is multiplied by adapter.lora.alpha / r.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_zh.core.sums import norm
from mlx_zh.errors import AdapterError
from mlx_zh.models.export.merge import Adapter, Fusion, Survival, survival
from mlx_zh.models.gguf_model import gguf_architecture, gguf_name, permute
from mlx_zh.system.storage import storage_errors

_FILE_TYPE_F16 = 1  # llama.cpp's llama_ftype MOSTLY_F16
# Rounding to float16 moves a normal number by at most 2^-11 of itself. A larger error means numbers that are too
# small or too large for float16.
_ROUNDING = 2.0**-11


def check_for_gguf(adapter: Adapter) -> None:
    """Raise AdapterError for an adapter that is more than low-rank pairs, with what a GGUF adapter cannot hold."""
    spec = adapter.spec
    if spec.kind == "full":
        problem = "a full fine-tuning has no adapter"
    elif spec.kind == "dora":
        problem = "llama.cpp and Ollama do not know DoRA's magnitudes"
    elif spec.saved:
        problem = f"llama.cpp and Ollama do not know trained tables ({', '.join(spec.saved)})"
    else:
        return
    raise AdapterError(
        f"export.formats: {problem}, so `gguf-lora` cannot be written for {adapter.folder}. Export `gguf`, which "
        "holds the merged model."
    )


def write_gguf_lora(
    path: Path, fusion: Fusion, title: str, *, step: Callable[[], None] = lambda: None
) -> list[Survival]:
    """Write the file; returns what rounding leaves of the change to each matrix.

    A matrix is stored in float16, or in float32 if float16 would lose more than rounding. `step` is called once for
    each adapted matrix. Raises AdapterError as `check_for_gguf` does, and StorageError.
    """
    import gguf

    adapter, config = fusion.adapter, fusion.source.config
    check_for_gguf(adapter)
    writer = gguf.GGUFWriter(None, gguf_architecture(config) or "")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_string("general.name", title)
    writer.add_uint32("general.file_type", _FILE_TYPE_F16)
    writer.add_uint32("general.quantization_version", 2)
    writer.add_float32("adapter.lora.alpha", adapter.spec.scale * adapter.spec.rank)
    survivals: list[Survival] = []
    for name in sorted(adapter.tensors, key=_order):
        step()
        module = name.removesuffix(".weight")
        a, b = (adapter.weights[f"{module}.{leaf}"].astype(mx.float32).T for leaf in ("lora_a", "lora_b"))
        stored = [_narrow(a), _narrow(b)]
        wide = [part.astype(mx.float32) for part in stored]
        product = adapter.spec.scale * (b @ a)  # (out, r) @ (r, in) -> (out, in)
        rest = survival(mx.zeros_like(product), product, adapter.spec.scale * (wide[1] @ wide[0]))
        survivals += [] if rest is None else [rest]
        writer.add_tensor(f"{gguf_name(name)}.lora_a", _numpy(stored[0]))
        writer.add_tensor(f"{gguf_name(name)}.lora_b", _numpy(permute(name, stored[1], config)))
    with storage_errors(path):
        try:
            writer.open_output_file(path)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return survivals


def _narrow(matrix: mx.array) -> mx.array:
    """The matrix in float16 if that only rounds it, else unchanged."""
    half = matrix.astype(mx.float16)
    error, size = float(norm(half.astype(mx.float32) - matrix)), float(norm(matrix))
    return half if error <= _ROUNDING * size else matrix


def _numpy(matrix: mx.array) -> npt.NDArray[np.floating]:
    return np.ascontiguousarray(np.array(matrix))


def _order(name: str) -> tuple[int, str]:
    """Layers in the order of their numbers."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), -1)
    return number, name
