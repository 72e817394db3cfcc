"""Upload a finished folder to Hugging Face or ModelScope. Their libraries find the token; it is never shown."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_zh.errors import UploadError, first_line
from mlx_zh.system.environment import pip_install
from mlx_zh.system.links import check_folder

# Both hubs take ASCII; Hugging Face also refuses two dots or dashes in a row, and a name that ends with them.
_PART = r"\w(?:[.-]?\w)*"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}", re.ASCII)
_LONGEST = 96  # characters of OWNER/NAME on Hugging Face
_SECRET = re.compile(r"(hf_|ms-|Bearer )[\w-]+")


def check(repository: str, hub: str) -> None:
    """Check the repository's name, the library and the login before the export. Raises UploadError."""
    if not _REPOSITORY.fullmatch(repository) or len(repository) > _LONGEST or repository.endswith(".git"):
        raise UploadError(
            f"{repository!r} is not a repository's name; write it as OWNER/NAME, in at most {_LONGEST} of the "
            "characters a-z, A-Z, 0-9, -, _ and ."
        )
    if hub == "huggingface":
        from huggingface_hub import get_token

        if not get_token():
            raise UploadError(
                "no access token for Hugging Face was found. Create one with write permission in your account's "
                "settings there, and run `hf auth login` (or set HF_TOKEN)."
            )
    else:
        _modelscope_api()


def own_repository(title: str, hub: str) -> str:
    """`OWNER/NAME` for a model, with the logged-in user as its owner. Raises UploadError."""
    name = re.sub(r"[.-]{2,}", "-", re.sub(r"[^A-Za-z0-9_.-]", "-", title))[:60].strip("-.") or "tuned-model"
    if hub != "huggingface":
        raise UploadError(f"name the repository on ModelScope yourself: --push-to-hub OWNER/{name}.")
    check(f"me/{name}", hub)
    try:
        from huggingface_hub import whoami

        return f"{whoami()['name']}/{name}"
    except Exception as error:  # the library raises its own errors and those of its HTTP library
        raise UploadError(
            f"the hub does not say who is logged in: {_reason(error)}. Name the repository yourself: --push-to-hub "
            f"OWNER/{name}."
        ) from error


def push(folder: Path, repository: str, hub: str, *, public: bool) -> str:
    """Upload everything in `folder` and return the repository's address; the repository is created if needed.

    A new repository is private unless `public`. Raises UploadError, also for a link that leads out of the folder.
    """
    check_folder(folder, UploadError)
    try:
        return _HUBS[hub](folder, repository, public)
    except UploadError:
        raise
    except Exception as error:  # each library raises its own errors and those of its HTTP library
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise UploadError(f"{repository} could not be uploaded: {_reason(error)}.{_remedy(status, hub)}") from error


def _huggingface(folder: Path, repository: str, public: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=not public, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload from mlx-zh")
    return f"{api.endpoint}/{repository}"


def _modelscope(folder: Path, repository: str, public: bool) -> str:
    api, visibility = _modelscope_api(), 5 if public else 1  # ModelScope's numbers for public and private
    if not api.repo_exists(repository):
        api.create_model(repository, visibility=visibility)
    api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload from mlx-zh")
    return f"{repository} on ModelScope"


def _modelscope_api() -> Any:
    try:
        from modelscope.hub.api import HubApi
    except ImportError as error:
        raise UploadError(
            "uploading to ModelScope needs a package that is not installed. Run "
            f"`{pip_install('mlx-zh[modelscope]')}` and `modelscope login --token TOKEN`."
        ) from error
    return HubApi()


_HUBS: dict[str, Callable[[Path, str, bool], str]] = {"huggingface": _huggingface, "modelscope": _modelscope}


def _reason(error: BaseException) -> str:
    return _SECRET.sub("***", first_line(error).rstrip("."))


def _remedy(status: int | None, hub: str) -> str:
    if status in (401, 403):
        login = "`hf auth login`" if hub == "huggingface" else "`modelscope login --token TOKEN`"
        return f" The token is not valid or has no write permission there: run {login} with a token that can write."
    if status is not None:
        return " The model itself is whole on this disk; try again later."
    mirror = " Most mirrors that HF_ENDPOINT can name do not accept uploads." if os.environ.get("HF_ENDPOINT") else ""
    return f" Check the network; the model itself is whole on this disk.{mirror}"
