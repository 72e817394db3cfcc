"""Downloaded folders: whether they are whole and undamaged, and which commit they are."""

from __future__ import annotations

import re
from pathlib import Path

from mlx_zh.errors import DownloadError
from mlx_zh.system import storage
from mlx_zh.system.digests import FileDigests
from mlx_zh.system.hub_request import MODEL_FILES
from mlx_zh.system.json_text import load_json
from mlx_zh.system.links import is_readable

_COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


def commit_of(folder: Path) -> str | None:
    """The commit of a downloaded folder: the folder's name in Hugging Face's cache, a note in ModelScope's."""
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    try:
        noted = _COMMIT.search((folder / ".mv").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return noted[0] if noted else None


def check_digests(folder: Path, kind: str = "model") -> None:
    """Compare the files that Hugging Face's cache names by SHA-256 with their digests; `FileDigests` caches these.

    The library checks only sizes. A damaged file is removed, so that it is fetched again; then raises DownloadError.
    """
    links = [path for path in folder.rglob("*") if path.is_symlink() and is_readable(folder, path)]
    blobs = [path for path in links if SHA256.fullmatch(path.resolve().name)]
    digests = FileDigests(storage.cache_folder() / f"{kind}s.json").digests(str(path) for path in blobs)
    for path in blobs:
        if digests[str(path)] != path.resolve().name:
            path.resolve().unlink()
            path.unlink()
            raise DownloadError(
                f"{path.name} arrived damaged: its SHA-256 is not the hub's. It was removed; run the command again "
                "to fetch it."
            )


def is_whole(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a model's folder holds the files that `patterns` name, or with the usual patterns a whole model."""
    if patterns != MODEL_FILES:
        return all((folder / pattern).is_file() for pattern in patterns if "*" not in pattern)
    weights = {path.name for path in folder.glob("model*.safetensors") if path.is_file()}
    try:
        index = load_json(folder / "model.safetensors.index.json")
        listed = set(index["weight_map"].values())
    except FileNotFoundError:
        listed = weights
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return (folder / "config.json").is_file() and bool(listed) and listed <= weights
