"""What a run will take, known beforehand: `python -m mlx_zh.plan RECIPE [--memory 16GB] [KEY=VALUE ...]`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.planning.search import Step
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.memory_check import Place


def main(argv: list[str] | None = None) -> int:
    """Tell memory by part, whether it fits, and time; exit 1 where a stage does not fit."""
    parser = command.parser("plan", "Tell how much memory and time a run takes; the model's config is enough.")
    parser.add_argument("--memory", metavar="SIZE", type=_bytes, help="for a Mac of this size instead, as in 16GB")
    parser.add_argument("--quick", action="store_true", help="memory only, without measuring this machine's speed")
    arguments = parser.parse_intermixed_args(argv)
    recipe = command.read_recipe(arguments)
    if recipe is None:
        return 0

    from mlx_zh.models.load import find_config
    from mlx_zh.stages import memory_check
    from mlx_zh.system import console

    config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    place = memory_check.this_machine() if arguments.memory is None else memory_check.mac(arguments.memory)
    stages = [name for name, split in (("sft", recipe.data.sft), ("dpo", recipe.data.dpo)) if split.train] or ["sft"]
    fits = True
    for name in stages:
        step = memory_check.training_step(recipe, name, config, place)
        fits = _tell_memory(recipe, name, step, place) and fits
        if arguments.memory is None and not arguments.quick:
            _tell_time(recipe, name, step)
    if arguments.memory is not None:
        console.say("Times are told for the machine that this runs on: leave out --memory.")
    return 0 if fits else 1


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 16GB")
    return float(found[1]) * 2**30


def _tell_memory(recipe: Recipe, name: str, step: Step, place: Place) -> bool:
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
    fits = estimate.peak <= place.budget
    console.say(f"{'fits' if fits else 'DOES NOT FIT'}: {place.budget / 1e9:.1f} GB are the {place.name}.")
    if not fits:
        console.say(memory_check.way_out(step, settings, place))
    return fits


def _tell_time(recipe: Recipe, name: str, step: Step) -> None:
    from mlx_zh.planning.speed import measure
    from mlx_zh.system import console

    section = recipe.training(name)
    tokens, scored, count, known = _typical(recipe, name, section.batch_size)
    console.say("Measuring this machine, about ten seconds ...")
    speed = measure(step.model, step.trained, step.target, length=max(int(tokens / section.batch_size), 16))
    seconds = speed.step_seconds(
        step.model, step.trained, tokens=tokens, scored=scored, checkpoint=recipe.memory.checkpoint_layers
    )
    console.say(
        f"time: about {seconds:.3g} s a step of {tokens:.0f} tokens ({tokens / seconds:.0f} tokens/s); {known}"
    )
    steps = section.max_steps or (count and max(round(section.epochs * count / section.batch_size), 1))
    if not steps:
        console.say("      The run's length is not known: the data are not here yet.")
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
    """Tokens and scored tokens of a usual step, the number of examples, and where these come from."""
    from mlx_zh.planning.row_lengths import estimate_row_lengths

    split = recipe.data.sft if name == "sft" else recipe.data.dpo
    lengths = estimate_row_lengths([str(source.path or source.name) for source in split.train])
    if lengths is None:
        length = recipe.data.max_length / 2
        return batch_size * length, batch_size * length / 2, None, "examples taken to be half of data.max_length"
    tokens = min(lengths.tokens, float(recipe.data.max_length))
    known = f"examples of {tokens:.0f} tokens, guessed from the letters of {lengths.sampled} rows"
    return batch_size * tokens, batch_size * tokens * (0.6 if name == "sft" else 0.8), lengths.rows, known


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
