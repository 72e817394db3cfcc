"""The tests that the documents name exist."""

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
