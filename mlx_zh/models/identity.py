"""Which model this is: a digest of its files, read whole, and the samples by which earlier versions knew it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mlx_zh.models import folder, gguf
from mlx_zh.models.adapters.spec import CONFIG_FILE
from mlx_zh.system.digests import Reading, known_digests, value_digest
from mlx_zh.system.json_text import load_json

_SAMPLED = 16  # hex digits of a fingerprint of earlier versions; those of whole files have 64


def fingerprint_of(path: Path, reading: Reading | None = None) -> str:
    """A digest of a model's config and weights, 64 hex digits; tokenizer and template are part of the rendering.

    `path` is a model folder or a .gguf file. Digests of unchanged files are remembered, so only the first call reads
    the weights; `reading` is called before a large file is read. Raises ModelError, DataError.
    """
    files = [path] if path.is_file() else [path / "config.json", *folder.weight_files(path)]
    digests = known_digests(reading).digests(map(str, files))
    return value_digest([[file.name if path.is_dir() else "", digests[str(file)]] for file in files])


def is_model(recorded: object, path: Path, fingerprint: str) -> bool:
    """Whether `recorded`, a fingerprint that this or an earlier version wrote, is that of the model at `path`."""
    if isinstance(recorded, str) and len(recorded) == _SAMPLED:
        return recorded == sampled_fingerprint(path)
    return recorded == fingerprint


def is_foreign(adapter: Path, path: Path, fingerprint: str) -> bool:
    """Whether an adapter folder says that it was trained on another model than the one at `path`."""
    try:
        trained_on = load_json(adapter / CONFIG_FILE)["mlx_zh"]["base_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return not is_model(trained_on, path, fingerprint)


def sampled_fingerprint(path: Path) -> str:
    """What earlier versions recorded: a digest of the config and three samples of each tensor, 16 hex digits."""
    if path.is_file():
        return _sampled_gguf(path)
    digest = hashlib.sha256(json.dumps(folder.read_json(path / "config.json"), sort_keys=True).encode())
    for table in map(folder.read_table, folder.weight_files(path)):
        with table.path.open("rb") as file:
            for name, (kind, shape, first, last) in sorted(table.tensors.items()):
                digest.update(f"{name} {kind} {shape}".encode())
                for at in (first, (first + last) // 2, max(first, last - 128)):
                    file.seek(at)
                    digest.update(file.read(min(128, last - at)))
    return digest.hexdigest()[:_SAMPLED]


def _sampled_gguf(path: Path) -> str:
    table = gguf.read_gguf(path)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(table.header))
        for tensor in table.tensors.values():
            for at in (0, tensor.size // 2, max(0, tensor.size - 128)):
                file.seek(tensor.offset + at)
                digest.update(file.read(min(128, tensor.size - at)))
    return digest.hexdigest()[:_SAMPLED]
