"""The table of a run's steps: the files that each reads and writes, and the recipe keys that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from mlx_zh.recipe import Recipe, Sources

NAMES = ("prepare", "eval-base", "sft", "eval-sft", "dpo", "eval-dpo", "fuse", "report")


@dataclass(frozen=True)
class Step:
    """A stage as the pipeline runs it: `python -m mlx_zh.STAGE RECIPE ARGUMENTS`.

    The step is up to date while nothing that it depends on has changed: the recipe's `keys`, the `files`, the outputs
    of the steps in `after`, and the files of the run folder that match `reads`. Keys are dotted. A section's name
    stands for all of its keys, and `without` excludes some of them. `outputs` are patterns in the run folder.
    """

    name: str
    stage: str
    arguments: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    prepared: str | None = None  # the stage (sft or dpo) whose prepared data it reads
    trains: bool = False  # it writes checkpoints, can resume, and has the option --fresh

    def inputs(self, values: Mapping[str, object]) -> dict[str, object]:
        """The keys of a recipe that this step depends on. `values` has dotted keys."""
        return {k: v for k, v in values.items() if _under(k, self.keys) and not _under(k, self.without)}


def _under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


class StageFiles(Protocol):
    """The paths in a training stage's folder that the pipeline needs."""

    path: Path
    metrics: Path
    summary: Path
    warnings: Path
    adapter: Path


class RunFiles(Protocol):
    """The paths in a run folder that the pipeline needs."""

    path: Path
    pipeline: Path
    prepared: Path
    exams: Path
    fused: Path
    page: Path
    text: Path
    plots: Path

    def at(self, path: Path) -> RunFiles:
        """The run folder at `path`."""

    def stage(self, name: str) -> StageFiles:
        """The folder of a training stage."""

    def pattern(self, path: Path, *more: str) -> str:
        """A path inside the folder, as a pattern relative to it."""


def steps(recipe: Recipe, run: RunFiles) -> list[Step]:
    """The steps of this recipe, in order."""
    chosen: list[Step] = []
    for name in NAMES:
        step = _MAKERS[name](recipe, run, {step.name for step in chosen})
        if step is not None and find_spec(f"mlx_zh.{step.stage}") is not None:
            chosen.append(step)
    return chosen


def _prepare(recipe: Recipe, run: RunFiles, _: set[str]) -> Step | None:
    if not (recipe.data.sft.train or recipe.data.dpo.train):
        return None
    sources = (
        *recipe.data.sft.train,
        *recipe.data.sft.validation,
        *recipe.data.dpo.train,
        *recipe.data.dpo.validation,
    )
    exams = tuple(f"evaluate.{name}" for name in ("benchmarks", "folder", "hub"))  # decontamination reads the exams
    keys = ("model.path", "model.hub", "model.revision", "data", *exams, "seed")
    return Step("prepare", "prepare", keys=keys, files=_paths(sources), outputs=(run.pattern(run.prepared),))


def _train(stage: str, other_stage: str, recipe: Recipe, run: RunFiles, before: set[str]) -> Step | None:
    split = getattr(recipe.data, stage)
    if not split.train:
        return None
    files = [recipe.model.path, *_paths((*split.train, *split.validation))]
    start = recipe.start(stage)
    after = {"prepare"} | ({"sft"} if start == "sft" else set())
    if start not in ("sft", "base"):
        files.append(start)
    return Step(
        stage,
        stage,
        keys=("model", "lora", "data", "seed", stage),
        without=(f"data.{other_stage}", f"{stage}.max_skipped_steps"),
        files=tuple(files),
        after=tuple(sorted(after & before)),
        outputs=(run.pattern(run.stage(stage).adapter, "*"),),
        prepared=stage if "prepare" in before else None,
        trains=True,
    )


def _eval(model: str, recipe: Recipe, run: RunFiles, before: set[str]) -> Step | None:
    settings = recipe.evaluate
    if not settings.benchmarks or (model != "base" and model not in before):
        return None
    generates = settings.protocol == "generate"
    return Step(
        f"eval-{model}",
        "eval",
        arguments=("--stage", model),
        keys=("model", "evaluate", "data.date_string", "seed"),
        without=("evaluate.prompts", *(() if generates else ("evaluate.max_new_tokens",))),
        files=(recipe.model.path, *settings.benchmarks, *settings.folder.values()),
        after=(model,) if model in before else (),
        # Only the answers: the file of results changes whenever another model is evaluated.
        outputs=(run.pattern(run.exams, f"{model}-*.jsonl"),),
    )


def _fuse(recipe: Recipe, run: RunFiles, before: set[str]) -> Step | None:
    tuned = next((stage for stage in ("dpo", "sft") if stage in before), None)
    if "export" not in recipe.model_fields_set or tuned is None:
        return None
    keys = ("model", "export", "data.sft.validation", "data.system", "data.variables", "data.date_string")
    files = (recipe.model.path, *_paths(recipe.data.sft.validation))
    return Step("fuse", "fuse", keys=keys, files=files, after=(tuned,), outputs=(run.pattern(run.fused, "**", "*"),))


def _report(recipe: Recipe, run: RunFiles, before: set[str]) -> Step:
    any_stage = run.stage("*")
    files = (any_stage.metrics, any_stage.summary, any_stage.warnings, run.prepared)
    reads = ("*.json", *map(run.pattern, files), run.pattern(run.exams, "*.json*"))
    sections = tuple(type(recipe).model_fields)
    outputs = (run.pattern(run.text), run.pattern(run.page), run.pattern(run.plots, "*.png"))
    return Step("report", "report", keys=sections, after=tuple(sorted(before)), reads=reads, outputs=outputs)


_MAKERS: dict[str, Callable[[Recipe, RunFiles, set[str]], Step | None]] = {
    "prepare": _prepare,
    "eval-base": lambda recipe, run, before: _eval("base", recipe, run, before),
    "sft": lambda recipe, run, before: _train("sft", "dpo", recipe, run, before),
    "eval-sft": lambda recipe, run, before: _eval("sft", recipe, run, before),
    "dpo": lambda recipe, run, before: _train("dpo", "sft", recipe, run, before),
    "eval-dpo": lambda recipe, run, before: _eval("dpo", recipe, run, before),
    "fuse": _fuse,
    "report": _report,
}


def _paths(sources: Sources) -> tuple[str, ...]:
    """The local files and folders of data sources. A registered name has none."""
    return tuple(source.path for source in sources if source.path and Path(source.path).expanduser().exists())
