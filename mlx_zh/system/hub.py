"""Download models, data sets and single files from Hugging Face or ModelScope; no code, and every SHA-256 checked.

What is in the cache of either hub is used without asking a network. Hugging Face's cache is managed by its library,
which discards a partly downloaded file when it is killed; so `downloads` fetches large files into that cache, and
resumes them. ModelScope's cache is filled by `modelscope`.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_zh.errors import DownloadError, ModelError, StorageError, first_line
from mlx_zh.system import downloads, hub_choice, modelscope, storage
from mlx_zh.system.digests import FileDigests, value_digest
from mlx_zh.system.downloads import STATUS, Progress, RemoteFile, chain, fetch_file, full_disk
from mlx_zh.system.json_text import load_json
from mlx_zh.system.links import is_readable

_MODEL_FILES = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A request to a hub. Error messages begin with `label` and end with `advice` on what the user can do."""

    name: str
    revision: str | None
    kind: Literal["model", "dataset"]
    patterns: tuple[str, ...]  # empty: every file
    label: str
    advice: str
    progress: Progress | None


def download(
    name: str,
    hub: str = "auto",
    revision: str | None = None,
    *,
    ids: Mapping[str, str] | None = None,
    kind: Literal["model", "dataset"] = "model",
    patterns: tuple[str, ...] | Mapping[str, tuple[str, ...]] = (),
    label: str = "",
    advice: str = "",
    progress: Progress | None = None,
) -> Path:
    """Download a repository at `revision` (branch, tag or commit) unless it is cached; returns its folder.

    `name` is what the user wrote, `ids` the repository's id ("org/name") by hub; without `ids`, `name` is its id on
    both. With the hub "auto", a cached copy of either hub is used, else the hub that answers. `patterns` selects
    files, the same or by hub; without any, a data set comes with all files, and a model with its safetensors weights
    and small text files. Error messages begin with `label` and end with `advice`. `progress` hears of large files.

    Raises DownloadError for a repository or file that is missing, gated, unreachable or damaged, StorageError for a
    full disk, and ModelError for an unknown hub.
    """
    wanted = _requests(name, hub, revision, ids, kind, patterns, label or name, advice, progress)
    with full_disk(label or name):
        for place, request in wanted.items():
            if (folder := _HUBS[place].cached(request)) is not None:
                return folder
        choosing = len(wanted) > 1 and not is_offline()
        chosen = hub_choice.chosen(label or name) if choosing else next(iter(wanted))
        try:
            return _HUBS[chosen].fetch(wanted[chosen])
        except DownloadError as error:
            if choosing and (failed := hub_choice.answers().failed):
                raise DownloadError(f"{error} {_tried(failed)}") from error
            raise


def cached(
    name: str,
    hub: str = "auto",
    revision: str | None = None,
    *,
    ids: Mapping[str, str] | None = None,
    kind: Literal["model", "dataset"] = "model",
    patterns: tuple[str, ...] | Mapping[str, tuple[str, ...]] = (),
) -> Path | None:
    """The folder that `download` would return without a network; None if it would have to download."""
    wanted = _requests(name, hub, revision, ids, kind, patterns, name, "", None)
    folders = (_HUBS[place].cached(request) for place, request in wanted.items())
    return next((folder for folder in folders if folder is not None), None)


def _requests(
    name: str,
    hub: str,
    revision: str | None,
    ids: Mapping[str, str] | None,
    kind: Literal["model", "dataset"],
    patterns: tuple[str, ...] | Mapping[str, tuple[str, ...]],
    label: str,
    advice: str,
    progress: Progress | None,
) -> dict[str, _Wanted]:
    """The request to each hub that comes into question. Raises ModelError, DownloadError."""
    if hub != "auto" and hub not in _HUBS:
        raise ModelError(f"hub {hub!r} is not known; choose auto, {' or '.join(_HUBS)}.")
    requests = {}
    for place in _HUBS if hub == "auto" else (hub,):
        id = name if ids is None else ids.get(place)
        if id is not None:
            chosen = patterns.get(place, ()) if isinstance(patterns, Mapping) else patterns
            fitting = tuple(chosen) or (_MODEL_FILES if kind == "model" else ())
            requests[place] = _Wanted(id, revision, kind, fitting, label, advice or _WAYS[place], progress)
    if not requests:
        raise _elsewhere(name, hub, ids or {})
    return requests


def _elsewhere(name: str, hub: str, ids: Mapping[str, str]) -> DownloadError:
    """The error for something whose id on the requested hub is not known."""
    places = " and ".join(f"on {hub_choice.TITLES[place]} as {id}" for place, id in ids.items())
    return DownloadError(
        f"{name} is not known on {hub_choice.TITLES[hub]}, only {places}. Leave out `hub: {hub}`; where the other "
        "hub cannot be reached, set HF_ENDPOINT to a mirror, or give the path of a folder downloaded another way."
    )


def _tried(failed: Mapping[str, str]) -> str:
    """The hubs that were tried before the one that failed to deliver, and the remedy."""
    before = "; ".join(f"{hub_choice.TITLES[name]} was tried first: {why}" for name, why in failed.items())
    return f"{before}. If it is only there, set HF_ENDPOINT to a mirror that you can reach."


_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    blobs = [path for path in links if _SHA256.fullmatch(path.resolve().name)]
    digests = FileDigests(storage.cache_folder() / f"{kind}s.json").digests(str(path) for path in blobs)
    for path in blobs:
        if digests[str(path)] != path.resolve().name:
            path.resolve().unlink()
            path.unlink()
            raise DownloadError(
                f"{path.name} arrived damaged: its SHA-256 is not the hub's. It was removed; run the command again "
                "to fetch it."
            )


# ---- Hugging Face


def _huggingface(wanted: _Wanted) -> Path:
    limit_requests()
    try:
        folder = _snapshot(wanted)
    except (DownloadError, StorageError):
        raise
    except Exception as error:  # from the library itself, its HTTP library or the operating system
        if downloads.is_full(error):
            raise
        raise _explained(error, wanted, endpoint()) from error
    check_digests(folder, wanted.kind)
    return folder


def _huggingface_cached(wanted: _Wanted) -> Path | None:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    options: dict[str, Any] = {"repo_type": wanted.kind, "allow_patterns": list(wanted.patterns) or None}
    try:
        found = huggingface_hub.snapshot_download(
            wanted.name, revision=wanted.revision, local_files_only=True, **options
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    folder = Path(found)
    if wanted.kind == "model" and not _is_whole(folder, wanted.patterns):
        return None
    check_digests(folder, wanted.kind)
    return folder


def _is_whole(folder: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a model's folder holds the files that `patterns` name, or with the usual patterns a whole model."""
    if patterns != _MODEL_FILES:
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


def _snapshot(wanted: _Wanted) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = wanted.revision
    options: dict[str, Any] = {"repo_type": wanted.kind, "allow_patterns": list(wanted.patterns) or None}
    if not is_offline():
        # If the hub does not answer, this is the commit in the cache.
        revision = huggingface_hub.resolve_revision(wanted.name, repo_type=wanted.kind, revision=wanted.revision)
        try:
            huggingface_hub.snapshot_download(wanted.name, revision=revision, local_files_only=True, **options)
            complete = True
        except LocalEntryNotFoundError:
            complete = False
        if not complete:
            _fetch_large_files(wanted, revision.resolved)
    return Path(huggingface_hub.snapshot_download(wanted.name, revision=revision, tqdm_class=_silent(), **options))


def _fetch_large_files(wanted: _Wanted, commit: str) -> None:
    """Download the files that the hub stores by SHA-256 (LFS and Xet) into the library's cache."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # loaded lazily, so mypy does not see it
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
        digest = large[path].lower()
        if not _SHA256.fullmatch(digest):  # it becomes a file name
            raise DownloadError(f"{wanted.label}: {endpoint()} gives no SHA-256 for {path}. {wanted.advice}")
        fetch_file(
            RemoteFile(
                huggingface_hub.hf_hub_url(wanted.name, path, repo_type=wanted.kind, revision=commit),
                f"{wanted.label}: {path}",
                wanted.advice,
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
    """Give each request of huggingface_hub in this process the time limits of `downloads`.

    The library sends some requests without a limit and repeats others six times. So after two timeouts in a row, a
    host is not waited for again within a minute.
    """
    import httpx2
    import huggingface_hub

    silent: dict[str, tuple[int, float, type[httpx2.TimeoutException]]] = {}

    class Client(httpx2.Client):
        def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
            if request.method not in ("GET", "HEAD"):
                return super().send(request, **options)  # uploads have no time limit
            host = request.url.netloc.decode()
            times, last, kind = silent.get(host, (0, 0.0, httpx2.ReadTimeout))
            if times >= 2 and time.monotonic() - last < 60:
                raise kind("the host timed out twice", request=request)
            limits = httpx2.Timeout(downloads.LIMITS.read, connect=downloads.LIMITS.connect)
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
    """Remove headers that ask for a pause above `LIMITS.retry_after`: the library would wait it out silently."""
    for name, seconds in (("Retry-After", r"\d+"), ("RateLimit", r"(?<=t=)\d+")):
        pause = re.search(seconds, headers.get(name, ""))
        if pause is not None and float(pause[0]) > downloads.LIMITS.retry_after:
            del headers[name]


def endpoint() -> str:
    """The address of Hugging Face, or of the mirror that HF_ENDPOINT names."""
    from huggingface_hub.constants import ENDPOINT

    return os.environ.get("HF_ENDPOINT", ENDPOINT).rstrip("/")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids every download."""
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def _silent() -> type:
    """A class of progress bars without output: nothing below the stages prints."""
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent


# ---- ModelScope


def _modelscope(wanted: _Wanted) -> Path:
    if is_offline():
        raise DownloadError(_OFFLINE.format(label=wanted.label, advice=wanted.advice))
    options: dict[str, Any] = {"label": wanted.label, "advice": wanted.advice, "progress": wanted.progress}
    try:
        folder, files = modelscope.snapshot(wanted.name, wanted.kind, wanted.revision, wanted.patterns, **options)
    except (DownloadError, StorageError):
        raise
    except Exception as error:  # from the HTTP library or the operating system, or a failure that the hub reports
        if downloads.is_full(error):
            raise
        raise _explained(error, wanted, modelscope.endpoint()) from error
    storage.write_exact_json(_record(wanted), {"folder": str(folder), "files": files})
    return folder


def _modelscope_cached(wanted: _Wanted) -> Path | None:
    """A folder that was downloaded whole by this program, or one of ModelScope's tools that holds a whole model."""
    try:
        record = load_json(_record(wanted))
        folder, files = Path(record["folder"]), dict(record["files"])
        if folder.is_dir() and all((folder / name).stat().st_size == size for name, size in files.items()):
            return folder
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if wanted.kind == "model":
        folders = modelscope.cached_folders(wanted.name, wanted.kind, wanted.revision)
        return next((folder for folder in folders if _is_whole(folder, wanted.patterns)), None)
    return None


def _record(wanted: _Wanted) -> Path:
    """Where it is noted that everything that was wanted has been downloaded."""
    key = [wanted.kind, wanted.name, wanted.revision, sorted(wanted.patterns), str(modelscope.cache_root())]
    return storage.cache_folder() / "modelscope" / f"{value_digest(key)[:32]}.json"


@dataclass(frozen=True, slots=True)
class _Hub:
    """How a hub is used: what is in its cache (None if that is not all), and the download."""

    cached: Callable[[_Wanted], Path | None]
    fetch: Callable[[_Wanted], Path]


_HUBS = {
    "huggingface": _Hub(_huggingface_cached, _huggingface),
    "modelscope": _Hub(_modelscope_cached, _modelscope),
}


# ---- Error messages

_WAYS = {
    "huggingface": (
        "Check the network. Where Hugging Face cannot be reached, set HF_ENDPOINT to the address of a mirror "
        "or use `hub: modelscope`; or give the path of a folder that you downloaded another way."
    ),
    "modelscope": (
        "Check the network and the name on ModelScope (it can differ from Hugging Face's); a private or restricted "
        "repository needs MODELSCOPE_API_TOKEN. Or use `hub: huggingface`, or give the path of a folder that you "
        "downloaded another way."
    ),
}

_LOGIN = "`hf auth login` (`huggingface-cli login` in older versions)"

_OFFLINE = "{label} could not be downloaded: HF_HUB_OFFLINE is set, and the files are not in the cache. {advice}"

# Messages by the class name of the library's exception; {reason} is the first line of its own message.
_MEANINGS: dict[str, str | dict[str, str]] = {
    "GatedRepoError": (
        "{label} is gated: its owner asks for your consent first. Accept the conditions on its page ({page}), create "
        f"an access token there, and run {_LOGIN}, or set HF_TOKEN."
    ),
    "RevisionNotFoundError": "{label} has no revision {revision!r}; check the revisions on {page}.",
    "RepositoryNotFoundError": {
        "model": (
            "{endpoint} has no model {name}, or it is private. Check the spelling; for a private model run "
            f"{_LOGIN}; if you meant a folder, that folder does not exist."
        ),
        "dataset": "{label}: {endpoint} answers 404, there is no such data set, or it is private. {advice}",
    },
    "DisabledRepoError": "{label} was disabled by {endpoint}. {advice}",
    "HFValidationError": "{name!r} is not a hub id: {reason}.",
    "OfflineModeIsEnabled": _OFFLINE,
}

_HUB_STATUS = STATUS | {
    401: "the server answers 401: it needs an access token, or does not accept the one that was sent; log in again",
    404: "the server answers 404: there is no such repository, revision or file",
    403: "the server answers 403: your account or access token has no permission",
}


def _explained(error: Exception, wanted: _Wanted, address: str) -> DownloadError:
    """A DownloadError for any failure of a hub: worded by `_MEANINGS`, else by its HTTP status or cause."""
    fields = {
        "label": wanted.label,
        "name": wanted.name,
        "revision": wanted.revision,
        "endpoint": address,
        "page": f"{address}/{'datasets/' if wanted.kind == 'dataset' else ''}{wanted.name}",
        "advice": wanted.advice,
    }
    for cause in chain(error):
        for kind in type(cause).__mro__:
            meaning = _MEANINGS.get(kind.__name__)
            if meaning is not None:
                text = meaning if isinstance(meaning, str) else meaning[wanted.kind]
                return DownloadError(text.format(**fields, reason=first_line(cause).rstrip(".")))
    at = f" at revision {wanted.revision!r}" if wanted.revision else ""
    reason = downloads.reason_of(error, address, _HUB_STATUS)
    return DownloadError(f"{wanted.label}{at} could not be downloaded: {reason}. {wanted.advice}")
