"""Models, data sets and single files from Hugging Face or ModelScope: no code is fetched, and every SHA-256 checked.

Each hub's own library keeps the cache. `huggingface_hub` throws away the part of a file that had arrived when it was
killed, so large files are brought by `downloads`, which goes on where it stopped, into that cache.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_zh.errors import DownloadError, ModelError, StorageError, first_line
from mlx_zh.system import downloads, storage
from mlx_zh.system.digests import FileDigests
from mlx_zh.system.downloads import STATUS, Progress, RemoteFile, chain, fetch_file, full_disk

_MODEL_FILES = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked of a hub. `called` is how messages speak of it, `way` what the user can do without it."""

    name: str
    revision: str | None
    kind: Literal["model", "dataset"]
    patterns: tuple[str, ...]  # none: every file
    called: str
    way: str
    progress: Progress | None


def download(
    name: str,
    hub: str = "huggingface",
    revision: str | None = None,
    *,
    kind: Literal["model", "dataset"] = "model",
    patterns: tuple[str, ...] = (),
    called: str = "",
    way: str = "",
    progress: Progress | None = None,
) -> Path:
    """The local folder of `name` ("org/name") at `revision` (branch, tag or commit), from the cache where possible.

    Brought are the files that fit `patterns`; without any, all files of a data set, and of a model its weights as
    safetensors and its small text files. `called` and `way` are for messages: what the user calls it, and what to do
    where it cannot be had. `progress` is told of large files as they arrive.

    Raises DownloadError with the way out for what is missing, gated, unreachable or damaged; StorageError on a full
    disk; ModelError for a hub that is not known.
    """
    if hub not in _HUBS:
        raise ModelError(f"hub {hub!r} is not known; choose {' or '.join(_HUBS)}.")
    fitting = patterns or (_MODEL_FILES if kind == "model" else ())
    wanted = _Wanted(name, revision, kind, fitting, called or name, way or _WAYS[hub], progress)
    with full_disk(wanted.called):
        return _HUBS[hub](wanted)


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


def check_digests(folder: Path, kind: str = "model") -> None:
    """Read what Hugging Face's cache holds under a SHA-256, and compare; a file is read once, then remembered.

    The library checks sizes alone. Raises DownloadError for a damaged file, which is removed, to be fetched again.
    """
    blobs = [path for path in folder.rglob("*") if path.is_symlink() and _SHA256.fullmatch(path.resolve().name)]
    known = FileDigests(storage.cache_folder() / f"{kind}s.json").digests(str(path) for path in blobs)
    for path in blobs:
        if known[str(path)] != path.resolve().name:
            path.resolve().unlink()
            path.unlink()
            raise DownloadError(
                f"{path.name} arrived damaged: its SHA-256 is not the hub's. It was removed; start again to fetch it."
            )


# ---- Hugging Face


def _huggingface(wanted: _Wanted) -> Path:
    limit_requests()
    try:
        folder = _snapshot(wanted)
    except (DownloadError, StorageError):
        raise
    except Exception as error:  # the library's own errors, the HTTP library's, and the operating system's
        if downloads.is_full(error):
            raise
        raise _explained(error, wanted, endpoint()) from error
    check_digests(folder, wanted.kind)
    return folder


def _snapshot(wanted: _Wanted) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = wanted.revision
    what: dict[str, Any] = {"repo_type": wanted.kind, "allow_patterns": list(wanted.patterns) or None}
    if not _offline():
        # Where the hub does not answer, this is the commit that the cache knows.
        revision = huggingface_hub.resolve_revision(wanted.name, repo_type=wanted.kind, revision=wanted.revision)
        try:
            huggingface_hub.snapshot_download(wanted.name, revision=revision, local_files_only=True, **what)
            complete = True
        except LocalEntryNotFoundError:
            complete = False
        if not complete:
            _bring_large_files(wanted, revision.resolved)
    return Path(huggingface_hub.snapshot_download(wanted.name, revision=revision, tqdm_class=_silent(), **what))


def _bring_large_files(wanted: _Wanted, commit: str) -> None:
    """Put the files that the hub keeps by SHA-256 (LFS and Xet) where the library's cache has them."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # loaded on demand, which hides it from mypy
        build_hf_headers,
        filter_repo_objects,
        hf_raise_for_status,
    )

    store = Path(constants.HF_HUB_CACHE) / f"{wanted.kind}s--{wanted.name.replace('/', '--')}" / "blobs"
    tree = huggingface_hub.HfApi().list_repo_tree(wanted.name, recursive=True, revision=commit, repo_type=wanted.kind)
    large = {
        file.path: file.lfs.sha256
        for file in tree
        if isinstance(file, huggingface_hub.RepoFile) and file.lfs is not None
    }
    for path in filter_repo_objects(large, allow_patterns=list(wanted.patterns) or None):
        digest = large[path]
        if not _SHA256.fullmatch(digest):  # it becomes a file's name
            raise DownloadError(f"{wanted.called}: {endpoint()} gives no SHA-256 for {path}. {wanted.way}")
        fetch_file(
            RemoteFile(
                huggingface_hub.hf_hub_url(wanted.name, path, repo_type=wanted.kind, revision=commit),
                f"{wanted.called}: {path}",
                wanted.way,
                digest,
                build_hf_headers(),
                huggingface_hub.get_session(),
                hf_raise_for_status,
            ),
            store / digest,
            wanted.progress,
        )


@functools.cache
def limit_requests() -> None:
    """Give each question that huggingface_hub asks a server in this process the time limits of `downloads`.

    The library asks some questions without any limit, and others six times. A host that was silent twice running is
    therefore not waited for again within a minute.
    """
    import httpx2
    import huggingface_hub

    silent: dict[str, tuple[int, float, type[httpx2.TimeoutException]]] = {}

    class Client(httpx2.Client):
        def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
            if request.method not in ("GET", "HEAD"):
                return super().send(request, **options)  # what is uploaded may take its time
            host = request.url.netloc.decode()
            times, last, kind = silent.get(host, (0, 0.0, httpx2.ReadTimeout))
            if times >= 2 and time.monotonic() - last < 60:
                raise kind("not waited for again", request=request)
            limits = httpx2.Timeout(downloads.LIMITS.silence, connect=downloads.LIMITS.connect)
            request.extensions = {**request.extensions, "timeout": limits.as_dict()}
            try:
                answer = super().send(request, **options)
            except httpx2.TimeoutException as error:
                silent[host] = (silent.get(host, (0,))[0] + 1, time.monotonic(), type(error))
                raise
            silent.pop(host, None)
            if answer.status_code in (429, 503):
                _shorten_wait(answer.headers)
            return answer

    hooks = list(huggingface_hub.get_session().event_hooks["request"])
    huggingface_hub.set_client_factory(
        lambda: Client(event_hooks={"request": hooks}, follow_redirects=True, timeout=None)
    )


def _shorten_wait(headers: Any) -> None:
    """The library waits as long as a server asks, without a word: let it not see what is longer than one waits."""
    for name, seconds in (("Retry-After", r"\d+"), ("RateLimit", r"(?<=t=)\d+")):
        asked = re.search(seconds, headers.get(name, ""))
        if asked is not None and float(asked[0]) > downloads.LIMITS.wait:
            del headers[name]


def endpoint() -> str:
    """The address of Hugging Face, or of the mirror in HF_ENDPOINT."""
    from huggingface_hub.constants import ENDPOINT

    return os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def _silent() -> type:
    """The library's progress bars without a display: nothing below the stages prints."""
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent


# ---- ModelScope

# What the library reads when it is imported: the limits of `downloads`. Its limit of an hour for one file would end a
# download of 5 GB at less than 1.4 MB a second, so it gets a day.
_MODELSCOPE_SETTINGS = {
    "MODELSCOPE_API_CONNECT_TIMEOUT": "{0.connect:.0f}",
    "MODELSCOPE_API_TIMEOUT": "{0.silence:.0f}",
    "MODELSCOPE_DOWNLOAD_TIMEOUT": "{0.silence:.0f}",
    "MODELSCOPE_REPO_TREE_PAGE_TIMEOUT_SECONDS": "{0.silence:.0f}",
    "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2",
    "MODELSCOPE_API_MAX_RETRIES": "2",
    "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "2",
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "86400",
}


def _modelscope(wanted: _Wanted) -> Path:
    """The library itself goes on where it stopped, and compares each file with the SHA-256 of the hub's listing."""
    for name, value in _MODELSCOPE_SETTINGS.items():
        os.environ.setdefault(name, value.format(downloads.LIMITS))
    try:
        if wanted.kind == "model":
            from modelscope import snapshot_download as snapshot
        else:
            from modelscope import dataset_snapshot_download as snapshot
    except ImportError as error:
        raise DownloadError(
            f"`hub: modelscope` needs a package that is not installed, so {wanted.called} was not downloaded. Run "
            "`pip install 'mlx-zh[modelscope]'` (or `pip install modelscope`)."
        ) from error
    try:
        return Path(snapshot(wanted.name, revision=wanted.revision, allow_patterns=list(wanted.patterns) or None))
    except Exception as error:  # modelscope raises its own, requests' and plain exceptions
        if downloads.is_full(error):
            raise
        raise _explained(error, wanted, os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn")) from error


_HUBS: dict[str, Callable[[_Wanted], Path]] = {"huggingface": _huggingface, "modelscope": _modelscope}


# ---- What went wrong, and what to do

_WAYS = {
    "huggingface": (
        "Check the network. Where Hugging Face cannot be reached, set HF_ENDPOINT to the address of a mirror "
        "or use `hub: modelscope`; or give the path of a folder that you downloaded another way."
    ),
    "modelscope": (
        "Check the network and the name on ModelScope (it can differ from Hugging Face's); or use "
        "`hub: huggingface`, or give the path of a folder that you downloaded another way."
    ),
}

_LOGIN = "`hf auth login` (`huggingface-cli login` in older versions)"

# By the class of the hub library's exception. {said} is the first line of its own message.
_MEANINGS: dict[str, str | dict[str, str]] = {
    "GatedRepoError": (
        "{called} is gated: its owner asks for your consent first. Accept the conditions on its page ({page}), make "
        f"an access token there, and run {_LOGIN}, or set HF_TOKEN."
    ),
    "RevisionNotFoundError": "{called} has no revision {revision!r}; check it on {page}.",
    "RepositoryNotFoundError": {
        "model": (
            "{endpoint} has no model {name}, or it is private. Check the spelling; for a private model run "
            f"{_LOGIN}; if you meant a folder, it does not exist."
        ),
        "dataset": "{called}: {endpoint} answers 404, there is no such data set, or it is private. {way}",
    },
    "DisabledRepoError": "{called} was disabled by {endpoint}. {way}",
    "HFValidationError": "{name!r} is not a hub id: {said}.",
    "OfflineModeIsEnabled": (
        "{called} could not be downloaded: HF_HUB_OFFLINE is set, and it is not in the cache. {way}"
    ),
    "FileIntegrityError": "{called} arrived damaged: {said}. Start again to fetch it. {way}",
}

_HUB_STATUS = STATUS | {
    401: "the server answers 401: it wants an access token, or does not accept the one it got; log in again",
    404: "the server answers 404: there is no such repository, revision or file",
    403: "the server answers 403: your account, or its access token, may not have it",
}


def _explained(error: Exception, wanted: _Wanted, address: str) -> DownloadError:
    """The one error map: a hub's refusal by `_MEANINGS`, any other failure by its HTTP status or cause."""
    known = {
        "called": wanted.called,
        "name": wanted.name,
        "revision": wanted.revision,
        "endpoint": address,
        "page": f"{address}/{'datasets/' if wanted.kind == 'dataset' else ''}{wanted.name}",
        "way": wanted.way,
    }
    for cause in chain(error):
        for kind in type(cause).__mro__:
            meaning = _MEANINGS.get(kind.__name__)
            if meaning is not None:
                text = meaning if isinstance(meaning, str) else meaning[wanted.kind]
                return DownloadError(text.format(**known, said=first_line(cause).rstrip(".")))
    at = f" at revision {wanted.revision!r}" if wanted.revision else ""
    reason = downloads.reason_of(error, address, _HUB_STATUS)
    return DownloadError(f"{wanted.called}{at} could not be downloaded: {reason}. {wanted.way}")
