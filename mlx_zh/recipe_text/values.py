"""YAML as people write it: numbers and booleans, documents that are too large, and values on one line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mlx_zh.errors import RecipeError, first_line


class Loader(yaml.SafeLoader):
    """Numbers and booleans as people write them: `1e-5` is a number; `no`, `1:30`, `017` and `0x1f` are text."""


class Dumper(yaml.SafeDumper):
    """Quotes text that `Loader` or YAML 1.1 would read as a number or boolean, such as `1e-5`."""


_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
)
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in _PLAIN:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


_LONGEST = 200_000  # characters of a document; PyYAML takes some seconds for them
_MOST_NODES = 100_000  # values of a document, those that aliases repeat included


def load(text: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> tuple[Any, Any]:
    """The node and the value of a YAML document. Raises YAMLError, also if it is too long or its aliases repeat much.

    Aliases of aliases would make gigabytes of a few lines.
    """
    if len(text) > _LONGEST:
        raise yaml.YAMLError(f"it has {len(text):,} characters, more than {_LONGEST:,}")
    opened = loader(text)
    try:
        node = opened.get_single_node()
        if _repeated_size(node, {}) > _MOST_NODES:
            raise yaml.YAMLError(f"it has more than {_MOST_NODES:,} values, or aliases that repeat so many")
        return node, None if node is None else opened.construct_document(node)
    finally:
        opened.dispose()


def _repeated_size(node: Any, sizes: dict[int, int]) -> int:
    """The nodes below a node, each as often as aliases repeat it; a node within itself counts once."""
    if id(node) not in sizes:
        sizes[id(node)] = 1
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
        sizes[id(node)] = min(1 + sum(_repeated_size(part, sizes) for part in inner), 2 * _MOST_NODES)
    return sizes[id(node)]


def is_utf8(text: str) -> bool:
    """Whether a text of the command line is UTF-8; bytes that are not become halves of surrogate pairs."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def compose(text: str) -> tuple[Any, Any]:
    """The node and the value of a YAML document, read as a recipe is. Raises YAMLError as `load` does."""
    return load(text, Loader)


def dump(value: Any) -> str:
    """Plain values as YAML. `parse` reads the same values from it."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


def inline(value: Any) -> str:
    """A plain value as one line of YAML: `{prompt: 问题, response: 答案}`."""
    text = yaml.dump(
        value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf"), default_flow_style=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


# PyYAML's constructors raise KeyError and AttributeError for some values with explicit tags.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)


def reason_of(error: BaseException) -> str:
    """Why a text is not valid YAML."""
    return getattr(error, "problem", None) or first_line(error)


def parse_value(text: str, context: str) -> Any:
    """The value of an override, read as YAML. Raises RecipeError, which names the override `context`."""
    if not is_utf8(text):
        raise RecipeError(
            f"{context!r}: the name is not UTF-8, and a recipe cannot hold it. Rename the file or folder first."
        )
    try:
        return load(text, Loader)[1]
    except (*YAML_ERRORS, RecursionError) as error:
        reason = f"the value is not valid YAML: {reason_of(error)}"
        raise RecipeError(f"{context!r}: {reason}. Put text in quotes.") from None
