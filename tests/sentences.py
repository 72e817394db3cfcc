"""What the tests of sentences for people share: the fields of a wording, and values to fill it with."""

from __future__ import annotations

import json
import string
from pathlib import Path

from mlx_zh.language.catalogue import Wording, catalogue, read
from mlx_zh.language.notice import Notice, notice_of

WARNINGS = sorted(read("warnings"))


def fields(text: str) -> dict[str, str]:
    """The named fields of a format string, each with its format."""
    return {name: form or "" for _, name, form, _ in string.Formatter().parse(text) if name is not None}


def kept(path: Path) -> list[Notice | None]:
    """The notices of a `warnings.jsonl`; None for a line without a code."""
    return [notice_of(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def example(code: str) -> Notice:
    """The notice of a code with values that its formats take."""
    wording: Wording = catalogue()[code]
    return Notice(code, **{name: 0.25 if form else f"<{name}>" for name, form in fields(wording.en).items()})
