"""About how many floating-point operations a stage takes, before anything is read or measured."""

from __future__ import annotations

import argparse
from os.path import expanduser, isfile

from mlx_zh.planning.flops import training_flops
from mlx_zh.planning.search import Step
from mlx_zh.planning.shapes import ModelShape
from mlx_zh.planning.workload import SCORED, exam_size
from mlx_zh.recipe import Recipe
from mlx_zh.stages.outlook import amount_of
from mlx_zh.stages.run_folder import TUNED, RunFolder

_ANSWER = 0.5  # of the longest answer, in the mean
_PROMPTS = 1000  # of a set of the recipe


def operations(recipe: Recipe, stage: str, arguments: argparse.Namespace, step: Step) -> float:
    """Those of SFT, DPO, an evaluation or of drawing samples, with a model and adapter as of `step`.

    Raises MlxZhError for a recipe with which they cannot be counted.
    """
    if stage in TUNED:
        return _training(recipe, stage, step)
    each = _reading(step.model)
    return each * (_exams(recipe, arguments.stage) if stage == "eval" else _samples(recipe, arguments))


def shared_out(recipe: Recipe, stage: str) -> int:
    """Into how many pieces the work of a stage can be shared out: subjects of an exam, or many."""
    if stage != "eval":
        return recipe.training(stage).batch_size if stage in TUNED else _PROMPTS
    return max((exam_size(recipe, name).subjects for name in recipe.evaluate.benchmarks), default=1)


def _training(recipe: Recipe, stage: str, step: Step) -> float:
    section, amount = recipe.training(stage), amount_of(recipe, stage)
    steps = amount.steps(section.epochs, section.batch_size, section.max_steps)
    each = training_flops(step.model, step.trained, scored=SCORED[recipe.kind(stage)], again=0.0)
    return steps * section.batch_size * amount.tokens * each


def _reading(model: ModelShape) -> float:
    """Operations for a token of a row or of an answer, without a gradient."""
    return 2.0 * (model.layers * model.active_values + model.hidden * model.vocabulary)


def _exams(recipe: Recipe, requested: str | None) -> float:
    """Tokens of all exams and models."""
    models = 1 if requested else 1 + len(RunFolder.of(recipe).adapters())
    tokens = 0.0
    for name in dict.fromkeys(recipe.evaluate.benchmarks):
        size, limit = exam_size(recipe, name), recipe.evaluate.limit
        questions = size.questions if limit is None else min(size.questions, limit * size.subjects)
        answer = _ANSWER * recipe.evaluate.max_new_tokens if size.writes else 0.0
        tokens += size.subjects * size.prefix + questions * (size.question + answer)
    return models * tokens


def _samples(recipe: Recipe, arguments: argparse.Namespace) -> float:
    """Tokens of all answers."""
    file = expanduser(arguments.prompts)
    prompts = _PROMPTS
    if isfile(file):
        with open(file, "rb") as lines:
            prompts = sum(1 for _ in lines)
    elif arguments.prompts == "evaluate":
        prompts = len(recipe.evaluate.prompts)
    elif arguments.prompts.partition(".")[0] in TUNED:
        prompts = int(amount_of(recipe, arguments.prompts.partition(".")[0]).examples)
    if arguments.limit is not None:
        prompts = min(prompts, arguments.limit)
    return prompts * arguments.n * _ANSWER * arguments.max_tokens
