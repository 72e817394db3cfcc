"""C-Eval and CMMLU as data: where their files are, how many questions they have, and their subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

NAMES = ("ceval", "cmmlu")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a result table: the subjects of a category, those with a flag, or all."""

    name: str
    category: str | None = None
    flag: str | None = None

    def holds(self, entry: Entry) -> bool:
        """Whether a subject belongs to this row."""
        return self.category in (None, entry.category) and (self.flag is None or self.flag in entry.flags)


@dataclass(frozen=True, slots=True)
class Entry:
    """A subject's Chinese name, its category, and flags such as hard."""

    name: str
    category: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published benchmark."""

    key: str  # ceval or cmmlu
    title: str
    form: str  # whose prompts in protocols.yaml it is asked with
    hubs: Mapping[str, Mapping[str, str]]  # hub -> repository and archive
    splits: Mapping[str, int]  # split -> number of its questions
    default_split: str
    rows: tuple[Row, ...]  # of its result table
    subjects: Mapping[str, Entry]


@cache
def benchmark(key: str) -> Benchmark:
    """C-Eval (`ceval`) or CMMLU (`cmmlu`)."""
    data: dict[str, Any] = yaml.safe_load(files(__package__).joinpath(f"{key}.yaml").read_text(encoding="utf-8"))
    rows = tuple(Row(**row) for row in data.pop("rows"))
    subjects = {name: entry(**fields) for name, fields in data.pop("subjects").items()}
    return Benchmark(key=key, rows=rows, subjects=subjects, **data)


def entry(name: str, category: str | None = None, flags: Sequence[str] = ()) -> Entry:
    """An `Entry` from plain values."""
    return Entry(name, category, tuple(flags))
