"""Estimated lengths of the examples in local data files, without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    return encode(_SAMPLE) / _tokens(_SAMPLE)


# Everyday Chinese with some English and digits, as in questions and answers.
_SAMPLE = (
    "请问怎样才能养成早起的习惯？首先，每天晚上十一点以前睡觉，睡前半小时不要看手机。"
    "其次，把闹钟放在离床远一点的地方，这样必须起来才能关掉它。"
    "第三，给早晨安排一件喜欢的事，比如喝一杯咖啡、散步或者读几页书。坚持 21 天以后，身体会逐渐适应新的作息。"
    "Python is a popular programming language: it is easy to read, and many libraries exist for data analysis. "
    "今天天气晴朗，适合去公园走走。"
)


def _tokens(value: Any) -> float:
    """Estimated tokens of all text in a JSON value."""
    if isinstance(value, str):
        wide = sum(letter >= "⺀" for letter in value)
        return _WIDE * wide + _NARROW * (len(value) - wide)
    if isinstance(value, dict):
        return sum(map(_tokens, value.values()))
    return sum(map(_tokens, value)) if isinstance(value, list) else 0.0
