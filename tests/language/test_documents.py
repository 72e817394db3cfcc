"""The tests that the documents name exist, and Chinese pages use one word for a token."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
FUNCTION = re.compile(r"^def (test_\w+)", re.MULTILINE)


@pytest.mark.parametrize(
    "document", [ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_every_test_that_a_document_names_exists(document: Path):
    """Files are written with or without their folder, and a function alone is one of any file."""
    text = document.read_text(encoding="utf-8")
    files = {path.relative_to(TESTS).as_posix(): path for path in TESTS.rglob("*.py")}
    functions = {path: set(FUNCTION.findall(file.read_text(encoding="utf-8"))) for path, file in files.items()}
    for name, function in re.findall(r"\b((?:\w+/)*\w+\.py)::(test_\w+)", text):
        name = name.removeprefix("tests/")
        assert any(function in functions[path] for path in files if f"/{path}".endswith(f"/{name}")), (name, function)
    alone = {name for name in re.findall(r"`(test_\w+)`", text)}
    assert alone <= set().union(*functions.values())
    for name in re.findall(r"\b((?:\w+/)*test_\w+\.py)", text):
        assert any(f"/{path}".endswith("/" + name.removeprefix("tests/")) for path in files), name


# A Chinese letter or stop beside the English word, which stands alone: no name, no option of a command.
TOKEN = re.compile(r"[\u4e00-\u9fff，。] ?tokens?(?![\w-])|(?<![\w-])tokens? ?[\u4e00-\u9fff，。]")
CODE = re.compile(r"```.*?```|`[^`]*`|^    .*?$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page", [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.zh-CN.md"))], ids=lambda p: p.name
)
def test_chinese_pages_call_a_token_by_its_chinese_name(page: Path):
    assert TOKEN.findall(CODE.sub("", page.read_text(encoding="utf-8"))) == []


def test_chinese_wordings_call_a_token_by_its_chinese_name():
    files = sorted((ROOT / "mlx_zh").rglob("*.yaml"))
    assert [line for file in files for line in file.read_text("utf-8").splitlines() if TOKEN.search(line)] == []
