"""Adapter folders: mlx-lm's format is read and written, PEFT's is read."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_zh.core.families import Config
from mlx_zh.errors import AdapterError, ModelError, first_line
from mlx_zh.models.adapters import peft
from mlx_zh.models.adapters.layers import (
    LAYERS,
    add_adapter,
    block_of,
    install,
    linear_layers,
    new_layers,
    train_tables,
)
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE, PEFT_FILE, SAVED, AdapterSpec, saved_of
from mlx_zh.models.family_configs import mlx_lm_names
from mlx_zh.models.folder import read_table
from mlx_zh.system.digests import damage, file_digest, value_digest
from mlx_zh.system.json_text import load_json
from mlx_zh.system.links import check_file
from mlx_zh.system.redaction import redacted
from mlx_zh.system.storage import write_arrays, write_json

_LEAVES = ("lora_a", "lora_b", "m")
_PICKLE = "adapter_model.bin"  # how PEFT wrote adapters before version 0.5
_LARGEST_RANK = 1 << 20
_PART = "language_model."  # in mlx-lm's names of a model that is a part of another one
_SETTINGS = ("fine_tune_type", "num_layers", "lora_parameters")


def save_adapter(
    folder: Path,
    weights: dict[str, mx.array],
    spec: AdapterSpec,
    about: dict[str, Any],
    config: Config | None = None,
) -> None:
    """Write an adapter folder that mlx-lm can load. `about` (base model, run) is stored beside the settings.

    `config` is the model's config.json, by which mlx-lm's names are known where they differ.
    So are the SHA-256 of the weights and a digest of the settings, by which `adapter_damage` sees a flipped bit.
    """
    write_arrays(folder / ADAPTER_FILE, mlx_lm_names(weights, config or {}), {"format": "mlx"})
    # mlx-lm puts LoRA layers over the keys, and then loads every tensor under its own name.
    whole = set() if spec.kind == "full" else set(SAVED.values())
    keys = sorted({_key(name.rpartition(".")[0]) for name in weights if name not in whole})
    parameters = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout, "keys": keys}
    settings = redacted({"fine_tune_type": spec.kind, "num_layers": spec.num_layers, "lora_parameters": parameters})
    digests = {"weights": file_digest(folder / ADAPTER_FILE), "settings": value_digest(settings)}
    write_json(folder / CONFIG_FILE, settings | {"mlx_zh": about | {"sha256": digests}})


def adapter_damage(folder: Path) -> str | None:
    """What differs in an adapter folder of ours from what was written; None if nothing does.

    Adapters of other programs and of earlier versions have no digests, and nothing is compared.
    """
    try:
        config = load_json(folder / CONFIG_FILE)
    except (OSError, ValueError) as error:
        return f"{CONFIG_FILE} cannot be read ({first_line(error)})"
    digests = _about(config).get("sha256")
    if not isinstance(digests, dict):
        return None
    if digests.get("settings") != value_digest({name: config.get(name) for name in _SETTINGS}):
        return f"{CONFIG_FILE} is not what was written"
    return damage(folder, {ADAPTER_FILE: digests.get("weights", "")})


def adapter_about(folder: Path) -> dict[str, Any]:
    """What mlx-zh stored in an adapter's config beside the settings; empty if another program wrote it."""
    try:
        return _about(load_json(folder / CONFIG_FILE))
    except (OSError, ValueError):
        return {}


def _about(config: Any) -> dict[str, Any]:
    about = config.get("mlx_zh") if isinstance(config, dict) else None
    return about if isinstance(about, dict) else {}


def _key(module: str) -> str:
    """A module's name as in mlx-lm's `keys`: relative to its block, or the full name if it is in no block."""
    return module.split(".layers.", 1)[-1].split(".", 1)[-1] if block_of(module) >= 0 else module


def load_adapter(model: nn.Module, folder: Path, *, seed: int = 0) -> AdapterSpec:
    """Load an adapter folder (ours, mlx-lm's or PEFT's) into a model, in place of the adapter that it has.

    The adapter's weights become trainable. Raises AdapterError if the folder cannot be read or does not fit; the
    message lists the tensors that do not fit, with both shapes, and the model is not changed.
    """
    spec, weights = read_adapter(folder)
    _check_vocabulary(model, folder)
    if spec.kind == "full":
        _check_shapes(dict(tree_flatten(model.parameters())), weights, folder)
        add_adapter(model, spec, seed=seed)
    else:
        weights = one_table(weights, folder, tied="lm_head" not in model)
        spec = replace(spec, saved=saved_of(weights))
        _install_named_layers(model, spec, weights, folder, seed)
    model.load_weights(list(weights.items()), strict=False)
    return spec


def read_adapter(folder: Path) -> tuple[AdapterSpec, dict[str, mx.array]]:
    """The settings and the arrays of an adapter folder, in mlx-lm's terms also for PEFT's. Raises AdapterError."""
    for name in (CONFIG_FILE, ADAPTER_FILE, PEFT_FILE):
        check_file(folder, folder / name, AdapterError)
    if peft.is_peft(folder):
        return peft.read_peft(folder)
    if pickled := pickle_hint(folder):
        raise AdapterError(pickled)
    for name in (CONFIG_FILE, ADAPTER_FILE):
        if not (folder / name).is_file():
            if "run" in adapter_about(folder):
                raise AdapterError(f"{folder} is damaged: it has no {name}. {_remedy(folder)}")
            raise AdapterError(
                f"{folder} is not an adapter folder: it has no {name}. Give the folder with {CONFIG_FILE} and "
                f"{ADAPTER_FILE}."
            )
    try:
        config = load_json(folder / CONFIG_FILE)
        parameters = config.get("lora_parameters") or {}
        spec = AdapterSpec(
            kind=config.get("fine_tune_type", "lora"),
            num_layers=_all_if_not_positive(int(config.get("num_layers", 0))),
            rank=int(parameters.get("rank", 0)),
            scale=float(parameters.get("scale", 0)),
            dropout=float(parameters.get("dropout", 0)),
        )
        read_table(folder / ADAPTER_FILE)
        weights = mx.load(str(folder / ADAPTER_FILE))
        mx.eval(weights)  # read the data now, so that an error is raised here
        weights = _without_part(weights)
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError, ModelError) as error:
        raise AdapterError(f"{folder} is damaged: {first_line(error)}. {_remedy(folder)}") from error
    if (reason := adapter_damage(folder)) is not None:
        raise AdapterError(f"{folder} is damaged: {reason}. {_remedy(folder)}")
    if spec.kind not in (*LAYERS, "full") or not isinstance(weights, dict) or not weights:
        raise AdapterError(
            f"{folder}: fine_tune_type {spec.kind!r} with {len(weights)} tensors is no usable adapter. Types that "
            f"can be read: {', '.join((*LAYERS, 'full'))}."
        )
    if spec.kind != "full" and not (0 < spec.rank <= _LARGEST_RANK and math.isfinite(spec.scale)):
        raise AdapterError(
            f"{folder} is damaged: rank {spec.rank} and scale {spec.scale} in {CONFIG_FILE} are not usable. "
            f"{_remedy(folder)}"
        )
    return (spec if spec.kind == "full" else replace(spec, saved=saved_of(weights))), weights


def _without_part(weights: Any) -> Any:
    """Tensors of a model that is a part of mlx-lm's, under its own names."""
    if not isinstance(weights, dict):
        return weights
    return {name.removeprefix(_PART): array for name, array in weights.items()}


def one_table(weights: dict[str, mx.array], folder: Path, *, tied: bool) -> dict[str, mx.array]:
    """The weights without the head's, if the model's head is its embedding and both are the same.

    PEFT stores the shared table twice. Raises AdapterError if a tied model gets two different tables.
    """
    embedding, head = SAVED["embed_tokens"], SAVED["lm_head"]
    if not tied or head not in weights:
        return weights
    if embedding in weights and not mx.array_equal(weights[embedding], weights[head]).item():
        raise AdapterError(
            f"{folder}: its embed_tokens and lm_head differ, and this model has one table for both. Merge it with "
            "PEFT (merge_and_unload) and take the merged model."
        )
    return {name: array for name, array in weights.items() if name != head} | {embedding: weights[head]}


def _remedy(folder: Path) -> str:
    """What to do about a damaged adapter: the stage of a run writes its own again from the last checkpoint."""
    about = adapter_about(folder)
    if not isinstance(about.get("run"), str) or not isinstance(about.get("stage"), str):
        return "Copy or download it again."
    again = f"mlx-zh {about['stage']} {shlex.quote(about['run'])}"
    return (
        f"Copy it again from where it is whole; where it was trained, `{again}` writes it from the last checkpoint."
    )


def pickle_hint(folder: Path) -> str:
    """What to do with a PEFT folder whose weights are a pickle, which is never read; "" for any other folder."""
    if (folder / ADAPTER_FILE).is_file() or not (folder / _PICKLE).is_file():
        return ""
    return (
        f"{folder} has its weights only as {_PICKLE}. Such a file is a Python pickle, which can run any program when "
        f"it is opened, so it is not read. Load it with PEFT where you trust it, and save it again as {PEFT_FILE}: "
        "model.save_pretrained(..., safe_serialization=True)."
    )


def vocabulary_size(model: nn.Module) -> int:
    """The number of rows of a model's embedding."""
    return int(model.model.embed_tokens.weight.shape[0])


def _check_vocabulary(model: nn.Module, folder: Path) -> None:
    """Raise AdapterError if the adapter was trained with another vocabulary.

    Its shapes cannot show this, because most adapters do not touch the embedding; ours record the vocabulary's size.
    """
    trained = adapter_about(folder).get("vocabulary")
    if isinstance(trained, int) and trained != vocabulary_size(model):
        raise AdapterError(
            f"{folder} was trained on a model with a vocabulary of {trained} tokens, and this one has "
            f"{vocabulary_size(model)}. Load it with the base model that it was trained on."
        )


def _all_if_not_positive(layers: int) -> int:
    return layers if layers > 0 else 10**6  # in mlx-lm, 0 and -1 mean every layer


def _install_named_layers(
    model: nn.Module, spec: AdapterSpec, weights: dict[str, mx.array], folder: Path, seed: int
) -> None:
    """Put adapter layers over the linear layers that the adapter's tensors name, even if its settings differ."""
    linear = linear_layers(model)
    tables = {SAVED[name]: weights[SAVED[name]] for name in spec.saved}
    width = int(model.model.norm.weight.shape[0])
    _check_shapes(dict.fromkeys(tables, mx.zeros((vocabulary_size(model), width))), tables, folder)
    weights = {name: array for name, array in weights.items() if name not in tables}
    owners = {name.rpartition(".")[0] for name in weights}
    unexpected = [n for n in weights if n.rpartition(".")[2] not in _LEAVES]
    unexpected += [f"{n} (no such linear layer)" for n in owners if n not in linear]
    if unexpected:
        raise AdapterError(
            f"{folder} was made for another model; it has " + "; ".join(sorted(unexpected)[:8]) + ". "
            "Load it with the base model that it was trained on."
        )
    layers = new_layers(model, sorted(owners), spec, seed)
    expected = {f"{name}.{leaf}": layer[leaf] for name, layer in layers.items() for leaf in _LEAVES if leaf in layer}
    _check_shapes(expected, weights, folder)
    if missing := sorted(expected.keys() - weights.keys()):
        raise AdapterError(f"{folder} is incomplete: {', '.join(missing[:8])} is missing. Copy or download it again.")
    install(model, layers)
    train_tables(model, spec.saved)


def _check_shapes(expected: dict[str, mx.array], weights: dict[str, mx.array], folder: Path) -> None:
    wrong = [
        f"{name} is {list(array.shape)}, the model needs {list(expected[name].shape) if name in expected else 'none'}"
        for name, array in weights.items()
        if name not in expected or expected[name].shape != array.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise AdapterError(
            f"{folder} does not fit this model: " + "; ".join(sorted(wrong)[:8]) + more + ". "
            "Load it with the base model that it was trained on."
        )
