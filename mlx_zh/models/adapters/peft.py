"""Read and write adapters in the format of Hugging Face's PEFT.

PEFT stores A as (r, in) and B as (out, r), mlx-lm as (in, r) and (r, out). PEFT has `lora_alpha`, mlx-lm has `scale`:
scale = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_zh.errors import AdapterError, ModelError
from mlx_zh.models.adapters.patterns import read_patterns
from mlx_zh.models.adapters.spec import ADAPTER_FILE, CONFIG_FILE, PEFT_FILE, SAVED, AdapterSpec, saved_of
from mlx_zh.models.family_configs import expert_names, of_expert
from mlx_zh.models.folder import read_table
from mlx_zh.system.json_text import load_json
from mlx_zh.system.storage import write_arrays, write_json

_PREFIX = "base_model.model."
_PART = "model.language_model."  # in the names of a model with images
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_BACK = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
_BACK["lora_magnitude_vector.weight"] = "m"  # some versions of PEFT wrote this
_KEY = re.compile(r"base_model\.model\.(.+?)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)")

# PEFT stores the table under an adapted head too. It is the base's own: LoRA does not change it.
_UNDER_ADAPTER = re.compile(r"base_model\.model\.(lm_head)\.base_layer\.weight")
_TABLE = re.compile(r"base_model\.model\.(model\.embed_tokens|lm_head)\.(?:modules_to_save\.(?:default\.)?)?weight")


def is_peft(folder: Path) -> bool:
    """Whether a folder has PEFT's files and not mlx-lm's."""
    return (folder / PEFT_FILE).is_file() and not (folder / ADAPTER_FILE).is_file()


def write_peft(
    folder: Path,
    spec: AdapterSpec,
    weights: dict[str, mx.array],
    *,
    base: str,
    matrices: Collection[str],
    tied: bool = False,
) -> None:
    """Write an adapter folder in PEFT's format.

    `base` is the base model's id on Hugging Face, `matrices` the names of its linear layers. A `tied` model's trained
    table is written for both its modules, because PEFT would give the head the old one. Raises AdapterError for
    a full fine-tuning, for which PEFT has no format.
    """
    if spec.kind == "full":
        raise AdapterError("a full fine-tuning is no adapter, so PEFT cannot hold it; export `hf` instead.")
    tables = {SAVED[module]: weights[SAVED[module]] for module in saved_of(weights)}
    if tied and tables:
        tables[SAVED["lm_head"]] = tables[SAVED["embed_tokens"]]
    arrays = {f"{_PREFIX}{name}": mx.contiguous(array.astype(mx.float32)) for name, array in tables.items()}
    weights = {name: array for name, array in weights.items() if name not in tables}
    paths: set[str] = set()
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        array = array.astype(mx.float32)
        if array.ndim == 3:  # experts; A and B are as PEFT has them
            parts = dict(zip(expert_names(path, array.shape[0]), array, strict=True))
        else:
            parts = {path: array if leaf == "m" else array.T}
        paths |= parts.keys()
        arrays |= {f"{_PREFIX}{part}.{_LEAVES[leaf]}": mx.contiguous(value) for part, value in parts.items()}
    write_arrays(folder / PEFT_FILE, arrays, {"format": "pt"})
    config = _config(spec, paths, base, matrices)
    write_json(folder / CONFIG_FILE, config | {"modules_to_save": list(saved_of(tables)) or None})


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
    """PEFT's target_modules and layers_to_transform for the adapted `paths`.

    If names and layer numbers cannot express the paths exactly, target_modules are the whole paths.
    """
    names = sorted({path.rpartition(".")[2] for path in paths})
    everywhere = {path for path in matrices if path.rpartition(".")[2] in names}
    if everywhere == paths:
        return names, None
    layers = {int(match[1]) for path in paths if (match := re.search(r"\.layers\.(\d+)\.", path))}
    within = {p for p in everywhere if (match := re.search(r"\.layers\.(\d+)\.", p)) and int(match[1]) in layers}
    if within == paths:
        return names, sorted(layers)
    return sorted(paths), None


def read_peft(folder: Path) -> tuple[AdapterSpec, dict[str, mx.array]]:
    """The settings and arrays of a PEFT folder in mlx-lm's terms.

    Raises AdapterError if the folder is damaged or mlx-lm's terms cannot express the adapter.
    """
    try:
        config = load_json(folder / CONFIG_FILE)
        read_table(folder / PEFT_FILE)
        stored = mx.load(str(folder / PEFT_FILE))
        if not isinstance(config, dict) or not isinstance(stored, dict):
            raise ValueError(f"{CONFIG_FILE} is not a JSON object")
        mx.eval(stored)
        stored = {key.replace(_PART, "model."): array for key, array in stored.items()}
        _check(config, folder)
        rank, alpha = int(config["r"]), float(config.get("lora_alpha", 8))
        ranks, alphas = (read_patterns(config.get(f"{name}_pattern") or {}) for name in ("rank", "alpha"))
        dropout = float(config.get("lora_dropout", 0.0))
        if not (rank > 0 and 0 < alpha < math.inf):
            raise ValueError(f"r {rank} and lora_alpha {alpha} are not usable")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise AdapterError(
            f"{folder} is damaged or no PEFT adapter: {error}. Copy or download it again, or give another folder."
        ) from error
    except ModelError as error:
        raise AdapterError(f"{folder} is damaged: {error}") from error
    tables = {f"{match[1]}.weight": stored.pop(key) for key in list(stored) if (match := _TABLE.fullmatch(key))}
    if lacking := sorted(_named_tables(config) - set(saved_of(tables))):
        raise AdapterError(f"{folder} is incomplete: {', '.join(lacking)} is missing. Copy or download it again.")
    modules = _by_module(stored, folder)
    stored_ranks = {path: int(parts["lora_a"].shape[0]) for path, parts in modules.items()}
    largest_rank = max(stored_ranks.values(), default=rank)
    rslora = bool(config.get("use_rslora"))
    scale = AdapterSpec.scale_of(alpha, rank, rslora=rslora)
    weights: dict[str, mx.array] = {}
    for path, parts in modules.items():
        own = AdapterSpec.scale_of(alphas.value(path, alpha), int(ranks.value(path, rank)), rslora=rslora)
        # mlx-lm has one rank and one scale for all layers: smaller ranks get rows of zeros, other scales go into B.
        padding = [(0, largest_rank - stored_ranks[path]), (0, 0)]
        weights[f"{path}.lora_a"] = mx.contiguous(mx.pad(parts["lora_a"].astype(mx.float32), padding).T)
        weights[f"{path}.lora_b"] = mx.pad(parts["lora_b"].astype(mx.float32).T * (own / scale), padding)
        if "m" in parts:
            weights[f"{path}.m"] = parts["m"].astype(mx.float32).reshape(-1)
    kind = "dora" if config.get("use_dora") else "lora"
    weights = _experts_together(weights, folder)
    weights |= {name: array.astype(mx.float32) for name, array in tables.items()}
    return AdapterSpec(kind, 10**6, largest_rank, scale, dropout, saved=saved_of(weights)), weights


def _experts_together(weights: dict[str, mx.array], folder: Path) -> dict[str, mx.array]:
    """The arrays with those of all experts of a layer in one, as mlx-lm has them; AdapterError if one lacks."""
    together: dict[str, mx.array] = {}
    experts: dict[str, dict[int, mx.array]] = {}
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        if (found := of_expert(path)) is None:
            together[name] = array
        else:
            experts.setdefault(f"{found[0]}.{leaf}", {})[found[1]] = array.T
    for name, arrays in experts.items():
        if sorted(arrays) != list(range(len(arrays))) or len({array.shape for array in arrays.values()}) > 1:
            raise AdapterError(
                f"{folder}: {name.rpartition('.')[0]} has an adapter for some of its experts only, which cannot be "
                "read. Merge it with PEFT (merge_and_unload) and take the merged model."
            )
        together[name] = mx.stack([arrays[number] for number in range(len(arrays))])
    return together


# Initialisations that leave the base model's weights as they are. EVA and MiCA choose A or B from the data or the
# base, and both matrices are in the file. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights too,
# so that the adapter fits no other base; PEFT writes true once such an adapter is converted.
_KEEPS_BASE = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_CONVERTIBLE = ("pissa", "olora", "corda", "lora_ga")  # what PEFT's conversion to plain LoRA knows
# Every other key `use_…`, and every other object `…_config`, is another kind of LoRA. These configure an
# initialisation or the training program.
_KNOWN_USES = ("use_rslora", "use_dora")
_KNOWN_CONFIGS = ("eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config")
# What PEFT cannot merge: the change depends on the text.
_NEVER_MERGED = ("alora_invocation_tokens", "invocation_string", "arrow_config")
_NEVER_MERGED_TYPES = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "POLY", "SHADOW", "XLORA",
)  # fmt: skip


def _named_tables(config: dict[str, Any]) -> set[str]:
    """The last names of `modules_to_save`."""
    return {str(name).rpartition(".")[2] for name in config.get("modules_to_save") or ()}


def _check(config: dict[str, Any], folder: Path) -> None:
    """Raise AdapterError for an adapter that is more than LoRA or DoRA on linear layers; it names the settings."""
    variants = [
        key
        for key, value in config.items()
        if value
        and (
            (key.startswith("use_") and key not in _KNOWN_USES)
            or (key.endswith("_config") and key not in _KNOWN_CONFIGS)
        )
    ]
    initialisation = str(config.get("init_lora_weights")).lower()
    unsupported = dict.fromkeys(variants, True) | {
        "init_lora_weights": initialisation not in _KEEPS_BASE,
        "alora_invocation_tokens": bool(config.get("alora_invocation_tokens")),
        "invocation_string": bool(config.get("invocation_string")),
        "layer_replication": bool(config.get("layer_replication")),
        "peft_type": config.get("peft_type", "LORA") != "LORA",
        "bias": config.get("bias", "none") != "none",
        "lora_bias": bool(config.get("lora_bias")),
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "modules_to_save": bool(_named_tables(config) - SAVED.keys()),
        "trainable_token_indices": bool(config.get("trainable_token_indices")),
        "target_parameters": bool(config.get("target_parameters")),
    }
    if used := [name for name, is_used in unsupported.items() if is_used]:
        named = ", ".join(f"{name} {config.get(name)!r}" for name in used)
        raise AdapterError(
            f"{folder}: {named} cannot be read; only LoRA and DoRA on linear layers can. {_instead(config, used)}"
        )


def _instead(config: dict[str, Any], used: Collection[str]) -> str:
    """What to do with an adapter that is not read because of the settings `used`."""
    if set(used) & set(_NEVER_MERGED) or config.get("peft_type") in _NEVER_MERGED_TYPES:
        return "PEFT cannot merge it either, so no model can be made of it. Give another adapter."
    text = "Merge it with PEFT (merge_and_unload) and take the merged model."
    initialisation = str(config.get("init_lora_weights")).lower()
    if "init_lora_weights" not in used:
        return text
    if initialisation.startswith(_CONVERTIBLE):
        return (
            f"{text} This initialisation changes the base model's weights too: save the adapter again with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it plain LoRA."
        )
    return (
        f"{text} This initialisation may have changed the base model's weights too, so merge it where it was "
        "trained, into the weights that it was trained on."
    )


def _by_module(stored: dict[str, mx.array], folder: Path) -> dict[str, dict[str, mx.array]]:
    """The arrays of each module by mlx-lm's leaf names, in PEFT's layout."""
    modules: dict[str, dict[str, mx.array]] = {}
    unexpected = []
    for key, array in stored.items():
        if (under := _UNDER_ADAPTER.fullmatch(key)) and f"{_PREFIX}{under[1]}.lora_A.weight" in stored:
            continue
        match = _KEY.fullmatch(key)
        if match and (match[2] not in ("lora_A.weight", "lora_B.weight") or array.ndim == 2):
            modules.setdefault(match[1], {})[_BACK[match[2]]] = array
        else:
            unexpected.append(key)
    unexpected += [path for path, parts in modules.items() if not {"lora_a", "lora_b"} <= parts.keys()]
    if unexpected or not modules:
        shown = ", ".join(sorted(unexpected)[:6]) or "no tensors"
        raise AdapterError(
            f"{folder}: not LoRA on linear layers, or not complete: {shown}. Download it again; if it is complete, "
            "merge it with PEFT (merge_and_unload) and take the merged model."
        )
    return modules
