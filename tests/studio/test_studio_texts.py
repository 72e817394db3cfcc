"""Every text of the studio's pages has a Chinese wording with the same fields, and no wording is left over."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

import mlx_zh.studio
from mlx_zh.language.catalogue import Language
from mlx_zh.studio.texts import chinese, said

LANGUAGES: tuple[Language, ...] = ("en", "zh")
PACKAGE = Path(mlx_zh.studio.__file__).parent


def texts() -> Iterator[tuple[str, str]]:
    """Each text that a page says or marks to be said, with its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        codes = any(
            isinstance(node, ast.ImportFrom) and "say" in {a.name for a in node.names} for node in ast.walk(tree)
        )
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and _says(node.func, codes):
                for text in _choices(node.args[0]):
                    yield text, f"{path.relative_to(PACKAGE)}:{node.lineno}"


def _says(function: ast.expr, codes: bool) -> bool:
    """Whether a call says a text. Where `say` was imported, `codes`, a bare one takes a code of the catalogue."""
    if codes and isinstance(function, ast.Name) and function.id == "say":
        return False
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    of_console = getattr(getattr(function, "value", None), "id", "") == "console"
    return name in ("say", "said", "worded") and not of_console


def _choices(argument: ast.expr) -> Iterator[str]:
    """The texts that an argument may be: itself, or the two of `a if … else b`."""
    if isinstance(argument, ast.IfExp):
        yield from _choices(argument.body)
        yield from _choices(argument.orelse)
    elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        yield argument.value
    assert not isinstance(argument, ast.JoinedStr), f"line {argument.lineno}: fields are named, not filled in"


def test_every_text_of_a_page_has_a_chinese_wording() -> None:
    missing = {text: place for text, place in texts() if text not in chinese()}
    assert not missing, "add these to language/studio.yaml"


def test_no_wording_is_left_over() -> None:
    said_somewhere = {text for text, _ in texts()}
    assert not [text for text in chinese() if text not in said_somewhere]


def test_both_languages_have_the_same_fields() -> None:
    def fields(text: str) -> set[str]:
        return {name for _, name, _, _ in Formatter().parse(text) if name}

    assert not [english for english, wording in chinese().items() if fields(english) != fields(wording)]
    assert not [wording for wording in chinese().values() if not wording or wording != wording.strip()]


def test_a_text_is_said_in_the_language_of_the_page() -> None:
    assert said("Compare {count}", "en", count=3) == "Compare 3"
    assert said("Compare {count}", "zh", count=3) == "对比 3 个"
    assert said("a text without a wording", "zh") == "a text without a wording"


@pytest.mark.parametrize("text", sorted({text for text, _ in texts()}))
def test_a_field_may_have_any_name(text: str) -> None:
    fields = {name for _, name, _, _ in Formatter().parse(text) if name and name.isidentifier()}
    for language in LANGUAGES:
        wording = said(text, language, **dict.fromkeys(fields, 77))
        assert wording.count("77") >= len(fields)


def test_fields_may_be_named_as_the_parameters_are() -> None:
    filled = said("Line {line}: {text}", "zh", line=3, text="少了一个冒号")
    assert filled == "第 3 行：少了一个冒号"
    assert said("{language} {text}", "en", language="a", text="b") == "a b"
