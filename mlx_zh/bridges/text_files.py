"""Files of other programs as text: whatever a Windows editor or an old shell has left, but nothing huge."""

from __future__ import annotations

import codecs
from pathlib import Path

from mlx_zh.errors import RecipeError
from mlx_zh.language.reader import say

_LARGEST = 1_000_000  # bytes


def read_text(path: Path) -> str:
    """The text of a file: UTF-8, UTF-16 with a mark, or Chinese GB18030. Raises RecipeError."""
    try:
        if not path.is_file():
            raise RecipeError(say("import-no-file" if not path.exists() else "import-no-text", file=path))
        if path.stat().st_size > _LARGEST:
            raise RecipeError(say("import-large", file=path, size=path.stat().st_size / 1e6))
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(say("import-unreadable", file=path, reason=error.strerror)) from None
    except ValueError:
        raise RecipeError(say("import-no-file", file=path)) from None
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encodings = ("utf-16",) if data.startswith(marks) else ("utf-8-sig", "gb18030")
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text.replace("\r\n", "\n").replace("\r", "\n")
    raise RecipeError(say("import-no-text", file=path))
