"""Downloads from Hugging Face or a mirror of it, into its library's cache."""

from __future__ import annotations

import functools
import os
import re
import time
from pathlib import Path
from typing import Any

from mlx_zh.errors import DownloadError, StorageError
from mlx_zh.system import downloads
from mlx_zh.system.downloads import RemoteFile, fetch_file
from mlx_zh.system.hub_folders import SHA256, check_digests, is_whole
from mlx_zh.system.hub_request import Wanted, explained


def fetch_snapshot(wanted: Wanted) -> Path:
    """The folder of a repository, downloaded where it is not cached. Raises DownloadError, StorageError."""
    limit_requests()
    try:
        folder = _snapshot(wanted)
    except (DownloadError, StorageError):
        raise
    except Exception as error:  # from the library itself, its HTTP library or the operating system
        if downloads.is_full(error):
            raise
        raise explained(error, wanted, endpoint()) from error
    check_digests(folder, wanted.kind)
    return folder


def cached_snapshot(wanted: Wanted) -> Path | None:
    """The folder of a repository in the library's cache; None if it is not there whole."""
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
    if wanted.kind == "model" and not is_whole(folder, wanted.patterns):
        return None
    check_digests(folder, wanted.kind)
    return folder


def _snapshot(wanted: Wanted) -> Path:
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


def _fetch_large_files(wanted: Wanted, commit: str) -> None:
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
        if not SHA256.fullmatch(digest):  # it becomes a file name
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
