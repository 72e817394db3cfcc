"""Write sharded safetensors tensor by tensor, so that memory never holds a whole shard.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlx_zh.system.storage import write_exact_json, written_whole

INDEX = "model.safetensors.index.json"

_TYPES = {
    mx.float32: ("F32", 4),
    mx.bfloat16: ("BF16", 2),
    mx.float16: ("F16", 2),
    mx.uint32: ("U32", 4),
    mx.uint8: ("U8", 1),
}


@dataclass(frozen=True)
class Entry:
    """The name, dtype and shape of a tensor to be written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * _TYPES[self.dtype][1]


def write_shards(
    folder: Path, entries: Sequence[Entry], arrays: Iterable[mx.array], max_bytes: int, kind: str
) -> None:
    """Write files model*.safetensors of at most `max_bytes` each, with an index if there are several.

    `arrays` are in the order of `entries`, with their dtypes and shapes; each is written before the next is taken.
    `kind` is the "format" in the files' metadata: "mlx" or "pt". Raises StorageError if a file cannot be written,
    ValueError if an array does not match its entry.
    """
    shards = _split(entries, max_bytes)
    count = len(shards)
    names = (
        [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)] if count > 1 else ["model.safetensors"]
    )
    remaining = iter(arrays)
    for file_name, shard in zip(names, shards, strict=True):
        with written_whole(folder / file_name) as file:
            file.write(_header(shard, kind))
            for entry in shard:
                _write(file, entry, next(remaining))
    if count > 1:
        file_of = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.size for entry in entries)
        write_exact_json(
            folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        )


def _write(file: BinaryIO, entry: Entry, array: mx.array) -> None:
    if (array.dtype, array.shape) != (entry.dtype, entry.shape):
        raise ValueError(f"expected {entry}, got an array of {array.dtype} {array.shape}")
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)  # NumPy has no bfloat16
    file.write(np.ascontiguousarray(np.array(array)).data)


def _split(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Groups of consecutive entries of at most `max_bytes`; a larger tensor is a group of its own."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(entry)
        room -= entry.size
    return shards


def _header(shard: Sequence[Entry], kind: str) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": kind}}
    offset = 0
    for entry in shard:
        table[entry.name] = {
            "dtype": _TYPES[entry.dtype][0],
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
