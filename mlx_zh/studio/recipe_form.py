"""The fields of a form for recipes, made from the recipe's own types: kind, choices, limits, default of each key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from mlx_zh.errors import RecipeError
from mlx_zh.language.catalogue import Language, read
from mlx_zh.recipe import Recipe
from mlx_zh.recipe_text.values import inline, parse_value

Kind = Literal["choice", "choices", "switch", "whole", "number", "text", "long"]
# Keys that the page asks for itself: the base, the data, the name and the time.
ASKED = ("name", "budget", "model.path", "data.sft.train", "data.dpo.train")
# What people change first, in this order; the other keys are under Advanced.
FIRST = ("sft.epochs", "sft.learning_rate", "sft.batch_size", "lora.rank", "data.max_length", "data.system")
_LONG = ("data.system",)  # texts of several lines


@dataclass(frozen=True, slots=True)
class Field:
    """A key of the recipe that holds a value. `kind` is `long` for what is written as YAML."""

    key: str  # dotted
    kind: Kind
    default: Any
    choices: tuple[Any, ...] = ()
    optional: bool = False  # may be null
    least: float | None = None
    most: float | None = None
    above: float | None = None  # the value must be larger than this
    below: float | None = None

    @property
    def parts(self) -> list[str]:
        """The key's parts."""
        return self.key.split(".")

    @property
    def section(self) -> str:
        """The section of the recipe that the key stands in; "" for the top."""
        return self.key.partition(".")[0] if "." in self.key else ""

    @property
    def limits(self) -> str:
        """The range of a number, as `> 0, ≤ 1`; "" without limits."""
        signs = {"≥": self.least, ">": self.above, "≤": self.most, "<": self.below}
        return ", ".join(f"{sign} {limit:,.15g}" for sign, limit in signs.items() if limit is not None)

    def about(self, language: Language) -> str:
        """What the key does, in a sentence or two."""
        wording = _about()[about_code(self.key)]
        return wording.zh if language == "zh" else wording.en

    def shown(self, value: Any) -> Any:
        """A value as the field shows it."""
        if self.kind in ("choice", "choices", "switch"):
            return value
        if value is None:
            return ""
        return value if isinstance(value, str) else inline(value)

    def read(self, entered: Any) -> Any:
        """The value of what was entered. Raises RecipeError for a text that is not YAML where YAML is expected."""
        if not isinstance(entered, str) or self.kind in ("choice", "choices", "switch"):
            return list(entered) if isinstance(entered, tuple) else entered
        if self.optional and not entered.strip():
            return None
        if self.kind == "text" or self.key in _LONG:
            return entered
        if not entered.strip():
            raise RecipeError(f"{self.key} is empty.")
        return parse_value(entered, self.key)


@cache
def fields() -> Mapping[str, Field]:
    """Every key of the recipe that holds a value, in its order. Entries of lists are part of a value."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {field.key: field for field in _fields(schema, schema, "")}


def about_code(key: str) -> str:
    """Under which name `keys.yaml` explains a key: the sections of SFT and DPO share theirs."""
    for prefix, shared in (("sft.", "training."), ("dpo.", "training."), ("data.dpo.", "data.sft.")):
        if key.startswith(prefix) and (code := shared + key.removeprefix(prefix)) in _about() and key not in _about():
            return code
    return key


@cache
def _about() -> Mapping[str, Any]:
    return read("keys")


def _fields(schema: Mapping[str, Any], section: Mapping[str, Any], prefix: str) -> list[Field]:
    listed: list[Field] = []
    for name, about in section["properties"].items():
        key = f"{prefix}{name}"
        inner = _section(schema, about)
        listed += _fields(schema, inner, f"{key}.") if inner is not None else [_field(key, about)]
    return listed


def _section(schema: Mapping[str, Any], about: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a key holds; None if it holds a value."""
    for way in (about, *about.get("anyOf", ())):
        if "$ref" in way:
            inner: Mapping[str, Any] = schema["$defs"][way["$ref"].rpartition("/")[2]]
            return inner
    return None


def _field(key: str, about: Mapping[str, Any]) -> Field:
    ways = [way for way in about.get("anyOf", [about]) if way.get("type") != "null"]
    optional = len(ways) < len(about.get("anyOf", [about]))
    limits = {ours: way[theirs] for ours, theirs in _LIMITS.items() for way in ways if theirs in way}
    choices, kind = _kind(key, ways)
    if kind == "choice" and optional:
        choices = (None, *choices)
    return Field(key, kind, about.get("default"), choices, optional, **limits)


_LIMITS = {"least": "minimum", "most": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
_KINDS: dict[str, Kind] = {"integer": "whole", "number": "number", "string": "text", "boolean": "switch"}


def _kind(key: str, ways: list[Mapping[str, Any]]) -> tuple[tuple[Any, ...], Kind]:
    if len(ways) == 1:
        way = ways[0]
        if "enum" in way or "const" in way:
            return tuple(way.get("enum", [way.get("const")])), "choice"
        if way.get("type") == "boolean":
            return (), "switch"
        if way.get("type") == "array" and "enum" in way["items"]:
            return tuple(way["items"]["enum"]), "choices"
        if key in _LONG:
            return (), "long"
        return (), _KINDS.get(str(way.get("type")), "long")
    return (), "long"
