"""Estimated lengths of the examples in local data files, without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mlx_zh.corpus import preferences
from mlx_zh.corpus.formats import FORMATS
from mlx_zh.corpus.reader import InvalidRow
from mlx_zh.corpus.rows import open_rows
from mlx_zh.errors import MlxZhError
from mlx_zh.system.json_text import parse_json

_SAMPLED_ROWS = 500  # of each file
_TEMPLATE_TOKENS = 24.0  # of a chat template's headers, per row
_WIDE, _NARROW = 0.75, 0.27  # tokens per Chinese character, and per character of other scripts


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Number of rows, number of sampled rows, and the estimated mean length of the samples in tokens."""

    rows: int
    sampled: int
    tokens: float
    raw: bool = False  # whether the rows are raw text, so that a long one becomes several examples
    pairs: bool = False  # whether the rows are preference pairs


def estimate_row_lengths(path: Path, columns: Collection[str] = (), sheet: str | None = None) -> RowLengths | None:
    """Count the rows of a data file, and estimate their length from the first ones.

    `columns` are those of the file that are used; without them, all are. None for a file that cannot be read, and for
    one without rows.
    """
    rows = sampled = 0
    raw = pairs = False
    tokens = 0.0
    try:
        for row in _json_lines(path) if path.suffix.lower() == ".jsonl" else _rows(path, sheet):
            rows += 1
            if sampled < _SAMPLED_ROWS:
                used = parse_json(row) if isinstance(row, str) else row
                raw, pairs = raw or _is_raw(used), pairs or _is_pair(used)
                if columns and isinstance(used, dict):
                    used = [used.get(column) for column in columns]
                tokens += _TEMPLATE_TOKENS + _tokens(used)
                sampled += 1
    except (MlxZhError, OSError, ValueError):
        return None
    return RowLengths(rows, sampled, tokens / sampled, raw, pairs) if sampled else None


def _json_lines(path: Path) -> Iterator[str]:
    """The lines as text: to parse all of a large file would take minutes."""
    with path.open(encoding="utf-8-sig") as file:
        yield from (line for line in file if line.strip())


def _rows(path: Path, sheet: str | None) -> Iterator[Any]:
    return (row for _, row in open_rows(path, sheet=sheet) if not isinstance(row, InvalidRow))


def _is_raw(row: Any) -> bool:
    """Whether the reader would take a row for raw text."""
    return isinstance(row, dict) and next((n for n, form in FORMATS.items() if form.fits(row)), None) == "text"


def _is_pair(row: Any) -> bool:
    return isinstance(row, dict) and any(form.fits(row) for form in preferences.FORMATS.values())


def density(encode: Callable[[str], int]) -> float:
    """How many tokens a tokenizer makes of a mostly Chinese text where one is estimated; `encode` counts them."""
    return encode(_sample()) / _tokens(_sample())


def tokens_a_character(encode: Callable[[str], int]) -> float:
    """How many tokens a tokenizer makes of a Chinese character; `encode` counts them."""
    chinese = "".join(letter for letter in _sample() if "\u4e00" <= letter <= "\u9fff")
    return encode(chinese) / len(chinese)


@cache
def _sample() -> str:
    """Everyday Chinese with some English and digits, as in questions and answers."""
    text = files(__package__).joinpath("sample_text.yaml").read_text(encoding="utf-8")
    return "".join(yaml.safe_load(text))


def _tokens(value: Any) -> float:
    """Estimated tokens of all text in a JSON value."""
    if isinstance(value, str):
        wide = sum(letter >= "⺀" for letter in value)
        return _WIDE * wide + _NARROW * (len(value) - wide)
    if isinstance(value, dict):
        return sum(map(_tokens, value.values()))
    return sum(map(_tokens, value)) if isinstance(value, list) else 0.0
