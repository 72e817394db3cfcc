"""Numbers that a model gave to examples, kept on disk: computed once, found again by every later run."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_zh.system.storage import append, storage_errors

Values = npt.NDArray[np.float32]


class StoredValues:
    """A text file with an entry of `width` numbers and its checksum on each line.

    Several runs may append at once. A line that was cut short or damaged is skipped, so a kill loses only that line.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path = path
        self._form = struct.Struct(f"<{width}f")

    def read(self) -> dict[str, Values]:
        """All undamaged entries, by digest. Raises StorageError."""
        if not self.path.exists():
            return {}
        entries: dict[str, Values] = {}
        with storage_errors(self.path):
            lines = self.path.read_bytes().split(b"\n")
        for line in lines:
            digest, _, rest = line.partition(b" ")
            values, _, check = rest.partition(b" ")
            try:
                if len(digest) == 32 and int(check, 16) == zlib.crc32(digest + values):
                    entries[digest.decode()] = np.array(self._form.unpack(bytes.fromhex(values.decode())), np.float32)
            except (ValueError, struct.error):
                continue
        return entries

    def append(self, entries: dict[str, Values]) -> None:
        """Append entries and flush them to disk. Raises StorageError."""
        lines = []
        for digest, values in entries.items():
            text = self._form.pack(*values.tolist()).hex()
            lines.append(f"{digest} {text} {zlib.crc32((digest + text).encode()):08x}\n")
        append(self.path, ("\n" + "".join(lines)).encode(), flush=True)  # the last line may lack its newline
