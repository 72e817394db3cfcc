"""Models by short names: `models.yaml` of this package, and the user's own table."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import as_file, files
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, PositiveFloat, PositiveInt, model_validator

from mlx_zh.core.families import FAMILIES, Config
from mlx_zh.errors import RecipeError
from mlx_zh.recipe import Section
from mlx_zh.recipe_text.document import parse
from mlx_zh.recipe_text.problems import explain

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")

_NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
_PACKING = (4, 64)  # bits and group size of a 16-bit copy that is quantized on loading


def _hub_id(value: str) -> str:
    if not HUB_ID.fullmatch(value):
        raise ValueError("an id on a hub, as OWNER/NAME")
    return value


class HubCopy(Section):
    """A model's copy on one hub. `quantize` is for weights of 16 bits: they are quantized to 4 bits on loading."""

    id: Annotated[str, AfterValidator(_hub_id)]
    quantize: bool = False
    size_gb: PositiveFloat | None = None  # without it, that of the model


class Suits(Section):
    """What a model is good for, in both languages."""

    en: str = ""
    zh: str = ""


class KnownModel(Section):
    """An entry of the table. `config` holds the keys of config.json that the planner needs."""

    built_in: bool = False
    huggingface: HubCopy | None = None
    modelscope: HubCopy | None = None
    original: Annotated[str, AfterValidator(_hub_id)] | None = None  # of a built-in model: what it is a copy of
    licence: str = "not stated"
    accept: str | None = None  # the address of a licence whose conditions bind whoever uses the model
    size_gb: PositiveFloat | None = None
    params: PositiveInt | None = None
    context: PositiveInt | None = None
    suits: Suits = Suits()
    source: tuple[str, ...] = ()
    tried: bool = False
    config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _can_be_had_and_planned(self) -> KnownModel:
        if not (self.built_in or self.huggingface or self.modelscope):
            raise ValueError("a section with huggingface: {id: OWNER/NAME} or modelscope: {id: OWNER/NAME}")
        if self.config is not None:
            missing = [key for key in _NEEDED if not isinstance(self.config.get(key), int)]
            if missing or self.config.get("model_type") not in FAMILIES:
                wrong = missing or ["model_type"]
                raise ValueError(f"a section whose config has a usable {', '.join(wrong)}")
        return self

    @property
    def ids(self) -> dict[str, str]:
        """Its id on each hub where one is known."""
        return {name: copy.id for name, copy in self.copies.items()}

    @property
    def copies(self) -> dict[str, HubCopy]:
        """Its copy on each hub where one is known."""
        both = {"huggingface": self.huggingface, "modelscope": self.modelscope}
        return {name: copy for name, copy in both.items() if copy is not None}

    def download_gb(self, hub: str) -> float | None:
        """Size of the copy on a hub in GB of 10^9 bytes, if it is known."""
        copy = self.copies.get(hub)
        return (copy.size_gb if copy is not None else None) or self.size_gb


Catalog = Mapping[str, KnownModel]


class _Table(pydantic.RootModel[dict[str, KnownModel]]):
    """A whole file."""


def own_table() -> Path:
    """The user's own table: MLX_ZH_MODELS, else `~/.config/mlx-zh/models.yaml`. The file need not exist."""
    named = os.environ.get("MLX_ZH_MODELS")
    if named:
        return Path(expanduser(named))
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(expanduser(base)) / "mlx-zh" / "models.yaml"


def catalog() -> Catalog:
    """All models by short name; entries of the user's own table go before those of the package.

    Raises RecipeError for a table with mistakes: file, line and key of each.
    """
    own = own_table()
    if os.environ.get("MLX_ZH_MODELS") and not own.is_file():
        raise RecipeError(f"MLX_ZH_MODELS names {own}, which is not a file; correct it or unset it.")
    return {**_packaged(), **(_read(own) if own.is_file() else {})}


@cache
def _packaged() -> Catalog:
    with as_file(files(__package__).joinpath("models.yaml")) as path:
        return _read(path)


def _read(path: Path) -> dict[str, KnownModel]:
    document = parse(path, "a table of models is a mapping from names to models")
    problems = document.problems
    try:
        return _checked(_Table.model_validate(document.value).root, problems)
    except pydantic.ValidationError as error:
        problems = problems + explain(error, document, KnownModel, depth=1)
        raise RecipeError("\n".join(text for _, text in sorted(problems))) from error


def _checked(entries: dict[str, KnownModel], problems: list[tuple[int, str]]) -> dict[str, KnownModel]:
    if problems:
        raise RecipeError("\n".join(text for _, text in sorted(problems)))
    return entries


def known_model(name: str) -> KnownModel | None:
    """The entry with this short name, or with this id on any hub; None if there is none. Raises RecipeError."""
    entries = catalog()
    if name in entries:
        return entries[name]
    return next((entry for entry in entries.values() if name in entry.ids.values()), None)


def planned_config(name: str) -> Config | None:
    """The sizes in config.json of a known model, as far as the table holds them. Raises RecipeError."""
    entry = known_model(name)
    return dict(entry.config) if entry is not None and entry.config is not None else None


def packing_on_loading(name: str, config: Config) -> tuple[int, int] | None:
    """(bits, group size) for a 16-bit copy that the table says is quantized on loading; else None.

    `config` is the config.json of the copy that was downloaded. Raises RecipeError.
    """
    if config.get("quantization") or config.get("quantization_config"):
        return None
    entry = known_model(name)
    copies = entry.copies.values() if entry is not None else ()
    return _PACKING if any(copy.quantize for copy in copies) else None


def suggestion(name: str) -> str:
    """A sentence with the nearest short names and all of them, for a name that there is not."""
    names = list(catalog())
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    return f"{hint}Models by short name: {', '.join(names)}."
