"""Checkpoints: everything that a run needs to resume exactly.

A checkpoint is written to a temporary folder and then renamed, so a folder of its final name is complete.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import mlx.core as mx

from mlx_zh.errors import StorageError
from mlx_zh.language.notice import Notice
from mlx_zh.system.digests import damage, digests_of
from mlx_zh.system.json_text import load_json, read_object
from mlx_zh.system.storage import (
    make_folder,
    require_in_place,
    storage_errors,
    sweep,
    sync_folder,
    write_arrays,
    write_exact_json,
)
from mlx_zh.training.optimizer import Arrays

_FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
_DIGESTS = "digests.json"
_DAMAGED = (OSError, ValueError, KeyError, TypeError, RuntimeError)


class CheckpointState(TypedDict):
    """`state.json` of a checkpoint."""

    step: int
    key: str  # digest of everything that the stage learns from
    progress: dict[str, Any]  # the fields of `Progress`


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run after `state["step"]` steps: trained weights, optimizer state, and JSON values."""

    weights: Arrays
    optimizer: Arrays
    state: CheckpointState


@dataclass
class Progress:
    """The state of a run besides weights and optimizer. It is stored in each checkpoint.

    `evaluated_at` is the step of the last validation, -1 before the first; `metrics_size` is in bytes. `row_limits`
    has the `micro_tokens` that the recipe asked for ("asked") and those that the rows of "training" and "validation"
    have had since the accelerator gave up longer ones; "memory" is how many bytes decide what rows compute again,
    "memory_asked" is what the recipe said of that, 0 if nothing, "memory_sharing" how many ranks of a machine share
    its memory, and "memory_lowered" how often the limit was lowered since, because memory ran out.
    """

    step: int = 0
    elapsed_seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    evaluated_at: int = -1
    metrics_size: int = 0
    row_limits: dict[str, int] = field(default_factory=dict)
    threads: int = 0  # of matrix products on the CPU, see `system.cpu_threads`; a resumed run rounds as before
    products: dict[str, Any] = field(default_factory=dict)  # see `stages.product_choice`; so does their rounding
    ranks: int = 0  # processes of this machine that compute together; 0 if there is one, or some on other machines


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder/step-NNNNNN`. Raises StorageError.

    Then remove all but the newest `keep` checkpoints, and temporary folders that a killed run left.
    """
    target = folder / f"step-{checkpoint.state['step']:06d}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        with storage_errors(target):
            require_in_place(target)
            make_folder(folder)
            temporary.mkdir(exist_ok=True)
            write_arrays(temporary / "weights.safetensors", checkpoint.weights)
            write_arrays(temporary / "optimizer.safetensors", checkpoint.optimizer)
            write_exact_json(temporary / "state.json", checkpoint.state)
            write_exact_json(temporary / _DIGESTS, digests_of(temporary, _FILES))
            require_in_place(target)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
            sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, keep)
    return target


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and what kills left. Each is first renamed as unfinished."""
    for old in _folders(folder)[:-keep]:
        leaving = folder / f".{old.name}.{os.getpid()}.tmp"
        with suppress(OSError):
            old.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)
    sweep(folder)


def load_newest(folder: Path) -> tuple[Checkpoint | None, list[Notice]]:
    """The newest undamaged checkpoint, or None, and a notice about each damaged one, which is renamed.

    Raises StorageError when a damaged checkpoint cannot be renamed.
    """
    remarks: list[Notice] = []
    for path in reversed(_folders(folder)):
        try:
            return _load(path), remarks
        except _DAMAGED as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            try:
                path.rename(aside)
            except OSError:
                raise StorageError(f"{path} is damaged ({error}) and cannot be moved aside.") from error
            remarks.append(Notice("checkpoint-damaged", name=path.name, reason=str(error), aside=aside.name))
    return None, remarks


def newest_progress(folder: Path) -> dict[str, Any] | None:
    """The progress in the newest checkpoint whose state can be read; None without one. Its arrays are not checked."""
    for path in reversed(_folders(folder)):
        state = read_object(path / "state.json") or {}
        if isinstance(progress := state.get("progress"), dict):
            return progress
    return None


def weights_after(folder: Path, step: int) -> Arrays | None:
    """The trained weights of the checkpoint after `step`; None if there is none, or if it is damaged."""
    try:
        return _load(folder / f"step-{step:06d}").weights
    except _DAMAGED:
        return None


def _load(path: Path) -> Checkpoint:
    digests = load_json(path / _DIGESTS)
    # An array with a flipped bit would load without an error.
    if (reason := damage(path, {name: digests[name] for name in _FILES})) is not None:
        raise ValueError(reason)
    state = load_json(path / "state.json")
    arrays = [mx.load(str(path / f"{name}.safetensors")) for name in ("weights", "optimizer")]
    mx.eval(arrays)
    weights, optimizer = arrays
    if not isinstance(weights, dict) or not isinstance(optimizer, dict) or not isinstance(state["step"], int):
        raise ValueError("unexpected contents")
    return Checkpoint(weights, optimizer, state)


def _folders(folder: Path) -> list[Path]:
    """The checkpoints, oldest first. From step 1,000,000 on, names do not sort like numbers."""
    folders = [p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(folders, key=lambda p: int(p.name[5:]))
