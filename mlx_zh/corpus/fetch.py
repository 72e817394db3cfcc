"""Bring a registered data set to this disk: from a hub, from an address, or from where the user put it."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from mlx_zh.errors import DataError, DownloadError, StorageError
from mlx_zh.recipe import DataSet
from mlx_zh.system import storage
from mlx_zh.system.storage import written_whole

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_ABOUT = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|config\.json|LICENSE.*|README.*", re.I)
_SPLITS = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|dev)(?:[/_.-]|$)")
_TRIES, _LONGEST_WAIT, _TIMEOUT = 3, 5.0, 30.0
_PIECE = 1 << 20


def fetch(name: str, entry: DataSet) -> list[Path]:
    """The data set's files, downloaded where they are not in the cache.

    Raises DownloadError, with the way out, for a hub that has it not, limits, or does not answer; StorageError on a
    full disk; DataError for a set that the user must fetch himself.
    """
    try:
        return _HUBS[entry.hub](name, entry)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk is full: {name} could not be stored. Make room and start again; what has arrived is kept."
            ) from error
        raise DownloadError(f"{name}: {entry.id} could not be downloaded: {_first_line(error)}. {_WAY}") from error


def folder_files(folder: Path, patterns: Sequence[str] = (), split: str = "train") -> list[Path]:
    """The data files of a folder, sorted: those that fit a pattern, else all of `split`.

    Raises DataError for a link that leads out of the folder, and where there is no data file.
    """
    root = folder.resolve()
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or not _is_data(str(inside), patterns):
            continue
        if not path.resolve().is_relative_to(root):
            target = os.readlink(path) if path.is_symlink() else path.resolve()
            raise DataError(
                f"{path} is a link out of the folder, to {target}. "
                "Name that file itself in the recipe, or copy it into the folder"
            )
        if path.is_file():
            found.append(path)
    found = _of_split(found, folder, split)
    if not found:
        kinds = ", ".join(patterns or [f"*{suffix}" for suffix in DATA_SUFFIXES])
        raise DataError(f"{folder}: no data file in it ({kinds}); name the files, or another folder")
    return found


def _is_data(path: str, patterns: Sequence[str]) -> bool:
    name = path.rsplit("/", 1)[-1]
    if not path.endswith(DATA_SUFFIXES) or _ABOUT.fullmatch(name):
        return False
    return not patterns or any(
        fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(name, pattern) for pattern in patterns
    )


def _of_split(paths: list[Path], folder: Path, split: str) -> list[Path]:
    """Without the files whose names say that they are another split."""

    def says(path: Path) -> str:
        found = _SPLITS.search(path.relative_to(folder).as_posix())
        return found[1] if found else split

    return [path for path in paths if says(path) == split]


def _huggingface(name: str, entry: DataSet) -> list[Path]:
    import huggingface_hub
    from huggingface_hub import constants, errors

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    patterns = [*entry.files] or [f"*{suffix}" for suffix in DATA_SUFFIXES]
    where = f"{name}: {entry.id}"
    try:
        folder = huggingface_hub.snapshot_download(
            entry.id, repo_type="dataset", revision=entry.revision, allow_patterns=patterns
        )
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{where} is gated: accept the conditions on {endpoint}/datasets/{entry.id}, make an access token there, "
            "and run `huggingface-cli login` (or set HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{where} has no revision {entry.revision!r} on {endpoint}.") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{where}: {endpoint} answers 404, there is no such data set, or it is private. {_WAY}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise DownloadError(f"{where} could not be downloaded: {_http(_status(error), error)}. {_WAY}") from error
    except errors.LocalEntryNotFoundError as error:
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            reason = "HF_HUB_OFFLINE is set, and it is not in the cache"
        else:
            cause = error.__cause__ or error.__context__
            reason = _http(_status(cause), cause or error)
        raise DownloadError(f"{where} could not be downloaded: {reason}. {_WAY}") from error
    except OSError:
        raise
    except Exception as error:  # the HTTP library's own errors
        raise DownloadError(f"{where} could not be downloaded: {_first_line(error)}. {_WAY}") from error
    return _chosen(where, Path(folder), entry)


def _modelscope(name: str, entry: DataSet) -> list[Path]:
    try:
        from modelscope import dataset_snapshot_download
    except ImportError as error:
        raise DownloadError(
            f"{name} lies on ModelScope, whose package is not installed: run `pip install 'mlx-zh[modelscope]'`."
        ) from error
    where = f"{name}: {entry.id}"
    try:
        folder = dataset_snapshot_download(entry.id, revision=entry.revision, allow_patterns=[*entry.files] or None)
    except Exception as error:  # modelscope raises its own, requests' and plain exceptions
        raise DownloadError(f"{where} could not be downloaded: {_first_line(error)}. {_WAY}") from error
    return _chosen(where, Path(folder), entry)


def _chosen(where: str, folder: Path, entry: DataSet) -> list[Path]:
    """The data files of a hub's snapshot, whose files are links into the hub's cache."""
    every = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [path for path in every if _is_data(path.relative_to(folder).as_posix(), entry.files)]
    found = _of_split(found, folder, entry.split)
    if not found:
        there = ", ".join(path.relative_to(folder).as_posix() for path in every[:8]) or "no such file at all"
        raise DownloadError(
            f"{where} holds no data file like {', '.join(entry.files) or ', '.join(DATA_SUFFIXES)} of split "
            f"{entry.split} (it has: {there}). Give `files` patterns in a data.registry entry of your own."
        )
    return found


def _url(name: str, entry: DataSet) -> list[Path]:
    """One file from an address, kept in the cache folder under the address's digest."""
    digest = hashlib.sha256(entry.id.encode()).hexdigest()[:16]
    target = storage.cache_folder() / "downloads" / digest / (Path(urlparse(entry.id).path).name or "data")
    if not target.is_file():
        _download(name, entry, target)
    return [target]


def _download(name: str, entry: DataSet, target: Path) -> None:
    for attempt in range(1, _TRIES + 1):
        try:
            with urllib.request.urlopen(entry.id, timeout=_TIMEOUT) as answer:
                _store(name, entry, answer, target)
            return
        except urllib.error.HTTPError as error:
            error.close()
            wait = _wait(error.headers.get("Retry-After"), attempt)
            if error.code not in (429, 500, 502, 503, 504) or wait is None or attempt == _TRIES:
                raise DownloadError(
                    f"{name}: {entry.id} could not be downloaded: {_http(error.code, error)}. {_WAY}"
                ) from error
            time.sleep(wait)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError, ValueError) as error:
            if attempt == _TRIES or isinstance(error, ValueError):
                reason = getattr(error, "reason", None) or error
                raise DownloadError(f"{name}: {entry.id} does not answer: {_first_line(reason)}. {_WAY}") from error
            time.sleep(0.2 * attempt)


def _store(name: str, entry: DataSet, answer: Any, target: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with written_whole(target) as file:
        while piece := _read(answer):
            digest.update(piece)
            size += len(piece)
            file.write(piece)
        expected = answer.headers.get("Content-Length")
        if size == 0 or (expected is not None and size != int(expected)):
            raise HTTPException(f"only {size} of {expected or 'some'} bytes came")
        if entry.sha256 and digest.hexdigest() != entry.sha256.lower():
            raise DownloadError(
                f"{name}: {entry.id} is not the file that was expected: its SHA-256 is {digest.hexdigest()}, "
                f"sha256 says {entry.sha256}. Nothing was kept."
            )


def _read(answer: Any) -> bytes:
    try:
        piece: bytes = answer.read(_PIECE)
    except OSError as error:  # of the network; those of the disk have a remedy of their own
        raise HTTPException(_first_line(error)) from error
    return piece


def _wait(asked: str | None, attempt: int) -> float | None:
    """Seconds until the next try; None where the server asks for longer than one waits at a prompt."""
    if asked is None or not asked.isdigit():
        return 0.5 * attempt
    return float(asked) if float(asked) <= _LONGEST_WAIT else None


def _file(name: str, entry: DataSet) -> list[Path]:
    if entry.id and Path(entry.id).expanduser().exists():
        path = Path(entry.id).expanduser()
        return folder_files(path, entry.files, entry.split) if path.is_dir() else [path]
    raise DataError(f"{name} must be fetched by hand ({entry.id}); then write {{name: {name}, path: FILE}}")


def _status(error: BaseException | None) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _http(status: int | None, error: BaseException) -> str:
    if status == 404:
        return "the server answers 404, there is no such file"
    if status == 429:
        return "the server answers 429, too many requests: wait some minutes and run the same command again"
    return f"the server answers {status}" if status else _first_line(error)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


_HUBS: dict[str, Callable[[str, DataSet], list[Path]]] = {
    "huggingface": _huggingface,
    "modelscope": _modelscope,
    "url": _url,
    "file": _file,
}

_WAY = (
    "Check the network and the name; set HF_ENDPOINT to a mirror where Hugging Face cannot be reached; or fetch "
    "the files another way and write {name: NAME, path: FILE-OR-FOLDER} in the recipe."
)
