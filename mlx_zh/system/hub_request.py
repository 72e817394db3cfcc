"""What is asked of a hub, and its failures in words that say what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_zh.errors import DownloadError, first_line
from mlx_zh.system import downloads
from mlx_zh.system.downloads import STATUS, Progress, chain

MODEL_FILES = ("*.json", "model*.safetensors", "*.jinja", "*.txt", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request to a hub. Error messages begin with `label` and end with `advice` on what the user can do."""

    name: str
    revision: str | None
    kind: Literal["model", "dataset"]
    patterns: tuple[str, ...]  # empty: every file
    label: str
    advice: str
    progress: Progress | None


# What to do about a failure.
WAYS = {
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

OFFLINE = "{label} could not be downloaded: HF_HUB_OFFLINE is set, and the files are not in the cache. {advice}"

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
    "OfflineModeIsEnabled": OFFLINE,
}

_HUB_STATUS = STATUS | {
    401: "the server answers 401: it needs an access token, or does not accept the one that was sent; log in again",
    404: "the server answers 404: there is no such repository, revision or file",
    403: "the server answers 403: your account or access token has no permission",
}


def explained(error: Exception, wanted: Wanted, address: str) -> DownloadError:
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
