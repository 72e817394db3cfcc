"""What a run will take, told before it starts: memory, hours, downloads and disk. No network is asked for it.

The lengths of the examples are those of the prepared data if there is any, else those that `planning.data_sizes`
expects. The memory is that of examples as long as `data.max_length` allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_zh.core.families import Config
from mlx_zh.exams.catalog import NAMES, benchmark
from mlx_zh.exams.protocols import protocols
from mlx_zh.language.notice import Notice
from mlx_zh.planning.chips import Chip, predicted_pace
from mlx_zh.planning.data_sizes import data_size
from mlx_zh.planning.exports import recovery_bytes, rounding_seconds
from mlx_zh.planning.memory import FLOAT, saved_values, trained_values
from mlx_zh.planning.pace import Pace
from mlx_zh.planning.row_lengths import estimate_row_lengths
from mlx_zh.planning.search import cheapest
from mlx_zh.planning.workload import SCORED, exam_size, stages_of
from mlx_zh.recipe import Recipe, Rounds
from mlx_zh.stages import half_precision, memory_check
from mlx_zh.stages.budgeting import decision_for, explained, record_of
from mlx_zh.stages.data import registry_of
from mlx_zh.stages.memory_check import Machine
from mlx_zh.stages.needs import disk_bytes, downloads_of
from mlx_zh.stages.rendering import is_default, thinking_text
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.system import console
from mlx_zh.system.json_text import load_json

if TYPE_CHECKING:
    from mlx_zh.planning.search import Step
    from mlx_zh.planning.speed import Speed

_ONE_BY_ONE = 10.0  # a generated token reads all weights, and takes about as long as so many tokens of a row
_LONG = 24 * 3600.0  # seconds; a longer run is named as such


@dataclass(frozen=True, slots=True)
class Amount:
    """How much a training stage learns from: examples, their mean length in tokens, and where both are from."""

    examples: float
    validation: float
    tokens: float
    scored: float  # scored tokens of an example
    basis: Notice

    def steps(self, epochs: float, batch_size: int, max_steps: int | None) -> int:
        """Steps of a run. An epoch ends with a smaller batch, so it has a whole number of steps."""
        return max_steps or max(math.ceil(epochs * math.ceil(self.examples / batch_size) - 1e-9), 1)


def amount_of(recipe: Recipe, stage: str) -> Amount:
    """What `stage` will learn from. Raises DataError for a registry file that cannot be read."""
    prepared = _prepared(recipe, stage)
    if prepared is not None:
        return prepared
    data, registry = recipe.data, registry_of(recipe)
    split, longest, kind = data.split(stage), data.max_length, recipe.kind(stage)
    size = data_size(split.train, kind, registry, mixing=data.mixing, max_length=longest)
    held_out = data_size(split.validation, kind, registry, mixing="concat", max_length=longest).examples
    if not split.validation:
        held_out = data.validation_fraction * size.examples
    count = size.examples - (0 if split.validation else held_out)
    basis = Notice("outlook-expected" if size.counted else "outlook-assumed", rows=size.rows, tokens=size.tokens)
    return Amount(count, held_out, size.tokens, SCORED[kind] * size.tokens, basis)


def _prepared(recipe: Recipe, stage: str) -> Amount | None:
    """The amount that `prepare` stored in the run folder, if it did."""
    try:
        report = load_json(RunFolder.of(recipe).prepared)[stage]
        train, held_out = report["train"], report["validation"] or {"examples": 0}
        count = int(train["examples"])
        tokens, scored = train["tokens"] / count, train["scored_tokens"] / count
        basis = Notice("outlook-prepared", rows=count, tokens=tokens)
        return Amount(count, int(held_out["examples"]), tokens, scored, basis)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def show_memory(recipe: Recipe, stage: str, step: Step, machine: Machine) -> bool:
    """Print a stage's peak memory by part; returns whether it fits."""
    settings = recipe.memory
    estimate = step.memory(settings)
    row, rows = step.examples.largest_row(settings.micro_tokens)
    console.say(
        f"{stage}: {rows} rows of up to {row.tokens} tokens a step, of examples as long as data.max_length allows; "
        f"peak in: {estimate.phase}"
    )
    lines = [(part, f"{size / 1e9:.2f} GB") for part, size in estimate.parts.items()]
    lines.append(("peak", f"{estimate.peak / 1e9:.2f} GB"))
    lines.append(("cache", "up to 1.07 GB more, given back when memory is short"))
    console.say(console.table(lines))
    if tables := saved_values(step.model, step.trained) * FLOAT:
        console.say(
            f"lora.modules_to_save: {4 * tables / 1e9:.2f} GB of this are weights, gradient and two moments of the "
            "embedding or head, in float32 also where the model is quantized."
        )
    fits = estimate.peak <= machine.budget
    console.say(f"{'fits' if fits else 'DOES NOT FIT'}: {machine.budget / 1e9:.1f} GB are the {machine.name}.")
    again = step.again(settings, amount_of(recipe, stage).tokens)
    if settings.checkpoint_layers == "auto":
        console.say(memory_check.computed_again(again, step))
    faster = cheapest(step, settings, machine.budget)
    if not fits:
        console.say(memory_check.suggestion(step, settings, machine))
    elif faster is not None and faster.cost < 0:
        changes = memory_check.overrides(faster.settings, settings)
        console.say(Notice("memory-faster", settings=changes, share=-faster.cost))
    return fits


def show_time(recipe: Recipe, stage: str, step: Step, speed: Speed) -> float:
    """Print how long a stage takes on the measured machine; returns the seconds of all its parts."""
    section, amount = recipe.training(stage), amount_of(recipe, stage)
    batch = section.batch_size
    again = step.again(recipe.memory, amount.tokens)
    tokens, scored = batch * amount.tokens, batch * amount.scored
    seconds = speed.step_seconds(step.model, step.trained, tokens=tokens, scored=scored, again=again.share)
    others = stage == "dpo" and recipe.dpo.has_kl  # a forward pass over as many mismatched answers
    if others:
        seconds += speed.forward_seconds(step.model, tokens=tokens, scored=scored)
    console.say(
        f"time: about {seconds:.3g} s a step of {tokens:.0f} tokens ({tokens / seconds:.0f} tokens/s); {amount.basis}"
    )
    steps = amount.steps(section.epochs, batch, section.max_steps)
    one_pass = (
        (1 + others)
        * amount.validation
        * speed.forward_seconds(step.model, tokens=amount.tokens, scored=amount.scored)
    )
    passes = 1 + math.ceil(steps / (section.eval_steps or steps)) if amount.validation else 0
    console.say(f"      {steps} steps: about {console.duration(steps * seconds)}")
    if passes:
        console.say(
            f"      {passes} passes over {amount.validation:.0f} validation examples: about "
            f"{console.duration(passes * one_pass)}"
        )
    reference = 0.0
    if stage == "dpo" and recipe.dpo.reference != "none":
        pairs = min(steps * batch, amount.examples) + amount.validation
        more = others * amount.scored
        reference = pairs * speed.forward_seconds(
            step.model, tokens=amount.tokens + more, scored=amount.scored + more
        )
        once = console.duration(reference)
        if recipe.dpo.unpaired:
            console.say(f"      before them, reference log-probs of {pairs:.0f} answers: about {once}, once")
        else:
            console.say(f"      before them, reference log-probs of {pairs:.0f} pairs: about {once}, once")
    return steps * seconds + passes * one_pass + reference


def show_exams(recipe: Recipe, models: Sequence[str], step: Step, speed: Speed) -> float:
    """Print how long the recipe's exams take for `models`; returns the seconds."""
    total = 0.0
    for name in dict.fromkeys(recipe.evaluate.benchmarks):
        questions, tokens = _exam_tokens(recipe, name)
        seconds = len(models) * speed.forward_seconds(step.model, tokens=tokens, scored=questions)
        title = benchmark(name).title if name in NAMES else name
        console.say(
            f"exam: {title}, {questions} questions, {', '.join(models)}: about {console.duration(seconds)}"
            + (", without the time to write the answers" if _writes(recipe) else "")
        )
        total += seconds
    return total


def show_rounding(recipe: Recipe, step: Step, speed: Speed | None) -> float:
    """Print what a recovery or mixed bits need when the model is fused; returns the seconds, 0 without a speed."""
    export = recipe.export
    if "export" not in recipe.model_fields_set or not (export.recover or export.bits == "mixed"):
        return 0.0
    needed = {"memory": recovery_bytes(step.model) / 1e9}
    if speed is None:
        console.say(Notice("outlook-rounding-memory", **needed))
        return 0.0
    seconds = rounding_seconds(export, pace_of(recipe, step, speed))
    console.say(Notice("outlook-rounding", **needed, time=console.duration(seconds)))
    return seconds


def _writes(recipe: Recipe) -> bool:
    return protocols()[recipe.evaluate.protocol].reply == "free"


def _exam_tokens(recipe: Recipe, name: str) -> tuple[int, float]:
    """The questions that one model answers, and about how many tokens are computed for them."""
    size, limit = exam_size(recipe, name), recipe.evaluate.limit
    questions = size.questions if limit is None else min(size.questions, limit * size.subjects)
    return questions, size.subjects * size.prefix + questions * size.question


def show_needs(recipe: Recipe, config: Config) -> None:
    """Print what will be downloaded, and the disk space for results. Raises MlxZhError."""
    stages = (*stages_of(recipe), *(("eval",) if recipe.evaluate.benchmarks else ()))
    wanted = downloads_of(recipe, registry_of(recipe), stages)
    known = sum(item.gigabytes or 0.0 for item in wanted)
    parts = [f"{item.name} ({f'{item.gigabytes:.2g} GB' if item.gigabytes else '?'})" for item in wanted]
    if wanted:
        unknown = any(item.gigabytes is None for item in wanted)
        console.say(Notice("outlook-downloads-more" if unknown else "outlook-downloads", size=known, parts=parts))
    else:
        console.say(Notice("outlook-no-downloads"))
    console.say(Notice("outlook-disk", size=disk_bytes(recipe, config) / 1e9, folder=str(recipe.run_folder())))


def show_total(seconds: float) -> None:
    """Print the time of the whole run, and what to do about a long one."""
    console.say(Notice("outlook-total", time=console.duration(seconds)))
    if seconds > _LONG:
        console.say(Notice("outlook-long", hours=seconds / 3600))


def pace_of(recipe: Recipe, step: Step, speed: Speed) -> Pace:
    """The pace of a machine of which one block was measured."""
    model, again = step.model, step.again(recipe.memory).share
    training = speed.step_seconds(model, step.trained, tokens=1.0, scored=SCORED["sft"], again=again)
    update = speed.update * trained_values(model, step.trained)
    forward = speed.forward_seconds(model, tokens=1.0, scored=0.0)
    return Pace(training - update, forward, update, _ONE_BY_ONE * forward)


def show_predicted(recipe: Recipe, config: Config, machine: Machine, chip: Chip) -> None:
    """Print how a run is spent on `chip`, by its published figures."""
    step = memory_check.training_step(recipe, "sft", config, machine)
    again = step.again(recipe.memory, amount_of(recipe, "sft").tokens).share
    pace = predicted_pace(chip, step.model, step.trained, step.target, again=again, scored=SCORED["sft"])
    training, forward = pace.rates
    console.say(
        f"Predicted for {chip.name}, from its published figures and not measured: "
        f"{training} tokens/s in training, {forward} when only read."
    )
    show_budget(recipe, config, machine, pace)


def show_budget(recipe: Recipe, config: Config, machine: Machine, pace: Pace) -> None:
    """Print how the time of a run is spent, with what its budget would decide at this pace."""
    costs, decision = decision_for(recipe, config, machine, pace)
    console.say(explained(recipe, record_of(recipe, costs, decision, pace)))
    if recipe.budget:
        console.say("The run itself measures before it decides.")
    elif decision.total > _LONG:
        console.say(Notice("outlook-long", hours=decision.total / 3600))


def rounds_text(recipe: Recipe, rounds: Rounds, step: Step, pace: Pace | None) -> Notice:
    """What the rounds take at most, which is no part of the run's time; that alone where no pace is known.

    All answers are taken to be as long as they may be, and each prompt that is learned from to give a pair.
    """
    prompts = _prompts(recipe, rounds)
    if pace is None or prompts is None:
        return Notice("outlook-without-rounds")
    answers = (
        rounds.samples * prompts * (1 + rounds.check)
    )  # of the model before, and after on the prompts kept apart
    drawing = answers * rounds.max_new_tokens * pace.generation
    pairs = prompts * (1 - rounds.check)
    tokens = pairs * (amount_of(recipe, "sft").tokens + 2 * rounds.max_new_tokens)
    steps = recipe.dpo.max_steps or recipe.dpo.epochs * math.ceil(pairs / recipe.dpo.batch_size)
    epochs = steps * recipe.dpo.batch_size / max(pairs, 1.0)
    referred = tokens * pace.forward if recipe.dpo.reference != "none" else 0.0
    tuning = epochs * tokens * pace.training + steps * pace.update + referred
    return Notice(
        "outlook-rounds-judged" if rounds.by == "judge" else "outlook-rounds",
        count=rounds.count,
        each=console.duration(drawing + tuning),
        drawing=console.duration(drawing),
        tuning=console.duration(tuning),
        total=console.duration(rounds.count * (drawing + tuning)),
        samples=rounds.samples,
        prompts=prompts,
    )


def _prompts(recipe: Recipe, rounds: Rounds) -> float | None:
    """How many prompts a round draws answers to; None where their file cannot be read."""
    if rounds.prompts is None:
        return amount_of(recipe, "sft").examples or None
    lengths = estimate_row_lengths(Path(rounds.prompts))
    return None if lengths is None else lengths.rows


def _roomy_enough(recipe: Recipe, config: Config, chip: Chip) -> int:
    """The smallest memory in GB that is sold with `chip` and fits the recipe; the largest if none does."""
    for size in chip.memory:
        machine = memory_check.mac(size * 2.0**30)
        steps = [memory_check.training_step(recipe, name, config, machine) for name in stages_of(recipe) or ("sft",)]
        if all(step.memory(recipe.memory).peak <= machine.budget for step in steps):
            return size
    return chip.memory[-1]


def show(recipe: Recipe, memory: float | None = None, *, measured: bool = False, chip: Chip | None = None) -> bool:
    """Print the plan of a whole run, for this machine or a Mac with `memory` bytes; returns whether it fits.

    `measured` measures this machine's speed for the times, `chip` predicts them. Raises MlxZhError.
    """
    from mlx_zh.models.load import find_config
    from mlx_zh.planning.speed import measure

    config = find_config(recipe.model.path, hub=recipe.model.hub, revision=recipe.model.revision)
    if not is_default(recipe):
        console.say(thinking_text(recipe))
    if memory is None and chip is not None:
        memory = _roomy_enough(recipe, config, chip) * 2.0**30
    machine = memory_check.this_machine() if memory is None else memory_check.mac(memory)
    machine = memory_check.within_limit(machine, recipe.memory)
    stages = stages_of(recipe)
    fits, seconds, speed = True, 0.0, None
    for name in stages or ("sft",):
        step = memory_check.training_step(recipe, name, config, machine)
        fits = show_memory(recipe, name, step, machine) and fits
        if measured:
            console.say("Measuring this machine for about ten seconds ...")
            length = max(int(amount_of(recipe, name).tokens), 16)
            speed = measure(step.model, step.trained, step.target, length=length)
            seconds += show_time(recipe, name, step, speed) if stages else 0.0
    if speed is not None:
        seconds += show_exams(recipe, ("base", *stages), step, speed)
    seconds += show_rounding(recipe, step, speed)
    if memory is None and (remark := half_precision.advice(recipe, config)):
        console.say(remark)
    show_needs(recipe, config)
    if chip is not None:
        show_predicted(recipe, config, machine, chip)
    elif recipe.budget and speed is not None:
        show_budget(recipe, config, machine, pace_of(recipe, step, speed))
    elif seconds:
        show_total(seconds)
        console.say("Expect it within a third: other programs, heat and the lengths of your examples all count.")
    if recipe.rounds is not None:
        pace = None if speed is None else pace_of(recipe, step, speed)
        console.say(rounds_text(recipe, recipe.rounds, step, pace))
    return fits
