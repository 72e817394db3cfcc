"""Test the models of a run on exams.

`python -m mlx_zh.eval RECIPE [--stage S] [--benchmark B ...] [KEY=VALUE ...]`
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from mlx_zh.distributed import launching
from mlx_zh.stages import command

if TYPE_CHECKING:
    from mlx_zh.distributed.world import World
    from mlx_zh.exams.exam import Exam
    from mlx_zh.exams.protocols import Protocol
    from mlx_zh.recipe import Recipe
    from mlx_zh.stages.examination import Examination


def main(argv: list[str] | None = None) -> int:
    """Ask the base and the tuned models the recipe's exams, and print the results side by side.

    Returns the exit status. Raises MlxZhError.
    """
    arguments = _arguments(argv)
    return command.on_ranks("eval", arguments, argv, lambda recipe, world: _evaluate(recipe, arguments, world))


def _evaluate(recipe: Recipe, arguments: argparse.Namespace, world: World) -> int:
    from mlx_zh.stages import preflight, same_everywhere
    from mlx_zh.stages.budgeting import settle
    from mlx_zh.stages.run_folder import RunFolder

    same_everywhere.require(world, recipe, "eval", {"--stage": arguments.stage})
    with world.each(lambda: RunFolder.of(recipe)).all_at_work("eval", world):
        world.broadcast_result(lambda: preflight.check(recipe, ["eval"]))
        return _ask(settle(recipe, world, force=True), arguments, world)


def _ask(recipe: Recipe, arguments: argparse.Namespace, world: World) -> int:
    from mlx_zh.exams.protocols import protocols
    from mlx_zh.stages import same_everywhere
    from mlx_zh.stages.examination import Examination
    from mlx_zh.stages.run_models import RunModels
    from mlx_zh.system import console

    protocol = protocols()[recipe.evaluate.protocol]
    shots = protocol.shots if recipe.evaluate.shots is None else recipe.evaluate.shots
    exams = world.each(lambda: _exams(recipe, shots))
    same_everywhere.require(
        world, recipe, "eval", {"exams": [exam.key for exam in exams], "protocol": protocol.name, "shots": shots}
    )
    models = RunModels(recipe, arguments.stage, world)
    examination = Examination(recipe, protocol, models, world)
    for exam in exams:
        size = f"{len(exam)} questions in {len(exam.subjects)} subjects"
        console.say(f"{exam.title}, {exam.split}: {size}; protocol {protocol.name}, {shots} worked examples")
    for name in models.names:
        for exam in exams:
            examination.ask(name, exam)
    for exam in exams if world.first else []:
        _conclude(examination, exam, protocol)
        _compare_fused(recipe, examination, exam)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = command.parser("eval", "Test models on multiple-choice exams, and compare them.")
    parser.add_argument(
        "--stage",
        choices=("base", "sft", "dpo", "fused"),
        help="test only this model (default: the base and every adapter)",
    )
    parser.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        metavar="ceval|cmmlu|PATH",
        help="use these exams instead of the recipe's evaluate.benchmarks",
    )
    command.add_dry_run(parser)
    launching.add_machines(parser)
    arguments = parser.parse_intermixed_args(argv)
    # The words after --benchmark may include overrides; the name of a benchmark has no '='.
    named = [name for name in arguments.benchmark or [] if "=" not in name]
    arguments.overrides += [text for text in arguments.benchmark or [] if "=" in text]
    if named:
        arguments.overrides.append(f"evaluate.benchmarks={json.dumps(named, ensure_ascii=False)}")
    return arguments


def _exams(recipe: Recipe, shots: int) -> list[Exam]:
    from mlx_zh.errors import RecipeError
    from mlx_zh.exams.archives import open_exam
    from mlx_zh.system import console

    settings = recipe.evaluate
    if not settings.benchmarks:
        raise RecipeError("evaluate.benchmarks names no exam; add ceval, cmmlu or a path, or use --benchmark.")
    exams = [
        open_exam(
            name,
            folders={str(key): folder for key, folder in settings.folder.items()},
            hub=settings.hub or recipe.model.hub,
            split=settings.split,
            shots=shots,
            limit=settings.limit,
            progress=console.DownloadBar(),
        )
        for name in dict.fromkeys(settings.benchmarks)
    ]
    keys = [exam.key for exam in exams]
    if repeated := {key for key in keys if keys.count(key) > 1}:
        raise RecipeError(
            f"evaluate.benchmarks has two exams called {', '.join(repeated)}; rename the folder of one of them."
        )
    return exams


def _conclude(examination: Examination, exam: Exam, protocol: Protocol) -> None:
    """Print an exam's tables and warnings, and the paths of its files."""
    from mlx_zh.exams import tables
    from mlx_zh.language.translation import in_readers_language
    from mlx_zh.system import console

    stages = examination.side_by_side(exam)
    console.say(f"\n{exam.title}, {exam.split} ({protocol.name}, version {protocol.version})")
    form = tables.fitting(stages, console.terminal_width(), console.table)
    if exam.labelled:
        console.say(console.table(tables.results(stages, form)))
        console.say(f"{console.paragraph(form.legend)}\n")
        for before, after in tables.pairs(list(stages)):
            comparison = examination.compare(exam, before, after)
            console.say(console.paragraph(tables.verdict(before, after, comparison)))
    console.say(f"\n{console.table(tables.letters(stages, form))}")
    for name, metrics in stages.items():
        for warning in metrics["tripwires"]:
            console.warn(f"{exam.title}, {name}: {in_readers_language(warning)}")
    for path in examination.write(exam):
        console.say(f"  {path}")


def _compare_fused(recipe: Recipe, examination: Examination, exam: Exam) -> None:
    """What fusing cost in this exam goes into the fused model's card, if base + adapter answered it too."""
    from mlx_zh.stages import fused_exams
    from mlx_zh.stages.run_folder import RunFolder
    from mlx_zh.system import console

    run = RunFolder.of(recipe)
    stages, stage = examination.side_by_side(exam), fused_exams.fused_stage(run)
    if not exam.labelled or "fused" not in stages or stage is None:
        return
    if stage in stages:
        fused_exams.record(run, exam.title, examination.compare(exam, stage, "fused"))
        console.say(f"  {run.fused_model() / 'README.md'}")
    else:
        console.say(f"To see what fusing cost, run `mlx-zh eval {recipe.words} --stage {stage}` too.")


if __name__ == "__main__":
    from mlx_zh.system.entry import entry

    entry(main)
