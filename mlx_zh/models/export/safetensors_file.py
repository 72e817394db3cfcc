"""Sharded safetensors, written tensor by tensor: no shard is ever whole in memory.

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

from mlx_zh.system.storage import write_json, written_whole

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
    """A tensor to come."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * _TYPES[self.dtype][1]


def write_shards(
    folder: Path, entries: Sequence[Entry], arrays: Iterable[mx.array], max_bytes: int, kind: str
) -> None:
    """Write files model*.safetensors of at most `max_bytes`, with an index where there are several.

    `arrays` come in the order of `entries`, of their types and shapes; each is written before the next is asked for.
    `kind` is the format that the files say they are for: "mlx" or "pt".
    """
    shards = _split(entries, max_bytes)
    count = len(shards)
    names = (
        [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)] if count > 1 else ["model.safetensors"]
    )
    coming = iter(arrays)
    for file_name, shard in zip(names, shards, strict=True):
        with written_whole(folder / file_name) as file:
            file.write(_header(shard, kind))
            for entry in shard:
                _write(file, entry, next(coming))
    if count > 1:
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.size for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _write(file: BinaryIO, entry: Entry, array: mx.array) -> None:
    if (array.dtype, array.shape) != (entry.dtype, entry.shape):
        raise ValueError(f"{array.dtype} {array.shape} came where {entry} was announced")
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)  # NumPy has no bfloat16
    file.write(np.ascontiguousarray(np.array(array)).data)


def _split(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Consecutive entries of at most `max_bytes` together; a tensor larger than that gets a file of its own."""
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
