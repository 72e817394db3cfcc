"""Every text for people is a code, worded once in each language, and every code in the program is one of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from sentences import WARNINGS, example, fields

import mlx_zh
from mlx_zh import errors
from mlx_zh.corpus import choosing, rendered, row_keys, shards
from mlx_zh.language.catalogue import FILES, Wording, catalogue, read

PACKAGE = Path(mlx_zh.__file__).parent
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.mark.parametrize(("code", "wording"), catalogue().items())
def test_both_wordings_are_there_and_use_the_same_fields(code: str, wording: Wording) -> None:
    assert all(side and side == side.strip() for side in wording)
    assert fields(wording.en) == fields(wording.zh)
    assert not CHINESE.search(wording.en)


@pytest.mark.parametrize("code", WARNINGS)
def test_every_warning_is_worded_in_chinese_and_says_all_its_values(code: str) -> None:
    notice = example(code)
    chinese = notice.text("zh")
    for name, form in fields(catalogue()[code].zh).items():
        shown = format(0.25, form) if form else f"<{name}>"
        assert shown in chinese and shown in notice
    words = re.sub(r"\{.*?\}", "", catalogue()[code].zh).strip()
    assert CHINESE.search(words) or not words, "a wording of values alone has no words to translate"


def test_no_code_is_there_twice() -> None:
    codes = []
    for name in FILES:
        tree = yaml.compose((PACKAGE / "language" / f"{name}.yaml").read_text(encoding="utf-8"))
        codes += [key.value for key, _ in tree.value]
        assert all([side.value for side, _ in wording.value] == ["en", "zh"] for _, wording in tree.value)
    assert len(codes) == len(set(codes)) == len(catalogue())


# The program


def used() -> Iterator[tuple[str, str, set[str] | None]]:
    """(place, code, the values it is given) of every `Notice(...)` and `say(...)`; None where those are computed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        # The studio's pages say texts, see tests/studio/test_studio_texts.py; one that imports `say` says codes too.
        texts = "studio" in path.parts and not re.search(r"^from .* import .*\bsay\b", text, re.MULTILINE)
        names_of_calls = ("Notice",) if texts else ("Notice", "say")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names_of_calls:
                names = [keyword.arg for keyword in node.keywords]
                given = None if None in names else {name for name in names if name}
                for code in codes_of(node.args[0]) if node.args else ():
                    yield f"{path.name}:{node.lineno}", code, given


def codes_of(argument: ast.expr) -> list[str]:
    """The codes that an argument may be; of one that is only begun by a constant, all that begin so."""
    if isinstance(argument, ast.Constant):
        return [argument.value]
    if isinstance(argument, ast.IfExp):
        return codes_of(argument.body) + codes_of(argument.orelse)
    if isinstance(argument, ast.JoinedStr) and isinstance(start := argument.values[0], ast.Constant):
        return [code for code in catalogue() if code.startswith(start.value)]
    return []


def test_every_code_in_the_program_is_known_and_gets_the_values_that_it_needs() -> None:
    for place, code, given in used():
        assert code in catalogue(), f"{place}: {code}"
        assert given is None or given == fields(catalogue()[code].en).keys(), f"{place}: {code}"


def test_every_code_in_the_templates_is_known() -> None:
    codes = [
        (path.name, code)
        for path in PACKAGE.rglob("*.html")
        for code in re.findall(r"""\bsay\(["']([^"']+)""", path.read_text(encoding="utf-8"))
    ]
    assert len(codes) > 5
    assert [(name, code) for name, code in codes if code not in catalogue()] == []


def test_every_warning_is_given_somewhere() -> None:
    assert set(WARNINGS) - {code for _, code, _ in used()} == set()


def test_every_reason_to_leave_out_a_row_has_its_chinese() -> None:
    reasons = {shards.CUT_SHORT, choosing.DUPLICATE, choosing.NEAR_DUPLICATE, choosing.IN_VALIDATION, choosing.EXAM}
    reasons |= {choosing.NOT_PICKED, rendered.OVERFLOW, rendered.FIRST_EXCHANGE_OVERFLOW, rendered.NO_REPLY}
    reasons |= {
        rendered.PROMPT_OVERFLOW,
        rendered.CHOSEN_OVERFLOW,
        rendered.REJECTED_OVERFLOW,
        rendered.ANSWER_OVERFLOW,
        errors.RefusedByTemplate.reason,
        errors.RefusedTools.reason,
        errors.RefusedReasoning.reason,
    }
    for path in (PACKAGE / "corpus").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "InvalidRow":
                reasons |= set(reason_of(node.args[0]))
    assert len(reasons) > 25
    for reason in reasons:
        assert read("report")[reason].en == reason and CHINESE.search(read("report")[reason].zh), reason


def reason_of(argument: ast.expr) -> list[str]:
    """The reasons that an argument of InvalidRow may be."""
    if isinstance(argument, ast.Constant):
        return [argument.value]
    text = ast.unparse(argument)
    known = {
        "REFUSED[key]": row_keys.REFUSED.values(),
        "REFUSED_IN_ROW[key]": row_keys.REFUSED_IN_ROW.values(),
        "REFUSED_IN_MESSAGE[key]": row_keys.REFUSED_IN_MESSAGE.values(),
        "UNREAD[key]": row_keys.UNREAD.values(),
        "NOT_POSITIVE_REFUSED[key]": row_keys.NOT_POSITIVE_REFUSED.values(),
        "FALSE_REFUSED[key]": list(row_keys.FALSE_REFUSED.values()),
        "reason": ["empty reply", "empty user message"],
        "f'does not end with {last}'": ["does not end with assistant", "does not end with user"],
    }
    return known[text]
