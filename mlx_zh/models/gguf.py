"""Read GGUF files: metadata, tensor table and tensors, each checked against the size of the file.

The `gguf` package is not used, because it makes a NumPy view of every string (nine seconds for a vocabulary of 128k).
`mx.load` is not used, because it turns BF16 into F16, so that large weights become infinite, and because it does not
check the offsets of a damaged file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_zh.errors import ModelError
from mlx_zh.models.gguf_blocks import BLOCKS, unpack_blocks

if TYPE_CHECKING:
    import mlx.core as mx

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_MOST = 1 << 22  # entries that a table or an array may have; the largest vocabularies have a sixteenth of it
_ROW, _ENTRY = 24, 13  # bytes that a tensor's row and an entry of metadata take at least
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

# Names of all tensor types, so that an error can name a type that is not supported.
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table."""

    name: str
    kind: str  # e.g. Q4_0
    shape: tuple[int, ...]  # in row-major order: (rows, columns)
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensor table of a GGUF file; the weights stay on disk until `read_tensor`."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    header: int  # bytes before the weights and their padding

    @property
    def architecture(self) -> str:
        """GGUF's name of the model's architecture, e.g. llama; "" if the file has none."""
        return str(self.metadata.get("general.architecture", ""))


def read_gguf(path: Path) -> GGUFFile:
    """Parse and check the header of a file.

    Raises ModelError if it is not GGUF, is damaged, or holds tensors of a type that cannot be read.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != _MAGIC:
            raise ModelError(
                f"{path} is not a GGUF file: it does not start with the letters GGUF. If it was downloaded, an error "
                "page may have been saved in its place; download it again."
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            metadata, rows = _header(cursor)
            tensors = _table(cursor, metadata, rows)
            return GGUFFile(path, metadata, tensors, cursor.offset)


class _Cursor:
    """A position in the file's header. Its methods read a value and advance; ModelError past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.offset, self.size = path, data, 4, len(data)

    def take(self, count: int) -> int:
        """Advance by `count` bytes; returns the offset where they start."""
        start, stop = self.offset, self.offset + count
        if stop > self.size:
            raise ModelError(
                f"{self.path} is truncated or damaged: its header needs byte {stop:,} and the file ends at "
                f"{self.size:,}. Download it again."
            )
        self.offset = stop
        return start

    def scalar(self, code: str) -> Any:
        """A number or boolean of `struct`'s format `code`."""
        layout = struct.Struct("<" + code)
        return layout.unpack_from(self.data, self.take(layout.size))[0]

    def string(self) -> str:
        """A string; invalid UTF-8 is replaced."""
        length = self.scalar("Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A metadata value of GGUF's type number `kind`."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ModelError(
                f"{self.path} is damaged: metadata of unknown type {kind} near byte {self.offset:,}. Download it "
                "again."
            )
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        """An array of numbers or strings."""
        kind, length = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS and length <= _MOST:
            layout = np.dtype(_SCALARS[kind]).newbyteorder("<")
            start = self.take(length * layout.itemsize)
            return list(np.frombuffer(self.data, layout, length, start).tolist())
        # A string takes at least the eight bytes of its length.
        if kind != _STRING or length > _MOST or length * 8 > self.size:
            raise ModelError(
                f"{self.path} is damaged: an array of {length:,} values of type {kind} near byte {self.offset:,}. "
                "Download it again."
            )
        return [self.string() for _ in range(length)]


def _header(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """The metadata, and the number of rows of the tensor table."""
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ModelError(
            f"{cursor.path} is GGUF version {version}; versions 2 and 3 (little-endian) can be read. Convert the "
            "model again with a current llama.cpp."
        )
    rows, entries = cursor.scalar("Q"), cursor.scalar("Q")
    if max(rows, entries) > _MOST or rows * _ROW + entries * _ENTRY > cursor.size:
        raise ModelError(
            f"{cursor.path} is damaged: its header says {entries:,} entries of metadata and {rows:,} tensors. "
            "Download it again."
        )
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    return metadata, rows


def _table(cursor: _Cursor, metadata: dict[str, Any], rows: int) -> dict[str, TensorInfo]:
    path = cursor.path
    entries = [_row(cursor) for _ in range(rows)]
    unread = sorted({kind for _, kind, _, _ in entries if kind not in BLOCKS})
    if unread:
        raise ModelError(
            f"{path} holds tensors of type {', '.join(unread)}; only {', '.join(BLOCKS)} can be read. Take the "
            "Q4_K_M, Q8_0 or BF16 file of the same model."
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ModelError(f"{path} is damaged: its alignment is {alignment!r}. Download it again.")
    start = math.ceil(cursor.offset / alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    bad: list[str] = []
    for name, kind, shape, offset in entries:
        weights, size = BLOCKS[kind]
        if name in tensors or not shape or shape[-1] % weights or math.prod(shape) == 0:
            bad.append(f"{name} {kind} {shape}")
            continue
        tensors[name] = TensorInfo(name, kind, shape, start + offset, math.prod(shape) // weights * size)
    if bad:
        raise ModelError(f"{path} is damaged: its table lists impossible tensors: {_some(bad)}. Download it again.")
    late = [t for t in tensors.values() if t.offset + t.size > cursor.size]
    if late:
        end = max(t.offset + t.size for t in late)
        raise ModelError(
            f"{path} is truncated: {len(late)} of {len(tensors)} tensors (first {late[0].name}) end after the file "
            f"does; it should have at least {end:,} bytes and has {cursor.size:,}. Download it again."
        )
    return tensors


def _row(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    name = cursor.string()
    dimensions = cursor.scalar("I")
    if dimensions > 8:
        raise ModelError(f"{cursor.path} is damaged: tensor {name!r} has {dimensions} dimensions. Download it again.")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
    number = cursor.scalar("I")
    return name, _TYPE_NAMES.get(number, f"number {number}"), shape, cursor.scalar("Q")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def read_tensor(file: GGUFFile, name: str) -> dict[str, mx.array]:
    """The tensor as MLX arrays: {"weight"}, or {"weight", "scales", "biases"} in groups of 32 if it is quantized.

    Nothing is rounded. F16, BF16 and F32 keep their type. Quantized weights keep their codes where MLX has such a
    format, and become float32 where it has none. `scale * code + bias` in float32 is the weight of llama.cpp.
    """
    import mlx.core as mx

    info = file.tensors[name]
    raw = np.memmap(file.path, np.uint8, "r", info.offset, (info.size,))
    if info.kind == "F32":
        return {"weight": mx.array(raw.view(np.float32).reshape(info.shape))}
    if info.kind == "F16":
        return {"weight": mx.array(raw.view(np.float16).reshape(info.shape))}
    if info.kind == "BF16":
        return {"weight": mx.array(raw.view(np.uint16).reshape(info.shape)).view(mx.bfloat16)}
    weights, size = BLOCKS[info.kind]
    blocks = mx.array(raw.reshape(-1, info.shape[-1] // weights, size))
    return {part: array.reshape(*info.shape[:-1], -1) for part, array in unpack_blocks(info.kind, blocks).items()}
