"""Download models, data sets and single files from Hugging Face or ModelScope; no code, and every SHA-256 checked.

What is in the cache of either hub is used without asking a network. Hugging Face's cache is managed by its library,
which discards a partly downloaded file when it is killed; so `downloads` fetches large files into that cache, and
resumes them. ModelScope's cache is filled by `modelscope`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlx_zh.errors import DownloadError, ModelError, StorageError
from mlx_zh.system import downloads, hub_choice, modelscope, storage
from mlx_zh.system.digests import value_digest
from mlx_zh.system.downloads import Progress, full_disk
from mlx_zh.system.hub_folders import is_whole
from mlx_zh.system.hub_request import MODEL_FILES, OFFLINE, WAYS, Wanted, explained
from mlx_zh.system.huggingface import cached_snapshot, fetch_snapshot, is_offline
from mlx_zh.system.json_text import load_json


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
) -> dict[str, Wanted]:
    """The request to each hub that comes into question. Raises ModelError, DownloadError."""
    if hub != "auto" and hub not in _HUBS:
        raise ModelError(f"hub {hub!r} is not known; choose auto, {' or '.join(_HUBS)}.")
    requests = {}
    for place in _HUBS if hub == "auto" else (hub,):
        id = name if ids is None else ids.get(place)
        if id is not None:
            chosen = patterns.get(place, ()) if isinstance(patterns, Mapping) else patterns
            fitting = tuple(chosen) or (MODEL_FILES if kind == "model" else ())
            requests[place] = Wanted(id, revision, kind, fitting, label, advice or WAYS[place], progress)
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


# ---- ModelScope


def _modelscope(wanted: Wanted) -> Path:
    if is_offline():
        raise DownloadError(OFFLINE.format(label=wanted.label, advice=wanted.advice))
    options: dict[str, Any] = {"label": wanted.label, "advice": wanted.advice, "progress": wanted.progress}
    try:
        folder, files = modelscope.snapshot(wanted.name, wanted.kind, wanted.revision, wanted.patterns, **options)
    except (DownloadError, StorageError):
        raise
    except Exception as error:  # from the HTTP library or the operating system, or a failure that the hub reports
        if downloads.is_full(error):
            raise
        raise explained(error, wanted, modelscope.endpoint()) from error
    storage.write_exact_json(_record(wanted), {"folder": str(folder), "files": files})
    return folder


def _modelscope_cached(wanted: Wanted) -> Path | None:
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
        return next((folder for folder in folders if is_whole(folder, wanted.patterns)), None)
    return None


def _record(wanted: Wanted) -> Path:
    """Where it is noted that everything that was wanted has been downloaded."""
    key = [wanted.kind, wanted.name, wanted.revision, sorted(wanted.patterns), str(modelscope.cache_root())]
    return storage.cache_folder() / "modelscope" / f"{value_digest(key)[:32]}.json"


@dataclass(frozen=True, slots=True)
class _Hub:
    """How a hub is used: what is in its cache (None if that is not all), and the download."""

    cached: Callable[[Wanted], Path | None]
    fetch: Callable[[Wanted], Path]


_HUBS = {
    "huggingface": _Hub(cached_snapshot, fetch_snapshot),
    "modelscope": _Hub(_modelscope_cached, _modelscope),
}
