"""Download a model from Hugging Face or ModelScope: weights as safetensors, and small text files. No code."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

from mlx_zh.errors import DownloadError, ModelError, StorageError
from mlx_zh.system import storage
from mlx_zh.system.digests import FileDigests

_FILES = ["*.json", "model*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]


def download(
    name: str,
    hub: str = "huggingface",
    revision: str | None = None,
    *,
    dataset_file: str | None = None,
    only: tuple[str, ...] = (),
) -> Path:
    """The local folder of `name` ("org/model") at `revision` (branch, tag or commit), from the cache where possible.

    With `dataset_file`, `name` is a data set and only that file of it is brought; with `only`, a model's files of
    these names.

    Raises DownloadError with the way out for a missing, gated or unreachable model; StorageError on a full disk.
    """
    if hub not in _HUBS:
        raise ModelError(f"hub {hub!r} is not known; choose {' or '.join(_HUBS)}.")
    try:
        return _HUBS[hub](name, revision, _what(dataset_file, only))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk is full: {name} could not be stored. Make room and start again; what has arrived is kept."
            ) from error
        raise DownloadError(f"{name} could not be downloaded: {_first_line(error)}.{_WAYS[hub]}") from error


_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def commit_of(folder: Path) -> str | None:
    """The commit that a downloaded folder is of: Hugging Face's cache is named by it, ModelScope's notes it."""
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    try:
        noted = _COMMIT.search((folder / ".mv").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return noted[0] if noted else None


def check_digests(folder: Path) -> None:
    """Read what Hugging Face's cache holds under a SHA-256, and compare; a file is read once, then remembered.

    The library checks sizes alone. Raises DownloadError for a damaged file, which is removed, to be fetched again.
    """
    blobs = [path for path in folder.rglob("*") if path.is_symlink() and _SHA256.fullmatch(path.resolve().name)]
    found = FileDigests(storage.cache_folder() / "models.json").digests(str(path) for path in blobs)
    for path in blobs:
        if found[str(path)] != path.resolve().name:
            path.resolve().unlink()
            path.unlink()
            raise DownloadError(
                f"{path.name} arrived damaged: its SHA-256 is not the hub's. It was removed; start again to fetch it."
            )


def _huggingface(name: str, revision: str | None, what: dict[str, Any]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, **what))
        check_digests(folder)
        return folder
    except DownloadError:
        raise
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{name} is gated: its owner asks for your consent first. Accept the conditions on its page "
            f"({_endpoint()}/{name}), make an access token there, and run `huggingface-cli login` (or set HF_TOKEN)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{name} has no revision {revision!r}; check it on {_endpoint()}/{name}.") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{_endpoint()} has no model {name}, or it is private. Check the spelling; for a private model run "
            "`huggingface-cli login`; if you meant a folder, it does not exist."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
        reason = "HF_HUB_OFFLINE is set, and it is not in the cache" if offline else _first_line(error)
        raise DownloadError(f"{name}{at} could not be downloaded: {reason}.{_WAYS['huggingface']}") from error
    except errors.HFValidationError as error:
        raise DownloadError(f"{name!r} is not a hub id: {_first_line(error)}.") from error
    except OSError:
        raise
    except Exception as error:  # the HTTP library's own errors: no route, no name, bad certificate, bad proxy
        raise DownloadError(
            f"{name}{at} could not be downloaded: {_first_line(error)}.{_WAYS['huggingface']}"
        ) from error


def _modelscope(name: str, revision: str | None, what: dict[str, Any]) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise DownloadError(
            f"`hub: modelscope` needs a package that is not installed, so {name} was not downloaded. Run "
            "`pip install 'mlx-zh[modelscope]'` (or `pip install modelscope`)."
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, **what))
    except OSError as error:
        if error.errno is not None:
            raise
        raise DownloadError(f"{name} could not be downloaded: {_first_line(error)}.{_WAYS['modelscope']}") from error
    except Exception as error:  # modelscope raises its own, requests' and plain exceptions
        raise DownloadError(f"{name} could not be downloaded: {_first_line(error)}.{_WAYS['modelscope']}") from error


def _what(dataset_file: str | None, only: tuple[str, ...]) -> dict[str, Any]:
    if dataset_file is None:
        return {"allow_patterns": list(only) or _FILES}
    return {"repo_type": "dataset", "allow_patterns": [dataset_file]}


_HUBS = {"huggingface": _huggingface, "modelscope": _modelscope}

_WAYS = {
    "huggingface": (
        " Check the network. Where Hugging Face cannot be reached, set HF_ENDPOINT to the address of a mirror "
        "or use `hub: modelscope`; or give the path of a folder that you downloaded another way."
    ),
    "modelscope": (
        " Check the network and the name on ModelScope (it can differ from Hugging Face's); or use "
        "`hub: huggingface`, or give the path of a folder that you downloaded another way."
    ),
}


def _endpoint() -> str:
    from huggingface_hub.constants import ENDPOINT

    return os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
