"""Load a model: a folder, a .gguf file, a hub id, or the small one that needs no hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.errors import ModelError
from mlx_zh.models import folder, gguf, gguf_model, gguf_tokenizer, wheel
from mlx_zh.models.build import DTYPES, build_model
from mlx_zh.system import device, hub
from mlx_zh.system.downloads import Progress

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

BUILT_IN = wheel.NAME

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

# Marks that end a turn. Some configs name only the end of a document, so one that the chat template uses counts.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use: frozen, in evaluation mode, with its tokenizer."""

    model: nn.Module
    tokenizer: Any  # transformers' PreTrainedTokenizerFast
    config: dict[str, Any]  # config.json; "quantization" only where the weights in memory are quantized
    path: Path
    source: str
    fingerprint: str  # of the content on disk: 16 hex digits
    eos_token_ids: tuple[int, ...]  # every id that ends a turn, the tokenizer's own first


def resolve_model(
    path: str, *, hub: str = "huggingface", revision: str | None = None, progress: Progress | None = None
) -> Path:
    """The folder or .gguf file that `path` stands for, downloaded where needed.

    `path` is a local folder or file, a hub id ("org/name"), or the built-in name. `progress` is told of large files
    as they arrive. ModelError if it is none of them; DownloadError if it cannot be obtained.
    """
    if path == BUILT_IN:
        return wheel.small_model()
    try:
        local = Path(path).expanduser()
        local.stat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"The model {path[:200]!r} cannot be looked for: {error}.") from error
    if path.strip() and local.is_dir():
        return _inside(local)
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise ModelError(
                f"{local} is neither a folder nor a .gguf file. Give the folder that holds config.json and the "
                "*.safetensors files."
            )
        return local
    if not _HUB_ID.fullmatch(path) or path.lower().endswith((".gguf", ".safetensors")):
        raise ModelError(
            f"There is no model at {path!r}. Give a folder with config.json and *.safetensors, a .gguf file, a hub "
            f"id such as mlx-community/Meta-Llama-3.1-8B-Instruct-4bit, or {BUILT_IN}."
        )
    return _download(path, hub, revision, progress)


def _download(name: str, kind: str, revision: str | None, progress: Progress | None) -> Path:
    return hub.download(name, kind, revision, progress=progress)


def _inside(path: Path) -> Path:
    """A folder without config.json that holds one .gguf file stands for that file."""
    if (path / "config.json").exists():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(
            f"{path} holds {len(files)} .gguf files: {', '.join(f.name for f in files[:8])}. Give the path of one of "
            "them."
        )
    return files[0] if files else path


def load_config(path: Path) -> dict[str, Any]:
    """The config of a resolved model, without its weights (GGUF: derived from the metadata)."""
    return gguf_model.gguf_config(gguf.read_gguf(path)) if path.is_file() else folder.folder_config(path)


def find_config(path: str, *, hub: str = "huggingface", revision: str | None = None) -> dict[str, Any]:
    """The config of a model that need not be here yet: of one on a hub, only its config is downloaded."""
    local = Path(path).expanduser()
    if path == BUILT_IN:
        known = wheel.location()
        return _with_packing(known if known.is_file() else resolve_model(path))
    if local.exists() or not _HUB_ID.fullmatch(path):
        return _with_packing(resolve_model(path))
    return folder.folder_config(_download_config(path, hub, revision))


def _with_packing(place: Path) -> dict[str, Any]:
    """A local model's config; "quantization" says of a GGUF file, too, how its matrices are stored."""
    config = load_config(place)
    if place.is_file():
        config["quantization"] = gguf_model.gguf_packing(gguf.read_gguf(place))
    return config


def _download_config(name: str, kind: str, revision: str | None) -> Path:
    return hub.download(name, kind, revision, patterns=("config.json",))


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a resolved model, without its weights."""
    if path.is_file():
        return gguf_tokenizer.gguf_tokenizer(gguf.read_gguf(path))
    return folder.folder_tokenizer(path)


def load_model(
    path: str,
    *,
    hub: str = "huggingface",
    revision: str | None = None,
    dtype: str = "auto",
    quantize: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Find, check and load a model and its tokenizer.

    `dtype`: "auto" takes the weights as stored on Metal and CUDA, quantized ones included (those of a GGUF file get
    bfloat16 scales, for float16 overflows in training), and makes everything float32 on the CPU, where MLX is slow at
    anything else. A named dtype casts floating-point parameters and leaves quantized weights quantized everywhere.
    `quantize`: (bits, group_size) for a full-precision model. Raises ModelError, DownloadError.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    place = resolve_model(path, hub=hub, revision=revision, progress=progress)
    try:
        return _load(place, path, dtype, quantize)
    except OSError as error:
        raise ModelError(f"{place} cannot be read: {error}. Check the file and its permissions.") from error


def _load(place: Path, source: str, dtype: str, quantize: tuple[int, int] | None) -> LoadedModel:
    if place.is_file():
        file = gguf.read_gguf(place)
        config = gguf_model.gguf_config(file)
        tokenizer = gguf_tokenizer.gguf_tokenizer(file)
        weights, fingerprint = gguf_model.gguf_weights(file, config), file.fingerprint
    else:
        config = folder.folder_config(place)
        tokenizer = folder.folder_tokenizer(place)
        weights, fingerprint = folder.folder_weights(place)
    target, keep = _precision(dtype, weights, place.is_file())
    model = build_model(config, weights, str(place), dtype=target, keep_quantized=keep, quantize=quantize)
    _check_vocabulary(tokenizer, model, place)
    ends = end_of_turn_ids(tokenizer, config, place)
    return LoadedModel(model, tokenizer, config, place, source, fingerprint, ends)


def _precision(dtype: str, weights: dict[str, mx.array], from_gguf: bool) -> tuple[mx.Dtype | None, bool]:
    """The dtype to cast to (None: as stored), and whether quantized weights stay so."""
    import mlx.core as mx

    if dtype != "auto":
        return getattr(mx, dtype), True
    if device.is_cpu():
        return mx.float32, False
    if not from_gguf:
        return None, True
    # GGUF keeps norms in float32 whatever the matrices are, which would make every activation float32.
    stored = weights["model.embed_tokens.weight"].dtype
    return (stored if mx.issubdtype(stored, mx.floating) else mx.bfloat16), True


def _check_vocabulary(tokenizer: Any, model: Any, place: Path) -> None:
    rows = model.model.embed_tokens.weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    beyond = sorted(index for index in vocabulary.values() if index >= rows)
    if beyond:
        names = [token for token, index in vocabulary.items() if index == beyond[-1]]
        raise ModelError(
            f"{place}: the tokenizer and the model do not belong together: {len(beyond)} token ids (up to "
            f"{beyond[-1]}, {names[0]!r}) lie beyond the {rows} rows of the embedding. Take both from the same model."
        )


def end_of_turn_ids(tokenizer: Any, config: dict[str, Any], place: Path) -> tuple[int, ...]:
    """Every token id that ends a turn: the tokenizer's, the config's, and the mark that the chat template uses."""
    ids = [*folder.as_ids(tokenizer.eos_token_id, place), *folder.as_ids(config.get("eos_token_id"), place)]
    template, vocabulary = str(tokenizer.chat_template or ""), tokenizer.get_vocab()
    ids += [vocabulary[mark] for mark in _TURN_ENDS if mark in vocabulary and mark in template]
    return tuple(dict.fromkeys(ids))
