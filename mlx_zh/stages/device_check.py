"""Check a GPU before it trains: the self-check's short form, once for each MLX version, device and kind of model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_zh.core.families import Config
from mlx_zh.core.logprobs import decoder
from mlx_zh.errors import StorageError, TrainingError
from mlx_zh.language.notice import Notice, notice_of
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.system import console, device
from mlx_zh.system.digests import value_digest
from mlx_zh.system.json_text import load_json
from mlx_zh.system.storage import cache_folder, write_exact_json
from mlx_zh.training.check_cases import Case
from mlx_zh.training.self_check import check

if TYPE_CHECKING:
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.recipe import Recipe

_FORMAT = 1  # of the remembered results; raised when the check itself changes
_SETTINGS = ("MLX_ENABLE_TF32", "MLX_SDPA_VJP_FALLBACK")  # variables that choose other kernels


def needs_unfused(recipe: Recipe, loaded: LoadedModel, spec: AdapterSpec, *, force: bool) -> bool:
    """Whether this run's attention must go the unfused way, because the fused way fails the self-check.

    A result is remembered in the cache folder. Raises TrainingError if neither way passes; with `force`, only warns.
    Nothing is checked on the CPU: it is the reference itself, and the tests compare the rest.
    """
    if device.is_cpu():
        return False
    case = case_of(recipe, loaded, spec)
    about: dict[str, Any] = {"format": _FORMAT, **device.identity(), "case": str(case)}
    about["settings"] = {name: os.environ.get(name) for name in _SETTINGS}
    path = cache_folder() / "self-check" / f"{value_digest(about)[:24]}.json"
    result = _remembered(path, about)
    if result is None:
        console.say("Checking that this device computes a training step as the CPU does; this is done once.")
        result = _checked(case, about, force=force)
        if result["remember"]:
            _remember(path, result)
    if result["warning"] is not None:
        console.warn(notice_of(result["warning"]) or result["warning"])
    return result["attention"] == "unfused"


def case_of(recipe: Recipe, loaded: LoadedModel, spec: AdapterSpec) -> Case:
    """The self-check's case that is like a run: its precision, quantization, heads and adapter."""
    config = loaded.config
    packing = config.get("quantization") or {}
    return Case(
        dtype=str(decoder(loaded.model).norm.weight.dtype).rpartition(".")[2],
        head=_head_size(config),
        adapter=spec.kind,
        bits=packing.get("bits"),
        group=packing.get("group_size", 64),
        mode=packing.get("mode", "affine"),
        checkpoint=recipe.memory.checkpoint_layers is True,
    )


def _head_size(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _checked(case: Case, about: dict[str, Any], *, force: bool) -> dict[str, Any]:
    """The result of the check: the way that attention goes, and a warning about it. Raises TrainingError."""
    result: dict[str, Any] = {"about": about, "attention": "fused", "warning": None, "remember": True}
    fused = check(case)
    if fused.passed:
        return result
    with device.unfused_attention():
        unfused = check(case)
    if unfused.passed:
        warning = Notice("attention-unfused", problem=fused.problem)
        return result | {"attention": "unfused", "warning": warning.as_dict(), "remember": not fused.fault}
    warning = Notice("self-check-failed", problem=unfused.problem)
    if not force:
        raise TrainingError(f"{warning} To start anyway, add --force.")
    way = "unfused" if fused.error and not unfused.error else "fused"
    return result | {"attention": way, "warning": warning.as_dict(), "remember": False}


def _remembered(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier result; None if there is none, or if its file is damaged."""
    try:
        result = load_json(path)
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict) or result.get("about") != about:
        return None
    warning = result.get("warning", "")
    whole = result.get("attention") in ("fused", "unfused") and (warning is None or notice_of(warning) is not None)
    return result if whole else None


def _remember(path: Path, result: dict[str, Any]) -> None:
    try:
        write_exact_json(path, result)
    except StorageError as error:  # the check then runs again next time
        console.say(f"The result of the check cannot be kept: {error}")
