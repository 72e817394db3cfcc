"""Reading YAML with line numbers, and turning validation errors into plain sentences."""

from __future__ import annotations

import difflib
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pydantic
import yaml

from mlx_zh.errors import RecipeError, first_line
from mlx_zh.language.other_names import other_names

Key = tuple[str | int, ...]


_WIDE_COLON = "："  # what a Chinese input method writes
_PLAIN_COLON = "Write a plain colon and a space in place of ："
_WIDE_KEY = re.compile(rf"^[\s-]*[\w.]+{_WIDE_COLON}", re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """Numbers and booleans as people write them: `1e-5` is a number; `no`, `1:30`, `017` and `0x1f` are text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` or YAML 1.1 would read as a number or boolean, such as `1e-5`."""


_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in _PLAIN:
    for _class in (_Loader, _Dumper):
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
    return load(text, _Loader)


def dump(value: Any) -> str:
    """Plain values as YAML. `parse` reads the same values from it."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


# Units of a length of time: a name as people write it -> seconds.
_UNITS = {
    **dict.fromkeys(("d", "day", "days", "天"), 86_400),
    **dict.fromkeys(("h", "hour", "hours", "小时", "个小时"), 3_600),
    **dict.fromkeys(("m", "min", "minute", "minutes", "分", "分钟"), 60),
    **dict.fromkeys(("s", "sec", "second", "seconds", "秒"), 1),
}
_TIME_PART = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([a-z天个小时分钟秒]+)\s*")


def seconds_of(text: str) -> int | None:
    """Seconds of a length of time such as 90m, 8h, 1h30m, 8小时 or 2d; None for any other text, and for no time."""
    rest, total = unicodedata.normalize("NFKC", text).strip().lower(), 0.0
    last = float("inf")
    while rest:
        part = _TIME_PART.match(rest)
        unit = _UNITS.get(part[2]) if part else None
        if part is None or unit is None or unit >= last:  # units fall from left to right, each once
            return None
        total, last, rest = total + float(part[1]) * unit, unit, rest[part.end() :]
    return round(total) or None


def time_text(seconds: int) -> str:
    """Seconds as a length of time that `seconds_of` reads: 1h30m."""
    parts = []
    for name in ("d", "h", "m", "s"):
        count, seconds = divmod(seconds, _UNITS[name])
        parts += [f"{count}{name}"] if count else []
    return "".join(parts) or "0s"


_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?) ?(m|mb|mib|g|gb|gib)")
_SIZE_UNITS = {"m": 10**6, "mb": 10**6, "mib": 2**20, "g": 10**9, "gb": 10**9, "gib": 2**30}


def size_of(text: str) -> int | None:
    """Bytes of a size such as 10GB, 9.5 GiB or 800MB; None for any other text, and for nothing at all."""
    found = _SIZE.fullmatch(unicodedata.normalize("NFKC", text).strip().lower())
    return round(float(found[1]) * _SIZE_UNITS[found[2]]) or None if found else None


def size_text(size: float) -> str:
    """Bytes as a size that `size_of` reads, to three digits: 9.75GB, 800MB."""
    unit = 1e9 if size >= 1e9 else 1e6
    return f"{max(float(f'{size / unit:.3g}'), 0.001):g}{'GB' if unit == 1e9 else 'MB'}"


def inline(value: Any) -> str:
    """A plain value as one line of YAML: `{prompt: 问题, response: 答案}`."""
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"), default_flow_style=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


Problem = tuple[int, str]  # line, and a sentence that begins with file and line


@dataclass
class Document:
    """A parsed file: its value, the line of every key, the override that set a key, and the problems so far."""

    path: Path
    value: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)
    overridden: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, key: Key) -> tuple[int, str]:
        """The line of `key` or of the nearest key above it, and file and line as text.

        For an override it is a number beyond all lines, and the override as text.
        """
        paths = [key[:size] for size in range(len(key), 0, -1)]
        for path in paths:
            if path in self.overridden:
                return sys.maxsize, f"{self.overridden[path]!r}"
        for path in paths:
            if path in self.lines:
                return self.lines[path], f"{self.path}:{self.lines[path]}"
        return 0, str(self.path)


_FORM = "a recipe is a mapping of sections (name, model, data, ...)"


def parse(path: Path, form: str = _FORM) -> Document:
    """Read a YAML mapping from `path`; `form` says in errors what the file must be.

    Raises RecipeError when the file cannot be read or is not a YAML mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe at {path}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from None
    return parse_text(text, path, form)


def parse_text(text: str, path: Path, form: str = _FORM) -> Document:
    """As `parse`, for a text that stands at `path` or will. Raises RecipeError if it is not a YAML mapping."""
    try:
        node, value = compose(text)
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {_reason(error)}.{_wide_colon(text)}") from None
    except RecursionError:
        raise RecipeError(f"{path}: not valid YAML: nested too deeply.") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {form}, found {_described(value)}." + _wide_colon(text))
    document = Document(path, value)
    _note_lines(node, (), document, set())
    return document


def _wide_colon(text: str) -> str:
    """A hint at the first key that is followed by the full-width colon of a Chinese input method, or ""."""
    if (match := _WIDE_KEY.search(text)) is None:
        return ""
    line = text.count("\n", 0, match.end()) + 1
    return f" Line {line} has a full-width colon. " + _PLAIN_COLON


# PyYAML's constructors raise KeyError and AttributeError for some values with explicit tags.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError)


def _reason(error: BaseException) -> str:
    return getattr(error, "problem", None) or first_line(error)


def _note_lines(node: Any, key: Key, document: Document, seen: set[int]) -> None:
    """Note the line of every key, and the problems that YAML allows but a recipe does not."""
    if id(node) in seen:  # an alias, which may refer to a node that contains it
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for name, below in node.value:
            inner, line = (*key, str(name.value)), name.start_mark.line + 1
            if not name.tag.endswith((":str", ":merge")):
                document.problems.append((line, f"{document.path}:{line}: keys are text, found {name.value}."))
            if inner in document.lines:
                twice = f"{_dotted(inner)} is given twice (first on line {document.lines[inner]})"
                document.problems.append((line, f"{document.path}:{line}: {twice}."))
                continue
            document.lines[inner] = line
            _note_lines(below, inner, document, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, below in enumerate(node.value):
            document.lines[(*key, index)] = below.start_mark.line + 1
            _note_lines(below, (*key, index), document, seen)


def parse_value(text: str, context: str) -> Any:
    """The value of an override, read as YAML. Raises RecipeError, which names the override `context`."""
    if not is_utf8(text):
        raise RecipeError(
            f"{context!r}: the name is not UTF-8, and a recipe cannot hold it. Rename the file or folder first."
        )
    try:
        return load(text, _Loader)[1]
    except (*_YAML_ERRORS, RecursionError) as error:
        reason = f"the value is not valid YAML: {_reason(error)}"
        raise RecipeError(f"{context!r}: {reason}. Put text in quotes.") from None


def explain(
    error: pydantic.ValidationError, document: Document, schema: type[pydantic.BaseModel], *, depth: int = 0
) -> list[Problem]:
    """One sentence for each key with a problem: file and line, key, what was expected and what was got.

    Of more than 100 problems, the first are told and the others counted: each looks for similar keys.
    In a file that maps names to sections, `depth` is 1 and `schema` that of a section.
    """
    wrong, more = wrong_keys(error, document, schema, depth=depth)
    problems = [(line, f"{document.where(key)[1]}: {sentence}") for key, line, sentence in wrong]
    return problems + ([(sys.maxsize, f"… and {more} more problems.")] if more else [])


def wrong_keys(
    error: pydantic.ValidationError, document: Document, schema: type[pydantic.BaseModel], *, depth: int = 0
) -> tuple[list[tuple[Key, int, str]], int]:
    """Each key with a problem, its line and a sentence, and how many more there are. See `explain`."""
    by_key: dict[Key, list[Any]] = {}
    for problem in error.errors():
        if problem["type"] != "invalid_key":  # `parse` has reported it
            key = _written_key(problem["loc"], document.value, absent=problem["type"] == "missing")
            by_key.setdefault(key, []).append(problem)
    # When a value may have one of two types, pydantic reports a problem for each. The one with the longer key says
    # more, so problems with keys above it are left out.
    parents = {key[:size] for key in by_key for size in range(len(key))}
    placed = sorted((*document.where(key), number, key) for number, key in enumerate(by_key) if key not in parents)
    wrong = [(key, line, _sentence(by_key[key], key, schema, depth)) for line, _, _, key in placed[:_TOLD]]
    return wrong, max(len(placed) - _TOLD, 0)


def _written_key(location: tuple[str | int, ...], value: Any, *, absent: bool) -> Key:
    """The part of pydantic's location that the user wrote, or with `absent` should have written at its end.

    Pydantic adds the names of union members.
    """
    key: list[str | int] = []
    for index, part in enumerate(location):
        last = index == len(location) - 1
        inside = isinstance(value, list | tuple) if isinstance(part, int) else isinstance(value, dict)
        if not inside:
            continue
        if isinstance(part, str) and part not in value and not (last and absent):
            continue
        key.append(part)
        try:
            value = value[part]
        except (KeyError, IndexError):
            value = None
    return tuple(key)


_TOLD = 100  # problems
_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number that is not so large",
    "finite_number": "a finite number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_sub_type": "text",
    "string_unicode": "text",
    "list_type": "a list",
    "mapping_type": "a mapping",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "string_too_short": "text that is not empty",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
}


def _sentence(problems: list[Any], key: Key, schema: type[pydantic.BaseModel], depth: int) -> str:
    """What is wrong with a key. Several problems mean that one of several types was expected."""
    kinds = {problem["type"] for problem in problems}
    if "extra_forbidden" in kinds:
        return _unknown(key, schema, depth)
    if "missing" in kinds:
        return f"{_dotted(key)} is missing."
    expected = _alternatives(list(dict.fromkeys(map(_expected, problems))))
    got = problems[0]["input"]
    sentence = f"{_dotted(key)} must be {expected}, found {_described(got)}."
    hinted = "model_type" in kinds and isinstance(got, str) and _WIDE_KEY.match(got)
    return f"{sentence} {_PLAIN_COLON}" if hinted else sentence


def _alternatives(expected: list[str]) -> str:
    """One of several descriptions, in words that have a Chinese wording; a bare `text` may be a format's name."""
    if len(expected) == 1:
        return expected[0]
    expected = ["some text" if words == "text" else words for words in expected]
    if len(expected) == 3:
        return f"either {expected[0]}; or {expected[1]}; or {expected[2]}"
    return f"either {expected[0]} or {_alternatives(expected[1:])}"


def _expected(problem: Any) -> str:
    """What pydantic expected, in words that have a Chinese wording, too."""
    limits = {name: _plain(value) for name, value in problem.get("ctx", {}).items()}
    match problem["type"]:
        case "value_error":
            return str(problem["msg"]).removeprefix("Value error, ")
        case "greater_than":
            return f"greater than {limits['gt']}"
        case "greater_than_equal":
            return f"greater than or equal to {limits['ge']}"
        case "less_than":
            return f"less than {limits['lt']}"
        case "less_than_equal":
            return f"less than or equal to {limits['le']}"
        case "literal_error":
            names = limits["expected"].replace(" or ", ", ")
            return f"one of {names}" if ", " in names else str(names)
        case kind:
            return _EXPECTED.get(kind, "a valid value")


def _plain(value: Any) -> Any:
    """A number without a fraction of zero."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def other_name(name: str, stage: str = "sft") -> str | None:
    """What a setting of another program is called here, in a sentence; None for a name that none has.

    `stage` is the section (sft or dpo) to name for a setting that both have.
    """
    entry = other_names().get(name.lstrip("-").replace("-", "_").lower())
    return None if entry is None else entry.told(stage)[0]


def _unknown(key: Key, schema: type[pydantic.BaseModel], depth: int) -> str:
    """The sentence about an unknown key.

    It names the key that other programs call so, else the most similar key of its section or of the whole recipe.
    """
    if _WIDE_COLON in str(key[-1]):
        return f"{_dotted(key)} is not a key. {_PLAIN_COLON}"
    if (here_named := other_name(str(key[-1]), "dpo" if "dpo" in key else "sft")) is not None:
        return f"{_dotted(key)} is not a key. {here_named}"
    keys = dict(_keys(schema))
    section = _dotted(tuple(k for k in key[depth:-1] if isinstance(k, str)))
    here = [k for k, parent in keys.items() if parent == section]
    last = str(key[-1])
    near = difflib.get_close_matches(last, [k.rsplit(".", 1)[-1] for k in here], n=1, cutoff=0.6)
    if near:
        return f"{_dotted(key)} is not a key; did you mean {'.'.join(filter(None, [section, near[0]]))}?"
    elsewhere = [k for k in keys if k.rsplit(".", 1)[-1] == last]
    if not elsewhere:
        names = {k.rsplit(".", 1)[-1]: k for k in keys}
        elsewhere = [names[n] for n in difflib.get_close_matches(last, list(names), n=1, cutoff=0.75)]
    if elsewhere:
        return f"{_dotted(key)} is not a key; did you mean {elsewhere[0]}?"
    listed = ", ".join(k.rsplit(".", 1)[-1] for k in here) or "none"
    return f"{_dotted(key)} is not a key; {section or 'a recipe'} has: {listed}."


def _keys(schema: type[pydantic.BaseModel], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, dotted section) of every key of a schema. Keys in lists have no index."""
    keys: list[tuple[str, str]] = []
    for name, info in schema.model_fields.items():
        name = info.alias or name
        dotted = f"{prefix}.{name}" if prefix else name
        keys.append((dotted, prefix))
        for inner in _models(info.annotation):
            keys.extend(_keys(inner, dotted))
    return keys


def _models(annotation: Any) -> list[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _dotted(key: Key) -> str:
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if part.isprintable() and len(part) <= 80 else repr(part[:80])
            text += f".{name}" if text else name
    return text


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
