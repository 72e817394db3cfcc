"""The prompts that `mlx-zh sample` answers: a file, or a set that the recipe names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from os.path import expanduser, isfile
from pathlib import Path

from mlx_zh.corpus.conversation import Message
from mlx_zh.corpus.prompts import Prompt, prompt_of, read_prompts
from mlx_zh.corpus.rows import LoadReport
from mlx_zh.corpus.samples import prompt_id
from mlx_zh.errors import DataError
from mlx_zh.recipe import Recipe
from mlx_zh.stages.data import registry_of, resolve_source

_SPLITS = ("train", "validation")
SETS = (*_SPLITS, *(f"{stage}.{split}" for stage in ("sft", "dpo") for split in _SPLITS), "evaluate")


@dataclass
class PromptSet:
    """Different prompts by id, in their order, and how many were left out for which reason."""

    name: str
    prompts: dict[str, Prompt] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, prompt: Prompt) -> None:
        """Add a prompt, unless it is there already or uses tools."""
        key = prompt_id(prompt.messages)
        if prompt.uses_tools:
            self.left_out["with tools"] += 1
        elif key in self.prompts:
            self.left_out["asked before"] += 1
        else:
            self.prompts[key] = prompt


def prompt_set(recipe: Recipe, name: str, limit: int | None) -> PromptSet:
    """The first `limit` prompts of a file or of a set of the recipe. Raises DataError for one without prompts."""
    result = PromptSet(name)
    report = LoadReport()
    for prompt in _prompts(recipe, name, report):
        if limit is not None and len(result.prompts) == limit:
            break
        result.add(prompt)
    result.left_out.update(report.dropped)
    if not result.prompts:
        raise DataError(f"{name} has no prompt that can be answered.")
    return result


def _prompts(recipe: Recipe, name: str, report: LoadReport) -> Iterator[Prompt]:
    if isfile(expanduser(name)):
        yield from read_prompts(Path(expanduser(name)), recipe.data.on_invalid, report)
    elif name == "evaluate":
        for sample in recipe.sample_prompts():
            yield Prompt((Message("user", sample.prompt),), sample.expect, "evaluate.prompts")
    elif name in SETS:
        yield from _of_data(recipe, name, report)
    else:
        raise DataError(f"{name}: there is no such file of prompts, and the sets of a recipe are {', '.join(SETS)}.")


def _of_data(recipe: Recipe, name: str, report: LoadReport) -> Iterator[Prompt]:
    """The prompts of the recipe's rows: those of data.sft unless the name says dpo, or there are no others."""
    stage, _, split = name.rpartition(".")
    stage = stage or ("sft" if recipe.data.sft.train else "dpo")
    data = recipe.data.split(stage)
    sources = data.train if split == "train" else data.validation
    if not sources:
        raise DataError(f"data.{stage}.{split} of the recipe names no data; give a file of prompts instead.")
    registry = registry_of(recipe)
    for source in sources:
        resolved = resolve_source(
            source, registry, stage, recipe.seed, validation=split == "validation", hub=recipe.model.hub
        )
        resolved = replace(resolved, variables=recipe.data.variables)
        for item in resolved.items(stage, recipe.data.on_invalid, report):
            if (prompt := prompt_of(item)) is not None:
                yield prompt
