"""Damaged adapters of a training stage: set aside, and written again from a checkpoint that is whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mlx_zh.errors import AdapterError
from mlx_zh.language.notice import Notice
from mlx_zh.models.adapters.files import adapter_damage, read_adapter
from mlx_zh.system import console
from mlx_zh.system.storage import set_damaged_aside
from mlx_zh.training import checkpoints
from mlx_zh.training.optimizer import Arrays

if TYPE_CHECKING:
    from mlx_zh.stages.run_folder import StageFolder


def set_result_aside(stage: StageFolder) -> None:
    """Rename the damaged adapter of a finished stage, so that its last checkpoint writes it again.

    Raises AdapterError if there is no checkpoint.
    """
    if not stage.adapter.is_dir() or (reason := adapter_damage(stage.adapter)) is None:
        return
    if not any(stage.checkpoints.glob("step-*")):
        raise AdapterError(
            f"{stage.adapter} is damaged: {reason}. No checkpoint is left in {stage.checkpoints} to write it from. "
            "Put back a copy of it, or start over with --fresh (the old folder is kept beside it)."
        )
    aside = set_damaged_aside(stage.adapter)
    console.warn(Notice("adapter-damaged", folder=str(stage.adapter), reason=reason, aside=aside.name))


def mend_best(stage: StageFolder, step: int | None, save: Callable[[Arrays], None]) -> Arrays | None:
    """The weights of the lowest validation loss, which were kept after `step`; None if they are lost.

    If `checkpoints/best` is damaged, it is set aside and written again with `save` from the checkpoint after `step`.
    """
    if step is None or not stage.best.is_dir():
        return None
    try:
        return read_adapter(stage.best)[1]
    except AdapterError:
        reason = adapter_damage(stage.best) or "it cannot be read"
    aside = set_damaged_aside(stage.best)
    weights = checkpoints.weights_after(stage.checkpoints, step)
    told: dict[str, str | int] = {"folder": str(stage.best), "reason": reason, "aside": aside.name, "step": step}
    if weights is None:
        console.warn(Notice("best-lost", **told))
        return None
    console.warn(Notice("best-damaged", **told))
    save(weights)
    return weights
