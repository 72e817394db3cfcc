"""Reading JSON that others wrote: a text that cannot be read is a ValueError, however deep or long it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEEPEST = 200  # levels; what walks through the values calls itself once a level
_LONGEST = 308  # digits of a whole number; the largest float has 309


class NestedTooDeeply(ValueError):
    """A text with more levels than `DEEPEST`."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for any text that is not JSON, or is nested too deeply."""
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise NestedTooDeeply("nested too deeply") from None
    openings = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, openings)) > DEEPEST and _is_deep(value):  # type: ignore[arg-type]
        raise NestedTooDeeply(f"nested more than {DEEPEST} levels deep")
    return value


def _integer(digits: str) -> int:
    """Raises ValueError for a number that a float cannot hold, because what reads numbers computes with floats."""
    if len(digits) > _LONGEST:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def load_json(path: Path) -> Any:
    """The value in a JSON file. Raises ValueError as `parse_json` does, and OSError if the file cannot be read."""
    return parse_json(path.read_text(encoding="utf-8"))


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file, or it cannot be read, or holds another value.

    A named pipe counts as no file, because it can block its reader.
    """
    try:
        value = load_json(path) if path.is_file() else None
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
