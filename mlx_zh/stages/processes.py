"""In how many processes a stage computes on this machine: as asked, as its run began, or as is fastest now.

Only MLX's CPU back end with OpenBLAS is faster with several, and only where nobody said how many threads to use. Each
process computes with one thread and holds a copy of the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from mlx_zh.distributed import launching, local
from mlx_zh.distributed.world import World, joined
from mlx_zh.errors import DistributedError, MlxZhError
from mlx_zh.recipe import Recipe
from mlx_zh.stages import memory_check
from mlx_zh.stages.operations import operations, shared_out
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system import console, cpu_processes, cpu_threads, device
from mlx_zh.system.locks import in_pipeline
from mlx_zh.training.checkpoints import newest_progress

WORTH = 6e12  # floating-point operations of a stage, about a minute of a core, for which others are started
WORTH_GAIN = 1.15  # the least gain that pays a second copy of the model
Work = Callable[[Recipe, World], int]


def compute(stage: str, recipe: Recipe, arguments: argparse.Namespace, argv: Sequence[str] | None, work: Work) -> int:
    """Do the `work` of a stage alone, or together with other processes; returns the exit status.

    Raises DistributedError if those that the user asked for do not start, and MlxZhError as `work` does.
    """
    asked = launching.processes_asked(arguments)
    count = asked or _fastest(recipe, stage, arguments)
    if count == 1:
        return work(recipe, World())
    if device.back_end() == "cuda":
        if in_pipeline():
            raise DistributedError(
                f"--processes {count}: `mlx-zh run` cannot give each process a GPU. Run the stages one by one, as in "
                f"`mlx-zh {stage} {recipe.words} --processes {count}`."
            )
        return launching.launch(stage, arguments, argv)
    variables = {}
    if cpu_threads.is_free():
        threads = max(cpu_threads.usable_cores() // count, 1) if asked else 1
        cpu_threads.use(threads)  # here BLAS is loaded already
        variables["OPENBLAS_NUM_THREADS"] = str(threads)
    with ExitStack() as stack:
        try:
            command = launching.command_of(stage, argv)
            all_joined = stack.enter_context(local.started(count, command, variables))
        except (DistributedError, OSError):
            if asked:
                raise
            console.say("The other processes did not start, so this one computes alone.")
            return work(recipe, World())
        world = stack.enter_context(joined(console.warn))
        all_joined()
        return work(world.each(lambda: recipe), world)


def _fastest(recipe: Recipe, stage: str, arguments: argparse.Namespace) -> int:
    """The number of processes where nobody asked for one, and a line that says so if there are several."""
    if not may_choose():
        return 1
    if stage in TUNED and (began := _as_it_began(recipe, stage, arguments)) is not None:
        if began > 1:
            console.say(f"Going on in {began} processes with one BLAS thread each, as this run began.")
        return began
    try:
        fastest = measured_for(recipe, stage, arguments)
    except MlxZhError:
        return 1  # the stage itself says what is wrong
    if fastest.processes > 1:
        console.say(
            f"Computing in {fastest.processes} processes with one BLAS thread each: measured just now, they do "
            f"{fastest.gain:.1f} times the work of one process. `--processes 1` computes in one."
        )
    return fastest.processes


def may_choose() -> bool:
    """Whether several processes could be faster here: OpenBLAS computes, and nothing was said about its threads."""
    return not local.is_rank() and cpu_threads.is_free() and device.is_cpu() and cpu_threads.usable_cores() > 1


def _as_it_began(recipe: Recipe, stage: str, arguments: argparse.Namespace) -> int | None:
    """The processes of the run that goes on, because another number rounds otherwise; None if one starts anew."""
    folder = RunFolder.of(recipe).stage(stage)
    if arguments.fresh or recipe.resume == "never":
        return None
    if folder.is_finished:
        return None if arguments.renew else 1
    progress = newest_progress(folder.checkpoints)
    if progress is None:
        return None
    ranks = progress.get("ranks")  # earlier versions recorded none
    return max(ranks, 1) if isinstance(ranks, int) else 1


def measured_for(recipe: Recipe, stage: str, arguments: argparse.Namespace) -> cpu_processes.Fastest:
    """The fastest number of processes whose memory suffices, for a stage that takes long enough.

    Raises MlxZhError for a recipe with which the work cannot be counted.
    """
    from mlx_zh.models.load import find_config

    alone = cpu_processes.Fastest()
    pieces = shared_out(recipe, stage)
    if pieces == 1:
        return alone
    config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    machine = memory_check.this_machine()
    step = memory_check.training_step(recipe, stage if stage in TUNED else "sft", config, machine)
    if operations(recipe, stage, arguments, step) < WORTH:
        return alone
    fastest = cpu_processes.fastest()
    count = fastest.processes
    if not 1 < count <= pieces:
        return alone
    budget = memory_check.within_limit(machine, recipe.memory).budget / count
    smaller = replace(step, limit=memory_check.memory_limit(recipe.memory, machine) / count)
    if smaller.memory(recipe.memory).peak > (1 - memory_check.RESERVE) * budget:
        return alone
    # With less memory, rows may have to compute more again.
    gain = fastest.gain * (3 + step.again(recipe.memory).share) / (3 + smaller.again(recipe.memory).share)
    return replace(fastest, gain=gain) if gain >= WORTH_GAIN else alone
