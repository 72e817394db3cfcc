"""Estimated lengths of the examples in local data files, without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

_SAMPLED_ROWS = 500  # of each file
_TEMPLATE_TOKENS = 24.0  # of a chat template's headers, per row
_WIDE, _NARROW = 0.75, 0.27  # tokens per Chinese character, and per character of other scripts


@dataclass(frozen=True, slots=True)
class RowLengths:
    """Number of rows, number of sampled rows, and the estimated mean length of the samples in tokens."""

    rows: int
    sampled: int
    tokens: float


def estimate_row_lengths(paths: Sequence[str]) -> RowLengths | None:
    """Estimate the length of the rows of JSON-lines files from the first rows of each.

    None when a file is missing, cannot be read or has another format, and when there are no rows.
    """
    rows = sampled = 0
    tokens = 0.0
    for path in map(Path, paths):
        if not path.is_file() or path.suffix.lower() not in (".jsonl", ".json"):
            return None
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(line for line in file if line.strip()):
                    rows += 1
                    if number < _SAMPLED_ROWS:
                        tokens += _TEMPLATE_TOKENS + _tokens(json.loads(line))
                        sampled += 1
        except (OSError, ValueError):
            return None
    return RowLengths(rows, sampled, tokens / sampled) if sampled else None


def density(encode: Callable[[str], int]) -> float:
    """How many tokens a tokenizer makes of a mostly Chinese text where one is estimated; `encode` counts them."""
    return encode(_sample()) / _tokens(_sample())


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
