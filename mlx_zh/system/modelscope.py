"""ModelScope's HTTP interface: list a repository and download its files.

Files go where ModelScope's own tools look for them, so each uses what the other has downloaded. Those tools are not
needed: they would add 100 MB to the installation, draw progress bars of their own and wait for a silent server even
when everything is cached.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from os.path import expanduser
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from mlx_zh.errors import DownloadError
from mlx_zh.system import downloads
from mlx_zh.system.downloads import Progress, RemoteFile, fetch_file
from mlx_zh.system.storage import is_system_note

_PAGE = 200  # entries of a listing that are asked for at a time
_TRIES = 2
_SHA256 = re.compile(r"[0-9a-f]{64}", re.IGNORECASE)


class Refused(Exception):
    """A response that is a failure; `response` holds its status for `downloads.status_of`."""

    def __init__(self, response: Any, reason: str) -> None:
        super().__init__(reason)
        self.response = response


def endpoint() -> str:
    """The address of ModelScope, or the one that MODELSCOPE_ENDPOINT names."""
    return (os.environ.get("MODELSCOPE_ENDPOINT") or "https://www.modelscope.cn").rstrip("/")


def cache_root() -> Path:
    """The cache folder of ModelScope's tools: MODELSCOPE_CACHE, else `~/.cache/modelscope`."""
    return Path(expanduser(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"))


def snapshot_folder(name: str, kind: str, revision: str | None) -> Path:
    """The folder of a repository ("org/name") at a revision, whether it exists or not."""
    owner, _, short = name.partition("/")
    return cache_root() / f"{kind}s" / f"{owner}--{short}" / "snapshots" / (revision or "master")


def cached_folders(name: str, kind: str, revision: str | None) -> Iterator[Path]:
    """The existing folders in which this repository may lie: `snapshot_folder`, and those of older tools.

    Older tools kept one state of a repository, so for a named revision they are not looked at.
    """
    owner, _, short = name.partition("/")
    folders = [snapshot_folder(name, kind, revision)]
    if revision is None:
        for base in (cache_root(), cache_root() / "hub"):
            for folder in (base / f"{kind}s" / owner, base / owner):
                folders += [folder / short.replace(".", "___"), folder / short]
    yield from (folder for folder in dict.fromkeys(folders) if folder.is_dir())


def snapshot(
    name: str,
    kind: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    label: str,
    advice: str,
    progress: Progress | None,
) -> tuple[Path, dict[str, int]]:
    """Download the files of a repository that match a pattern; returns the folder, and the files with their sizes.

    Files that are in the folder already are not downloaded again. Raises DownloadError and StorageError from
    `fetch_file`, `Refused` and the errors of the HTTP library.
    """
    folder = snapshot_folder(name, kind, revision)
    with _client() as client:
        entries = [entry for entry in _listing(client, name, kind, revision or "master") if _wanted(entry, patterns)]
        for entry in entries:
            digest = str(entry.get("Sha256") or "")
            file = RemoteFile(
                _address(name, kind, revision or "master", entry["Path"]),
                f"{label}: {entry['Path']}",
                advice,
                digest.lower() if _SHA256.fullmatch(digest) else None,
                _login(),
                client,
                _refuse,
            )
            fetch_file(file, folder / entry["Path"], progress)
    if not entries:
        raise DownloadError(f"{label}: {name} on ModelScope has no file like {', '.join(patterns)}. {advice}")
    return folder, {entry["Path"]: (folder / entry["Path"]).stat().st_size for entry in entries}


def _client() -> Any:
    import httpx2

    limits = httpx2.Timeout(downloads.LIMITS.read, connect=downloads.LIMITS.connect)
    return httpx2.Client(follow_redirects=True, timeout=limits)


def _login() -> dict[str, str]:
    """Headers with the access token that MODELSCOPE_API_TOKEN holds, if any."""
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}


def _address(name: str, kind: str, revision: str, path: str) -> str:
    query = f"Revision={quote(revision, safe='')}&FilePath={quote(path, safe='')}"
    return f"{endpoint()}/api/v1/{kind}s/{name}/repo?{query}"


def _listing(client: Any, name: str, kind: str, revision: str) -> list[dict[str, Any]]:
    """The entries of a repository's file tree. Listings of data sets come in pages."""
    asked = {"Revision": revision, "Recursive": "True"}
    if kind == "model":
        return _entries(client, f"models/{name}/repo/files", asked)
    entries: list[dict[str, Any]] = []
    number = 1
    while True:
        page = _entries(
            client, f"datasets/{name}/repo/tree", asked | {"PageNumber": str(number), "PageSize": str(_PAGE)}
        )
        entries += page
        if len(page) < _PAGE:
            return entries
        number += 1


def _entries(client: Any, path: str, asked: dict[str, str]) -> list[dict[str, Any]]:
    """The entries of one listing. Raises Refused and the errors of the HTTP library."""
    import httpx2

    for attempt in range(1, _TRIES + 1):
        try:
            response = client.get(f"{endpoint()}/api/v1/{path}", params=asked, headers=_login())
        except httpx2.RequestError:
            if attempt == _TRIES:
                raise
            continue
        if response.status_code < 500 or attempt == _TRIES:
            break
    return _files(response)


def _files(response: Any) -> list[dict[str, Any]]:
    if response.status_code != 200:
        raise Refused(response, f"the server answers {response.status_code}")
    try:
        answer = response.json()
        data = answer["Data"]
        files = data if isinstance(data, list) else data.get("Files") or []
        return [entry for entry in files if isinstance(entry["Path"], str)]
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = "it answers with something other than a list of files"
        with_message = answer.get("Message") if isinstance(answer := _json(response), dict) else None
        raise Refused(None, str(with_message or reason)) from None


def _json(response: Any) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _wanted(entry: dict[str, Any], patterns: Sequence[str]) -> bool:
    """Whether an entry is a file that matches a pattern (any file without patterns) and lies inside the folder."""
    path = PurePosixPath(entry["Path"])
    if entry.get("Type") == "tree" or path.is_absolute() or ".." in path.parts or not path.parts:
        return False
    if is_system_note(path.name):
        return False
    return not patterns or any(fnmatch.fnmatch(entry["Path"], pattern) for pattern in patterns)


def _refuse(response: Any) -> None:
    """Raise Refused for the response to a file's request that is a failure."""
    raise Refused(response, f"the server answers {response.status_code}")
