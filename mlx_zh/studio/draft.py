"""The recipe that the page New run is about: its choices and its text, which follow each other."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlx_zh.errors import RecipeError, StorageError, StudioError
from mlx_zh.recipe import Recipe
from mlx_zh.recipe_text.units import seconds_of, time_text
from mlx_zh.recipe_text.values import compose
from mlx_zh.stages.run_folder import RunFolder
from mlx_zh.studio.recipe_check import Finding, check_recipe
from mlx_zh.studio.yaml_edit import value_at, with_value, without_key
from mlx_zh.system.storage import storage_errors

# The positions of the slider for the time; None is no limit.
BUDGETS: tuple[str | None, ...] = (
    *("10m", "20m", "30m", "45m", "1h", "1h30m", "2h", "3h", "4h", "6h", "8h", "10h", "12h", "16h", "1d", "2d"),
    None,
)
DEFAULT_BUDGET = "8h"
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


# The choices by the key of the recipe that holds them.
_CHOICES = {
    "name": "name",
    "model.path": "model",
    "budget": "budget",
    "data.sft.train": "use",
    "data.dpo.train": "use",
}


def nearest_budget(budget: str | None) -> int:
    """The slider's position for a time."""
    seconds = None if budget is None else seconds_of(budget)
    if seconds is None:
        return len(BUDGETS) - 1
    times = [seconds_of(text) or 0 for text in BUDGETS if text is not None]
    return min(range(len(times)), key=lambda number: abs(times[number] - seconds))


@dataclass
class Draft:
    """A recipe in the making. `own` holds the values that the user set, by dotted key; they outlast new data.

    `rewritten` tells that the user edited the text by hand: then nothing is generated over it.
    """

    project: Path
    place: str = ""  # the folder of the recipe, from the project; paths in it begin there
    name: str = "my-model"
    named: bool = False  # whether the user chose the name
    model: str = ""
    budget: str | None = DEFAULT_BUDGET
    use: str = "sft"
    files: list[dict[str, Any]] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    text: str = ""
    own: dict[str, Any] = field(default_factory=dict)
    rewritten: bool = False

    @property
    def path(self) -> Path:
        """Where the recipe will stand."""
        return self.project / self.place / f"{self.name}.yaml"

    @property
    def file(self) -> str:
        """The same, as a path from the project."""
        return str(self.path.relative_to(self.project))

    def checked(self) -> tuple[Recipe | None, list[Finding]]:
        """The recipe, or what is wrong with the text; also what the studio does not allow."""
        recipe, findings = check_recipe(self.text, self.path)
        if recipe is not None:
            findings = self._outside(recipe)
        return (recipe if not findings else None), findings

    def _outside(self, recipe: Recipe) -> list[Finding]:
        """A folder of runs outside the project: the studio neither writes nor shows it."""
        runs = (self.project / recipe.runs).resolve()
        if runs.is_relative_to(self.project):
            return []
        return [Finding(0, ("runs",), "runs must be a folder within the project.")]

    def value(self, key: str) -> Any:
        """The value of a key in the text; None where it is not there or the text is not YAML."""
        try:
            return value_at(self.text, key.split("."))
        except _YAML_ERRORS:
            return None

    def has(self, key: str) -> bool:
        """Whether the text sets a key."""
        with suppress(*_YAML_ERRORS):
            value = compose(self.text)[1]
            for part in key.split("."):
                if not isinstance(value, dict) or part not in value:
                    return False
                value = value[part]
            return True
        return False

    def set(self, key: str, value: Any, *, default: Any = None) -> None:
        """Set a key in the text. One that is not there is left out while it has its default.

        Raises RecipeError while the text cannot be read.
        """
        try:
            if value == default and not self.has(key):
                return
            self.text = with_value(self.text, key.split("."), value)
        except ValueError:
            raise RecipeError(
                "the YAML cannot be read. Correct it first; its first error is shown beside it."
            ) from None
        self.own[key] = value
        if key in _CHOICES:
            self._follow(_CHOICES[key])

    def unset(self, key: str) -> None:
        """Remove a key from the text, so that its default counts."""
        with suppress(ValueError):
            self.text = without_key(self.text, key.split("."))
        self.own.pop(key, None)

    def generated(self, text: str) -> None:
        """Take a new first recipe for other data or another model, with what the user has set so far."""
        if self.rewritten:
            for key in ("data.sft.train", "data.dpo.train"):
                new = value_at(text, key.split("."))
                if new is not None:
                    self.text = with_value(self.text, key.split("."), new)
                elif self.has(key):
                    self.unset(key)
            return
        for key, value in self.own.items():
            text = with_value(text, key.split("."), value)
        self.text = text

    def edited(self, text: str) -> None:
        """Take the text as the user wrote it; the choices follow."""
        if text == self.text:
            return
        self.text, self.rewritten = text, True
        for choice in _CHOICES.values():
            self._follow(choice)

    def _follow(self, choice: str) -> None:
        """Take a choice from the text: only the one that changed, because the text may wait for the others."""
        if choice == "name":
            name = self.value("name")
            if isinstance(name, str) and _NAME.fullmatch(name):
                self.named = self.named or name != self.name
                self.name = name
        elif choice == "model":
            model = self.value("model.path")
            self.model = model if isinstance(model, str) and model else self.model
        elif choice == "budget":
            budget = self.value("budget")
            seconds = seconds_of(budget) if isinstance(budget, str) else None
            self.budget = None if seconds is None else time_text(seconds)
        else:
            sft, dpo = bool(self.value("data.sft.train")), bool(self.value("data.dpo.train"))
            if sft or dpo:
                self.use = "sft-dpo" if sft and dpo else "dpo" if dpo else "sft"

    def taken(self) -> bool:
        """Whether a run or another recipe of this name is here already."""
        if self.run().path.exists() and any(self.run().path.iterdir()):
            return True
        try:
            return self.path.read_text(encoding="utf-8") != self.text
        except FileNotFoundError:
            return False
        except (OSError, UnicodeDecodeError):
            return True

    def unused_name(self) -> str:
        """The first name with a number that neither a run nor a recipe has."""
        stem = re.sub(r"-\d+$", "", self.name)
        number = 2
        while (self.run(f"{stem}-{number}").path.exists()) or (self.project / f"{stem}-{number}.yaml").exists():
            number += 1
        return f"{stem}-{number}"

    def run(self, name: str | None = None) -> RunFolder:
        """The run folder of the draft, or of another name."""
        runs = self.value("runs")
        folder = self.project / (runs if isinstance(runs, str) and runs else "runs")
        return RunFolder(folder / (name or self.name))

    def write(self) -> Path:
        """Write the recipe beside the others. Raises StudioError where another one has that name."""
        try:
            with storage_errors(self.path), self.path.open("x", encoding="utf-8") as file:
                try:
                    file.write(self.text)
                    file.flush()
                except OSError:
                    self.path.unlink()  # what was begun would stand in the way of the next try
                    raise
        except StorageError:
            if not self.path.is_file() or self.path.read_text(encoding="utf-8") != self.text:
                raise
        return self.path


def recipes(project: Path) -> list[str]:
    """The recipes in the project, as paths from it."""
    found: list[str] = []
    for path in sorted([*project.glob("*.y*ml"), *project.glob("recipes/*.y*ml")]):
        with suppress(OSError, UnicodeDecodeError, *_YAML_ERRORS):
            if path.stat().st_size < 200_000 and path.resolve().is_relative_to(project):
                value = compose(path.read_text(encoding="utf-8"))[1]
                if isinstance(value, dict) and "name" in value and "model" in value:
                    found.append(str(path.relative_to(project)))
    return found


def opened(project: Path, name: str) -> Draft:
    """A draft from one of the project's recipes. Raises StudioError if it is not one of them."""
    if name not in recipes(project):
        raise StudioError("there is no such recipe here.")
    draft = Draft(project, str(Path(name).parent))
    draft.edited((project / name).read_text(encoding="utf-8"))
    draft.budget = draft.budget if draft.has("budget") else None
    return draft
