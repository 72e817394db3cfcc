"""Adapters in the format of Hugging Face's PEFT: written for others, and read wherever an adapter is read.

PEFT keeps A as (r, in) and B as (out, r) where mlx-lm has (in, r) and (r, out), and `lora_alpha` where mlx-lm has
`scale`: scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zh.errors import AdapterError, ModelError
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE, PEFT_FILE, AdapterSpec
from mlx_zh.models.folder import read_table
from mlx_zh.system.storage import write_arrays, write_json

_PREFIX = "base_model.model."
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_BACK = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
_BACK["lora_magnitude_vector.weight"] = "m"  # some versions of PEFT wrote this
_KEY = re.compile(r"base_model\.model\.(.+?)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")


def is_peft(folder: Path) -> bool:
    """Whether a folder holds PEFT's files and not mlx-lm's."""
    return (folder / PEFT_FILE).is_file() and not (folder / ADAPTER_FILE).is_file()


def write_peft(
    folder: Path, spec: AdapterSpec, weights: dict[str, mx.array], *, base: str, matrices: Collection[str]
) -> None:
    """Write an adapter as PEFT does; `base` is the model's id for Hugging Face, `matrices` its linear layers.

    AdapterError for a full fine-tuning, which PEFT has no format for.
    """
    if spec.kind == "full":
        raise AdapterError("a full fine-tuning is no adapter, so there is nothing for PEFT; export `hf` instead.")
    arrays = {}
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        turned = array.astype(mx.float32)
        arrays[f"{_PREFIX}{path}.{_LEAVES[leaf]}"] = mx.contiguous(turned if leaf == "m" else turned.T)
    write_arrays(folder / PEFT_FILE, arrays, {"format": "pt"})
    write_json(folder / CONFIG_FILE, _config(spec, {n.rpartition(".")[0] for n in weights}, base, matrices))


def _config(spec: AdapterSpec, paths: set[str], base: str, matrices: Collection[str]) -> dict[str, Any]:
    targets, layers = _targets(paths, matrices)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.scale * spec.rank,
        "use_rslora": False,
        "use_dora": spec.kind == "dora",
        "lora_dropout": spec.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else "layers",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _targets(paths: set[str], matrices: Collection[str]) -> tuple[list[str], list[int] | None]:
    """PEFT's target_modules and layers_to_transform; whole paths where names and layers do not say it exactly."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    everywhere = {path for path in matrices if path.rpartition(".")[2] in names}
    if everywhere == paths:
        return names, None
    layers = {int(found[1]) for path in paths if (found := re.search(r"\.layers\.(\d+)\.", path))}
    within = {p for p in everywhere if (found := re.search(r"\.layers\.(\d+)\.", p)) and int(found[1]) in layers}
    if within == paths:
        return names, sorted(layers)
    return sorted(paths), None


def read_peft(folder: Path) -> tuple[AdapterSpec, dict[str, mx.array]]:
    """Settings and arrays of a PEFT folder in mlx-lm's terms. AdapterError for what these cannot express."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        read_table(folder / PEFT_FILE)
        stored = mx.load(str(folder / PEFT_FILE))
        if not isinstance(config, dict) or not isinstance(stored, dict):
            raise ValueError(f"{CONFIG_FILE} is no mapping")
        mx.eval(stored)
        _check(config, folder)
        rank, alpha = int(config["r"]), float(config.get("lora_alpha", 8))
        ranks, alphas = (_patterns(config.get(f"{name}_pattern") or {}) for name in ("rank", "alpha"))
        dropout = float(config.get("lora_dropout", 0.0))
        if not (rank > 0 and 0 < alpha < math.inf):
            raise ValueError(f"r {rank} and lora_alpha {alpha} make no adapter")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise AdapterError(f"{folder} is damaged or no PEFT adapter: {error}.") from error
    except ModelError as error:
        raise AdapterError(f"{folder} is damaged: {error}") from error
    modules = _by_module(stored, folder)
    found = {path: int(parts["lora_a"].shape[0]) for path, parts in modules.items()}
    widest = max(found.values(), default=rank)
    rslora = bool(config.get("use_rslora"))
    scale = AdapterSpec.scale_of(alpha, rank, rslora=rslora)
    weights: dict[str, mx.array] = {}
    for path, parts in modules.items():
        own = AdapterSpec.scale_of(_pattern(alphas, path, alpha), int(_pattern(ranks, path, rank)), rslora=rslora)
        # One rank and one scale for all: narrower pairs get rows of zeros, another scale goes into B.
        room = [(0, widest - found[path]), (0, 0)]
        weights[f"{path}.lora_a"] = mx.contiguous(mx.pad(parts["lora_a"].astype(mx.float32), room).T)
        weights[f"{path}.lora_b"] = mx.pad(parts["lora_b"].astype(mx.float32).T * (own / scale), room)
        if "m" in parts:
            weights[f"{path}.m"] = parts["m"].astype(mx.float32).reshape(-1)
    kind = "dora" if config.get("use_dora") else "lora"
    return AdapterSpec(kind, 10**6, widest, scale, dropout), weights


def _check(config: dict[str, Any], folder: Path) -> None:
    refused = {
        "peft_type": config.get("peft_type", "LORA") != "LORA",
        "bias": config.get("bias", "none") != "none",
        "lora_bias": bool(config.get("lora_bias")),
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "modules_to_save": bool(config.get("modules_to_save")),
        "trainable_token_indices": bool(config.get("trainable_token_indices")),
        "target_parameters": bool(config.get("target_parameters")),
    }
    if bad := [f"{name} {config.get(name)!r}" for name, wrong in refused.items() if wrong]:
        raise AdapterError(
            f"{folder}: {', '.join(bad)} cannot be read here; LoRA and DoRA on linear layers can. Merge it with PEFT "
            "(merge_and_unload) and take the merged model."
        )


def _by_module(stored: dict[str, mx.array], folder: Path) -> dict[str, dict[str, mx.array]]:
    modules: dict[str, dict[str, mx.array]] = {}
    strange = []
    for key, array in stored.items():
        match = _KEY.fullmatch(key)
        if match and (match[2] not in ("lora_A.weight", "lora_B.weight") or array.ndim == 2):
            modules.setdefault(match[1], {})[_BACK[match[2]]] = array
        else:
            strange.append(key)
    strange += [path for path, parts in modules.items() if not {"lora_a", "lora_b"} <= parts.keys()]
    if strange or not modules:
        shown = ", ".join(sorted(strange)[:6]) or "no tensors"
        raise AdapterError(f"{folder}: not LoRA on linear layers, or not complete: {shown}.")
    return modules


Patterns = list[tuple[re.Pattern[str], float]]


def _patterns(given: dict[str, Any]) -> Patterns:
    """PEFT's rank_pattern and alpha_pattern: a name, the end of a path, or a regular expression for it.

    Raises ValueError for one that is none, or whose repeated groups could keep matching for hours.
    """
    found = []
    for pattern, value in given.items():
        if len(pattern) > 400 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise ValueError(f"the pattern {pattern[:80]!r} is too elaborate")
        try:
            found.append((re.compile(rf"(?:.*\.)?(?:{pattern})"), float(value)))
        except re.error as error:
            raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    if not all(value > 0 and math.isfinite(value) for _, value in found):
        raise ValueError("ranks and alphas must be positive numbers")
    return found


def _pattern(patterns: Patterns, path: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.fullmatch(path)), default)
