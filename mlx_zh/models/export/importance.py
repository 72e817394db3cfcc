"""llama.cpp's importance matrix: how large the inputs of each matrix are, column by column.

File: the older of llama.cpp's two formats, which all versions of `llama-quantize` read; see load_legacy_imatrix in
its tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlx_zh.core.block_forms import form_of
from mlx_zh.core.logprobs import hidden_states
from mlx_zh.core.packing import PackedBatch
from mlx_zh.models.export.fidelity import HeldOut
from mlx_zh.models.gguf_model import gguf_name
from mlx_zh.system.accelerator import repeated
from mlx_zh.system.storage import storage_errors

Importance = Mapping[str, npt.NDArray[np.float32]]  # GGUF's tensor name -> mean square of each input (columns,)


_MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def measure_importance(model: Any, text: HeldOut) -> Importance:
    """The mean square of each input of every matrix of the blocks, over all tokens of `text`.

    The model is as before afterwards. Embedding and head are left out, as llama.cpp does. Raises AcceleratorError.
    """
    form_of(model)  # described now, while its matrices are its own
    watched: dict[str, _Watched] = {}
    for index, layer in enumerate(model.layers):
        for path in _MATRICES:
            part, leaf = path.split(".")
            holder = getattr(layer, part)
            watched[gguf_name(f"model.layers.{index}.{path}.weight")] = _Watched(holder, leaf)
    try:
        for row in text.rows:
            repeated(partial(_run, model, row, list(watched.values())))
    finally:
        for watch in watched.values():
            watch.remove()
    tokens = sum(int(row.tokens.size) for row in text.rows)
    return {name: np.array(watch.total / tokens) for name, watch in watched.items()}


class _Watched(nn.Module):
    """A matrix that sums the squares of its inputs; `remove` puts the matrix back."""

    def __init__(self, holder: Any, leaf: str) -> None:
        super().__init__()
        self.inner = getattr(holder, leaf)
        self._holder, self._leaf = holder, leaf
        self.total: Any = mx.array(0.0)
        self.last: Any = None
        setattr(holder, leaf, self)

    def __call__(self, x: mx.array) -> mx.array:
        self.last = (x.astype(mx.float32) ** 2).reshape(-1, x.shape[-1]).sum(axis=0)
        return self.inner(x)

    def remove(self) -> None:
        setattr(self._holder, self._leaf, self.inner)


def _run(model: nn.Module, row: PackedBatch, watched: Sequence[_Watched]) -> None:
    """Add one row's sums. Work that is given up and done again is added once."""
    mx.eval(hidden_states(model, row, grad=False), [watch.last for watch in watched])
    for watch in watched:
        watch.total = watch.total + watch.last
    mx.eval([watch.total for watch in watched])


def write_importance(path: Path, importance: Importance) -> None:
    """Write llama.cpp's file. Raises StorageError."""
    with storage_errors(path), path.open("wb") as file:
        file.write(struct.pack("<i", len(importance)))
        for name, values in importance.items():
            encoded = name.encode()
            # One chunk: the reader divides the values by the number of chunks.
            file.write(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", 1, values.size))
            file.write(values.astype("<f4").tobytes())
        file.write(struct.pack("<i", 1))  # the chunks; then the name of the text, which is empty
        file.write(struct.pack("<i", 0))


def read_importance(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Read what `write_importance` wrote."""
    data = path.read_bytes()
    (count,), at = struct.unpack_from("<i", data), 4
    table = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        at += 4 + length
        _, size = struct.unpack_from("<ii", data, at)
        table[name] = np.frombuffer(data, "<f4", size, at + 8).astype(np.float32)
        at += 8 + 4 * size
    return table
