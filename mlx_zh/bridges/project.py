"""Another program's project as a recipe: read, converted, checked and written with comments."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mlx_zh.bridges import llama_factory, mlx_lm, recipe_file, trl
from mlx_zh.bridges.draft import TITLES, Draft, Program, Row, Settings
from mlx_zh.bridges.joining import joined
from mlx_zh.bridges.reading import read_project
from mlx_zh.corpus.llama_factory import NAME
from mlx_zh.errors import RecipeError
from mlx_zh.language.reader import say
from mlx_zh.language.translation import in_readers_language
from mlx_zh.recipe import Recipe, load_recipe

_CONVERTERS = {
    "llama-factory": llama_factory.convert,
    "mlx-lm": mlx_lm.convert,
    "mlx-lm-lora": mlx_lm.convert,
    "trl": trl.convert,
    "unsloth": trl.convert,
}
_LONGEST_NAME = 60


@dataclass
class Imported:
    """A recipe as text, and the table of what it was made of."""

    program: Program
    target: Path
    text: str
    rows: list[Row]
    recipe: Recipe


@dataclass
class Wishes:
    """What the command line says: the program, the devices, the base model, the recipe's file and its name."""

    program: Program | None = None
    devices: int | None = None
    model: str | None = None
    out: Path | None = None
    name: str | None = None


def import_project(paths: Sequence[Path], wishes: Wishes) -> Imported:
    """The recipe for the project in these files: one with settings, or one of SFT and one of preferences after it.

    Tables of data sets may be given too.

    Raises RecipeError with every reason why there is none.
    """
    tables = [path for path in paths if path.name == NAME]
    projects = [path for path in paths if path.name != NAME]
    if len(projects) not in (1, 2):
        raise RecipeError(say("import-one-project", count=len(projects), table=NAME))
    name = wishes.name or name_of(wishes.out or projects[0])
    target = wishes.out or projects[0].parent / f"{name}.yaml"
    if target.exists() or target.is_symlink():
        raise RecipeError(say("import-exists", file=target))
    drafts = []
    for project in projects:
        settings = read_project(project, wishes.program)
        settings.tables = tables
        settings.devices = wishes.devices or settings.devices
        drafts.append(converted(settings, target.parent, wishes.model))
    draft = drafts[0] if len(drafts) == 1 else joined(drafts)
    text = recipe_file.recipe_text(draft, name, target)
    return Imported(draft.settings.program, target, text, draft.rows, _checked(draft, text, target))


def converted(settings: Settings, folder: Path, model: str | None = None) -> Draft:
    """The draft of a project's recipe in `folder`. Raises RecipeError with every reason why there is none."""
    draft = Draft(settings, defaults_of(settings), folder)
    stage = _CONVERTERS[settings.program](draft, model)
    if len(draft.values) > 3:  # not where the first look refused it
        draft.put("data.deduplicate", {"exact": False, "near": None}, note=say("import-every-row"))
        draft.finish(stage)
    for remark in settings.remarks:
        draft.remark(remark)
    if draft.refusals:
        raise RecipeError(refusal(settings.path, draft.refusals))
    return draft


def refusal(path: Path, reasons: Sequence[str]) -> str:
    """All reasons in one error."""
    return "\n".join([say("import-refusal", file=path), *[f"  - {reason}" for reason in reasons]])


@cache
def _tables() -> dict[str, Any]:
    text = files(__package__).joinpath("defaults.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def defaults_of(settings: Settings) -> dict[str, Any]:
    """What a program takes for the settings that a file does not name."""
    tables = _tables()
    defaults = dict(tables[settings.program])
    if settings.program == "trl" and settings.scripted:
        defaults |= tables["peft"]
    if settings.scripted and settings.values.get("plain_arguments"):
        defaults |= tables["transformers"]
    elif settings.program == "trl":
        trainer = trl.trainer_of(Draft(settings, defaults, settings.folder))
        defaults["learning_rate"] = tables["rates"].get(trainer, defaults["learning_rate"])
    return defaults


def name_of(path: Path) -> str:
    """The name of the run and of its recipe: that of the file with -mlx, in letters that a folder may have."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:_LONGEST_NAME]
    return stem if stem.endswith("-mlx") else f"{stem or 'imported'}-mlx"


def _checked(draft: Draft, text: str, target: Path) -> Recipe:
    """The recipe that the text gives. Raises RecipeError with what is wrong with their values."""
    with tempfile.TemporaryDirectory(prefix="mlx-zh-") as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            return load_recipe(file, beside=target.parent)
        except RecipeError as error:
            reasons = [_problem(line.removeprefix(f"{file}:")) for line in str(error).splitlines()]
            raise RecipeError(refusal(draft.settings.path, reasons)) from None


def _problem(text: str) -> str:
    """A problem of the recipe, `12: lora.rank must be …`, in the reader's language."""
    line, _, problem = text.partition(": ")
    if not line.isdecimal():
        return in_readers_language(text)
    return say("import-line", line=line, problem=in_readers_language(problem))


def titles() -> str:
    """The programs, for help and errors."""
    return ", ".join(TITLES)
