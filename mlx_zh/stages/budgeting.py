"""The time budget of a run: decided once, stored in the run folder, and applied to the recipe by every command.

`budget.json` holds the decision with everything that it was made from, so a run that is resumed takes the same steps
on the same data.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from mlx_zh.distributed.world import ALONE, World
from mlx_zh.language.notice import Notice
from mlx_zh.pipeline.steps import NAMES
from mlx_zh.planning.pace import Pace
from mlx_zh.recipe import Recipe, Select, Source
from mlx_zh.stages.forecast import Expected
from mlx_zh.stages.run_folder import TUNED, RunFolder
from mlx_zh.system import console, device
from mlx_zh.system.clock import clock
from mlx_zh.system.forms import fits
from mlx_zh.system.json_text import load_json
from mlx_zh.system.locks import in_pipeline
from mlx_zh.system.redaction import redacted
from mlx_zh.system.storage import write_json

if TYPE_CHECKING:
    from mlx_zh.core.families import Config
    from mlx_zh.models.load import LoadedModel
    from mlx_zh.planning.budget import Costs, Decision
    from mlx_zh.stages.memory_check import Machine as MemoryBudget

_ORDER = ("measure", *NAMES)


# How a budget selects rows of a stage whose recipe has no `select`. `random` needs no scores: it is `max_samples`.
_METHOD: tuple[Literal["random", "longest", "diverse", "ifd"], ...] = ("random",)


class _LaterKeys(TypedDict, total=False):
    """Keys that came after the first version."""

    select: dict[str, list[str]]  # by stage whose recipe has none: the methods by which the budget selects rows


class BudgetRecord(_LaterKeys):
    """A run's decision, as `budget.json` holds it."""

    asked: dict[str, Any]  # what the decision was made for: dotted keys of the recipe
    budget: str
    made: float  # seconds since 1970
    machine: str
    pace: dict[str, float]  # see `planning.pace.Pace`
    steps: dict[str, int]  # max_steps by stage; a stage that is not cut is left out
    limit: int | None  # evaluate.limit; None where the exams are not cut
    max_samples: dict[str, list[int | None]]  # by stage and training source; None leaves a source as it is
    full_steps: dict[str, int]  # by stage, of the whole recipe, as far as the data is known
    seconds: dict[str, float]  # expected, by step of the run, in the order of the run
    steps_seconds: dict[str, float]  # expected of an optimizer step, by stage


def settle(recipe: Recipe, world: World = ALONE, *, force: bool = False) -> Recipe:
    """The recipe with what its budget decides; decided now, by measuring this machine, unless the run folder has it.

    All ranks get rank 0's decision. Without a budget the recipe is returned as it is. Raises PlanError if the budget
    is too small, or if the model does not fit into memory and `force` is false; ModelError, DownloadError.
    """
    run = RunFolder.of(recipe)
    if recipe.budget is None:
        if world.first and (earlier := read_record(run)) is not None:
            console.say(
                f"{run.path} was begun with a budget of {earlier['budget']}, and this command has none. To go on "
                f"with it, add budget={earlier['budget']} or write `budget: {earlier['budget']}` into the recipe."
            )
        return recipe
    record = world.broadcast_result(lambda: _stored(recipe, run))
    if record is None:
        record = _decide(recipe, run, world, force=force)
    return applied(recipe, record)


def decided(recipe: Recipe) -> Recipe:
    """The recipe with what its budget has decided; as it is if nothing is decided yet. Never measures."""
    record = None if recipe.budget is None else matching(recipe, RunFolder.of(recipe))
    return recipe if record is None else applied(recipe, record)


def read_record(run: RunFolder) -> BudgetRecord | None:
    """The decision in a run folder, whatever recipe it was made for."""
    try:
        record = load_json(run.budget)
    except (OSError, ValueError):
        return None
    whole = fits(record, BudgetRecord) and fits(record["pace"], Pace)
    return cast(BudgetRecord, record) if whole and {*record["steps"], *record["max_samples"]} <= {*TUNED} else None


def matching(recipe: Recipe, run: RunFolder) -> BudgetRecord | None:
    """The stored decision if it was made for this recipe, or gave it, as it stands in `runs/NAME/recipe.yaml`."""
    record = read_record(run)
    if record is None:
        return None
    now = asked_of(recipe)
    try:
        if record["asked"] == now or _with_decision(record, now) == now:
            applied(recipe, record)
            return record
    except (LookupError, TypeError, ValueError):  # damaged, or of another number of data files
        return None
    return None


def asked_of(recipe: Recipe) -> dict[str, Any]:
    """What a decision is made for, by dotted key. Exams, export and memory may change without a new decision."""
    from mlx_zh.pipeline.state import flat

    values = recipe.model_dump(mode="json", include={"model": {"path", "dtype", "quantize"}, "lora": True})
    values["data"] = recipe.data.model_dump(
        mode="json", include={"sft", "dpo", "max_length", "mixing", "validation_fraction"}
    )
    for stage in ("sft", "dpo"):
        values[stage] = recipe.training(stage).model_dump(
            mode="json", include={"epochs", "max_steps", "batch_size", "eval_steps"}
        )
    return redacted({"budget": recipe.budget, **flat(values)})  # it is stored


def _with_decision(record: BudgetRecord, now: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe would ask after the decision was written into it."""
    values = dict(record["asked"])
    for stage, steps in record["steps"].items():
        values[f"{stage}.max_steps"] = steps
    for stage, counts in record["max_samples"].items():
        key = f"data.{stage}.train"
        select = _selection(values.get(f"data.{stage}.select.method"), stage, record)
        if select is not None:
            number = f"data.{stage}.select.count"
            dumped = {f"data.{stage}.select.{name}": value for name, value in select.model_dump(mode="json").items()}
            values = dumped | values
            values[number] = _selected_count(values[number], counts)
            values[f"data.{stage}.select.fraction"] = None
        values[key] = [
            source
            if count is None or (select is not None and not source.get("streaming"))
            else source | {"max_samples": min(source["max_samples"] or count, count)}
            for source, count in zip(values[key], counts, strict=True)
        ]
    return values


def _selection(own: Select | Sequence[str] | None, stage: str, record: BudgetRecord) -> Select | None:
    """The recipe's own selection, as a section or by its methods, else the one that the budget made by itself."""
    if own is not None:
        return own if isinstance(own, Select) else Select.model_validate({"method": own})
    methods = record.get("select", {}).get(stage)
    return None if methods is None else Select.model_validate({"method": methods})


def applied(recipe: Recipe, record: BudgetRecord) -> Recipe:
    """The recipe with the decision's numbers: `sft.max_steps`, `dpo.max_steps`, `max_samples`, `evaluate.limit`."""
    data = recipe.data
    for stage, counts in record["max_samples"].items():
        split = data.split(stage)
        select = _selection(split.select, stage, record)
        train = tuple(
            source if select is not None and not source.streaming else _with_max_samples(source, count)
            for source, count in zip(split.train, counts, strict=True)
        )
        update = {"train": train} | ({} if select is None else {"select": _with_count(select, counts)})
        data = data.model_copy(update={stage: split.model_copy(update=update)})
    changes: dict[str, Any] = {"data": data}
    for stage, steps in record["steps"].items():
        changes[stage] = recipe.training(stage).model_copy(update={"max_steps": steps})
    if record["limit"] is not None and recipe.evaluate.limit is None:
        changes["evaluate"] = recipe.evaluate.model_copy(update={"limit": record["limit"]})
    return recipe.model_copy(update=changes)


def _with_count(select: Select, counts: Sequence[int | None]) -> Select:
    """The selection with a count of at most the sum of `counts`: its order says which rows these are."""
    return select.model_copy(update={"count": _selected_count(select.count, counts), "fraction": None})


def _selected_count(own: int | None, counts: Sequence[int | None]) -> int:
    total = sum(count or 0 for count in counts)
    return min(own or total, total)


def _with_max_samples(source: Source, count: int | None) -> Source:
    """The source with `max_samples` of at most `count`."""
    if count is None or (source.max_samples is not None and source.max_samples <= count):
        return source
    return source.model_copy(update={"max_samples": count})


def within_epochs(recipe: Recipe, stage: str, examples: int) -> Recipe:
    """The recipe whose `max_steps`, where the budget set it, is no more than the stage's epochs over `examples`.

    The budget is decided before the data is read, so it may allow more steps than the data has.
    """
    from mlx_zh.training.order import Order

    record = None if recipe.budget is None else read_record(RunFolder.of(recipe))
    section = recipe.training(stage)
    if record is None or record["steps"].get(stage) != section.max_steps or section.max_steps is None:
        return recipe
    epochs = Order(examples, section.batch_size, recipe.seed).steps(section.epochs, None)
    own = record["asked"].get(f"{stage}.max_steps")  # of the recipe itself, which takes precedence over its epochs
    if own is not None or section.max_steps <= epochs:
        return recipe
    return recipe.model_copy(update={stage: section.model_copy(update={"max_steps": epochs})})


def _stored(recipe: Recipe, run: RunFolder) -> BudgetRecord | None:
    """The stored decision for this recipe; says what a decision for other settings means."""
    from mlx_zh.pipeline.state import changes

    record = matching(recipe, run)
    if record is not None:
        if not in_pipeline():  # `run` has said it
            console.say(recalled(record))
    elif (earlier := read_record(run)) is not None:
        console.say(
            "A budget was decided here before, for other settings "
            f"({changes(earlier['asked'], asked_of(recipe))}); it is decided again. Prepared data, reference "
            "log-probs and exam answers that the new decision asks for too are kept. A training stage whose number "
            "of steps changes starts over; its old folder is kept beside it."
        )
    return record


def _decide(recipe: Recipe, run: RunFolder, world: World, *, force: bool) -> BudgetRecord:
    """Measure every rank, decide on rank 0, store the decision and say it."""
    import mlx.core as mx

    from mlx_zh.stages import memory_check

    first_stage = next((name for name in ("sft", "dpo") if recipe.data.split(name).train), None)
    if first_stage is not None:
        world.each(lambda: memory_check.require(recipe, first_stage, force=force))
    record = _measure_and_store(recipe, run, world)
    gc.collect()  # the measured model
    mx.clear_cache()
    return record


def _measure_and_store(recipe: Recipe, run: RunFolder, world: World) -> BudgetRecord:
    from mlx_zh.planning.row_lengths import density
    from mlx_zh.stages import memory_check
    from mlx_zh.stages.run_models import open_model

    loaded = open_model(recipe, world)
    dense = density(lambda text: len(loaded.tokenizer.encode(text, add_special_tokens=False)))
    pace = _measured(recipe, loaded, dense, world)

    def decide_and_store() -> BudgetRecord:
        costs, decision = decision_for(recipe, loaded.config, memory_check.this_machine(), pace, dense)
        record = record_of(recipe, costs, decision, pace)
        write_json(run.budget, record)
        if not run.manifest.exists():
            run.write_manifest(applied(recipe, record), loaded, {})
        training, forward = pace.rates
        console.say(
            f"Measured: {training} tokens/s in training, {forward} when only read. The "
            f"budget of {recipe.budget} is spent so:"
        )
        console.say(explained(recipe, record))
        if recipe.rounds is not None:
            console.say(Notice("outlook-without-rounds"))
        left = sum(seconds for name, seconds in record["seconds"].items() if name != "measure")
        console.say(f"Done {clock(time.time() + left)}. This is decided once, and kept in {run.budget}.")
        return record

    return world.broadcast_result(decide_and_store)


def _measured(recipe: Recipe, loaded: LoadedModel, dense: float, world: World) -> Pace:
    """The pace of all ranks together: each takes an equal share of a step, so the slowest one counts."""
    from mlx_zh.planning.budget import measuring_seconds
    from mlx_zh.planning.workload import data_sizes
    from mlx_zh.stages.data import registry_of
    from mlx_zh.stages.measuring import measure_pace

    sizes = world.each(lambda: data_sizes(recipe, registry_of(recipe), dense))
    tokens = next(iter(sizes.values())).tokens if sizes else recipe.data.max_length / 2
    seconds = measuring_seconds(recipe.budget_seconds or 0)
    console.say("Measuring this machine's speed for the time budget ...")
    paces = world.collect(asdict(measure_pace(recipe, loaded, tokens, seconds=seconds)))
    slowest = {name: max(pace[name] for pace in paces) for name in paces[0]}
    return Pace(**slowest | {name: slowest[name] / world.size for name in ("training", "forward")})


def decision_for(
    recipe: Recipe, config: Config, machine: MemoryBudget, pace: Pace, density: float = 1.0
) -> tuple[Costs, Decision]:
    """The costs of a run on a machine with this pace, and the decision that its budget gives.

    `config` is the model's config.json, `density` see `planning.workload.Machine`. Raises PlanError.
    """
    from mlx_zh.planning.budget import decide
    from mlx_zh.planning.workload import Machine, costs_of, data_sizes
    from mlx_zh.stages import memory_check
    from mlx_zh.stages.data import registry_of

    registry = registry_of(recipe)
    lengths = {"sft": None} | {name: size.tokens for name, size in data_sizes(recipe, registry, density).items()}
    steps = {name: memory_check.training_step(recipe, name, config, machine) for name in lengths}
    again = {name: step.again(recipe.memory, lengths[name]).share for name, step in steps.items()}
    step = steps["sft"]
    planned = Machine(step.model, step.trained, step.target, pace, density, again)
    costs = costs_of(recipe, planned, registry)
    return costs, decide(costs, recipe.budget_seconds)


def record_of(recipe: Recipe, costs: Costs, decision: Decision, pace: Pace) -> BudgetRecord:
    """A decision as it is stored."""
    from mlx_zh.planning.workload import thinned
    from mlx_zh.stages.data import registry_of

    thinned_rows = thinned(recipe, decision.steps, registry_of(recipe))
    alone = [stage for stage in thinned_rows if recipe.data.split(stage).select is None and stage == "sft"]
    record: BudgetRecord = {
        "asked": asked_of(recipe),
        "budget": str(recipe.budget),
        "made": round(time.time(), 1),
        "machine": device.name(),
        "pace": asdict(pace),
        "steps": decision.steps,
        "limit": decision.limit if recipe.evaluate.limit is None else None,
        "max_samples": thinned_rows,
        "full_steps": {stage.name: stage.full_steps for stage in costs.trainings},
        "seconds": {name: round(decision.seconds[name], 1) for name in _ORDER if name in decision.seconds},
        "steps_seconds": {stage.name: stage.step for stage in costs.trainings},
    }
    if _METHOD != ("random",):
        record["select"] = {stage: list(_METHOD) for stage in alone}
    return record


def explained(recipe: Recipe, record: BudgetRecord) -> str:
    """A table of the run's steps: expected time, and what is done in it."""
    rows = [("step", "about", "")]
    for name, seconds in record["seconds"].items():
        rows.append((name, console.duration(seconds), _content(recipe, record, name)))
    total = sum(record["seconds"].values())
    rows.append(("total", console.duration(total), f"of {record['budget']}" if recipe.budget else ""))
    return console.table(rows)


def _content(recipe: Recipe, record: BudgetRecord, name: str) -> str:
    if name in record["full_steps"]:
        full, batch = record["full_steps"][name], recipe.training(name).batch_size
        steps = record["steps"].get(name, full)
        part = f"{steps:,} of {full:,} steps" if steps < full else f"all {full:,} steps"
        return f"{part} of {batch} {recipe.unit(name)}"
    if name.startswith("eval-"):
        limit = recipe.evaluate.limit or record["limit"]
        return f"{limit} questions a subject" if limit else "all questions"
    return ""


def recalled(record: BudgetRecord) -> str:
    """A line about a decision that is there already."""
    return f"Budget of {record['budget']}, decided {clock(record['made'], past=True)}: steps {_numbers(record)}."


def expected(recipe: Recipe, stage: str) -> Expected | None:
    """What the decision expects of a training stage and of the steps after it; None without a decision."""
    record = None if recipe.budget is None else read_record(RunFolder.of(recipe))
    if record is None or recipe.budget_seconds is None or stage not in record["steps_seconds"]:
        return None
    names = list(record["seconds"])
    later = {name: record["seconds"][name] for name in names[names.index(stage) + 1 :]}
    end = record["made"] + recipe.budget_seconds
    return Expected(record["steps_seconds"][stage], later, end, record["budget"])


def _numbers(record: BudgetRecord) -> str:
    parts = []
    for stage, full in record["full_steps"].items():
        steps = record["steps"].get(stage, full)
        parts.append(f"{stage.upper()} {min(steps, full):,}/{full:,}")
    if record["limit"] is not None:
        parts.append(f"exams of {record['limit']} a subject")
    return ", ".join(parts)
