"""Read a model folder in Hugging Face's or mlx-lm's layout: config.json, *.safetensors, tokenizer.

Pickles are never loaded, and code in a folder is never run.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.core.families import FAMILIES, Config, family_of
from mlx_zh.errors import ModelError, first_line
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE, PEFT_FILE
from mlx_zh.models.family_configs import completed
from mlx_zh.system.json_text import load_json, parse_json
from mlx_zh.system.links import check_folder
from mlx_zh.system.storage import visible

if TYPE_CHECKING:
    import mlx.core as mx

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.npz")
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_WEIGHTS = re.compile(r"[^./\\][^/\\]*\.safetensors")  # `check_folder` does not look at hidden files
_VERSIONED = "fast_tokenizer_files"  # the key by which Transformers takes another file instead of tokenizer.json
_ONE = ["tokenizer.json"]
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format


def folder_config(path: Path) -> Config:
    """config.json, with the end-of-turn ids of generation_config.json added, in the form that mlx-lm 0.32 reads.

    Raises ModelError if there is none, if it cannot be parsed, if the model's family is not supported, or if a link
    in the folder leads out of it.
    """
    check_folder(path, ModelError)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json, so it is not a model folder. Give the folder with config.json and the "
            f"*.safetensors files{_adapter_hint(path)}."
        )
    config = read_json(path / "config.json")
    config = completed(config, str(path / "config.json"))
    if family_of(config) is None:
        raise ModelError(
            f"{path / 'config.json'}: model_type {config.get('model_type')!r} is not supported. Supported are "
            f"{', '.join(FAMILIES)}; other models that mlx-lm has are tried when they are loaded."
        )
    generation = path / "generation_config.json"
    if generation.is_file():
        ends = as_ids(read_json(generation).get("eos_token_id"), generation)
        ends += as_ids(config.get("eos_token_id"), path / "config.json")
        if unique := list(dict.fromkeys(ends)):
            config["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    return config


def as_ids(value: Any, where: Path) -> list[int]:
    """A list of token ids from an id, a list of ids, or None. Raises ModelError for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if wrong := [item for item in ids if isinstance(item, bool) or not isinstance(item, int)]:
        shown = str(wrong[0])[:40]
        raise ModelError(
            f"{where}: eos_token_id must be a whole number or a list of them, got {shown!r}. Download the model "
            "again."
        )
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError if the file does not contain one."""
    try:
        content = load_json(path)
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text ({error.reason}). Download it again.") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}). Download it again.") from error
    except (ValueError, RecursionError) as error:  # e.g. a number with thousands of digits, or a thousand brackets
        raise ModelError(f"{path}: not usable as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: a JSON object is needed, got a {type(content).__name__}. Download it again.")
    return content


def _adapter_hint(path: Path) -> str:
    if any((path / name).exists() for name in (CONFIG_FILE, ADAPTER_FILE, PEFT_FILE)):
        return "; this one holds an adapter, which is loaded on top of a model"
    return ""


@dataclass(frozen=True)
class TensorFile:
    """One *.safetensors file and its checked table: name -> (dtype, shape, first byte, byte after the last)."""

    path: Path
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]


def folder_weights(path: Path) -> dict[str, mx.array]:
    """All tensors (lazy). Raises ModelError if a file is missing or damaged."""
    import mlx.core as mx

    files = [read_table(file) for file in weight_files(path)]
    weights: dict[str, mx.array] = {}
    for file in files:
        try:
            loaded = mx.load(str(file.path))
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{file.path} cannot be read ({str(error).strip()}). Download it again.") from error
        assert isinstance(loaded, dict)
        weights.update(loaded)
    return weights


def weight_files(path: Path) -> list[Path]:
    """The *.safetensors files of a model folder.

    Raises ModelError if there are none, if one is missing, or if a link in the folder leads out of it.
    """
    check_folder(path, ModelError)
    if (path / _INDEX).is_file():
        mapping = read_json(path / _INDEX).get("weight_map")
        names = list(mapping.values()) if isinstance(mapping, dict) else []
        if not names or not all(isinstance(name, str) and _WEIGHTS.fullmatch(name) for name in names):
            raise ModelError(f"{path / _INDEX} is damaged: its weight_map is not usable. Download it again.")
        names = sorted(set(names))
        if missing := [name for name in names if not (path / name).is_file()]:
            raise ModelError(
                f"{path} lacks {len(missing)} of the {len(names)} files that {_INDEX} lists: "
                f"{', '.join(missing[:8])}. The download is not complete; start it again."
            )
        return [path / name for name in names]
    # consolidated*.safetensors is a second copy of the weights with Mistral's own names.
    every = visible(path.glob("*.safetensors"))
    others = [file for file in every if not file.name.startswith(("adapter", "consolidated", "checkpoint"))]
    if files := visible(path.glob("model*.safetensors")) or others:
        return files
    if pickles := [p.name for p in visible(p for pattern in _PICKLES for p in path.glob(pattern))]:
        raise ModelError(
            f"{path} has its weights only as {', '.join(pickles[:3])}. Such files are Python pickles, which can run "
            "any program when they are opened, so they are not read. Take the *.safetensors files of the same model, "
            "or convert the pickles (`transformers`: model.save_pretrained(..., safe_serialization=True))."
        )
    raise ModelError(
        f"{path} has config.json but no weights (*.safetensors){_adapter_hint(path)}. Download the model again, or "
        "give the folder that holds them."
    )


def read_table(path: Path) -> TensorFile:
    """The table of a *.safetensors file, checked against the file's size, because MLX does not check it.

    Raises ModelError if the file is damaged or has tensors of a type that cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head == b"version ":
            raise ModelError(
                f"{path} is a Git LFS pointer, not the weights themselves. Run `git lfs pull` in that folder."
            )
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ModelError(
                f"{path} is truncated or is not a safetensors file: its header should have {length:,} bytes, and the "
                f"whole file has {size:,}. Download it again."
            )
        raw = file.read(length)
    try:
        entries = {name: entry for name, entry in parse_json(raw).items() if name != "__metadata__"}
        tensors = {name: _entry(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: its header cannot be parsed ({error}). Download it again.") from error
    end = max((entry[3] for entry in tensors.values()), default=0)
    if end > size - 8 - length:
        raise ModelError(
            f"{path} is truncated: it should have {8 + length + end:,} bytes and has {size:,}. Download it again."
        )
    _check_types(path, tensors)
    shifted = {n: (t, s, 8 + length + first, 8 + length + last) for n, (t, s, first, last) in tensors.items()}
    return TensorFile(path, shifted)


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    first, last = entry["data_offsets"]
    return str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), int(first), int(last)


_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1, "I64": 8, "I32": 4, "I8": 1, "BOOL": 1}


def _check_types(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], int, int]]) -> None:
    if unread := sorted({kind for kind, *_ in tensors.values() if kind not in _BYTES}):
        raise ModelError(
            f"{path} holds tensors of type {', '.join(unread)}, which cannot be read. Take the BF16 version of the "
            "model, or one that was quantized by mlx-lm."
        )
    wrong = [
        name
        for name, (kind, shape, first, last) in tensors.items()
        if first < 0 or min(shape, default=0) < 0 or last - first != math.prod(shape) * _BYTES[kind]
    ]
    if wrong:
        raise ModelError(
            f"{path} is damaged: {len(wrong)} tensors have a size that is not that of their shape, first {wrong[0]}. "
            "Download it again."
        )


def folder_tokenizer(path: Path) -> Any:
    """The folder's fast tokenizer, with its chat template if it has one.

    Raises ModelError if there is no tokenizer, or none that is fast, or if a link in the folder leads out of it.
    """
    check_folder(path, ModelError)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}). Download the model again with all of "
            "its files."
        )
    _check_names(path / "tokenizer_config.json")
    from transformers import AutoTokenizer

    _check_growth(path / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, local_files_only=True, use_fast=True
        )
    except Exception as error:  # transformers and tokenizers raise errors of many types
        reason = first_line(error)
        raise ModelError(f"The tokenizer in {path} cannot be read: {reason}. Download it again.") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer in {path} has no tokenizer.json, so it cannot tell which characters belong to a token. "
            "Take a version of the model that has a tokenizer.json."
        )
    return tokenizer


def _check_names(path: Path) -> None:
    """Refuse a tokenizer_config.json that names other files than tokenizer.json. Raises ModelError.

    They could lie anywhere on this disk, and an exported model would not have them.
    """
    if path.is_file() and read_json(path).get(_VERSIONED, _ONE) != _ONE:
        raise ModelError(
            f"{path}: {_VERSIONED} names other files than tokenizer.json, which are not read. Remove this key if "
            "tokenizer.json is the right one."
        )


_MOST_GROWTH = 64  # times as long as its text may the normalized text be


def _check_growth(path: Path) -> None:
    """Refuse a tokenizer.json whose replacements, one after another, make a text much longer. Raises ModelError."""
    if not path.is_file():
        return
    about = read_json(path)
    growth, waiting = 1.0, [about.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, dict):
            pattern, content = part.get("pattern"), part.get("content")
            if part.get("type") == "Replace" and isinstance(content, str):
                text = pattern.get("String") if isinstance(pattern, dict) else pattern
                growth *= max(1.0, len(content) / max(len(text), 1) if isinstance(text, str) else len(content))
            waiting.extend(value for value in part.values() if isinstance(value, list | dict))
        if growth > _MOST_GROWTH:
            raise ModelError(
                f"{path}: its replacements could make a text more than {_MOST_GROWTH} times as long. Take the "
                "tokenizer.json of the original model."
            )
