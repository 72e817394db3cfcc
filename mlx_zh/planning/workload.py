"""What a run spends its time on: from a recipe and a machine's pace to the costs that a budget is decided with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import expanduser
from pathlib import Path

from mlx_zh.corpus.registry import Registry
from mlx_zh.exams.catalog import NAMES, benchmark
from mlx_zh.exams.protocols import protocols
from mlx_zh.models.adapters.spec import AdapterSpec
from mlx_zh.planning.budget import Costs, ExamCost, Training
from mlx_zh.planning.data_sizes import DataSize, data_size, selected
from mlx_zh.planning.exports import export_bytes, rounding_seconds
from mlx_zh.planning.flops import training_flops
from mlx_zh.planning.memory import trained_values, weight_bytes
from mlx_zh.planning.pace import Pace
from mlx_zh.planning.shapes import ModelShape, Target
from mlx_zh.recipe import Recipe, Sources
from mlx_zh.system.links import is_readable
from mlx_zh.system.storage import visible

SCORED = {"sft": 0.6, "dpo": 0.8, "kto": 0.6}  # share of an example's tokens that are scored

# Preparation: 3,581 rows a second on two cores, reading and tokenizing (docs/data.md); a third of that is reading,
# which all rows of a source need, and the rest is for the rows that are chosen.
_READ_ROW, _WRITE_ROW = 0.1e-3, 0.2e-3
_DISK = 500e6  # bytes a second, read or written and synced
_PROCESS = 4.0  # seconds until a stage's process has imported what it needs
_REPORT = 15.0

# Tokens of a question and of a worked example, from 26 subjects of C-Eval (question 101 characters, 81 of them
# Chinese, worked example 103 and 75) and 34 of CMMLU (75 and 64, worked example 40 and 34), at 0.75 tokens a Chinese
# character, 0.27 of others, and 15 for the letters and the prompt around them.
_EXAM_TOKENS = {"ceval": (81.0, 79.0), "cmmlu": (66.0, 43.0)}
_OWN_QUESTION = 80.0  # tokens, in an exam of the user's own


@dataclass(frozen=True, slots=True)
class Machine:
    """What the run is planned for: its model, what is trained, how the model is held, and its pace.

    `again` is the share of the blocks' forward passes that the backward pass repeats, by training stage. `density` is
    how many tokens the tokenizer makes of a text where Llama 3.1's makes one.
    """

    model: ModelShape
    trained: AdapterSpec
    target: Target
    pace: Pace
    density: float = 1.0
    again: Mapping[str, float] = field(default_factory=dict)


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The training stages that the recipe has data for."""
    return tuple(name for name in ("sft", "dpo") if recipe.data.split(name).train)


def data_sizes(recipe: Recipe, registry: Registry, density: float = 1.0) -> dict[str, DataSize]:
    """The size of each training stage's data."""
    sizes = {}
    for name in stages_of(recipe):
        split = recipe.data.split(name)
        size = _data_size(recipe, split.train, name, registry, density)
        sizes[name] = size if split.select is None else selected(size, split.select)
    return sizes


def _data_size(recipe: Recipe, sources: Sources, stage: str, registry: Registry, density: float) -> DataSize:
    data = recipe.data
    return data_size(
        sources, recipe.kind(stage), registry, mixing=data.mixing, max_length=data.max_length, density=density
    )


def costs_of(recipe: Recipe, machine: Machine, registry: Registry) -> Costs:
    """What the whole run of `recipe` costs on `machine`."""
    sizes = data_sizes(recipe, registry, machine.density)
    trainings = tuple(_training(recipe, name, size, machine, registry) for name, size in sizes.items())
    exams = tuple(_exam(recipe, name, machine) for name in dict.fromkeys(recipe.evaluate.benchmarks))
    examined = tuple(f"eval-{name}" for name in ("base", *sizes)) if exams else ()
    return Costs(trainings, exams, examined, recipe.evaluate.limit, _fixed(recipe, sizes, examined, machine))


def _training(recipe: Recipe, name: str, size: DataSize, machine: Machine, registry: Registry) -> Training:
    section, pace, model, kind = recipe.training(name), machine.pace, machine.model, recipe.kind(name)
    # The same work per token, but of pairs more of the tokens are scored.
    seconds = pace.training * _flops(machine, kind, name) / _flops(machine, "sft", "sft")
    scored_seconds = pace.forward * (1 + SCORED[kind] * model.hidden * model.vocabulary / _block_values(model))
    fraction = 0.0 if recipe.data.split(name).validation else recipe.data.validation_fraction
    others = 1.0 if kind == "kto" and recipe.dpo.has_kl else 0.0  # forward passes over mismatched answers
    references = (1.0 + others * SCORED[kind]) if name == "dpo" and recipe.dpo.reference != "none" else 0.0
    held_out = _data_size(recipe, recipe.data.split(name).validation, name, registry, machine.density)
    per_epoch = math.ceil(size.examples * (1 - fraction) / section.batch_size)
    return Training(
        name=name,
        full_steps=max(section.max_steps or math.ceil(section.epochs * per_epoch - 1e-9), 1),
        batch_size=section.batch_size,
        examples=size.examples,
        counted=size.counted or section.max_steps is not None,
        step=section.batch_size * size.tokens * (seconds + others * scored_seconds) + pace.update,
        example=_WRITE_ROW + references * (1 + fraction) * size.tokens * scored_seconds,
        validation=(1 + others) * held_out.examples * held_out.tokens * scored_seconds,
        validation_share=(1 + others) * fraction * size.tokens * scored_seconds,
        eval_steps=section.eval_steps,
        checkpoint=3 * 4 * trained_values(model, machine.trained) / _DISK,
        every_steps=recipe.checkpoint.every_steps,
    )


def _flops(machine: Machine, kind: str, stage: str) -> float:
    again = machine.again.get(stage, 0.0)
    return training_flops(machine.model, machine.trained, scored=SCORED[kind], again=again)


def _block_values(model: ModelShape) -> float:
    return model.layers * model.active_values


@dataclass(frozen=True, slots=True)
class ExamSize:
    """Subjects and questions of an exam; tokens of a question, and of the worked examples of a subject."""

    subjects: int
    questions: int
    question: float
    prefix: float
    writes: bool  # whether the model writes an answer, instead of choosing a letter


def exam_size(recipe: Recipe, name: str) -> ExamSize:
    """The size of an exam as the recipe asks it, without `evaluate.limit`."""
    settings = recipe.evaluate
    protocol = protocols()[settings.protocol]
    shots = protocol.shots if settings.shots is None else settings.shots
    if name in NAMES:
        published = benchmark(name)
        questions = published.splits[settings.split or published.default_split]
        subjects, (question, worked) = len(published.subjects), _EXAM_TOKENS[name]
    else:
        subjects, questions = _own_exam(Path(expanduser(name)))
        question = worked = _OWN_QUESTION
    return ExamSize(subjects, questions, question, shots * worked, protocol.reply == "free")


def _exam(recipe: Recipe, name: str, machine: Machine) -> ExamCost:
    size, pace = exam_size(recipe, name), machine.pace
    token = machine.density * pace.forward
    answer = recipe.evaluate.max_new_tokens * pace.generation if size.writes else 0.0
    return ExamCost(size.subjects, size.questions, size.prefix * token, size.question * token + answer)


def _own_exam(path: Path) -> tuple[int, int]:
    """Subjects and about how many questions an exam of the user's own has: a question is a line of a CSV file."""
    folder = next((path / split for split in ("test", "val") if (path / split).is_dir()), path)
    tables = (
        [path] if path.is_file() else [table for table in visible(folder.glob("*.csv")) if is_readable(path, table)]
    )
    try:
        lines = sum(max(table.read_bytes().count(b"\n") - 1, 1) for table in tables)
    except OSError:
        lines = 0
    return max(len(tables), 1), max(lines, 1)


def _fixed(
    recipe: Recipe, sizes: dict[str, DataSize], examined: tuple[str, ...], machine: Machine
) -> dict[str, float]:
    """Seconds by step that no decision shortens."""
    weights = weight_bytes(machine.model, machine.target)
    load = _PROCESS + weights / _DISK
    answers = len(recipe.evaluate.prompts) * recipe.evaluate.max_new_tokens * machine.pace.generation
    fixed = {"measure": load} if recipe.budget else {}
    if sizes:
        stored = sum(source.stored for size in sizes.values() for source in size.sources)
        selecting = sum(_selecting(recipe, name, size, machine) for name, size in sizes.items())
        fixed["prepare"] = _PROCESS + _READ_ROW * stored + selecting
    fixed |= dict.fromkeys(examined, load)
    for number, name in enumerate(sizes):
        fixed[name] = load + answers * (2 if number == 0 else 1)  # the base answers too, before the first stage
    if sizes and "export" in recipe.model_fields_set:
        written = export_bytes(recipe.export, machine.model, machine.target)
        # merged, written, read again for the comparison
        fixed["fuse"] = 2 * load + 3 * written / _DISK + rounding_seconds(recipe.export, machine.pace)
    return fixed | {"report": _REPORT}


def _selecting(recipe: Recipe, stage: str, size: DataSize, machine: Machine) -> float:
    """Seconds to select a stage's rows: all are tokenized, and `ifd` reads each twice, with the base at most."""
    select = recipe.data.split(stage).select
    if select is None:
        return 0.0
    forward = 2 * machine.pace.forward if "ifd" in select.method else 0.0
    return sum(source.stored * (_WRITE_ROW + source.tokens * forward) for source in size.sources)


def thinned(recipe: Recipe, steps: Mapping[str, int], registry: Registry) -> dict[str, list[int | None]]:
    """`max_samples` of each training source, by stage, so that `steps` find enough examples and hardly more.

    Stages that see all of their data, and stages without an entry in `steps`, are left
    out. A tenth more is prepared than is needed, because some rows turn out to be duplicates or too long.
    """
    chosen: dict[str, list[int | None]] = {}
    for name, size in data_sizes(recipe, registry).items():
        if name not in steps or not size.examples:
            continue
        fraction = 0.0 if recipe.data.split(name).validation else recipe.data.validation_fraction
        needed = 1.1 * steps[name] * recipe.training(name).batch_size / (1 - fraction)
        share = needed / size.examples
        if share < 1:
            chosen[name] = [max(math.ceil(source.rows * share), 1) for source in size.sources]
    return chosen
