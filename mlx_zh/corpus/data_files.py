"""The files of a data set: those of a folder, and those of a registered set, which `system.hub` downloads."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mlx_zh.corpus.excel_rows import EXCEL_SUFFIXES
from mlx_zh.corpus.text_files import PACKED_SUFFIXES
from mlx_zh.errors import DataError, DownloadError
from mlx_zh.recipe import DataSet
from mlx_zh.system import hub as hubs
from mlx_zh.system import storage
from mlx_zh.system.digests import FileDigests, text_digest
from mlx_zh.system.downloads import Progress, RemoteFile, fetch_file
from mlx_zh.system.links import check_file
from mlx_zh.system.storage import is_system_note, visible_tree

_ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
DATA_SUFFIXES = (*_ROW_SUFFIXES, ".txt")
# A hub's sets explain themselves in .md files, so these are data only on the user's own disk.
LOCAL_SUFFIXES = (*DATA_SUFFIXES, ".md")
_OWN_TEXTS = (".txt", ".md")  # read only if a pattern names them, or if a folder has no files of rows
TABLE_SUFFIXES = (
    ".csv",
    ".tsv",
    *EXCEL_SUFFIXES,
)  # read only if a pattern names them, or if a folder has no other data files
STORED_SUFFIXES = (".arrow", ".zip")  # read only if a pattern names them, or if a folder has no others
# Files that are no rows: what describes a set, and what a model's folder holds beside its weights.
_ABOUT = re.compile(
    r"dataset_infos?\.json|dataset_dict\.json|state\.json|(\w+_)?config\.json|LICENSE.*|README.*"
    r"|tokenizer\.json|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.index\.json",
    re.I,
)
_OTHER_SPLITS = ("test", "validation", "valid", "val", "dev")  # beside `train`, in the names of files
_SPLITS = re.compile(rf"(?:^|[/_.-])(train|{'|'.join(_OTHER_SPLITS)})(?:[/_.-]|$)")

WAY = (
    "Check the network and the name; set HF_ENDPOINT to a mirror where Hugging Face cannot be reached, or make an "
    "entry of your own in data.registry with hub: modelscope; or download the files another way and write "
    "{name: NAME, path: FILE-OR-FOLDER} in the recipe."
)


class NoDataFiles(DownloadError):
    """A data set on a hub that has no file of the requested kind and split."""


def registered_files(name: str, entry: DataSet, progress: Progress | None = None, hub: str = "auto") -> list[Path]:
    """The files of a registered data set, downloaded if they are not in the cache.

    `name` is the user's name of the set. `progress` is called while large files are downloaded. Of a set that is on
    both hubs, the copy on `hub` is taken.

    Raises DownloadError, with a remedy, if the hub does not have the set, limits requests or does not answer, and for
    a damaged file; StorageError if the disk is full; DataError for a set that the user must download by hand.
    """
    return _PLACES[entry.hub](name, entry, progress, hub)


def folder_files(folder: Path, patterns: Sequence[str] = (), split: str = "train") -> list[Path]:
    """The data files of a folder, sorted: those of `split` that match a pattern, or all of `split` without patterns.

    Without patterns, these are the files of rows; in a folder without them the texts, without texts the tables, and
    without tables the Arrow files and zip archives. Raises DataError for a link that leads out of the folder, and if
    there is no data file.
    """
    if patterns:
        files = _data_files(folder, patterns, split)
    else:
        kinds = (_ROW_SUFFIXES, _OWN_TEXTS, TABLE_SUFFIXES, STORED_SUFFIXES)
        files = next((files for kind in kinds if (files := _data_files(folder, patterns_of(kind), split))), [])
    if not files:
        named = ", ".join(patterns or [f"*{suffix}" for suffix in (*LOCAL_SUFFIXES, *TABLE_SUFFIXES)])
        raise DataError(f"{folder}: no data file in it ({named}); name the files, or another folder")
    return files


def other_files(folder: Path, patterns: Sequence[str]) -> dict[Path, str]:
    """The data files of a folder that match a pattern and belong to another split than `train`, with its name."""
    train = _data_files(folder, patterns, "train")
    by_split = {split: _data_files(folder, patterns, split) for split in _OTHER_SPLITS}
    return {path: split for split, paths in by_split.items() for path in paths if path not in train}


def patterns_of(suffixes: Sequence[str]) -> list[str]:
    """The patterns of files with these suffixes, compressed ones too."""
    return [f"*{suffix}{packing}" for suffix in suffixes for packing in ("", *PACKED_SUFFIXES)]


def _data_files(folder: Path, patterns: Sequence[str], split: str) -> list[Path]:
    files = []
    # A name that begins with "~$" is a note of Excel that the workbook is open.
    for path in (path for path in visible_tree(folder) if not path.name.startswith("~$")):
        linked_folder = path.is_symlink() and path.is_dir()  # not entered, so its files would be missed in silence
        if not linked_folder and not _is_data(path.relative_to(folder).as_posix(), patterns, LOCAL_SUFFIXES):
            continue
        check_file(folder, path, DataError)
        if path.is_file():
            files.append(path)
    return _of_split(_without_copies(files), folder, split)


def _without_copies(files: list[Path]) -> list[Path]:
    """The files without a compressed one that lies beside what it was made of."""
    every = set(files)
    return [path for path in files if path.suffix not in PACKED_SUFFIXES or path.with_suffix("") not in every]


def data_file_names(names: Sequence[str], patterns: Sequence[str], split: str) -> list[str]:
    """The names of data files among `names` that match a pattern and do not belong to another split, sorted."""
    return [name for name in sorted(names) if _is_data(name, patterns) and _split_of(name, split) == split]


def _is_data(path: str, patterns: Sequence[str], default: tuple[str, ...] = DATA_SUFFIXES) -> bool:
    """Whether a path is that of a data file: by its ending, and by a pattern if there are any."""
    parts = path.lower().split("/")
    name = parts[-1]
    suffixes = (*LOCAL_SUFFIXES, *TABLE_SUFFIXES, *STORED_SUFFIXES) if patterns else default
    plain = next((name.removesuffix(packing) for packing in PACKED_SUFFIXES if name.endswith(packing)), name)
    if not plain.endswith(suffixes) or _ABOUT.fullmatch(plain) or any(map(is_system_note, parts)):
        return False
    wanted = [pattern.lower() for pattern in patterns]
    return not wanted or any(
        fnmatch.fnmatch("/".join(parts), pattern) or fnmatch.fnmatch(name, pattern) for pattern in wanted
    )


def _of_split(paths: list[Path], folder: Path, split: str) -> list[Path]:
    """The paths without those whose names belong to another split."""
    return [path for path in paths if _split_of(path.relative_to(folder).as_posix(), split) == split]


def _split_of(name: str, split: str) -> str:
    """The split in a file's name, or `split` if the name has none."""
    match = _SPLITS.search(name)
    return match[1] if match else split


def is_cached(entry: DataSet, hub: str = "auto") -> bool:
    """Whether `registered_files` needs no network for this set."""
    if entry.hub == "url":
        return _url_target(entry).is_file()
    if entry.hub not in ("huggingface", "modelscope"):
        return True
    request = _request(entry, hub)
    return hubs.cached(entry.id, **request) is not None


def _request(entry: DataSet, hub: str) -> dict[str, Any]:
    """Where a set is, as `hub.download` takes it. A revision or subset belongs to the set's own hub."""
    ids = entry.ids if entry.revision is None else {entry.hub: entry.id}
    patterns = entry.files
    if not patterns and entry.hub == "huggingface":
        patterns = tuple(f"*{suffix}" for suffix in DATA_SUFFIXES)
    where = hub if hub in ids else "auto"
    return {"hub": where, "revision": entry.revision, "ids": ids, "kind": "dataset", "patterns": patterns}


def _from_hub(name: str, entry: DataSet, progress: Progress | None, hub: str) -> list[Path]:
    where = f"{name}: {entry.id}"
    folder = hubs.download(entry.id, label=where, advice=WAY, progress=progress, **_request(entry, hub))
    return _chosen(where, folder, entry)


def _chosen(where: str, folder: Path, entry: DataSet) -> list[Path]:
    """The data files of a snapshot from a hub. Raises DataError for a link that leads out of the hub's cache."""
    every = [path for path in visible_tree(folder) if path.is_file()]
    files = [path for path in every if _is_data(path.relative_to(folder).as_posix(), entry.files)]
    files = _of_split(_without_copies(files), folder, entry.split)
    for path in files:
        check_file(folder, path, DataError)
    if not files:
        present = ", ".join(path.relative_to(folder).as_posix() for path in every[:8]) or "no such file at all"
        raise NoDataFiles(
            f"{where} holds no data file like {', '.join(entry.files) or ', '.join(DATA_SUFFIXES)} of split "
            f"{entry.split} (it has: {present}). Give `files` patterns in a data.registry entry of your own."
        )
    return files


def _url_target(entry: DataSet) -> Path:
    """Where the file of a URL is stored: in the cache folder, under the digest of the URL."""
    folder = storage.cache_folder() / "downloads" / text_digest(entry.id)[:16]
    return folder / (Path(urlparse(entry.id).path).name or "data")


def _from_address(name: str, entry: DataSet, progress: Progress | None, _: str) -> list[Path]:
    target = _url_target(entry)
    if target.is_file() and entry.sha256:
        digests = FileDigests(storage.cache_folder() / "downloads.json").digests([str(target)])
        if digests[str(target)] != entry.sha256.lower():
            target.unlink()  # the file is damaged, or the entry has changed
    fetch_file(RemoteFile(entry.id, f"{name}: {entry.id}", WAY, entry.sha256), target, progress)
    return [target]


def _from_disk(name: str, entry: DataSet, progress: Progress | None, _: str) -> list[Path]:
    if entry.id and Path(expanduser(entry.id)).exists():
        path = Path(expanduser(entry.id))
        return folder_files(path, entry.files, entry.split) if path.is_dir() else [path]
    raise DataError(f"{name} must be fetched by hand ({entry.id}); then write {{name: {name}, path: FILE}}")


_PLACES: dict[str, Callable[[str, DataSet, Progress | None, str], list[Path]]] = {
    "huggingface": _from_hub,
    "modelscope": _from_hub,
    "url": _from_address,
    "file": _from_disk,
}
