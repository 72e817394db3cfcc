"""LLaMA-Factory's `dataset_info.json`: which files it names, and what their columns mean.

The keys of an entry are those of data/README.md of that project: file_name, formatting (alpaca or sharegpt), ranking,
columns, tags, num_samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_zh.corpus.columns import Guess
from mlx_zh.corpus.row_messages import ROLES
from mlx_zh.corpus.tools import CALL_ROLES, RESULT_ROLES
from mlx_zh.errors import DataError, first_line
from mlx_zh.system.json_text import parse_json
from mlx_zh.system.links import target_outside

NAME = "dataset_info.json"
_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
    "function_tag": "function_call",
    "observation_tag": "observation",
}
_KEYS = (("from", "value"), ("role", "content"))  # of a message
_ALPACA = {
    "instruction": "prompt",
    "input": "query",
    "output": "response",
    **{name: name for name in ("system", "history", "tools")},
}
_DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url")
_UNKNOWN = ("images", "videos", "audios")


@dataclass(frozen=True)
class Entry:
    """One data set of the file. `reason` says why it cannot be used; then there is no guess."""

    name: str
    path: Path
    guess: Guess | None = None
    reason: str = ""
    max_samples: int | None = None


@dataclass
class _Form:
    """The keys of an entry, with their defaults."""

    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


def is_dataset_info(path: Path) -> bool:
    """Whether a file is LLaMA-Factory's table of data sets: an object of objects with a place each."""
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > 1 << 24:
        return False
    try:
        document = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    entries = list(document.values()) if isinstance(document, dict) else []
    return bool(entries) and all(isinstance(entry, dict) and _place(entry) for entry in entries)


def read_entries(path: Path) -> list[Entry]:
    """The entries of a `dataset_info.json`. Raises DataError if none of them can be used, with a reason for each."""
    try:
        document = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from error
    entries = [_entry(path.parent, str(name), keys) for name, keys in document.items()]
    if not any(entry.guess for entry in entries):
        reasons = "\n  ".join(f"{entry.name}: {entry.reason}" for entry in entries)
        raise DataError(f"{path}: no data set in it can be used:\n  {reasons}")
    return entries


def _place(entry: Mapping[str, Any]) -> str | None:
    return next(
        (key for key in ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url") if key in entry), None
    )


def _entry(folder: Path, name: str, keys: Mapping[str, Any]) -> Entry:
    file = keys.get("file_name")
    path = folder / file if isinstance(file, str) and file else folder
    if path == folder:
        return Entry(name, path, reason="it names no file (file_name); only files on this disk are read")
    if not path.exists():
        return Entry(name, path, reason=f"there is no file {path}")
    if path.is_relative_to(folder) and (target := target_outside(folder, path)) is not None:
        return Entry(name, path, reason=f"{path} is a link out of the folder, to {target}")
    guess = guess_of(keys)
    if isinstance(guess, str):
        return Entry(name, path, reason=guess)
    count = keys.get("num_samples")
    most = count if isinstance(count, int) and count > 0 else None
    return Entry(name, path, guess, max_samples=most)


def guess_of(keys: Mapping[str, Any]) -> Guess | str:
    """How the rows of an entry are read, wherever they are; the reason why they cannot be read."""
    texts = _texts(keys.get("columns")), _texts(keys.get("tags"))
    if texts[0] is None or texts[1] is None:
        return "columns and tags must be mappings of text"
    form = _Form(texts[0], texts[1])
    unknown = [key for key in _UNKNOWN if key in form.columns]
    if unknown:
        return f"columns.{unknown[0]} is not supported"
    sharegpt = keys.get("formatting", "alpaca") in ("sharegpt", "openai")
    return (_tag_problem(form.tags) if sharegpt else "") or _guess(
        form.columns, sharegpt, keys.get("ranking") is True
    )


def _texts(value: Any) -> dict[str, str] | None:
    """A mapping of texts, without keys that are null; None for anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str | None) for text in value.values()):
        return None
    return {str(key): text for key, text in value.items() if text}


def _tag_problem(tags: Mapping[str, str]) -> str:
    """Why messages with these tags cannot be read; "" if they can."""
    tags = {**_TAGS, **tags}
    if (tags["role_tag"], tags["content_tag"]) not in _KEYS:
        return f"messages with the keys {tags['role_tag']} and {tags['content_tag']} are not supported"
    for tag, role in (("user_tag", "user"), ("assistant_tag", "assistant"), ("system_tag", "system")):
        if ROLES.get(tags[tag].lower()) != role:
            return f"the role {tags[tag]!r} ({tag}) is not supported"
    for tag, names in (("function_tag", CALL_ROLES), ("observation_tag", RESULT_ROLES)):
        if tags[tag] not in names:
            return f"the role {tags[tag]!r} ({tag}) is not supported"
    return ""


def _guess(columns: Mapping[str, str], sharegpt: bool, ranking: bool) -> Guess:
    """How the file is read, from the entry's columns; a column that is not named has LLaMA-Factory's default."""
    pairs = {name: columns.get(name, name) for name in ("chosen", "rejected")} if ranking else {}
    if sharegpt:
        mapped = {"conversations": columns.get("messages", _DEFAULTS["messages"])}
        mapped |= {name: columns[name] for name in ("system", "tools") if name in columns}
        format = "sharegpt"
    else:
        mapped = {}
        for ours, theirs in _ALPACA.items():
            if theirs in columns or (theirs in ("prompt", "response") and not (ranking and theirs == "response")):
                mapped[ours] = columns.get(theirs, _DEFAULTS.get(theirs, theirs))
        if ranking:
            mapped.pop("output", None)
        format = "alpaca"
    mapped |= pairs
    if "kto_tag" in columns and not ranking:
        mapped["kto_tag"] = columns["kto_tag"]
    changed = {ours: theirs for ours, theirs in mapped.items() if ours != theirs}
    return Guess("dpo" if ranking else "kto" if "kto_tag" in mapped else "sft", format, changed, "given")
