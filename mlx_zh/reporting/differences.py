"""Where two texts differ, for a reader who sees them side by side."""

from __future__ import annotations

from difflib import SequenceMatcher

_SHORTEST = 2  # characters in a row that are the same; a single one between two others is chance


def marked(text: str, other: str) -> list[tuple[str, bool]]:
    """`text` in runs, each with whether `other` has it in the same order."""
    runs: list[tuple[str, bool]] = []
    at = 0
    for block in SequenceMatcher(None, text, other, autojunk=False).get_matching_blocks():
        inside = block.a > 0 and block.a + block.size < len(text)
        if inside and block.size < _SHORTEST:
            continue
        if block.a > at:
            runs.append((text[at : block.a], False))
        if block.size:
            runs.append((text[block.a : block.a + block.size], True))
        at = block.a + block.size
    return runs
