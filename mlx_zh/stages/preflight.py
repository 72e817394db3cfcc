"""Everything about a recipe that can be known before the first download or minute of work, checked in one go."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from mlx_zh.core.families import Config
from mlx_zh.corpus.registry import Registry, find_data_set
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.distributed.local import ranks_here
from mlx_zh.errors import MlxZhError, RecipeError
from mlx_zh.exams.archives import open_exam
from mlx_zh.exams.catalog import NAMES
from mlx_zh.language.notice import Notice
from mlx_zh.language.translation import in_readers_language
from mlx_zh.models import catalog
from mlx_zh.models.export.writable import check_writable
from mlx_zh.models.load import find_config, resolve_model
from mlx_zh.recipe import Model, Recipe, Source
from mlx_zh.stages import memory_check, needs
from mlx_zh.stages.data import registry_of, require_fitting_keys, require_kind, resolve_source
from mlx_zh.stages.first_adapter import choose_start
from mlx_zh.stages.prompt_sets import SETS, prompt_set
from mlx_zh.stages.rendering import thinking_problem
from mlx_zh.stages.run_folder import TUNED
from mlx_zh.system import console, hub_choice, huggingface, storage
from mlx_zh.system.downloads import LIMITS
from mlx_zh.system.environment import python

_TRACKERS = {"tensorboard": "tensorboardX", "swanlab": "swanlab", "wandb": "wandb"}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, or worth knowing, with its remedy. An error stops the run."""

    text: str  # a Notice, or an error's message
    is_error: bool = True


def problems(recipe: Recipe, stages: Sequence[str]) -> list[Problem]:
    """What stands in the way of `stages` (of sft, dpo and eval), errors first.

    The network is asked only whether it answers, and only if something must be downloaded.
    """
    found: list[Problem] = []
    try:
        registry = registry_of(recipe)
    except MlxZhError as error:
        return [_of(error)]
    found += _data(recipe, registry, stages)
    found += _packages(recipe)
    if (problem := thinking_problem(recipe)) is not None:
        found.append(Problem(problem))
    if "eval" in stages:
        found += _exams(recipe)
    found += starts(recipe, stages)
    found += _rounds(recipe)
    config, model_problems = _model(recipe.model)
    model_problems += scorers(recipe, stages)
    found += model_problems
    downloads: list[needs.Download] = []
    if not any(problem.is_error for problem in model_problems):
        downloads = needs.downloads_of(recipe, registry, tuple(stages))
    unreachable = list(_hubs(downloads))
    found += unreachable
    found += _disk(recipe, downloads, config)
    if config is not None:
        found += _exports(recipe, config)
        found += _memory(recipe, config, stages)
    return sorted(found, key=lambda problem: not problem.is_error)


def check(recipe: Recipe, stages: Sequence[str]) -> None:
    """Print the advice, and raise RecipeError with all errors. The pipeline has checked for its stages."""
    if os.environ.get("MLX_ZH_LOCK"):
        return
    found = problems(recipe, stages)
    for problem in found:
        if not problem.is_error:
            console.say(problem.text)
    if errors := [problem.text for problem in found if problem.is_error]:
        raise RecipeError("\n".join(in_readers_language(text) for text in errors))


def show(recipe: Recipe, stages: Sequence[str]) -> bool:
    """Print all problems as one list; returns whether nothing stands in the way."""
    found = problems(recipe, stages)
    for problem in found:
        kind = in_readers_language("error: " if problem.is_error else "note: ")
        console.say(f"{kind}{in_readers_language(problem.text)}")
    if not found:
        console.say("Checked: data, model, packages, network, disk and memory. Nothing stands in the way.")
    return not any(problem.is_error for problem in found)


def _of(error: MlxZhError) -> Problem:
    return Problem(str(error))


def _data(recipe: Recipe, registry: Registry, stages: Sequence[str]) -> Iterator[Problem]:
    """Names that there are not, files that there are not, and files whose rows cannot be read."""
    for stage in stages:
        if stage not in TUNED:
            continue
        split = recipe.data.split(stage)
        for source in (*split.train, *split.validation):
            try:
                yield from _source(recipe, source, registry, stage)
            except MlxZhError as error:
                yield _of(error)


def _source(recipe: Recipe, source: Source, registry: Registry, stage: str) -> Iterator[Problem]:
    entry = needs.registered(source, registry)
    local = source.path is not None and Path(expanduser(source.path)).exists()
    if not local and (entry is None or entry.hub in ("file", "generated")):
        if entry is None:
            find_data_set(source.name or str(source.path), registry)
        resolve_source(source, registry, stage, recipe.seed, validation=False)
        return
    if not local and entry is not None:
        require_kind(source, entry, stage)
        require_fitting_keys(source, entry)  # the rows of a set on a hub are read when it is here
        return
    opened = resolve_source(source, registry, stage, recipe.seed, validation=False)
    report = LoadReport()
    first = next(opened.items(recipe.kind(stage), recipe.data.on_invalid, report), None)
    if first is None:
        yield Problem(Notice("preflight-no-rows", source=source.label, path=str(source.path)))


def _packages(recipe: Recipe) -> Iterator[Problem]:
    pip = f"{python()} -m pip install"
    for name in recipe.track:
        if importlib.util.find_spec(_TRACKERS[name]) is None:
            command = f"{pip} {_TRACKERS[name]}"
            yield Problem(Notice("preflight-tracker", tracker=name, command=command), is_error=False)
    if recipe.data.simplify and importlib.util.find_spec("opencc") is None:
        yield Problem(Notice("preflight-opencc", command=f"{pip} opencc"))


def _exams(recipe: Recipe) -> Iterator[Problem]:
    settings = recipe.evaluate
    for exam, folder in settings.folder.items():
        if exam in settings.benchmarks and not Path(expanduser(folder)).is_dir():
            yield Problem(Notice("preflight-folder", exam=str(exam), folder=folder))
    for name in settings.benchmarks:
        if name not in NAMES:
            try:
                open_exam(name, folders={}, hub="auto", split=settings.split, shots=0, limit=1)
            except MlxZhError as error:
                yield _of(error)


def _rounds(recipe: Recipe) -> Iterator[Problem]:
    """A file of prompts that the rounds, the last step of a run, could not read."""
    name = recipe.rounds.prompts if recipe.rounds is not None else None
    if not name or name in SETS:
        return  # a set is of data that is checked by itself, and may not be here yet
    try:
        prompt_set(recipe, name, limit=1)
    except MlxZhError as error:
        yield _of(error)


def starts(recipe: Recipe, stages: Sequence[str] = TUNED) -> Iterator[Problem]:
    """Whether the adapters that training starts from are there; SFT's own may come yet."""
    for stage in stages:
        if stage in TUNED and recipe.data.split(stage).train and recipe.start(stage) not in ("sft", "base"):
            try:
                choose_start(recipe, stage)
            except MlxZhError as error:
                yield _of(error)


def scorers(recipe: Recipe, stages: Sequence[str] = TUNED) -> list[Problem]:
    """What is wrong with the models that `select.model` names: they are needed after the data was read."""
    found: list[Problem] = []
    for stage in stages:
        model = needs.scoring_model(recipe, stage) if stage in TUNED and recipe.data.split(stage).train else None
        if model is None:
            continue
        _, problems = _model(model)
        key = f"data.{stage}.select.model"
        found += [Problem(Notice("preflight-scorer", key=key, reason=p.text), p.is_error) for p in problems]
    return found


def _model(model: Model) -> tuple[Config | None, list[Problem]]:
    """The model's config if it is known without a download, and what is wrong with its name or licence."""
    try:
        entry = catalog.known_model(model.path)
        missing = needs.model_download(model)
        if missing and entry is None:
            resolvable = catalog.HUB_ID.fullmatch(model.path) is not None
            if not resolvable:
                resolve_model(model.path)  # raises, naming the nearest
        config = None
        if not missing or (entry is not None and entry.config is not None):
            config = find_config(model.path, hub=model.hub, revision=model.revision)
    except MlxZhError as error:
        return None, [_of(error)]
    if entry is None or entry.accept is None or not missing:
        return config, []
    licence = Notice("preflight-licence", model=model.path, licence=entry.licence, address=entry.accept)
    return config, [Problem(licence, is_error=False)]


def _hubs(downloads: Sequence[needs.Download]) -> Iterator[Problem]:
    """Whether what must be downloaded can be: each item by a hub that has it and answers."""
    on_hubs = [item for item in downloads if item.needed and set(item.hubs) & set(hub_choice.TITLES)]
    if not on_hubs:
        return
    if huggingface.is_offline():
        yield Problem(Notice("preflight-offline", names=[item.name for item in on_hubs]))
        return
    result = hub_choice.answers()
    if result.hub is None:
        tried = [f"{hub_choice.TITLES[name]}: {why}" for name, why in result.failed.items()]
        yield Problem(Notice("preflight-hub", names=[item.name for item in on_hubs], tried=tried))
        return
    for other in hub_choice.TITLES:
        only = [item.name for item in on_hubs if item.hubs == (other,)]
        if not only or other == result.hub:
            continue
        reason = result.failed.get(other) or hub_choice.unreachable(hub_choice.addresses()[other], LIMITS.probe)
        if reason:
            title = hub_choice.TITLES[other]
            yield Problem(Notice("preflight-other-hub", names=only, hub=title, reason=reason))


def _disk(recipe: Recipe, downloads: Sequence[needs.Download], config: Config | None) -> Iterator[Problem]:
    need = sum(item.gigabytes or 0.0 for item in downloads)
    cache = storage.cache_folder()
    if need * 1e9 > (free := _free(cache)):
        yield Problem(Notice("preflight-disk-cache", need=need, free=free / 1e9, folder=str(cache)))
    runs = Path(recipe.runs)
    if config is not None:
        written = needs.disk_bytes(recipe, config)
        if written > (free := _free(runs)):
            yield Problem(
                Notice("preflight-disk-run", need=written / 1e9, free=free / 1e9, folder=str(runs)), is_error=False
            )


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _exports(recipe: Recipe, config: Config) -> Iterator[Problem]:
    """A format that cannot be written for this family: it is the run's last step."""
    try:
        check_writable(config, recipe.export)
    except MlxZhError as error:
        yield _of(error)


def _without_effect(recipe: Recipe, config: Config, machine: memory_check.Machine) -> Iterator[Problem]:
    """Settings of memory that change nothing here."""
    settings = recipe.memory
    if memory_check.limits_nothing(machine, settings):
        have = machine.budget * ranks_here() / 1e9
        yield Problem(
            Notice("preflight-limit", limit=str(settings.limit), have=have, place=machine.name), is_error=False
        )
    if settings.dense_products is True and memory_check.target_of(recipe, config, machine).packing is None:
        yield Problem(Notice("preflight-dense"), is_error=False)


def _memory(recipe: Recipe, config: Config, stages: Sequence[str]) -> Iterator[Problem]:
    """Advice for stages that need more memory than there is if their examples are as long as they may be."""
    machine = memory_check.this_machine()
    tuned = [stage for stage in stages if stage in TUNED]
    if tuned:
        yield from _without_effect(recipe, config, machine)
    for stage in tuned:
        try:
            step = memory_check.training_step(recipe, stage, config, machine)
        except MlxZhError as error:
            yield _of(error)
            continue
        peak = step.memory(recipe.memory).peak
        if peak > machine.budget:
            way = memory_check.suggestion(step, recipe.memory, machine)
            numbers = {"need": peak / 1e9, "have": machine.budget / 1e9}
            yield Problem(Notice("preflight-memory", stage=stage, way=way, **numbers), is_error=False)
