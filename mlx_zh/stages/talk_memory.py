"""The memory that talking with a model takes, beside what the runs at work take or will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from mlx_zh.core.families import Config
from mlx_zh.errors import MlxZhError, PlanError
from mlx_zh.pipeline.outdated import peak_memory
from mlx_zh.planning.memory import FLOAT, trained_values, weight_bytes
from mlx_zh.recipe import Recipe
from mlx_zh.stages.command import find_recipe
from mlx_zh.stages.memory_check import Machine, this_machine, training_step
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system.holders import holder
from mlx_zh.system.locks import NAME as LOCK

_CACHED = 4096  # tokens of conversation that each column is counted with; a longer one takes more
_COLUMNS = 3
_CHUNK = 512  # tokens of a prompt that are computed at once
_PROGRAM = 0.5e9  # bytes of Python, MLX and the tokenizer (measured: 0.3 to 0.45 GB)
_LOGITS = 4  # arrays (1, V) float32 of a step


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: what talking needs, what is free for it, and what of the rest the runs at work will still take."""

    need: float
    free: float
    promised: float

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.need <= self.free


def room_for(recipe: Recipe, config: Config, at_work: Sequence[Path]) -> Room:
    """The memory for talking with a recipe's base and its adapters; `at_work` are the folders of runs at work.

    Raises ModelError if the model's config lacks a value.
    """
    machine = this_machine()
    promised = sum(_still_taken(folder, machine) for folder in at_work)
    available = min(machine.budget, float(psutil.virtual_memory().available))
    return Room(need_of(recipe, config, machine), max(0.0, available - promised), promised)


def need_of(recipe: Recipe, config: Config, machine: Machine) -> float:
    """Bytes that talking takes: weights, one adapter, the caches of three columns, and a chunk of a prompt.

    A fully tuned model takes its own weights beside the base's, which are kept to go back to.
    """
    step = training_step(recipe, "sft", config, machine)
    model, target, trained = step.model, step.target, step.trained
    size = target.value_bytes
    weights = weight_bytes(model, target)
    tuned = trained_values(model, trained) * FLOAT
    if trained.kind == "full":
        tuned = weight_bytes(model, target, trained)
    tokens = min(_CACHED, _context(config))
    cache = model.cache_bytes(tokens, size) * _COLUMNS
    width = 4 * model.intermediate + 4 * model.hidden + 2 * model.queries
    chunk = float(_CHUNK * width * size)
    if not target.fused_attention:
        chunk += 2.0 * model.heads * _CHUNK * tokens * size
    return weights + tuned + cache + chunk + _LOGITS * model.vocabulary * FLOAT + _PROGRAM


def _context(config: Config) -> int:
    trained = config.get("max_position_embeddings")
    return trained if isinstance(trained, int) and trained > 0 else _CACHED


def _still_taken(folder: Path, machine: Machine) -> float:
    """Bytes that a run at work may take beyond what its processes have: its measured or planned peak less that."""
    process = holder(folder / LOCK)
    if process is None:
        return 0.0
    try:
        recipe = find_recipe(str(folder))
        return max(0.0, _peak(recipe, machine) - _resident(process))
    except (MlxZhError, psutil.Error):  # ended meanwhile, or nothing is known of it
        return 0.0


def _peak(recipe: Recipe, machine: Machine) -> float:
    from mlx_zh.models.load import find_config

    run, peaks = RunFolder.of(recipe), [0.0]
    config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    for stage in TUNED:
        if run.stage(stage).is_finished or not recipe.data.split(stage).train:
            continue
        measured = peak_memory(run.stage(stage))
        planned = training_step(recipe, stage, config, machine).memory(recipe.memory).peak
        peaks.append(measured * 1e9 if measured else planned)
    return max(peaks)


def _resident(process: psutil.Process) -> float:
    """Bytes of a process and its children."""
    return float(sum(one.memory_info().rss for one in (process, *process.children(recursive=True))))


def require_room(room: Room) -> None:
    """Raise PlanError if talking does not fit."""
    if room.fits:
        return
    need, free, promised = (value / 1e9 for value in (room.need, room.free, room.promised))
    if room.promised:
        raise PlanError(
            f"talking with this model takes about {need:.1f} GB of memory, and beside the training at work, which "
            f"may still take {promised:.1f} GB, {free:.1f} GB are free. Wait until the training is done, or close "
            "other programs."
        )
    raise PlanError(
        f"talking with this model takes about {need:.1f} GB of memory, and {free:.1f} GB are free. Close other "
        "programs, or tune a smaller or a quantized model."
    )
