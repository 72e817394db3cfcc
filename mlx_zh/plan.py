"""Estimate a run before it starts: `python -m mlx_zh.plan RECIPE [--memory 16GB] [KEY=VALUE ...]`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.planning.search import Step
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.memory_check import Machine


def main(argv: list[str] | None = None) -> int:
    """Print memory by part, whether it fits, and time; returns 1 if a stage does not fit. Raises MlxZhError."""
    parser = command.parser("plan", "Estimate the memory and time of a run; only the model's config is downloaded.")
    parser.add_argument(
        "--memory", metavar="SIZE", type=_bytes, help="plan for a Mac with this memory instead, for example 16GB"
    )
    parser.add_argument("--quick", action="store_true", help="memory only; do not measure this machine's speed")
    arguments = parser.parse_intermixed_args(argv)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh.models.load import find_config
    from mlx_zh.stages import memory_check
    from mlx_zh.system import console

    config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    machine = memory_check.this_machine() if arguments.memory is None else memory_check.mac(arguments.memory)
    stages = [name for name, split in (("sft", recipe.data.sft), ("dpo", recipe.data.dpo)) if split.train] or ["sft"]
    fits = True
    for name in stages:
        step = memory_check.training_step(recipe, name, config, machine)
        fits = _print_memory(recipe, name, step, machine) and fits
        if arguments.memory is None and not arguments.quick:
            _print_time(recipe, name, step)
    if arguments.memory is not None:
        console.say("Times are measured on this machine only; leave out --memory to see them.")
    return 0 if fits else 1


def _bytes(text: str) -> float:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if not size or float(size[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write it as 16GB")
    return float(size[1]) * 2**30


def _print_memory(recipe: Recipe, name: str, step: Step, machine: Machine) -> bool:
    from mlx_zh.stages import memory_check
    from mlx_zh.system import console

    settings = recipe.memory
    estimate = step.memory(settings)
    row, rows = step.examples.largest_row(settings.micro_tokens)
    console.say(
        f"{name}: {rows} rows of up to {row.tokens} tokens a step, of examples as long as data.max_length allows; "
        f"peak in: {estimate.phase}"
    )
    lines = [(part, f"{size / 1e9:.2f} GB") for part, size in estimate.parts.items()]
    lines.append(("peak", f"{estimate.peak / 1e9:.2f} GB"))
    lines.append(("cache", "up to 1.07 GB more, given back when memory is short"))
    console.say(console.table(lines))
    fits = estimate.peak <= machine.budget
    console.say(f"{'fits' if fits else 'DOES NOT FIT'}: {machine.budget / 1e9:.1f} GB are the {machine.name}.")
    if not fits:
        console.say(memory_check.suggestion(step, settings, machine))
    return fits


def _print_time(recipe: Recipe, name: str, step: Step) -> None:
    from mlx_zh.planning.speed import measure
    from mlx_zh.system import console

    section = recipe.training(name)
    tokens, scored, count, basis = _typical(recipe, name, section.batch_size)
    console.say("Measuring this machine for about ten seconds ...")
    speed = measure(step.model, step.trained, step.target, length=max(int(tokens / section.batch_size), 16))
    seconds = speed.step_seconds(
        step.model, step.trained, tokens=tokens, scored=scored, checkpoint=recipe.memory.checkpoint_layers
    )
    console.say(
        f"time: about {seconds:.3g} s a step of {tokens:.0f} tokens ({tokens / seconds:.0f} tokens/s); {basis}"
    )
    steps = section.max_steps or (count and max(round(section.epochs * count / section.batch_size), 1))
    if not steps:
        console.say("      The number of steps is unknown, because the data is not here yet.")
        return
    console.say(f"      {steps} steps: about {console.duration(steps * seconds)}, without validation")
    if name == "dpo" and recipe.dpo.reference != "none":
        pairs = min(steps * section.batch_size, count or steps * section.batch_size)
        share = pairs / section.batch_size
        reference = speed.forward_seconds(step.model, tokens=share * tokens, scored=share * scored)
        console.say(
            f"      before them, reference log-probs of {pairs} pairs: about {console.duration(reference)}, once"
        )
    console.say("      Expect it within a third: other programs, heat and the lengths of your examples all count.")


def _typical(recipe: Recipe, name: str, batch_size: int) -> tuple[float, float, int | None, str]:
    """Tokens and scored tokens of a typical step, the number of examples, and what these numbers are based on."""
    from mlx_zh.planning.row_lengths import estimate_row_lengths

    split = recipe.data.sft if name == "sft" else recipe.data.dpo
    lengths = estimate_row_lengths([str(source.path or source.name) for source in split.train])
    if lengths is None:
        length = recipe.data.max_length / 2
        return (
            batch_size * length,
            batch_size * length / 2,
            None,
            "examples assumed to be half as long as data.max_length",
        )
    tokens = min(lengths.tokens, float(recipe.data.max_length))
    basis = f"examples of {tokens:.0f} tokens, estimated from the characters of {lengths.sampled} rows"
    return batch_size * tokens, batch_size * tokens * (0.6 if name == "sft" else 0.8), lengths.rows, basis


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
