"""Load a model: a folder, a .gguf file, a model on a hub, or the small built-in model, which needs no hub."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.core.families import Config
from mlx_zh.errors import ModelError
from mlx_zh.models import catalog, folder, gguf, gguf_model, gguf_tokenizer, wheel
from mlx_zh.models.build import DTYPES, build_model
from mlx_zh.models.chat_templates import default_template
from mlx_zh.models.identity import fingerprint_of
from mlx_zh.system import device, hub
from mlx_zh.system.digests import Reading
from mlx_zh.system.downloads import Progress
from mlx_zh.system.links import check_file
from mlx_zh.system.storage import visible

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

BUILT_IN = wheel.NAME

# Tokens that end a turn. Some configs name only the end-of-document token; then the one in the chat template counts.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for use: frozen, in evaluation mode, with its tokenizer."""

    model: nn.Module
    tokenizer: Any  # transformers' PreTrainedTokenizerFast
    config: Config  # config.json; "quantization" only if the weights in memory are quantized
    path: Path  # the folder or .gguf file
    source: str  # as the user wrote it
    fingerprint: str  # of config and weights on disk, see `models.identity`
    eos_token_ids: tuple[int, ...]  # every id that ends a turn, the tokenizer's own first


def resolve_model(
    path: str, *, hub: str = "auto", revision: str | None = None, progress: Progress | None = None
) -> Path:
    """The folder or .gguf file that `path` stands for, downloaded if needed.

    `path` is a local folder or file, a short name (`catalog`), or a hub id ("org/name"); the first of these that fits
    counts. `progress` is called while large files are downloaded. Raises ModelError if `path` is none of them, and
    DownloadError if the download fails.
    """
    if path == BUILT_IN:
        return wheel.small_model()
    try:
        local = Path(expanduser(path))
        local.stat()
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"The path of the model {path[:200]!r} cannot be used: {error}. Correct it.") from error
    if path.strip() and local.is_dir():
        return _inside(local)
    if local.is_file():
        if local.suffix.lower() != ".gguf":
            raise ModelError(
                f"{local} is neither a folder nor a .gguf file. Give the folder with config.json and the "
                "*.safetensors files, or a .gguf file."
            )
        return local
    if not _is_on_hub(path):
        raise ModelError(
            f"There is no model at {path!r}. Give a short name, a folder with config.json and *.safetensors, a .gguf "
            f"file, or a hub id such as mlx-community/Qwen3-8B-4bit. {catalog.suggestion(path)}"
        )
    return _download(path, hub, revision, progress=progress)


def _is_on_hub(path: str) -> bool:
    """Whether `path`, which is no local path, is a short name or has the form of a hub id."""
    if catalog.known_model(path) is not None:
        return True
    return bool(catalog.HUB_ID.fullmatch(path)) and not path.lower().endswith((".gguf", ".safetensors"))


def _download(
    name: str, kind: str, revision: str | None, patterns: tuple[str, ...] = (), progress: Progress | None = None
) -> Path:
    return hub.download(name, kind, revision, ids=hub_ids(name), patterns=patterns, progress=progress)


def hub_ids(name: str) -> dict[str, str] | None:
    """The ids of a known model by hub; None for an id that the table of models does not have."""
    entry = catalog.known_model(name)
    return entry.ids if entry is not None else None


def hub_name(name: str) -> str:
    """The id on a hub of a known model, or of the model that it is a copy of; any other name as it is."""
    entry = catalog.known_model(name)
    if entry is None:
        return name
    return next(iter(entry.ids.values()), entry.original or name)


def _inside(path: Path) -> Path:
    """The only .gguf file of a folder without config.json, else the folder itself."""
    if (path / "config.json").exists():
        return path
    files = visible(path.glob("*.gguf"))
    if len(files) > 1:
        raise ModelError(
            f"{path} holds {len(files)} .gguf files: {', '.join(f.name for f in files[:8])}. Give the path of one of "
            "them."
        )
    for file in files:
        check_file(path, file, ModelError)
    return files[0] if files else path


def load_config(path: Path) -> Config:
    """The config of a resolved model (for GGUF, derived from the metadata). Raises ModelError."""
    return gguf_model.gguf_config(gguf.read_gguf(path)) if path.is_file() else folder.folder_config(path)


def find_config(path: str, *, hub: str = "auto", revision: str | None = None) -> Config:
    """The config of a model that may not be on this disk.

    For a model of the table it is what the table says, without a network; of others on a hub, only the config is
    downloaded.

    For a GGUF file "quantization" says how its matrices are stored. Raises ModelError, DownloadError.
    """
    local = Path(expanduser(path))
    if path == BUILT_IN:
        cached = wheel.location()
        if cached.is_file():
            return _with_packing(cached)
    if local.exists():
        return _with_packing(resolve_model(path))
    if (planned := catalog.planned_config(path)) is not None:
        return planned
    if not _is_on_hub(path):
        return _with_packing(resolve_model(path))  # raises
    return folder.folder_config(_download(path, hub, revision, ("config.json",)))


def _with_packing(path: Path) -> Config:
    """A local model's config, with "quantization" for a GGUF file too."""
    config = load_config(path)
    if path.is_file():
        config["quantization"] = gguf_model.gguf_packing(gguf.read_gguf(path))
    return config


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a resolved model. Raises ModelError."""
    if path.is_file():
        return gguf_tokenizer.gguf_tokenizer(gguf.read_gguf(path))
    return folder.folder_tokenizer(path)


def load_model(
    path: str,
    *,
    hub: str = "auto",
    revision: str | None = None,
    dtype: str = "auto",
    quantize: tuple[int, int] | None = None,
    progress: Progress | None = None,
    reading: Reading | None = None,
) -> LoadedModel:
    """Find, check and load a model and its tokenizer.

    With the `dtype` "auto" on Metal and CUDA, weights stay as stored, also quantized ones; those of a GGUF file get
    bfloat16 scales, because float16 overflows in training. On the CPU, where MLX is slow with every other type,
    "auto" makes all weights float32. A named dtype casts floating-point parameters and leaves quantized weights
    quantized. `quantize` is (bits, group size) for a full-precision model. `reading` is called before a large file
    is read for its digest. Raises ModelError, DownloadError.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
    resolved = resolve_model(path, hub=hub, revision=revision, progress=progress)
    try:
        return _load(resolved, path, dtype, quantize, reading)
    except OSError as error:
        raise ModelError(f"{resolved} cannot be read: {error}. Check the file and its permissions.") from error


def _load(
    path: Path, source: str, dtype: str, quantize: tuple[int, int] | None, reading: Reading | None
) -> LoadedModel:
    if path.is_file():
        file = gguf.read_gguf(path)
        config = gguf_model.gguf_config(file)
        tokenizer = gguf_tokenizer.gguf_tokenizer(file)
        weights = gguf_model.gguf_weights(file, config)
    else:
        config = folder.folder_config(path)
        tokenizer = folder.folder_tokenizer(path)
        weights = folder.folder_weights(path)
        quantize = quantize or catalog.packing_on_loading(source, config)
    target, keep_quantized = _precision(dtype, file if path.is_file() else None)
    model = build_model(config, weights, str(path), dtype=target, keep_quantized=keep_quantized, quantize=quantize)
    _check_vocabulary(tokenizer, model, path)
    ends = end_of_turn_ids(tokenizer, config, path)
    return LoadedModel(model, tokenizer, config, path, source, fingerprint_of(path, reading), ends)


def _precision(dtype: str, file: gguf.GGUFFile | None) -> tuple[mx.Dtype | None, bool]:
    """The dtype to cast to (None: as stored), and whether quantized weights stay quantized; `file` is a GGUF file."""
    import mlx.core as mx

    if dtype != "auto":
        return getattr(mx, dtype), True
    if device.is_cpu():
        return mx.float32, False
    if file is None:
        return None, True
    # GGUF stores norms in float32 whatever the matrices are; uncast, they would make every activation float32.
    stored = {"F32": mx.float32, "F16": mx.float16}
    return stored.get(file.tensors["token_embd.weight"].kind, mx.bfloat16), True


def _check_vocabulary(tokenizer: Any, model: Any, path: Path) -> None:
    rows = model.model.embed_tokens.weight.shape[0]
    vocabulary = tokenizer.get_vocab()
    beyond = sorted(index for index in vocabulary.values() if index >= rows)
    if beyond:
        names = [token for token, index in vocabulary.items() if index == beyond[-1]]
        raise ModelError(
            f"{path}: the tokenizer and the model do not belong together: {len(beyond)} token ids (up to "
            f"{beyond[-1]}, {names[0]!r}) lie beyond the {rows} rows of the embedding. Take both from the same model."
        )


def end_of_turn_ids(tokenizer: Any, config: Config, path: Path) -> tuple[int, ...]:
    """Every token id that ends a turn: the tokenizer's, the config's, and the one that the chat template writes.

    Raises ModelError, naming `path`, if an id is not a whole number.
    """
    ids = [*folder.as_ids(tokenizer.eos_token_id, path), *folder.as_ids(config.get("eos_token_id"), path)]
    template, vocabulary = default_template(tokenizer.chat_template), tokenizer.get_vocab()
    ids += [vocabulary[mark] for mark in _TURN_ENDS if mark in vocabulary and mark in template]
    return tuple(dict.fromkeys(ids))
