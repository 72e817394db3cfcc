"""A draft as the text of a recipe, each key with a comment that says what it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_zh.bridges.draft import TITLES, Draft
from mlx_zh.language.reader import say
from mlx_zh.recipe_text.values import inline

_COMMENT = 34  # column at which comments begin
_WIDTH = 96  # of a comment that stands on a line of its own
_ORDER = ("model", "lora", "data", "sft", "dpo", "memory", "checkpoint", "track", "seed")


def recipe_text(draft: Draft, name: str, target: Path) -> str:
    """The recipe as YAML. Keys stand in the order of the shipped recipes."""
    settings = draft.settings
    lines = [
        f"# {say('import-title', file=_clean(settings.path.name), program=TITLES[settings.program])}",
        f"#   mlx-zh plan {_clean(target.name)}",
        f"#   mlx-zh run {_clean(target.name)}",
        "",
        f"name: {inline(name)}",
    ]
    differing = [row for row in draft.rows if row.level == "differs"]
    if differing:
        lines += ["", f"# {say('import-differs-title')}"]
        lines += [f"# - {_clean(' → '.join(filter(None, (row.theirs, row.ours))))}{_after(row)}" for row in differing]
    for section in _ORDER:
        keys = {key: value for key, value in draft.values.items() if key.split(".")[0] == section}
        if keys:
            lines += ["", *_section(draft, section, keys)]
    return "\n".join(lines) + "\n"


def _after(row: Any) -> str:
    head = row.theirs or row.ours
    return f"{'：' if _is_chinese(row.note) and head else ': ' if head else ''}{_clean(row.note)}" if row.note else ""


def _is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def _section(draft: Draft, section: str, keys: dict[str, Any]) -> list[str]:
    if section in keys:
        return _line(f"{section}: {inline(keys[section])}", draft.comments.get(section, ""))
    lines = [f"{section}:"]
    done: set[str] = set()
    for key, value in keys.items():
        parts = key.split(".")
        if len(parts) == 2:
            lines += _value(2, parts[1], value, draft.comments.get(key, ""))
        elif parts[1] not in done:
            done.add(parts[1])
            lines.append(f"  {parts[1]}:")
            for below, inner in keys.items():
                inside = below.split(".")
                if len(inside) == 3 and inside[1] == parts[1]:
                    lines += _value(4, inside[2], inner, draft.comments.get(below, ""))
    return lines


def _value(indent: int, name: str, value: Any, comment: str) -> list[str]:
    """A key with its value: a list of sections line by line, a mapping of sections too, anything else on one line."""
    space = " " * indent
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return [*_line(f"{space}{name}:", comment), *[f"{space}  - {inline(part)}" for part in value]]
    if isinstance(value, dict) and value:
        parts = [f"{space}  {inline(key)}: {inline(below)}" for key, below in value.items()]
        return [*_line(f"{space}{name}:", comment), *parts]
    return _line(f"{space}{name}: {inline(value)}", comment)


def _line(text: str, comment: str) -> list[str]:
    comment = _clean(comment)
    if comment in ("", text.strip()):
        return [text]
    if len(text) < _COMMENT and len(comment) <= _WIDTH:
        return [f"{text:<{_COMMENT}}# {comment}"]
    indent = " " * (len(text) - len(text.lstrip()))
    return [f"{indent}# {comment}", text]


def _clean(text: str) -> str:
    """A text that can stand in a comment: on one line, and printable."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
