"""What `mlx-zh compare` says on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from wcwidth import wcswidth

from mlx_zh.language.catalogue import Language
from mlx_zh.reporting.compare_view import Comparison, exam_lines
from mlx_zh.reporting.messages import say
from mlx_zh.system import console
from mlx_zh.system.escaping import one_line

_COLUMNS = 80  # where the output is no terminal
_VALUE = 28  # columns of a recipe's value at most
_KEYS = 12  # keys of the recipe that are shown
_INDENT = 2


def summary(comparison: Comparison, language: Language) -> list[str]:
    """Blocks of lines: the verdict, the main figures, what the recipes set differently, and the exams."""
    _, sentence = comparison.verdict
    unlike = [check for check in comparison.checks if check.decisive and check.same is not True]
    reasons = [
        say("compare-reason", what=check.what, meaning=check.meaning).in_language(language) for check in unlike
    ]
    blocks = [
        "\n".join(map(console.paragraph, [sentence.in_language(language), *reasons])),
        _table(_figures(comparison, language)),
        _differences(comparison, language),
        "\n".join(console.paragraph(line.in_language(language)) for line in exam_lines(comparison)),
    ]
    return [block for block in blocks if block]


def _figures(comparison: Comparison, language: Language) -> list[list[str]]:
    """A column for each run: its state and its main figures."""
    runs = comparison.runs
    headlines = [{tile.name: tile for tile in comparison.headlines(number)} for number in range(len(runs))]
    rows = [["", *(run.label for run in runs)]]
    rows.append([say("compare-state").in_language(language), *(run.state.in_language(language) for run in runs)])
    for name in dict.fromkeys(name for known in headlines for name in known):
        tiles = [known.get(name) for known in headlines]
        rows.append([name.in_language(language), *(tile.value if tile else "–" for tile in tiles)])
    return rows


def _differences(comparison: Comparison, language: Language) -> str:
    if not comparison.differences:
        return console.paragraph(comparison.recipe_note.in_language(language))
    shown = comparison.differences[:_KEYS]
    rows = [[difference.key, *(_cut(value, _VALUE) for value in difference.values)] for difference in shown]
    more = len(comparison.differences) - len(shown)
    rest = [f"  {say('compare-more-keys', count=more).in_language(language)}"] if more else []
    return "\n".join(
        [
            f"  {say('compare-recipe').in_language(language)}",
            _table([["", *(run.label for run in comparison.runs)], *rows]),
            *rest,
        ]
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The rows as aligned columns; where they are wider than the terminal, a block for each column instead."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    limit = console.terminal_width() or _COLUMNS
    if _INDENT + sum(widths) + 2 * (len(widths) - 1) <= limit:
        return _aligned(rows, widths)
    blocks = []
    for column in range(1, len(rows[0])):
        pairs = [[row[0], row[column]] for row in rows[1:]]
        blocks.append(f"  {rows[0][column]}\n{_aligned(pairs, [widths[0], 0], indent=4)}")
    return "\n".join(blocks)


def _aligned(rows: Sequence[Sequence[str]], widths: Sequence[int], indent: int = _INDENT) -> str:
    lines = ("  ".join(console.padded(cell, w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(" " * indent + line.rstrip() for line in lines)


def _cut(text: str, columns: int) -> str:
    """The text, cut to so many terminal columns."""
    kept, width = "", 0
    for character in text:
        width += _width(character)
        if width > columns - 1:
            return f"{kept}…"
        kept += character
    return kept


def _width(text: str) -> int:
    return max(wcswidth(text), 0)
