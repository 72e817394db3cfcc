"""The table of a run's steps: the files that each reads and writes, and the recipe keys that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from typing import Protocol

from mlx_zh.corpus.registry import Registry, load_registry
from mlx_zh.exams.catalog import NAMES as EXAMS
from mlx_zh.recipe import DataSet, Recipe, Source

NAMES = ("prepare", "eval-base", "sft", "eval-sft", "dpo", "eval-dpo", "rounds", "fuse", "report")


@dataclass(frozen=True)
class Step:
    """A stage as the pipeline runs it: `python -m mlx_zh.STAGE RECIPE ARGUMENTS`.

    The step is up to date while nothing that it depends on has changed: the recipe's `keys`, the `files`, the
    `entries` of data sets that the recipe names, the outputs of the steps in `after`, and the files of the run folder
    that match `reads`. Keys are dotted. A section's name stands for all of its keys, and `without` excludes some of
    them. `outputs` are patterns in the run folder.
    """

    name: str
    stage: str
    arguments: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    entries: Mapping[str, DataSet] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    amended: tuple[str, ...] = ()  # names of outputs to which others may add without the step being out of date
    asks: tuple[str, ...] = ()  # keys that change only the sample answers, not what is learned
    prepared: str | None = None  # the stage (sft or dpo) whose prepared data it reads
    trains: bool = False  # it writes checkpoints, can resume, and has the option --fresh

    def inputs(self, values: Mapping[str, object]) -> dict[str, object]:
        """The keys of a recipe that this step depends on. `values` has dotted keys."""
        keys = self.keys + self.asks
        return {k: v for k, v in values.items() if _under(k, keys) and not _under(k, self.without)}

    def learned(self, inputs: Mapping[str, object]) -> dict[str, object]:
        """The inputs without those that change only the sample answers."""
        return {k: v for k, v in inputs.items() if not _under(k, self.asks)}


def _under(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


class StageFiles(Protocol):
    """The paths in a training stage's folder that the pipeline needs."""

    path: Path
    metrics: Path
    summary: Path
    warnings: Path
    adapter: Path


class RoundFiles(Protocol):
    """The paths in a round's folder that the pipeline needs."""

    result: Path

    def stage(self, name: str) -> StageFiles:
        """The folder of a training stage."""


class RunFiles(Protocol):
    """The paths in a run folder that the pipeline needs."""

    path: Path
    pipeline: Path
    samples: Path
    prepared: Path
    exams: Path
    fused: Path
    fused_summary: Path
    page: Path
    text: Path
    plots: Path

    def at(self, path: Path) -> RunFiles:
        """The run folder at `path`."""

    def stage(self, name: str) -> StageFiles:
        """The folder of a training stage."""

    def round(self, number: int | str) -> RoundFiles:
        """The folder of a round."""

    def pattern(self, path: Path, *more: str) -> str:
        """A path inside the folder, as a pattern relative to it."""


def steps(recipe: Recipe, run: RunFiles) -> list[Step]:
    """The steps of this recipe, in order. Raises DataError for a registry that cannot be read."""
    chosen: list[Step] = []
    file = recipe.data.registry_file
    registry = load_registry(recipe.data.registry, None if file is None else Path(file))
    for name in NAMES:
        step = _MAKERS[name](recipe, run, {step.name for step in chosen}, registry)
        if step is not None and find_spec(f"mlx_zh.{step.stage}") is not None:
            chosen.append(step)
    return chosen


def _prepare(recipe: Recipe, run: RunFiles, _: set[str], registry: Registry) -> Step | None:
    sft, dpo = recipe.data.sft, recipe.data.dpo
    if not (sft.train or dpo.train):
        return None
    data = _Data.of((*sft.train, *sft.validation, *dpo.train, *dpo.validation), registry)
    exams = tuple(f"evaluate.{name}" for name in ("benchmarks", "folder", "hub"))  # decontamination reads the exams
    keys = ("model.path", "model.hub", "model.revision", "data", *exams, "seed")
    files = (*data.files, *_exam_copies(recipe))
    outputs = (run.pattern(run.prepared),)
    return Step("prepare", "prepare", keys=keys, files=files, entries=data.entries, outputs=outputs)


def _exam_copies(recipe: Recipe) -> tuple[str, ...]:
    """The user's own copies of exams whose questions are kept out of the data."""
    kept_out = recipe.data.decontaminate.benchmarks
    names = recipe.evaluate.benchmarks if kept_out is None else kept_out
    return tuple(folder for name, folder in recipe.evaluate.folder.items() if name in names and name in EXAMS)


def _train(
    stage: str, other_stage: str, recipe: Recipe, run: RunFiles, before: set[str], registry: Registry
) -> Step | None:
    split = getattr(recipe.data, stage)
    if not split.train:
        return None
    data = _Data.of((*split.train, *split.validation), registry)
    files = [recipe.model.path, *data.files]
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
        entries=data.entries,
        after=tuple(sorted(after & before)),
        outputs=(run.pattern(run.stage(stage).adapter, "*"),),
        asks=("evaluate.prompts", "evaluate.max_new_tokens"),
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


def _rounds(recipe: Recipe, run: RunFiles, before: set[str], registry: Registry) -> Step | None:
    if recipe.rounds is None:
        return None
    tuned = next((stage for stage in ("dpo", "sft") if stage in before), None)
    asked = recipe.data.sft.train or recipe.data.dpo.train
    data = _Data.of(() if recipe.rounds.prompts else asked, registry)
    prompts = (recipe.rounds.prompts,) if recipe.rounds.prompts else ()
    any_round = run.round("*")
    return Step(
        "rounds",
        "stages.rounds",
        keys=("model", "lora", "data", "seed", "dpo", "rounds"),
        without=("data.dpo", "dpo.max_skipped_steps"),
        files=(recipe.model.path, *prompts, *data.files),
        entries=data.entries,
        after=() if tuned is None else (tuned,),
        outputs=(run.pattern(any_round.result), run.pattern(any_round.stage("dpo").adapter, "*")),
    )


def _fuse(recipe: Recipe, run: RunFiles, before: set[str], registry: Registry) -> Step | None:
    tuned = next((stage for stage in ("dpo", "sft") if stage in before), None)
    if "export" not in recipe.model_fields_set or tuned is None:
        return None
    keys = ("model", "export", "data.sft.validation", "data.system", "data.variables", "data.date_string")
    data = _Data.of(recipe.data.sft.validation, registry)
    return Step(
        "fuse",
        "fuse",
        keys=keys,
        files=(recipe.model.path, *data.files),
        entries=data.entries,
        after=(tuned,),
        outputs=(run.pattern(run.fused, "**", "*"),),
        amended=(run.fused_summary.name, "README.md"),  # by eval of the fused model, and by the user
    )


def _report(recipe: Recipe, run: RunFiles, before: set[str], _: Registry) -> Step:
    any_stage = run.stage("*")
    files = (any_stage.metrics, any_stage.summary, any_stage.warnings, run.prepared, run.fused_summary)
    reads = ("*.json", *map(run.pattern, files), run.pattern(run.exams, "*.json*"))
    sections = tuple(type(recipe).model_fields)
    outputs = (run.pattern(run.text), run.pattern(run.page), run.pattern(run.plots, "*.png"))
    return Step("report", "report", keys=sections, after=tuple(sorted(before)), reads=reads, outputs=outputs)


_MAKERS: dict[str, Callable[[Recipe, RunFiles, set[str], Registry], Step | None]] = {
    "prepare": _prepare,
    "eval-base": lambda recipe, run, before, _: _eval("base", recipe, run, before),
    "sft": lambda recipe, run, before, registry: _train("sft", "dpo", recipe, run, before, registry),
    "eval-sft": lambda recipe, run, before, _: _eval("sft", recipe, run, before),
    "dpo": lambda recipe, run, before, registry: _train("dpo", "sft", recipe, run, before, registry),
    "eval-dpo": lambda recipe, run, before, _: _eval("dpo", recipe, run, before),
    "rounds": _rounds,
    "fuse": _fuse,
    "report": _report,
}


@dataclass(frozen=True)
class _Data:
    """What is on this disk of data sources: files and folders, and entries of the registry by name."""

    files: tuple[str, ...]
    entries: dict[str, DataSet]

    @staticmethod
    def of(sources: Iterable[Source], registry: Registry) -> _Data:
        files: list[str] = []
        entries: dict[str, DataSet] = {}
        for source in sources:
            if source.path and Path(expanduser(source.path)).exists():
                files.append(source.path)
            # A source with a name and a path reads the path in the way that the entry says.
            name = source.name or (source.path if source.path not in files else None)
            if name is None or (entry := registry.get(name)) is None:
                continue
            entries[name] = entry
            if entry.hub == "file" and not source.path:
                files.append(entry.id)
        return _Data(tuple(files), entries)
