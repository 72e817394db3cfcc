"""The two benchmarks as data: where they lie, how many questions they have, and their subjects."""

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
        """Whether a subject counts in this row."""
        return self.category in (None, entry.category) and (self.flag is None or self.flag in entry.flags)


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of a subject: its Chinese name, its category, and flags such as hard."""

    name: str
    category: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published benchmark. `splits` counts its questions; `hubs` says where its archive lies."""

    key: str
    title: str
    form: str
    hubs: Mapping[str, Mapping[str, str]]
    splits: Mapping[str, int]
    default_split: str
    rows: tuple[Row, ...]
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
